//! Rails' migrations: operations by name. What stands in `def down` is the way back.

use crate::Finding;
use crate::code::{Piece, Placed, arguments, executed, finding, named};

pub(crate) fn findings(text: &str) -> Vec<Finding> {
    let pieces = pieces(text);
    let mut found = Vec::new();
    for (place, placed) in pieces.iter().enumerate() {
        let Piece::Name(name) = &placed.piece else { continue };
        let arguments = arguments(&pieces, place);
        let first = named(arguments);
        if first.is_empty() && name != "execute" {
            continue;
        }
        let at = |index: usize| first.get(index).copied().unwrap_or("?");
        let what = match name.as_str() {
            "drop_table" | "drop_join_table" => format!("takes away the table {}", at(0)),
            "remove_column" | "remove_columns" | "remove_reference" | "remove_belongs_to" => {
                format!("takes away the column {} of {}", at(1), at(0))
            }
            "remove_timestamps" => format!("takes away columns of {}", at(0)),
            // `t.remove :column` within `change_table`.
            "remove" if is_of_table(&pieces, place) => format!("takes away the column {}", at(0)),
            "rename_table" => format!("renames {}", at(0)),
            "rename_column" => format!("renames the column {} of {}", at(1), at(0)),
            "rename" if is_of_table(&pieces, place) => format!("renames the column {}", at(0)),
            "change_column" => format!("changes the type of the column {} of {}", at(1), at(0)),
            "change_column_null" if is_false(arguments) => {
                format!("lets the column {} of {} be empty no more", at(1), at(0))
            }
            "delete_all" | "destroy_all" => "deletes rows".to_owned(),
            "execute" => {
                found.extend(executed(text, placed.line, arguments));
                continue;
            }
            _ => continue,
        };
        found.push(finding(text, placed.line, what));
    }
    found
}

fn is_of_table(pieces: &[Placed], place: usize) -> bool {
    let before = place.checked_sub(2).and_then(|start| pieces.get(start..place));
    matches!(before, Some([Placed { piece: Piece::Name(_), .. }, Placed { piece: Piece::Sign('.'), .. }]))
}

fn is_false(arguments: &[Placed]) -> bool {
    arguments.iter().any(|placed| matches!(&placed.piece, Piece::Name(name) if name == "false"))
}

/// Names, symbols, strings and signs outside of comments and of `def down`, whose end stands as far in as it does.
fn pieces(text: &str) -> Vec<Placed> {
    let mut found = Vec::new();
    let mut way_back: Option<usize> = None;
    let mut heredoc: Option<(String, usize, Vec<&str>)> = None;
    for (number, source) in text.lines().enumerate() {
        let line = number + 1;
        if let Some((mark, begun, lines)) = &mut heredoc {
            if source.trim() != mark.as_str() {
                lines.push(source);
                continue;
            }
            if way_back.is_none() {
                // As if it stood where it is named.
                found.push(Placed { piece: Piece::Text(format!("\n{}", lines.join("\n"))), line: *begun });
            }
            heredoc = None;
            continue;
        }
        let indent = source.len() - source.trim_start().len();
        match way_back {
            None if source.trim_start().starts_with("def down") => way_back = Some(indent),
            Some(begun) if indent == begun && source.trim() == "end" => {
                way_back = None;
                continue;
            }
            _ => {}
        }
        let marked = line_pieces(source, line, way_back.is_none(), &mut found);
        heredoc = marked.map(|mark| (mark, line, Vec::new()));
    }
    found
}

/// The pieces of one line; the mark of a heredoc that begins on it.
fn line_pieces(source: &str, line: usize, is_kept: bool, found: &mut Vec<Placed>) -> Option<String> {
    let mut keep = |piece: Piece| {
        if is_kept {
            found.push(Placed { piece, line });
        }
    };
    let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == '?' || c == '!';
    let mut heredoc = None;
    let mut place = 0;
    while let Some(first) = source[place..].chars().next() {
        let rest = &source[place..];
        let after = &rest[first.len_utf8()..];
        place += match first {
            '#' => break,
            '"' | '\'' => {
                let end = closing(after, first);
                keep(Piece::Text(after[..end].to_owned()));
                (1 + end + 1).min(rest.len())
            }
            ':' if after.starts_with(|c: char| c.is_alphabetic() || c == '_') => {
                let length = after.find(|c| !is_part(c)).unwrap_or(after.len());
                keep(Piece::Text(after[..length].to_owned()));
                1 + length
            }
            '<' if rest.starts_with("<<~") || rest.starts_with("<<-") => {
                let mark: String =
                    rest[3..].trim_start_matches(['"', '\'']).chars().take_while(|c| is_part(*c)).collect();
                let length = 3 + mark.len();
                heredoc = Some(mark);
                length
            }
            _ if first.is_alphabetic() || first == '_' => {
                let length = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
                keep(Piece::Name(rest[..length].to_owned()));
                length
            }
            _ => {
                if !first.is_whitespace() {
                    keep(Piece::Sign(first));
                }
                first.len_utf8()
            }
        };
    }
    heredoc
}

fn closing(text: &str, quote: char) -> usize {
    let mut characters = text.char_indices();
    while let Some((place, character)) = characters.next() {
        if character == '\\' {
            characters.next();
        } else if character == quote {
            return place;
        }
    }
    text.len()
}
