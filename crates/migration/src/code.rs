//! What Python and Ruby have in common here: calls by name, with what stands between their brackets.

use crate::{Finding, one_line, sql};

/// A piece of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    /// A name, also one with dots in front of it: only its last part.
    Name(String),
    /// A string's content.
    Text(String),
    /// Any other character.
    Sign(char),
}

/// A piece and the line on which it begins.
#[derive(Debug, Clone)]
pub(crate) struct Placed {
    pub(crate) piece: Piece,
    pub(crate) line: usize,
}

/// What follows a name up to the end of its call: between brackets, or to the end of the line where it has none.
pub(crate) fn arguments(pieces: &[Placed], place: usize) -> &[Placed] {
    let rest = pieces.get(place + 1..).unwrap_or_default();
    if rest.first().is_some_and(|next| next.piece == Piece::Sign('(')) {
        let mut depth = 0_usize;
        let end = rest.iter().position(|next| {
            match next.piece {
                Piece::Sign('(' | '[' | '{') => depth += 1,
                Piece::Sign(')' | ']' | '}') => depth = depth.saturating_sub(1),
                _ => {}
            }
            depth == 0
        });
        return &rest[1..end.unwrap_or(rest.len())];
    }
    let line = pieces[place].line;
    let end = rest.iter().position(|next| next.line != line).unwrap_or(rest.len());
    &rest[..end]
}

/// The first strings or symbols of a call: the table and the column, mostly.
pub(crate) fn named(arguments: &[Placed]) -> Vec<&str> {
    arguments
        .iter()
        .filter_map(|placed| match &placed.piece {
            Piece::Text(text) => Some(text.as_str()),
            _ => None,
        })
        .take(3)
        .collect()
}

/// Whether a call is given this argument by name, as `name=` or `name:`.
pub(crate) fn has_argument(arguments: &[Placed], name: &str) -> bool {
    arguments.windows(2).any(|pair| {
        matches!(&pair[0].piece, Piece::Name(found) if found == name)
            && matches!(pair[1].piece, Piece::Sign('=' | ':'))
    })
}

/// A finding at a call.
pub(crate) fn finding(text: &str, line: usize, what: String) -> Finding {
    let source = text.lines().nth(line - 1).unwrap_or_default();
    Finding { line, statement: one_line(source), what }
}

/// What SQL takes away that a call executes. Where there is no string, it is put together at run time.
pub(crate) fn executed(text: &str, line: usize, arguments: &[Placed]) -> Vec<Finding> {
    let strings: Vec<&Placed> =
        arguments.iter().filter(|placed| matches!(placed.piece, Piece::Text(_))).collect();
    if strings.is_empty() && !arguments.is_empty() {
        return vec![finding(
            text,
            line,
            "runs SQL that is put together at run time, which cannot be read".to_owned(),
        )];
    }
    strings
        .iter()
        .flat_map(|placed| match &placed.piece {
            Piece::Text(sql) => sql::findings(sql)
                .into_iter()
                .map(|found| Finding { line: found.line + placed.line - 1, ..found })
                .collect(),
            _ => Vec::new(),
        })
        .collect()
}
