//! Files with environment variables: written once, read by systemd, by `sh` and by our own supervision alike.
//!
//! The form is what all three understand: `NAME="value"`, with `\` before `"`, `\`, `$` and a backquote, one variable after another. A
//! value may have several lines.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use crate::files;

/// Most that an environment file may have; the kernel allows a program little more.
pub(crate) const ENVIRONMENT_BYTES_MAX: u64 = 2 * 1024 * 1024;

/// Why a variable cannot be given to a process.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the variable {name} cannot be given to a process: {why}")]
pub(crate) struct BadVariable {
    name: String,
    why: &'static str,
}

/// Checks that every program can be given these variables.
pub(crate) fn check<'a>(variables: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<(), BadVariable> {
    for (name, value) in variables {
        let bad = |why| Err(BadVariable { name: name.to_owned(), why });
        if name.starts_with(|c: char| c.is_ascii_digit()) {
            return bad("its name begins with a digit, which shells and systemd refuse");
        }
        if value.contains('\0') {
            return bad("its value has a NUL byte, which no environment can hold");
        }
    }
    Ok(())
}

/// The file's text. The variables must have passed [`check`].
pub(crate) fn render<'a>(variables: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut text = String::new();
    for (name, value) in variables {
        text.push_str(name);
        text.push_str("=\"");
        for c in value.chars() {
            if matches!(c, '"' | '\\' | '$' | '`') {
                text.push('\\');
            }
            text.push(c);
        }
        text.push_str("\"\n");
    }
    text
}

/// Reads a file that [`render`] made.
pub(crate) fn read(path: &Path) -> io::Result<BTreeMap<String, String>> {
    let content = files::read_if_there(path, ENVIRONMENT_BYTES_MAX)?.ok_or(io::ErrorKind::NotFound)?;
    let damaged = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    let text = String::from_utf8(content).map_err(|_| damaged("it is not UTF-8"))?;
    parse(&text).ok_or_else(|| damaged("it is not an environment file of greenlight"))
}

fn parse(text: &str) -> Option<BTreeMap<String, String>> {
    let mut variables = BTreeMap::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (name, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut characters = after.char_indices();
        let end = loop {
            match characters.next()? {
                (_, '\\') => value.push(characters.next()?.1),
                (at, '"') => break at,
                (_, c) => value.push(c),
            }
        };
        variables.insert(name.to_owned(), value);
        rest = after[end + 1..].strip_prefix('\n')?;
    }
    Some(variables)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command;

    const HARD: [(&str, &str); 6] = [
        ("EMPTY", ""),
        ("DOLLAR", "$HOME ${PATH} `id` \\n"),
        ("LINES", "one\ntwo = \"2\"\n"),
        ("PERCENT", "100% %h ; # no comment"),
        ("QUOTES", "it's \"quoted\"\\"),
        ("UNICODE", "grün ✓"),
    ];

    #[test]
    fn what_is_written_is_read() {
        let expected: BTreeMap<String, String> = HARD.map(|(n, v)| (n.to_owned(), v.to_owned())).into();
        assert_eq!(parse(&render(HARD)), Some(expected));
        for damaged in ["A", "A=1\n", "A=\"1", "A=\"1\\", "A=\"1\"B=\"2\"\n"] {
            assert_eq!(parse(damaged), None, "{damaged}");
        }
    }

    #[test]
    fn the_shell_reads_it_alike() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("test.env");
        std::fs::write(&path, render(HARD)).unwrap();
        for (name, value) in HARD {
            let script =
                ["/bin/sh", "-c", "set -a; . \"$0\"; exec printenv \"$1\"", path.to_str().unwrap(), name];
            let captured = command::capture(&script, std::time::Duration::from_secs(30)).unwrap();
            assert_eq!(captured.stdout, format!("{value}\n"), "{name}");
        }
    }

    #[test]
    fn what_no_process_can_have_is_refused() {
        assert!(check([("OK", "1"), ("_X9", "")]).is_ok());
        assert!(check([("9X", "1")]).unwrap_err().to_string().contains("digit"));
        assert!(check([("X", "a\0b")]).unwrap_err().to_string().contains("NUL"));
    }
}
