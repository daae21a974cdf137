//! The agent as a program of its own: `greenlight-agent agent` serves on its standard streams, as `greenlight agent` does.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use greenlight_agent::{guard, rearm, serve, supervise};
use greenlight_model::id::Generation;

#[expect(
    clippy::print_stderr,
    reason = "a program without a terminal of its own says on standard error why it ends"
)]
fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments.as_slice() {
        ["agent"] => serve(std::io::stdin(), std::io::stdout()).map_err(|error| error.to_string()),
        ["agent", "supervise", "--root", root, "--process", process] => match process.parse() {
            Ok(process) => supervise(Path::new(root), &process).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        },
        ["agent", "guard", "--root", root, "--generation", generation, "--armed-at-ms", armed_at, rest @ ..] => {
            go_back(root, generation, armed_at, rest)
        }
        ["agent", "rearm", "--root", root] => rearm(Path::new(root)).map_err(|error| error.to_string()),
        _ => Err("usage: greenlight-agent agent [supervise --root ROOT --process NAME | guard --root ROOT --generation N \
                  --armed-at-ms N [--after-ms N] | rearm --root ROOT]"
            .to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("greenlight-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

fn go_back(root: &str, generation: &str, armed_at: &str, rest: &[&str]) -> Result<(), String> {
    let number = |text: &str| text.parse::<u64>().map_err(|error| format!("`{text}`: {error}"));
    let after = match rest {
        [] => None,
        ["--after-ms", after] => Some(Duration::from_millis(number(after)?)),
        _ => return Err(format!("`{}` is not known", rest.join(" "))),
    };
    guard(Path::new(root), Generation(number(generation)?), number(armed_at)?, after)
        .map_err(|error| error.to_string())
}
