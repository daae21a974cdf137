//! The binary: arguments, settings, commands, printing.
fn main() {}
