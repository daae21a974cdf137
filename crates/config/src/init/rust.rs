//! Rust: built in release mode; the binary is what is released, with the directories that it reads.

use super::command::Candidate;
use super::{Draft, ProjectFacts};

const PORT: u16 = 8080;

pub(super) fn detect(facts: &ProjectFacts, draft: &mut Draft) {
    let Some(manifest) = facts.files.get("Cargo.toml").and_then(|text| text.parse::<toml::Table>().ok())
    else {
        return;
    };
    let locked = if facts.paths.contains("Cargo.lock") { " --locked" } else { "" };
    draft.build.push(format!("cargo build --release{locked}"));
    draft.found("Cargo.toml: built by `cargo build --release`");
    let name = |table: &toml::Value| table.get("name").and_then(toml::Value::as_str).map(str::to_owned);
    let mut binaries: Vec<String> =
        manifest.get("bin").and_then(toml::Value::as_array).into_iter().flatten().filter_map(name).collect();
    if binaries.is_empty() && facts.paths.contains("src/main.rs") {
        binaries.extend(manifest.get("package").and_then(name));
    }
    binaries.retain(|binary| super::process_name(binary).as_ref() == Some(binary));
    if binaries.is_empty() {
        draft.found("Cargo.toml: which binary runs is not clear; state it in a process");
    }
    // With another language beside it, the binary is one part among others.
    if draft.build.len() == 1 && !binaries.is_empty() {
        draft.include.extend(binaries.iter().map(|binary| format!("target/release/{binary}")));
        for directory in ["assets/", "config/", "migrations/", "public/", "static/", "templates/"] {
            if facts.paths.contains(directory) {
                draft.include.push(format!("{directory}**"));
            }
        }
    }
    let main = facts.files.get("src/main.rs").map_or("", String::as_str);
    let listens = ["axum", "actix", "hyper", "rocket", "warp", "poem", "TcpListener"]
        .iter()
        .any(|it| main.contains(it));
    if let (Some(binary), None) = (binaries.first(), &draft.usual) {
        let port = super::exposed_port(facts).or(listens.then_some(PORT));
        draft.usual = Some(Candidate::usual(binary, &format!("target/release/{binary}"), port, "Cargo.toml"));
    }
}
