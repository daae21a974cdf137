//! Reads greenlight.toml: text in, a fleet or all its errors at once out.
