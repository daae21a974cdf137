//! The one place that prints: results on standard output, everything else on standard error.

use std::io::{IsTerminal, Write};

use anstream::ColorChoice;
use owo_colors::OwoColorize;
use serde_json::Value;

use crate::args::{Color, Global};
use crate::diagnose;
use crate::failure::Failure;

/// The version of every JSON document that a command prints.
pub(crate) const JSON_VERSION: u32 = 1;

/// How much to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verbosity {
    Quiet,
    Normal,
    Verbose,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Printer {
    pub(crate) json: bool,
    /// Whether results are told as part of a longer story (the demo's), on standard error.
    pub(crate) narrates: bool,
    pub(crate) verbosity: Verbosity,
}

impl Printer {
    pub(crate) fn new(global: &Global) -> Self {
        // `auto` leaves the choice to the terminal and to NO_COLOR.
        match global.color {
            Color::Auto => {}
            Color::Always => ColorChoice::Always.write_global(),
            Color::Never => ColorChoice::Never.write_global(),
        }
        let verbosity = match (global.quiet, global.verbose) {
            (true, _) => Verbosity::Quiet,
            (_, true) => Verbosity::Verbose,
            _ => Verbosity::Normal,
        };
        Self { json: global.json, narrates: false, verbosity }
    }

    /// Whether a person watches standard error.
    pub(crate) fn is_live(self) -> bool {
        self.verbosity == Verbosity::Normal && std::io::stderr().is_terminal()
    }

    /// A line of the result.
    pub(crate) fn result(self, line: impl AsRef<str>) {
        if self.narrates {
            self.progress(line);
        } else if !self.json {
            // A reader that went away (`| head`) is not an error of ours.
            let _ = writeln!(anstream::stdout(), "{}", line.as_ref());
        }
    }

    /// Text that is the result itself, whatever `--json` says.
    pub(crate) fn raw(self, text: &str) {
        let _ = anstream::stdout().write_all(text.as_bytes());
    }

    /// The result as JSON: `{"version": 1, "command": …, …}`.
    pub(crate) fn json(self, command: &str, body: Value) {
        if !self.json || self.narrates {
            return;
        }
        let _ = writeln!(anstream::stdout(), "{:#}", document(command, body));
    }

    /// One of several documents, each on a line of its own: for results that come as they happen.
    pub(crate) fn json_line(self, command: &str, body: Value) {
        if self.json {
            let _ = writeln!(anstream::stdout(), "{}", document(command, body));
        }
    }

    /// A line about what is going on.
    pub(crate) fn progress(self, line: impl AsRef<str>) {
        // Who cares whether it was heard asks `tell`.
        let _ = self.tell(line);
    }

    /// A line about what is going on, and whether anybody could read it.
    pub(crate) fn tell(self, line: impl AsRef<str>) -> std::io::Result<()> {
        if self.verbosity > Verbosity::Quiet {
            writeln!(anstream::stderr(), "{}", line.as_ref())?;
        }
        Ok(())
    }

    /// A line that is only of interest to who asked for more.
    pub(crate) fn detail(self, line: impl AsRef<str>) {
        if self.verbosity == Verbosity::Verbose {
            let _ = writeln!(anstream::stderr(), "{}", line.as_ref());
        }
    }

    /// Something to look at, although it went on.
    pub(crate) fn warning(self, line: impl AsRef<str>) {
        let _ = writeln!(anstream::stderr(), "{} {}", "warning:".yellow().bold(), line.as_ref());
    }

    /// Why a command did not succeed.
    pub(crate) fn failure(self, failure: &Failure) {
        let mut stderr = anstream::stderr();
        if let Some(mistakes) = &failure.mistakes {
            let _ = writeln!(stderr, "{}", diagnose::render(mistakes).trim_start_matches('\n'));
        }
        let _ = writeln!(stderr, "{} {}", "error:".red().bold(), failure.message);
        if let Some(help) = &failure.help {
            let _ = writeln!(stderr, "  {} {help}", "help:".cyan());
        }
        self.json(
            "error",
            serde_json::json!({
                "exit": failure.exit.code(),
                "message": failure.message,
                "help": failure.help,
                "problems": failure.mistakes.as_deref().map(diagnose::json),
            }),
        );
    }
}

/// A document with what every one begins with.
fn document(command: &str, body: Value) -> Value {
    let mut document = serde_json::json!({ "version": JSON_VERSION, "command": command });
    if let (Value::Object(document), Value::Object(body)) = (&mut document, body) {
        document.extend(body);
    }
    document
}
