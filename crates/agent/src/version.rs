//! Version requirements of runtimes: `>=3.11`, `>=2.7.10, <3`.

use std::cmp::Ordering;

/// Whether a version meets a requirement; an error when the requirement cannot be read.
pub(crate) fn meets(version: &[u64], requirement: &str) -> Result<bool, String> {
    for part in requirement.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let operators = [">=", "<=", "==", "!=", ">", "<", "="];
        let operator = operators.into_iter().find(|operator| part.starts_with(operator)).unwrap_or("=");
        let text = part.strip_prefix(operator).unwrap_or(part).trim();
        let wanted =
            parse(text).ok_or_else(|| format!("`{part}` is not a version requirement such as >=3.11"))?;
        let ordering = compare(version, &wanted);
        let met = match operator {
            ">=" => ordering != Ordering::Less,
            "<=" => ordering != Ordering::Greater,
            ">" => ordering == Ordering::Greater,
            "<" => ordering == Ordering::Less,
            "!=" => compare(&version[..version.len().min(wanted.len())], &wanted) != Ordering::Equal,
            // `=3.11` means any 3.11.
            _ => compare(&version[..version.len().min(wanted.len())], &wanted) == Ordering::Equal,
        };
        if !met {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The first version number in what a program prints about itself: at least two numbers with dots between.
pub(crate) fn find(printed: &str) -> Option<Vec<u64>> {
    printed.split(|c: char| c.is_whitespace() || "(),\"'".contains(c)).find_map(|word| {
        let digits = word.trim_start_matches(|c: char| !c.is_ascii_digit());
        let end = digits.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(digits.len());
        let version = parse(digits[..end].trim_end_matches('.'))?;
        (version.len() > 1).then_some(version)
    })
}

/// A version as text.
pub(crate) fn shown(version: &[u64]) -> String {
    version.iter().map(u64::to_string).collect::<Vec<_>>().join(".")
}

fn parse(text: &str) -> Option<Vec<u64>> {
    text.split('.').map(|number| number.parse().ok()).collect()
}

/// Missing numbers count as nought: 3.11 is 3.11.0.
fn compare(one: &[u64], other: &[u64]) -> Ordering {
    let length = one.len().max(other.len());
    let at = |version: &[u64], index: usize| version.get(index).copied().unwrap_or(0);
    (0..length)
        .map(|index| at(one, index).cmp(&at(other, index)))
        .find(|ordering| ordering.is_ne())
        .unwrap_or(Ordering::Equal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requirements_are_compared_by_number() {
        for (version, requirement, met) in [
            ("3.11.2", ">=3.11", true),
            ("3.9.2", ">=3.11", false),
            ("2.7.6", ">=2.7.10", false),
            ("2.7.10", ">=2.7.10, <3", true),
            ("3.0", "<3", false),
            ("3.11.2", "=3.11", true),
            ("3.11.2", "3.11", true),
            ("3.11.2", "==3.12", false),
            ("3.11", ">3.11.0", false),
            ("3.11.1", ">3.11", true),
            ("18.2", "<=18.2.0", true),
            ("1.2", "", true),
            ("3.11.2", "!=3.11", false),
            ("3.12.0", ">=3.9, !=3.11.1", true),
        ] {
            assert_eq!(meets(&parse(version).unwrap(), requirement), Ok(met), "{version} {requirement}");
        }
        for bad in [">=", "~3", ">=three", ">= 3.x"] {
            assert!(meets(&[3], bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn versions_are_found_in_what_programs_print() {
        for (printed, version) in [
            ("Python 3.11.2\n", Some("3.11.2")),
            ("v18.19.0\n", Some("18.19.0")),
            ("ruby 2.7.6p219 (2022-04-12 revision c9c2245c0a)", Some("2.7.6")),
            ("PHP 8.2.7 (cli) (built: Jun  9 2023)", Some("8.2.7")),
            ("openjdk version \"17.0.9\" 2023-10-17", Some("17.0.9")),
            ("go version go1.19.8 linux/amd64", Some("1.19.8")),
            ("no number", None),
            ("build 42", None),
        ] {
            assert_eq!(find(printed).map(|version| shown(&version)).as_deref(), version, "{printed}");
        }
    }
}
