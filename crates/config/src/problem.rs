//! What is wrong with a fleet file: every problem once, with its place and what to do about it.

use std::ops::Range;

/// Something wrong with a fleet file, or doubtful in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Problem {
    /// The bytes of the text that it is about. Both ends are within the text and between characters.
    pub span: Range<usize>,
    /// What is wrong, in one line.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    /// The kind of problem, for programs: `unknown-key`, `wrong-type`, `port-used-twice` …
    pub code: &'static str,
}

/// Problems as they are found.
#[derive(Debug, Default)]
pub(crate) struct Problems {
    pub(crate) errors: Vec<Problem>,
    pub(crate) warnings: Vec<Problem>,
}

impl Problems {
    /// Notes an error: no fleet comes out of this text.
    pub(crate) fn error(
        &mut self,
        code: &'static str,
        span: &Range<usize>,
        message: impl Into<String>,
        help: impl Into<Option<String>>,
    ) {
        self.errors.push(Problem { span: span.clone(), message: message.into(), help: help.into(), code });
    }

    /// Notes something that is allowed and yet hardly meant.
    pub(crate) fn warning(
        &mut self,
        code: &'static str,
        span: &Range<usize>,
        message: impl Into<String>,
        help: impl Into<Option<String>>,
    ) {
        self.warnings.push(Problem { span: span.clone(), message: message.into(), help: help.into(), code });
    }

    /// The errors and the warnings, each in the order of the text and each once, with spans that `text` can be cut at.
    pub(crate) fn finish(self, text: &str) -> (Vec<Problem>, Vec<Problem>) {
        (in_order(self.errors, text), in_order(self.warnings, text))
    }
}

fn in_order(mut problems: Vec<Problem>, text: &str) -> Vec<Problem> {
    for problem in &mut problems {
        let start = boundary_at_or_before(text, problem.span.start);
        problem.span = start..boundary_at_or_before(text, problem.span.end).max(start);
    }
    problems.sort_by_key(|problem| (problem.span.start, problem.span.end));
    problems.dedup();
    problems
}

fn boundary_at_or_before(text: &str, offset: usize) -> usize {
    let mut offset = offset.min(text.len());
    while !text.is_char_boundary(offset) {
        offset -= 1;
    }
    offset
}

/// The line and column of a byte offset, both counted from 1; columns count characters. An offset beyond the text is its end.
#[must_use]
pub fn line_column(text: &str, offset: usize) -> (usize, usize) {
    let before = &text[..boundary_at_or_before(text, offset)];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// The candidate that was probably meant, when one is near enough.
pub(crate) fn nearest<'a>(text: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distance_max = (text.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(text, candidate), candidate))
        .filter(|(distance, _)| *distance <= distance_max)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// More names than this are not listed in one line.
const NAMES_LISTED_MAX: usize = 24;

/// "did you mean …?" when a candidate is near, else what there is to choose from.
pub(crate) fn suggest<'a>(
    text: &str,
    what: &str,
    candidates: impl IntoIterator<Item = &'a str, IntoIter: Clone>,
) -> Option<String> {
    let candidates = candidates.into_iter();
    if let Some(nearest) = nearest(text, candidates.clone()) {
        return Some(format!("did you mean `{nearest}`?"));
    }
    let count = candidates.clone().count();
    let mut listed: Vec<String> =
        candidates.take(NAMES_LISTED_MAX).map(|candidate| format!("`{candidate}`")).collect();
    if count > NAMES_LISTED_MAX {
        listed.push(format!("and {} more", count - NAMES_LISTED_MAX));
    }
    (count > 0).then(|| format!("{what}: {}", listed.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_become_lines_and_columns() {
        let text = "a = 1\n\u{e9}\u{e9} = 2\n";
        for (offset, expected) in
            [(0, (1, 1)), (4, (1, 5)), (6, (2, 1)), (8, (2, 2)), (7, (2, 1)), (999, (3, 1))]
        {
            assert_eq!(line_column(text, offset), expected, "{offset}");
        }
    }

    #[test]
    fn near_names_are_suggested_and_far_ones_listed() {
        assert_eq!(suggest("bild", "keys", ["build", "port"]).unwrap(), "did you mean `build`?");
        assert_eq!(suggest("xyz", "keys", ["build", "port"]).unwrap(), "keys: `build`, `port`");
        assert_eq!(suggest("xyz", "keys", []), None);
    }
}
