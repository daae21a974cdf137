//! Host ranges: `ol-web[3-4]`, `px[01-12]-ops`, `r[1-2]n[1,3,5-8]`.

use greenlight_model::id::HostName;

/// Most hosts that a range, and an environment, may name: more is a slip of the finger (`[1-99999999]`), and everything
/// above is measured up to this number.
pub const HOSTS_MAX: usize = 10_000;

/// Why a text is not a host or a range of hosts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct InvalidRange {
    /// What is wrong, in one line.
    pub message: String,
    /// What to write instead.
    pub help: String,
}

/// The hosts that a text names, in order: `px[08-10]` is `px08`, `px09`, `px10`.
///
/// Numbers are written with the digits of the lower bound, so leading zeros stay. Several brackets make all
/// combinations, and a bracket may hold a list (`[1,4-6]`).
///
/// # Errors
/// When a bracket is not closed or holds other than numbers, a range runs backwards, the result is not a host name, a
/// host comes out twice, or there are more than [`HOSTS_MAX`].
pub fn expand_range(text: &str) -> Result<Vec<HostName>, InvalidRange> {
    let invalid = |message: String, help: &str| InvalidRange { message, help: help.to_owned() };
    let mut names = vec![String::new()];
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('[') {
        let Some((inside, after)) = after.split_once(']') else {
            return Err(invalid(
                format!("`{text}` has a `[` without its `]`"),
                "a range is written `px[1-8]`",
            ));
        };
        let numbers = bracket(text, inside)?;
        if names.len().saturating_mul(numbers.len()) > HOSTS_MAX {
            return Err(too_many(text));
        }
        names = names
            .iter()
            .flat_map(|name| numbers.iter().map(move |number| format!("{name}{before}{number}")))
            .collect();
        rest = after;
    }
    if rest.contains(']') {
        return Err(invalid(format!("`{text}` has a `]` without its `[`"), "a range is written `px[1-8]`"));
    }
    let mut hosts = Vec::with_capacity(names.len());
    for name in names {
        let name = format!("{name}{rest}");
        hosts.push(name.parse::<HostName>().map_err(|error| {
            invalid(
                error.to_string(),
                "a host is named like `web1`, `web1.example.org` or, as a range, `web[1-4]`",
            )
        })?);
    }
    let mut seen = std::collections::BTreeSet::new();
    match hosts.iter().find(|host| !seen.insert(*host)) {
        Some(twice) => Err(invalid(format!("`{text}` names `{twice}` twice"), "let the ranges not overlap")),
        None => Ok(hosts),
    }
}

fn too_many(text: &str) -> InvalidRange {
    InvalidRange {
        message: format!("`{text}` names more than {HOSTS_MAX} hosts"),
        help: "is a digit too many in the range?".to_owned(),
    }
}

/// The numbers of one bracket, as text.
fn bracket(text: &str, inside: &str) -> Result<Vec<String>, InvalidRange> {
    let mut numbers = Vec::new();
    for part in inside.split(',') {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        let (Some(from), Some(to)) = (number(low), number(high)) else {
            return Err(InvalidRange {
                message: format!("`{text}`: `[{inside}]` is not a range of numbers"),
                help: "a range is written `[1-8]`, `[01-12]` or `[1,3,5-8]`".to_owned(),
            });
        };
        if from > to {
            return Err(InvalidRange {
                message: format!("`{text}`: the range `{part}` runs backwards"),
                help: format!("write `{high}-{low}`"),
            });
        }
        let is_padded = |digits: &str| digits.len() > 1 && digits.starts_with('0');
        if (is_padded(low) || is_padded(high)) && low.len() != high.len() {
            return Err(InvalidRange {
                message: format!("`{text}`: the ends of `{part}` have different numbers of digits"),
                help: "with leading zeros both ends need the same number of digits, as in `[01-12]`"
                    .to_owned(),
            });
        }
        if usize::try_from(to - from).map_or(true, |steps| steps >= HOSTS_MAX - numbers.len().min(HOSTS_MAX))
        {
            return Err(too_many(text));
        }
        let width = low.len();
        numbers.extend((from..=to).map(|number| format!("{number:0width$}")));
    }
    Ok(numbers)
}

fn number(digits: &str) -> Option<u64> {
    // `parse` alone would take a sign.
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &[&str]) {
        let hosts = expand_range(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(hosts.iter().map(HostName::as_str).collect::<Vec<_>>(), expected, "{text}");
    }

    #[test]
    fn ranges_expand_in_order_and_keep_their_zeros() {
        check("web", &["web"]);
        check("ol-web[3-4]", &["ol-web3", "ol-web4"]);
        check("px[08-10]-ops", &["px08-ops", "px09-ops", "px10-ops"]);
        check("px[8-10]", &["px8", "px9", "px10"]);
        check("px[1,4-5]", &["px1", "px4", "px5"]);
        check(
            "r[1-2]n[1-2].example.org",
            &["r1n1.example.org", "r1n2.example.org", "r2n1.example.org", "r2n2.example.org"],
        );
        assert_eq!(expand_range("px[1-10000]").unwrap().len(), HOSTS_MAX);
    }

    #[test]
    fn bad_ranges_say_why() {
        for (text, why) in [
            ("", "empty"),
            ("px[4-3]", "backwards"),
            ("px[a-b]", "not a range of numbers"),
            ("px[]", "not a range of numbers"),
            ("px[1-]", "not a range of numbers"),
            ("px[+1-2]", "not a range of numbers"),
            ("px[1-2", "without its `]`"),
            ("px1-2]", "without its `[`"),
            ("px[[1-2]]", "not a range of numbers"),
            ("px[01-3]", "digits"),
            ("px[1-03]", "digits"),
            ("px[1-10001]", "more than"),
            ("px[1-5000,5001-10001]", "more than"),
            ("px[1-1000][1-11]", "more than"),
            ("px[0-18446744073709551615]", "more than"),
            ("px[1-99999999999999999999]", "not a range of numbers"),
            ("px[1,1]", "twice"),
            ("p x[1-2]", "not allowed"),
            ("-px[1-2]", "begin"),
        ] {
            let error = expand_range(text).unwrap_err();
            assert!(error.message.contains(why), "{text}: {error}");
        }
    }
}
