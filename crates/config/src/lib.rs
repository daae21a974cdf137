//! Reads greenlight.toml: text in, a fleet or all its errors at once out.
//!
//! [`parse`] goes in three steps over the text. The reader (`read`, `language`, `text`) turns the spanned TOML tree into
//! typed values and notes unknown keys, wrong types and values that mean nothing by themselves. `check` notes what does not fit
//! together: a host that no service has, a port used twice, a floor that could never hold. `build` makes the
//! [`Fleet`], with every default filled in.
//!
//! Guarantees: a text with an error never becomes a fleet; every error is reported, once, with its place; one mistake
//! does not cause a second report elsewhere. [`schema`] comes from the same declarations as the reader.
//! Not in here: any I/O. Whether files, branches and hosts exist is for those who touch them.

mod build;
mod check;
mod gates;
pub mod init;
mod problem;
mod range;
mod read;
mod requires;
// Its macro is for those below.
#[macro_use]
mod text;
mod canary;
mod language;

#[cfg(test)]
mod tests;

use greenlight_model::fleet::Fleet;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

pub use problem::{Problem, line_column};
pub use range::{HOSTS_MAX, InvalidRange, expand_range};

use crate::language::FleetFile;
use crate::problem::Problems;
use crate::read::{Example, Node, Read};

/// Longest text that is read: ten thousand hosts with settings of their own fit in it many times.
pub const TEXT_BYTES_MAX: usize = 8 << 20;

/// A fleet, and what is allowed in its text and yet hardly meant.
#[derive(Debug, Clone, PartialEq)]
pub struct Parsed {
    /// The fleet.
    pub fleet: Fleet,
    /// Warnings, in the order of the text.
    pub warnings: Vec<Problem>,
}

/// Reads a fleet file.
///
/// # Errors
/// All errors of the text, in its order, each once; never empty.
pub fn parse(text: &str) -> Result<Parsed, Vec<Problem>> {
    let mut problems = Problems::default();
    let fleet = read_fleet(text, &mut problems);
    let (errors, warnings) = problems.finish(text);
    match fleet {
        Some(fleet) if errors.is_empty() => Ok(Parsed { fleet, warnings }),
        _ => {
            assert!(!errors.is_empty(), "what keeps a fleet from being built has been noted");
            Err(errors)
        }
    }
}

/// The JSON Schema (draft 2020-12) of a fleet file, for editors: its keys, types and descriptions.
#[must_use]
pub fn schema() -> serde_json::Value {
    let mut schema = FleetFile::schema();
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema".into();
    schema["title"] = "greenlight.toml".into();
    schema
}

fn read_fleet(text: &str, problems: &mut Problems) -> Option<Fleet> {
    if text.len() > TEXT_BYTES_MAX {
        let message = format!("the file is longer than {} MiB", TEXT_BYTES_MAX >> 20);
        problems.error("too-long", &(0..0), message, "write hosts as ranges: `px[01-12]`".to_owned());
        return None;
    }
    let (table, syntax_errors) = DeTable::parse_recoverable(text);
    let mut is_readable = true;
    for error in &syntax_errors {
        is_readable &= note_syntax_error(text, error, problems);
    }
    if !is_readable {
        // What follows a broken line is guesswork: its errors would be about the guess.
        return None;
    }
    let table = Spanned::new(table.span(), DeValue::Table(table.into_inner()));
    let root = Node {
        name: "the fleet file",
        key: &(0..0),
        value: &table,
        example: Example { key: "", value: "" },
        is_entry: false,
    };
    let file = FleetFile::read(root, problems)?;
    check::check(&file, problems);
    if problems.errors.is_empty() { build::fleet(&file) } else { None }
}

/// Notes an error of TOML itself; says whether the rest of the text can still be read as it was meant.
fn note_syntax_error(text: &str, error: &toml::de::Error, problems: &mut Problems) -> bool {
    let span = error.span().unwrap_or(0..0);
    if error.message() == "duplicate key" {
        let key = text.get(span.clone()).unwrap_or_default();
        problems.error(
            "duplicate-key",
            &span,
            format!("`{key}` is stated twice"),
            "remove one of the two; a table is opened once".to_owned(),
        );
        return true;
    }
    // One broken line often upsets the parser several times over; the first report is the one to act on.
    if !problems.errors.iter().any(|problem| problem.code == "syntax") {
        let message = format!("this is not TOML: {}", error.message());
        problems.error(
            "syntax",
            &span,
            message,
            "strings stand in quotes; see toml.io for the rest".to_owned(),
        );
    }
    false
}
