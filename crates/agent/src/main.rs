//! The agent as a program of its own: `greenlight-agent agent` serves on its standard streams, as `greenlight agent` does.

use std::path::Path;
use std::process::ExitCode;

use greenlight_agent::{serve, supervise};

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
        _ => Err("usage: greenlight-agent agent [supervise --root ROOT --process NAME]".to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("greenlight-agent: {error}");
            ExitCode::FAILURE
        }
    }
}
