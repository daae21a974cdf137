//! What a developer runs: test, bed.
fn main() {}
