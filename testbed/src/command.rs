//! Running a program to its end, with an error that shows what it said.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use crate::Error;

/// How much of a program's output an error shows, in bytes: its end, where the reason is.
const OUTPUT_SHOWN_BYTES: usize = 4000;

/// Runs a program and returns its standard output. Anything but success is an error with what it printed.
pub fn run(command: &mut Command) -> Result<String, Error> {
    let output = output_of(command)?;
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(failed(command, &output)) }
}

/// Runs a program to its end, whatever that is. An error only when it could not be started.
pub fn output_of(command: &mut Command) -> Result<Output, Error> {
    command.stdin(Stdio::null()).output().map_err(|source| Error::Start { command: line(command), source })
}

/// As [`run`], with bytes for its standard input.
pub(crate) fn run_with_input(command: &mut Command, input: &[u8]) -> Result<String, Error> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| Error::Start { command: line(command), source })?;
    let output = std::thread::scope(|scope| {
        if let Some(mut stdin) = child.stdin.take() {
            // A program that ends without reading all of its input says why by its status.
            scope.spawn(move || stdin.write_all(input));
        }
        child.wait_with_output()
    })
    .map_err(Error::system(format!("wait for {}", line(command))))?;
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(failed(command, &output)) }
}

/// The end of a program's output, as text.
pub(crate) fn tail(bytes: &[u8]) -> String {
    text(&bytes[bytes.len().saturating_sub(OUTPUT_SHOWN_BYTES)..])
}

fn failed(command: &Command, output: &Output) -> Error {
    let printed = [tail(&output.stdout), tail(&output.stderr)].concat();
    Error::Failed {
        command: line(command),
        status: output.status.to_string(),
        output: printed.trim_end().to_owned(),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A command line for people. A script given as an argument is shown by its first line.
fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| {
            let word = word.to_string_lossy();
            match word.split_once('\n') {
                Some((first, _)) => format!("{first}…"),
                None => word.into_owned(),
            }
        })
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_shows_the_command_and_what_it_said() {
        let error = run(Command::new("sh").args(["-c", "echo because >&2; exit 3"])).unwrap_err();
        assert_eq!(error.to_string(), "sh -c echo because >&2; exit 3 failed: exit status: 3\nbecause");
    }

    #[test]
    fn input_larger_than_a_pipe_passes() {
        let input = vec![b'x'; 1 << 20];
        assert_eq!(run_with_input(Command::new("wc").arg("-c"), &input).unwrap().trim(), "1048576");
    }
}
