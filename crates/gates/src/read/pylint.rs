//! pylint's own output: text, or `--output-format=json` or `json2`.

use std::collections::BTreeMap;

use greenlight_model::evidence::Fact;
use serde_json::Value;

use super::{ReadError, Report, check_count, check_name};

/// Reads a report. A finding is known by its file, symbol and message, not by its line.
///
/// # Errors
/// When it is something else: an empty text, say, which a pylint that did not start leaves too.
pub fn pylint(text: &str) -> Result<Report, ReadError> {
    let findings = match text.trim_start().chars().next() {
        Some('[' | '{') => of_json(text)?,
        _ => of_text(text)?,
    };
    let mut counted: BTreeMap<String, u32> = BTreeMap::new();
    for finding in findings {
        let count = counted.entry(finding).or_default();
        *count = count.saturating_add(1);
    }
    check_count(counted.len())?;
    Ok(Report { facts: vec![Fact::Lint { tool: check_name("pylint")?, findings: counted }], commit: None })
}

fn of_json(text: &str) -> Result<Vec<String>, ReadError> {
    let document: Value = serde_json::from_str(text)
        .map_err(|error| ReadError::new(format!("it is not whole JSON: {error}")))?;
    let list = document.as_array().or_else(|| document["messages"].as_array());
    let list = list.ok_or_else(|| ReadError::new("it is no report of pylint: it has no list of messages"))?;
    let finding = |entry: &Value| {
        let field = |name: &str| entry[name].as_str().map(str::to_owned);
        let fields = field("path").zip(field("symbol")).zip(field("message"));
        let ((path, symbol), message) =
            fields.ok_or_else(|| ReadError::new("a message has no path, symbol and message"))?;
        Ok(shown(&path, &symbol, &message))
    };
    list.iter().map(finding).collect()
}

fn of_text(text: &str) -> Result<Vec<String>, ReadError> {
    let findings: Vec<String> = text.lines().filter_map(of_line).collect();
    if findings.is_empty() && !text.contains("Your code has been rated at") {
        return Err(ReadError::new(
            "it is no report of pylint: it has neither a finding nor a rating; take its whole output, with the score",
        ));
    }
    Ok(findings)
}

/// `app.py:1:0: C0114: Missing module docstring (missing-module-docstring)`
fn of_line(line: &str) -> Option<String> {
    let (place, rest) = line.split_once(": ")?;
    let (code, rest) = rest.split_once(": ")?;
    let mut letters = code.chars();
    let is_code = letters.next().is_some_and(|c| "CRWEFI".contains(c))
        && code.len() == 5
        && letters.all(|c| c.is_ascii_digit());
    let (message, symbol) = rest.strip_suffix(')')?.rsplit_once(" (")?;
    let mut numbers = place.rsplitn(3, ':');
    let (column, row, path) = (numbers.next()?, numbers.next()?, numbers.next()?);
    let is_place = [column, row].iter().all(|number| number.parse::<u32>().is_ok());
    (is_code && is_place).then(|| shown(path, symbol, message))
}

fn shown(path: &str, symbol: &str, message: &str) -> String {
    let message: Vec<&str> = message.split_whitespace().collect();
    format!("{path}: {symbol}: {}", message.join(" "))
}
