//! Commands as other files write them, as a fleet file writes them: no shell, `{port}` for the port.

use std::collections::BTreeMap;

use greenlight_model::id::{UserName, VariableName};

use crate::read::Text;
use crate::text::Command;

/// The port of a process of which only that it has one is known.
pub(super) const PORT_USUAL: u16 = 8000;

/// A process to propose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) name: String,
    /// As it stands in the fleet file.
    pub(super) run: String,
    pub(super) port: Option<u16>,
    pub(super) health: Option<String>,
    pub(super) variables: BTreeMap<String, String>,
    pub(super) user: Option<String>,
    /// Where it was found, for the findings.
    pub(super) source: String,
}

impl Candidate {
    /// A process with a command that is known to be well formed.
    pub(super) fn usual(name: &str, run: &str, port: Option<u16>, source: &str) -> Self {
        Self {
            name: name.to_owned(),
            run: run.to_owned(),
            port,
            health: None,
            variables: BTreeMap::new(),
            user: None,
            source: source.to_owned(),
        }
    }

    pub(super) fn mentions_port(&self) -> bool {
        self.run.contains("{port}")
    }

    pub(super) fn set_user(&mut self, user: &str) {
        self.user = user.parse::<UserName>().ok().map(|user| user.to_string());
    }

    /// Sets a variable, unless Greenlight sets it itself or it could not be one. `PORT` is the port.
    pub(super) fn set_variable(&mut self, name: &str, value: &str) {
        if name == "PORT" {
            self.port = value.parse().ok().filter(|port| *port > 0).or(self.port);
        } else if name.parse::<VariableName>().is_ok()
            && !name.starts_with("GREENLIGHT_")
            && !value.contains('\0')
        {
            self.variables.insert(name.to_owned(), value.to_owned());
        }
    }
}

/// Reads a command that was written for a shell. `program_folder` is where the project's own programs lie.
///
/// # Errors
/// Why it cannot be proposed.
pub(super) fn read(
    name: &str,
    command: &str,
    program_folder: Option<&str>,
    source: &str,
) -> Result<Candidate, String> {
    let mut candidate = Candidate::usual(name, "", None, source);
    let words = shell_words::split(command).map_err(|_| "a quote in it is not closed".to_owned())?;
    candidate.run = if needs_shell(command) {
        // The agent sets PORT, so the shell finds it as the author meant.
        format!("sh -c {}", shell_words::quote(command.trim()))
    } else {
        let mut words = words.into_iter().skip_while(|word| word == "exec" || word == "env").peekable();
        while let Some((name, value)) = words
            .peek()
            .and_then(|word| word.split_once('='))
            .filter(|(name, _)| name.parse::<VariableName>().is_ok())
        {
            let (name, value) = (name.to_owned(), value.to_owned());
            candidate.set_variable(&name, &value);
            words.next();
        }
        let mut words: Vec<String> =
            words.map(|word| word.replace("${PORT}", "{port}").replace("$PORT", "{port}")).collect();
        literal_port(&mut words, &mut candidate);
        if let (Some(folder), Some(program)) = (program_folder, words.first_mut()) {
            *program = in_folder(folder, program);
        }
        words.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" ")
    };
    let command = Command::from_text(&candidate.run).map_err(|refusal| refusal.message)?;
    if command.placeholders().any(|placeholder| placeholder != "port") {
        return Err("words in braces mean something else in a fleet file".to_owned());
    }
    if candidate.run.contains('\0') {
        return Err("it holds the character NUL".to_owned());
    }
    Ok(candidate)
}

/// Whether a command uses more of a shell than splitting into words, and than `$PORT`.
fn needs_shell(command: &str) -> bool {
    let rest = command.replace("${PORT}", "").replace("$PORT", "");
    rest.contains(['$', '`', '|', ';', '>', '<', '*', '\n', '~']) || rest.contains('&')
}

/// Programs of an interpreter's own environment (`venv/bin/`), where a bare name is written.
fn in_folder(folder: &str, program: &str) -> String {
    match program {
        "python2" | "python3" | "python" => format!("{folder}python"),
        _ if program.contains('/') || matches!(program, "sh" | "bash" | "node" | "npm" | "make") => {
            program.to_owned()
        }
        _ => format!("{folder}{program}"),
    }
}

/// Puts `{port}` in the place of a number that is the port.
fn literal_port(words: &mut [String], candidate: &mut Candidate) {
    let options = ["--port", "-p", "--bind", "-b", "--listen", "--http", "--address", "--addr"];
    for at in 1..words.len() {
        let (before, now) = words.split_at_mut(at);
        let word = &mut now[0];
        let is_value = options.contains(&before[at - 1].as_str());
        let is_option = options.iter().any(|option| word.starts_with(&format!("{option}=")));
        let digits = word.rsplit([':', '=']).next().unwrap_or_default().to_owned();
        let is_alone = digits.len() == word.len() && !is_value;
        let port =
            digits.parse::<u16>().ok().filter(|port| *port > 0 && digits.bytes().all(|b| b.is_ascii_digit()));
        if let (Some(port), true, false) = (port, is_value || is_option, is_alone) {
            word.truncate(word.len() - digits.len());
            word.push_str("{port}");
            candidate.port = Some(port);
            return;
        }
    }
}

/// A word as a fleet file writes it; braces need no quotes there.
fn quote(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "+,-./:@_={}%".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        shell_words::quote(word).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_put_without_a_shell() {
        for (command, run, port) in [
            ("gunicorn app:app", "venv/bin/gunicorn app:app", None),
            ("python -m http.server", "venv/bin/python -m http.server", None),
            ("gunicorn -b 0.0.0.0:$PORT app:app", "venv/bin/gunicorn -b 0.0.0.0:{port} app:app", None),
            ("gunicorn --bind=:8080 app:app", "venv/bin/gunicorn --bind=:{port} app:app", Some(8080)),
            (
                "node server.js --port 3000 --workers 4",
                "node server.js --port {port} --workers 4",
                Some(3000),
            ),
            ("PORT=9000 exec bin/web", "exec bin/web", Some(9000)),
            ("exec bin/web 'a b'", "bin/web 'a b'", None),
            ("bin/a && bin/b", "sh -c 'bin/a && bin/b'", None),
            ("bin/web ${PORT:-80}", "sh -c 'bin/web ${PORT:-80}'", None),
        ] {
            let candidate = read("web", command, Some("venv/bin/"), "a test").unwrap();
            let expected = if command.starts_with("PORT") { "venv/bin/exec bin/web" } else { run };
            assert_eq!((candidate.run.as_str(), candidate.port), (expected, port), "{command}");
        }
        for bad in ["a 'b", "", "  ", "bin/web {name}"] {
            assert!(read("web", bad, None, "a test").is_err(), "{bad}");
        }
    }
}
