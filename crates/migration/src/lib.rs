//! Reads from the files of a migration what it takes away from a database that code of before may need: SQL, and the
//! operations of Alembic, Django and Rails.
//!
//! Guarantees: comments, strings and quoted names are never taken for statements; what takes a table, a column, a row or the
//! meaning of one away is found, also inside `DO` blocks and in SQL that a program executes; SQL that is put together at run
//! time cannot be read and is reported as such. What only adds is never reported.
//!
//! Not in here: which files there are, and what the database is like. An `UPDATE` is not reported, because it is how new columns
//! are filled, and nor is code that Django's `RunPython` or a Rails migration runs.

mod code;
mod python;
mod ruby;
mod sql;
#[cfg(test)]
mod tests;
mod tool;

use std::collections::BTreeMap;

pub use tool::files_of;

/// Most characters that are kept of a statement.
pub const STATEMENT_CHARACTERS_MAX: usize = 200;

/// What takes something away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The line on which it begins, from 1.
    pub line: usize,
    /// The statement, in one line, shortened to [`STATEMENT_CHARACTERS_MAX`].
    pub statement: String,
    /// What it takes away.
    pub what: String,
}

/// What a file of a migration takes away. What kind of file it is, its name says: `.py`, `.rb`, and SQL for all others.
#[must_use]
pub fn findings(path: &str, text: &str) -> Vec<Finding> {
    let mut found = match path.rsplit_once('.') {
        Some((_, "py")) => python::findings(text),
        Some((_, "rb")) => ruby::findings(text),
        _ => sql::findings(text),
    };
    found.sort_by_key(|finding| finding.line);
    found
}

/// What a file takes away that it did not before: a file of offline SQL grows with every release, and what was in it has run.
#[must_use]
pub fn new_findings(path: &str, before: &str, now: &str) -> Vec<Finding> {
    let mut known: BTreeMap<String, usize> = BTreeMap::new();
    for finding in findings(path, before) {
        *known.entry(finding.statement).or_default() += 1;
    }
    let is_new = |finding: &Finding| match known.get_mut(&finding.statement) {
        Some(count) if *count > 0 => {
            *count -= 1;
            false
        }
        _ => true,
    };
    let mut found = findings(path, now);
    let mut is_new = is_new;
    found.retain(|finding| is_new(finding));
    found
}

/// Text in one line, shortened.
fn one_line(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(STATEMENT_CHARACTERS_MAX) {
        None => line,
        Some((end, _)) => format!("{}…", &line[..end]),
    }
}
