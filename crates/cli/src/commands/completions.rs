//! `completions`: what shells need to complete commands and options.

use clap::CommandFactory;

use crate::args::Arguments;
use crate::failure::{Exit, Failure};
use crate::printer::Printer;

pub(crate) fn run(shell: clap_complete::Shell, printer: &Printer) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "greenlight", &mut script);
    printer.raw(&String::from_utf8_lossy(&script));
    Ok(Exit::Done)
}
