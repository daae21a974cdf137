//! The paths that a Rust source mentions, with imports and renames seen through.
//!
//! Works on tokens, so that what stands inside of macros is seen too. It knows no scopes: an import anywhere in
//! a file counts for the whole file, which can only find too much. Items under `#[cfg(test)]` are left out.

use std::collections::HashMap;

use proc_macro2::{Delimiter, Group, LexError, TokenStream, TokenTree};

/// One mention of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mention {
    /// The line, from 1.
    pub(crate) line: usize,
    /// Its segments after imports are seen through; `*` at the end of an import of everything.
    pub(crate) path: Vec<String>,
    /// How it comes in.
    pub(crate) kind: MentionKind,
}

/// How a path is mentioned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MentionKind {
    /// In a `use`, under its own name.
    Import,
    /// In a `use` or `extern crate`, under another name.
    Rename,
    /// Anywhere else.
    Use,
    /// As the name of a macro that is called.
    Macro,
    /// As the name of an attribute.
    Attribute,
}

/// What a source mentions.
#[derive(Debug, Default)]
pub(crate) struct Source {
    /// All paths, in their order.
    pub(crate) mentions: Vec<Mention>,
    /// Modules in files of their own that exist for tests only.
    pub(crate) test_modules: Vec<String>,
}

/// Reads a source.
pub(crate) fn read(text: &str) -> Result<Source, LexError> {
    let tokens: TokenStream = text.parse()?;
    let mut reader = Reader::default();
    reader.stream(tokens);
    let Reader { mut source, aliases } = reader;
    for mention in &mut source.mentions {
        if matches!(mention.kind, MentionKind::Use | MentionKind::Macro) {
            resolve(&mut mention.path, &aliases);
        }
    }
    Ok(source)
}

/// Replaces the first segment by what it was imported from, and that again, but never the same name twice.
fn resolve(path: &mut Vec<String>, aliases: &HashMap<String, Vec<String>>) {
    let mut seen = Vec::new();
    while let Some((name, full)) = path.first().and_then(|first| aliases.get_key_value(first)) {
        if seen.contains(name) {
            return;
        }
        seen.push(name.clone());
        path.splice(..1, full.iter().cloned());
    }
}

#[derive(Default)]
struct Reader {
    source: Source,
    aliases: HashMap<String, Vec<String>>,
}

impl Reader {
    fn stream(&mut self, tokens: TokenStream) {
        let tokens: Vec<_> = tokens.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            at = self.token(&tokens, at);
        }
    }

    /// Reads what begins at a token and returns where the next begins.
    fn token(&mut self, tokens: &[TokenTree], at: usize) -> usize {
        match &tokens[at] {
            TokenTree::Punct(punct) if punct.as_char() == '#' => self.attribute(tokens, at),
            TokenTree::Ident(ident) if ident == "use" => {
                let end = position(tokens, at, ';');
                self.import(&tokens[at + 1..end], &[]);
                end + 1
            }
            TokenTree::Ident(ident) if ident == "extern" && is_ident(tokens.get(at + 1), "crate") => {
                let end = position(tokens, at, ';');
                self.import(&tokens[at + 2..end], &[]);
                end + 1
            }
            TokenTree::Ident(ident) if ident == "type" => {
                self.type_alias(&tokens[at + 1..position(tokens, at, ';')]);
                at + 1
            }
            // A field or a method, not a path; the end of a range is one.
            TokenTree::Punct(punct) if punct.as_char() == '.' => match tokens.get(at + 1) {
                Some(TokenTree::Ident(_)) if at == 0 || !is_punct(tokens.get(at - 1), '.') => at + 2,
                _ => at + 1,
            },
            TokenTree::Ident(_) => self.path(tokens, at),
            TokenTree::Group(group) => {
                self.stream(group.stream());
                at + 1
            }
            _ => at + 1,
        }
    }

    /// An attribute, and with `#[cfg(test)]` the item behind it.
    fn attribute(&mut self, tokens: &[TokenTree], at: usize) -> usize {
        let inner = usize::from(is_punct(tokens.get(at + 1), '!'));
        let Some(TokenTree::Group(group)) = tokens.get(at + 1 + inner) else { return at + 1 };
        let after = at + 2 + inner;
        if inner == 0 && is_test_only(group) {
            return self.skip_item(tokens, after);
        }
        let content: Vec<_> = group.stream().into_iter().collect();
        if let Some(TokenTree::Ident(name)) = content.first() {
            self.mention(name, vec![name.to_string()], MentionKind::Attribute);
        }
        self.stream(group.stream());
        after
    }

    fn skip_item(&mut self, tokens: &[TokenTree], mut at: usize) -> usize {
        while at < tokens.len() {
            match (&tokens[at], tokens.get(at + 1), tokens.get(at + 2)) {
                (TokenTree::Ident(word), Some(TokenTree::Ident(name)), end)
                    if word == "mod" && is_punct(end, ';') =>
                {
                    self.source.test_modules.push(name.to_string());
                    return at + 3;
                }
                (TokenTree::Group(group), ..) if group.delimiter() == Delimiter::Brace => return at + 1,
                (TokenTree::Punct(punct), ..) if punct.as_char() == ';' => return at + 1,
                _ => at += 1,
            }
        }
        at
    }

    /// The tree of a `use`, below a path.
    fn import(&mut self, tokens: &[TokenTree], above: &[String]) {
        let mut path = above.to_vec();
        let mut at = 0;
        while at < tokens.len() {
            match &tokens[at] {
                TokenTree::Ident(ident) if ident == "as" => {
                    if let Some(TokenTree::Ident(name)) = tokens.get(at + 1) {
                        self.mention(name, path.clone(), MentionKind::Rename);
                        self.aliases.insert(name.to_string(), path);
                    }
                    return;
                }
                // `use a::{self}` imports a.
                TokenTree::Ident(ident) if ident == "self" && !path.is_empty() => {}
                TokenTree::Ident(ident) => path.push(ident.to_string()),
                TokenTree::Group(group) => {
                    let inner: Vec<_> = group.stream().into_iter().collect();
                    for part in inner.split(|token| is_punct(Some(token), ',')) {
                        self.import(part, &path);
                    }
                    return;
                }
                TokenTree::Punct(punct) if punct.as_char() == '*' => path.push("*".into()),
                _ => {}
            }
            at += 1;
        }
        let (Some(last), Some(token)) = (path.last().cloned(), tokens.last()) else { return };
        self.source.mentions.push(Mention {
            line: token.span().start().line,
            path: path.clone(),
            kind: MentionKind::Import,
        });
        if path.len() > 1 {
            self.aliases.insert(last, path);
        }
    }

    /// `type Name = some::path;` is one more name for it.
    fn type_alias(&mut self, tokens: &[TokenTree]) {
        let equals = tokens.iter().position(|token| is_punct(Some(token), '='));
        let (Some(TokenTree::Ident(name)), Some(equals)) = (tokens.first(), equals) else { return };
        let (path, end) = segments(tokens, equals + 1);
        if !path.is_empty() && end == tokens.len() {
            self.aliases.insert(name.to_string(), path);
        }
    }

    fn path(&mut self, tokens: &[TokenTree], at: usize) -> usize {
        let (mut path, end) = segments(tokens, at);
        let TokenTree::Ident(first) = &tokens[at] else { return at + 1 };
        // `<Type>::function`
        if is_punct(tokens.get(end), '>') && is_separator(tokens, end + 1) {
            path.extend(segments(tokens, end + 3).0);
        }
        let called =
            is_punct(tokens.get(end), '!') && matches!(tokens.get(end + 1), Some(TokenTree::Group(_)));
        self.mention(first, path, if called { MentionKind::Macro } else { MentionKind::Use });
        end
    }

    fn mention(&mut self, at: &proc_macro2::Ident, path: Vec<String>, kind: MentionKind) {
        self.source.mentions.push(Mention { line: at.span().start().line, path, kind });
    }
}

/// The names joined by `::` from a token on, and where they end. A leading `::` is passed over.
fn segments(tokens: &[TokenTree], mut at: usize) -> (Vec<String>, usize) {
    let mut path = Vec::new();
    if is_separator(tokens, at) {
        at += 2;
    }
    while let Some(TokenTree::Ident(ident)) = tokens.get(at) {
        path.push(ident.to_string());
        at += 1;
        match (is_separator(tokens, at), tokens.get(at + 2)) {
            (true, Some(TokenTree::Ident(_))) => at += 2,
            _ => break,
        }
    }
    (path, at)
}

fn is_test_only(attribute: &Group) -> bool {
    attribute.stream().to_string().replace(' ', "") == "cfg(test)"
}

fn is_separator(tokens: &[TokenTree], at: usize) -> bool {
    is_punct(tokens.get(at), ':') && is_punct(tokens.get(at + 1), ':')
}

fn is_punct(token: Option<&TokenTree>, character: char) -> bool {
    matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == character)
}

fn is_ident(token: Option<&TokenTree>, name: &str) -> bool {
    matches!(token, Some(TokenTree::Ident(ident)) if ident == name)
}

/// The first such character from a token on, or the end.
fn position(tokens: &[TokenTree], at: usize, character: char) -> usize {
    let found = tokens[at..].iter().position(|token| is_punct(Some(token), character));
    found.map_or(tokens.len(), |offset| at + offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &[&str]) {
        let source = read(text).unwrap();
        let paths: Vec<_> = source.mentions.iter().map(|mention| mention.path.join("::")).collect();
        for path in expected {
            assert!(paths.iter().any(|found| found == path), "{path} not in {paths:?}");
        }
    }

    #[test]
    fn sees_through_imports() {
        check("use std::{fs, net::{self, TcpStream as T}};", &["std::fs", "std::net", "std::net::TcpStream"]);
        check("use std::time; fn f() { time::Instant::now() }", &["std::time::Instant::now"]);
        check("use a::b as c; use c::d; fn f() { d::e() }", &["a::b::d::e"]);
        check("use std as s; fn f() { s::fs::read() }", &["std::fs::read"]);
        check("use std::*;", &["std::*"]);
        check("type T = jiff::Timestamp; fn f() { T::now() }", &["jiff::Timestamp::now"]);
        check("fn f() { <jiff::Timestamp>::now() }", &["jiff::Timestamp::now"]);
        check("fn f() { format!(\"{}\", ::std::env::var(\"x\")) }", &["std::env::var"]);
        check("fn f() { for i in 0..std::process::id() {} }", &["std::process::id"]);
        // A name that is imported from itself does not go round for ever.
        check("use super::a; use a::b; use b::a as super_a; fn f() { a::c() }", &["super::a::c"]);
    }

    #[test]
    fn leaves_fields_and_tests_out() {
        let source = read(
            "fn f() { x.fs.env() }\n#[cfg(test)]\nmod tests { use std::fs; }\n#[cfg(test)] mod slow;\nfn g() { h() }",
        )
        .unwrap();
        let paths: Vec<_> = source.mentions.iter().map(|mention| mention.path.join("::")).collect();
        assert!(paths.iter().all(|path| !path.contains("fs") && path != "env"), "{paths:?}");
        assert!(paths.contains(&"h".to_owned()));
        assert_eq!(source.test_modules, ["slow"]);
    }
}
