//! Alembic's and Django's migrations: operations by name. What stands in `def downgrade` is the way back.

use crate::Finding;
use crate::code::{Piece, Placed, arguments, executed, finding, has_argument, named};

pub(crate) fn findings(text: &str) -> Vec<Finding> {
    let pieces = pieces(text);
    let mut found = Vec::new();
    for (place, placed) in pieces.iter().enumerate() {
        let Piece::Name(name) = &placed.piece else { continue };
        let is_call = pieces.get(place + 1).is_some_and(|next| next.piece == Piece::Sign('('));
        // A definition or an import of the same name is no operation.
        if !is_call {
            continue;
        }
        let arguments = arguments(&pieces, place);
        let first = named(arguments);
        let at = |index: usize| first.get(index).copied().unwrap_or("?");
        let what = match name.as_str() {
            "drop_table" => format!("takes away the table {}", at(0)),
            "drop_column" if first.len() > 1 => format!("takes away the column {} of {}", at(1), at(0)),
            "drop_column" => format!("takes away the column {}", at(0)),
            "rename_table" => format!("renames {}", at(0)),
            "alter_column" if has_argument(arguments, "new_column_name") => {
                format!("renames the column {}", first[..first.len().min(2)].join("."))
            }
            "alter_column" if has_argument(arguments, "type_") => {
                format!("changes the type of the column {}", first[..first.len().min(2)].join("."))
            }
            "alter_column" if is_made_mandatory(arguments) => {
                format!("lets the column {} be empty no more", first[..first.len().min(2)].join("."))
            }
            "DeleteModel" => format!("takes away the table of {}", at(0)),
            "RemoveField" => format!("takes away the column {} of {}", at(1), at(0)),
            "RenameModel" => format!("renames the table of {}", at(0)),
            "RenameField" => format!("renames the column {} of {}", at(1), at(0)),
            "AlterModelTable" => format!("renames the table of {}", at(0)),
            "execute" => {
                found.extend(executed(text, placed.line, arguments));
                continue;
            }
            // The second argument is the way back.
            "RunSQL" => {
                found.extend(executed(text, placed.line, first_argument(arguments)));
                continue;
            }
            _ => continue,
        };
        found.push(finding(text, placed.line, what));
    }
    found
}

fn is_made_mandatory(arguments: &[Placed]) -> bool {
    arguments.windows(3).any(|three| {
        matches!(&three[0].piece, Piece::Name(name) if name == "nullable")
            && three[1].piece == Piece::Sign('=')
            && matches!(&three[2].piece, Piece::Name(value) if value == "False")
    })
}

fn first_argument(arguments: &[Placed]) -> &[Placed] {
    let mut depth = 0_usize;
    let end = arguments.iter().position(|placed| {
        match placed.piece {
            Piece::Sign('(' | '[' | '{') => depth += 1,
            Piece::Sign(')' | ']' | '}') => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 0 && placed.piece == Piece::Sign(',')
    });
    &arguments[..end.unwrap_or(arguments.len())]
}

/// Names, strings and signs outside of comments and of `def downgrade`.
fn pieces(text: &str) -> Vec<Placed> {
    let mut found = Vec::new();
    let (mut place, mut line) = (0, 1);
    let mut is_way_back = false;
    let mut is_line_start = true;
    while let Some(first) = text[place..].chars().next() {
        let rest = &text[place..];
        let at_column_0 = is_line_start;
        is_line_start = false;
        let length = match first {
            '\n' => {
                is_line_start = true;
                1
            }
            '#' => rest.find('\n').unwrap_or(rest.len()),
            '"' | '\'' => {
                let (body, length) = string(rest, first);
                if !is_way_back {
                    found.push(Placed { piece: Piece::Text(body.to_owned()), line });
                }
                length
            }
            _ if first.is_alphabetic() || first == '_' => {
                let length = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                if at_column_0 {
                    is_way_back = rest.starts_with("def downgrade");
                }
                let name = &rest[..length];
                let is_prefix = name.len() <= 2
                    && name.chars().all(|c| "rRbBuUfF".contains(c))
                    && rest[length..].starts_with(['"', '\'']);
                if !is_way_back && !is_prefix {
                    found.push(Placed { piece: Piece::Name(name.to_owned()), line });
                }
                length
            }
            _ => {
                if at_column_0 && !first.is_whitespace() {
                    is_way_back = false;
                }
                if !is_way_back && !first.is_whitespace() {
                    found.push(Placed { piece: Piece::Sign(first), line });
                }
                first.len_utf8()
            }
        };
        line += rest[..length].matches('\n').count();
        place += length;
    }
    found
}

/// A string's content, and how long it is with its quotes.
fn string(text: &str, quote: char) -> (&str, usize) {
    let triple = quote.to_string().repeat(3);
    if let Some(inside) = text.strip_prefix(triple.as_str()) {
        let end = inside.find(&triple).unwrap_or(inside.len());
        return (&inside[..end], (3 + end + 3).min(text.len()));
    }
    let mut characters = text.char_indices().skip(1);
    while let Some((place, character)) = characters.next() {
        if character == '\\' {
            characters.next();
        } else if character == quote || character == '\n' {
            return (&text[1..place], place + usize::from(character == quote));
        }
    }
    (&text[1..], text.len())
}
