//! SQL: statements told apart by a lexer that knows comments, strings, quoted names, dollar quotes and psql's own lines; then
//! what each takes away, by its words.

use crate::{Finding, one_line};

/// How deep `DO` blocks may stand in each other before the rest is reported as unreadable.
const DEPTH_MAX: usize = 4;

/// Tables in which tools keep what they have run; removing a line there takes nothing away.
const TOOL_TABLES: [&str; 5] = [
    "ALEMBIC_VERSION",
    "DJANGO_MIGRATIONS",
    "SCHEMA_MIGRATIONS",
    "AR_INTERNAL_METADATA",
    "FLYWAY_SCHEMA_HISTORY",
];

/// Kinds of things whose removal old code notices.
const DROPPED: [&str; 10] =
    ["TABLE", "SCHEMA", "DATABASE", "TYPE", "DOMAIN", "SEQUENCE", "VIEW", "FUNCTION", "PROCEDURE", "OWNED"];

/// What may stand after `ALTER TABLE … DROP` without taking a column away.
const NOT_A_COLUMN: [&str; 8] =
    ["CONSTRAINT", "INDEX", "KEY", "FOREIGN", "PRIMARY", "CHECK", "PARTITION", "DEFAULT"];

/// A piece of SQL.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Token<'a> {
    /// A word that is not quoted, in capitals.
    Word(String),
    /// A quoted name, as it is.
    Name(&'a str),
    /// A string's content.
    Text,
    /// A dollar-quoted string's content and the line on which that begins.
    Dollar(&'a str, usize),
    /// Any other character.
    Sign(char),
}

/// A statement with the line on which it begins.
struct Statement<'a> {
    line: usize,
    text: &'a str,
    tokens: Vec<Token<'a>>,
}

pub(crate) fn findings(text: &str) -> Vec<Finding> {
    within(text, 1, 0)
}

fn within(text: &str, first_line: usize, depth: usize) -> Vec<Finding> {
    let mut found = Vec::new();
    for statement in statements(text, first_line) {
        let mut report = |what: String| {
            found.push(Finding { line: statement.line, statement: one_line(statement.text), what });
        };
        if let Some(what) = loss(&statement.tokens) {
            report(what);
            continue;
        }
        if statement.is("DO") {
            for token in &statement.tokens {
                let Token::Dollar(body, line) = token else { continue };
                if depth >= DEPTH_MAX || has_word(body, *line, "EXECUTE") {
                    report("runs SQL that is put together at run time, which cannot be read".to_owned());
                    break;
                }
            }
            for token in &statement.tokens {
                let Token::Dollar(body, line) = token else { continue };
                if depth < DEPTH_MAX {
                    found.extend(within(body, *line, depth + 1));
                }
            }
        }
    }
    found
}

fn has_word(text: &str, line: usize, word: &str) -> bool {
    statements(text, line)
        .iter()
        .flat_map(|statement| &statement.tokens)
        .any(|token| matches!(token, Token::Word(found) if found == word))
}

impl Statement<'_> {
    fn is(&self, word: &str) -> bool {
        matches!(self.tokens.first(), Some(Token::Word(first)) if first == word)
    }
}

/// What a statement takes away, if it does.
fn loss(tokens: &[Token<'_>]) -> Option<String> {
    if let Some(Token::Sign('\\')) = tokens.first() {
        return included(tokens);
    }
    // `BEGIN`, `IF …​ THEN` and the like stand before statements in a block's body, so they are looked for anywhere; a word that
    // begins a statement is never a column's name without quotes.
    (0..tokens.len()).find_map(|place| at(&tokens[place..], place))
}

fn at(tokens: &[Token<'_>], place: usize) -> Option<String> {
    match (word(tokens, 0)?, word(tokens, 1)) {
        ("DROP", Some("MATERIALIZED")) => Some(format!("takes away the view {}", name(tokens, 3)?)),
        ("DROP", Some(kind)) if DROPPED.contains(&kind) && !is_within_alter(place, kind) => {
            Some(format!("takes away the {} {}", kind.to_lowercase(), name(tokens, 2)?))
        }
        ("TRUNCATE", Some("TABLE" | "ONLY")) => Some(format!("empties {}", name(tokens, 2)?)),
        ("TRUNCATE", _) if place == 0 => Some(format!("empties {}", name(tokens, 1)?)),
        ("DELETE", Some("FROM")) => {
            let table = name(tokens, 2)?;
            let is_own = TOOL_TABLES.contains(&table.to_uppercase().as_str());
            (!is_own).then(|| format!("deletes rows of {table}"))
        }
        ("ALTER", Some("TABLE" | "FOREIGN")) => altered(tokens),
        ("ALTER", Some("TYPE" | "VIEW" | "SCHEMA" | "SEQUENCE")) if has(tokens, "RENAME") => {
            Some(format!("renames {}", name(tokens, 2)?))
        }
        ("RENAME", Some("TABLE")) if place == 0 => Some(format!("renames {}", name(tokens, 2)?)),
        _ => None,
    }
}

/// `ALTER TABLE t DROP TYPE` names a column `type`; only a statement of its own drops a type.
fn is_within_alter(place: usize, kind: &str) -> bool {
    place > 0 && kind != "TABLE"
}

/// What `ALTER TABLE` takes away: each of its actions, told apart by commas outside of brackets.
fn altered(tokens: &[Token<'_>]) -> Option<String> {
    let table = name(tokens, if word(tokens, 1) == Some("FOREIGN") { 3 } else { 2 })?;
    let mut depth = 0_usize;
    let mut starts = vec![2];
    for (place, token) in tokens.iter().enumerate() {
        match token {
            Token::Sign('(') => depth += 1,
            Token::Sign(')') => depth = depth.saturating_sub(1),
            Token::Sign(',') if depth == 0 => starts.push(place + 1),
            _ => {}
        }
    }
    starts.iter().find_map(|start| {
        let rest = &tokens[*start..];
        let end = rest.iter().position(|token| *token == Token::Sign(',')).unwrap_or(rest.len());
        let action = &rest[..end];
        // The first action stands after the table's name.
        let verbs = ["DROP", "RENAME", "ALTER", "MODIFY", "CHANGE", "ADD", "SET"];
        let begin = action
            .iter()
            .position(|token| matches!(token, Token::Word(word) if verbs.contains(&word.as_str())))?;
        action_loss(&action[begin..], rest.get(begin..).unwrap_or_default(), &table)
    })
}

fn action_loss(action: &[Token<'_>], rest: &[Token<'_>], table: &str) -> Option<String> {
    match (word(action, 0)?, word(action, 1)) {
        ("DROP", Some(kind)) if NOT_A_COLUMN.contains(&kind) => None,
        ("DROP", Some("COLUMN")) => Some(format!("takes away the column {} of {table}", name(action, 2)?)),
        ("DROP", _) => Some(format!("takes away the column {} of {table}", name(action, 1)?)),
        ("RENAME", Some("CONSTRAINT" | "INDEX" | "KEY")) => None,
        ("RENAME", Some("TO" | "AS")) => Some(format!("renames {table}")),
        ("RENAME", Some("COLUMN")) => Some(format!("renames the column {} of {table}", name(action, 2)?)),
        ("RENAME", _) => Some(format!("renames the column {} of {table}", name(action, 1)?)),
        ("ALTER", _) => {
            let column = name(action, if word(action, 1) == Some("COLUMN") { 2 } else { 1 })?;
            if has(action, "TYPE") {
                Some(format!("changes the type of the column {column} of {table}"))
            } else if has(action, "SET") && has(action, "NULL") {
                Some(format!("lets the column {column} of {table} be empty no more"))
            } else {
                None
            }
        }
        ("MODIFY", _) => {
            let column = name(action, if word(action, 1) == Some("COLUMN") { 2 } else { 1 })?;
            Some(format!("changes the type of the column {column} of {table}"))
        }
        ("CHANGE", _) => {
            let column = name(action, if word(action, 1) == Some("COLUMN") { 2 } else { 1 })?;
            Some(format!("renames or changes the column {column} of {table}"))
        }
        ("ADD", Some("CONSTRAINT" | "FOREIGN" | "PRIMARY" | "CHECK" | "UNIQUE" | "INDEX" | "KEY")) => None,
        // Old code does not know the column and leaves it empty.
        ("ADD", _) => {
            // `numeric(10, 2)` has a comma of its own.
            let own = own_part(rest);
            let is_filled = ["DEFAULT", "GENERATED", "SERIAL", "BIGSERIAL", "SMALLSERIAL", "AUTO_INCREMENT"]
                .iter()
                .any(|word| has(own, word));
            let column = name(action, if word(action, 1) == Some("COLUMN") { 2 } else { 1 })?;
            let must_be_filled = own.windows(2).any(|pair| {
                matches!(pair, [Token::Word(not), Token::Word(null)] if not == "NOT" && null == "NULL")
            });
            (must_be_filled && !is_filled).then(|| {
                format!(
                    "adds the column {column} to {table}, which old code leaves empty and which may not be"
                )
            })
        }
        _ => None,
    }
}

/// Up to the next comma outside of brackets.
fn own_part<'t, 'a>(tokens: &'t [Token<'a>]) -> &'t [Token<'a>] {
    let mut depth = 0_usize;
    let end = tokens.iter().position(|token| {
        match token {
            Token::Sign('(') => depth += 1,
            Token::Sign(')') => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 0 && *token == Token::Sign(',')
    });
    &tokens[..end.unwrap_or(tokens.len())]
}

/// psql's line that runs another file.
fn included(tokens: &[Token<'_>]) -> Option<String> {
    let command = word(tokens, 1)?;
    matches!(command, "I" | "IR" | "INCLUDE" | "INCLUDE_RELATIVE" | "GEXEC")
        .then(|| format!("runs SQL from elsewhere (\\{}), which is not read", command.to_lowercase()))
}

fn word<'t>(tokens: &'t [Token<'_>], place: usize) -> Option<&'t str> {
    match tokens.get(place)? {
        Token::Word(word) => Some(word),
        _ => None,
    }
}

fn has(tokens: &[Token<'_>], wanted: &str) -> bool {
    tokens.iter().any(|token| matches!(token, Token::Word(word) if word == wanted))
}

/// The name at a place, after `IF EXISTS`, `IF NOT EXISTS` and `ONLY`, with its schema.
fn name(tokens: &[Token<'_>], mut place: usize) -> Option<String> {
    while matches!(word(tokens, place), Some("IF" | "NOT" | "EXISTS" | "ONLY" | "COLUMN" | "CONCURRENTLY")) {
        place += 1;
    }
    let mut name = String::new();
    loop {
        match tokens.get(place)? {
            Token::Word(word) => name.push_str(&word.to_lowercase()),
            Token::Name(quoted) => name.push_str(quoted),
            _ => return (!name.is_empty()).then_some(name),
        }
        match tokens.get(place + 1) {
            Some(Token::Sign('.')) => {
                name.push('.');
                place += 2;
            }
            _ => return Some(name),
        }
    }
}

/// Cuts SQL into statements.
fn statements(text: &str, first_line: usize) -> Vec<Statement<'_>> {
    let mut all = Vec::new();
    let mut lexer = Lexer { text, place: 0, line: first_line };
    let mut current: Option<(usize, usize, Vec<Token<'_>>)> = None;
    loop {
        lexer.skip();
        let (start, line) = (lexer.place, lexer.line);
        let is_line_start = text[..start].rfind('\n').is_none_or(|end| text[end..start].trim().is_empty())
            && (start == 0
                || text[..start].trim_end_matches([' ', '\t']).ends_with('\n')
                || text[..start].trim().is_empty());
        let Some(token) = lexer.token() else { break };
        if token == Token::Sign('\\') && is_line_start {
            // A line of psql's own is a statement by itself.
            let end = text[start..].find('\n').map_or(text.len(), |length| start + length);
            let mut tokens = vec![token];
            while lexer.place < end {
                lexer.skip_within(end);
                if lexer.place >= end {
                    break;
                }
                tokens.extend(lexer.token());
            }
            all.push(Statement { line, text: &text[start..end], tokens });
            continue;
        }
        if token == Token::Sign(';') {
            if let Some((from, line, tokens)) = current.take() {
                let reads_rows = matches!(tokens.first(), Some(Token::Word(first)) if first == "COPY")
                    && tokens.windows(2).any(|pair| {
                        matches!(pair, [Token::Word(from), Token::Word(stdin)] if from == "FROM" && stdin == "STDIN")
                    });
                all.push(Statement { line, text: &text[from..start], tokens });
                if reads_rows {
                    lexer.skip_rows();
                }
            }
            continue;
        }
        match &mut current {
            Some((_, _, tokens)) => tokens.push(token),
            None => current = Some((start, line, vec![token])),
        }
    }
    if let Some((from, line, tokens)) = current {
        all.push(Statement { line, text: text[from..].trim_end(), tokens });
    }
    all
}

struct Lexer<'a> {
    text: &'a str,
    place: usize,
    line: usize,
}

impl<'a> Lexer<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.place..]
    }

    fn go(&mut self, bytes: usize) {
        let end = (self.place + bytes).min(self.text.len());
        self.line += self.text[self.place..end].matches('\n').count();
        self.place = end;
    }

    /// Passes over spaces and comments. What stands in `/*! … */`, MySQL runs.
    fn skip(&mut self) {
        loop {
            let rest = self.rest();
            let spaces = rest.len() - rest.trim_start().len();
            if spaces > 0 {
                self.go(spaces);
            } else if rest.starts_with("--") {
                self.go(rest.find('\n').unwrap_or(rest.len()));
            } else if let Some(run) = rest.strip_prefix("/*!") {
                self.go(3 + run.bytes().take_while(u8::is_ascii_digit).count());
            } else if rest.starts_with("/*") {
                self.go(comment_length(rest));
            } else if rest.starts_with("*/") {
                self.go(2);
            } else {
                return;
            }
        }
    }

    fn skip_within(&mut self, end: usize) {
        while self.place < end && self.rest().starts_with([' ', '\t', '\r']) {
            self.go(1);
        }
    }

    /// The rows of `COPY … FROM stdin`, to the line `\.`.
    fn skip_rows(&mut self) {
        let rest = self.rest();
        let end = rest.find("\n\\.").map_or(rest.len(), |end| end + 3);
        self.go(end);
    }

    fn token(&mut self) -> Option<Token<'a>> {
        let rest = self.rest();
        let first = rest.chars().next()?;
        let line = self.line;
        let (token, length) = match first {
            '\'' => (Token::Text, string_length(rest, '\'', false)),
            'e' | 'E' if rest[1..].starts_with('\'') => {
                (Token::Text, 1 + string_length(&rest[1..], '\'', true))
            }
            '"' | '`' => {
                let length = string_length(rest, first, false);
                (Token::Name(rest[1..length].trim_end_matches(first)), length)
            }
            '$' => match dollar(rest) {
                Some((body, length)) => {
                    let opening = body.as_ptr() as usize - rest.as_ptr() as usize;
                    (Token::Dollar(body, line + rest[..opening].matches('\n').count()), length)
                }
                None => (Token::Sign('$'), 1),
            },
            _ if first.is_alphabetic() || first == '_' => {
                let is_part = |c: char| c.is_alphanumeric() || c == '_' || c == '$';
                let length = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
                (Token::Word(rest[..length].to_uppercase()), length)
            }
            _ => (Token::Sign(first), first.len_utf8()),
        };
        self.go(length);
        Some(token)
    }
}

/// PostgreSQL's comments may stand in each other.
fn comment_length(text: &str) -> usize {
    let bytes = text.as_bytes();
    let (mut depth, mut place) = (0_usize, 0);
    while place < bytes.len() {
        match bytes.get(place..place + 2) {
            Some(b"/*") => {
                depth += 1;
                place += 2;
            }
            Some(b"*/") => {
                depth -= 1;
                place += 2;
                if depth == 0 {
                    return place;
                }
            }
            _ => place += 1,
        }
    }
    text.len()
}

/// A quote that stands twice is part of the text; with `escapes` a backslash takes the next character along.
fn string_length(text: &str, quote: char, escapes: bool) -> usize {
    let mut characters = text.char_indices().skip(1).peekable();
    while let Some((place, character)) = characters.next() {
        if escapes && character == '\\' {
            characters.next();
        } else if character == quote {
            if characters.peek().is_some_and(|(_, next)| *next == quote) {
                characters.next();
            } else {
                return place + quote.len_utf8();
            }
        }
    }
    text.len()
}

/// `$TAG$ … $TAG$`: what is in it, and how long it is altogether.
fn dollar(text: &str) -> Option<(&str, usize)> {
    let tag_end = 1 + text[1..].find('$')?;
    let tag = &text[1..tag_end];
    let is_tag = tag.chars().all(|c| c.is_alphanumeric() || c == '_')
        && !tag.starts_with(|c: char| c.is_ascii_digit());
    if !is_tag {
        return None;
    }
    let mark = &text[..=tag_end];
    let inside = &text[mark.len()..];
    match inside.find(mark) {
        Some(end) => Some((&inside[..end], mark.len() + end + mark.len())),
        None => Some((inside, text.len())),
    }
}
