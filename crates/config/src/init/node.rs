//! Node: installed from the lock file and built in the checkout; the start script runs it.

use serde_json::Value;

use super::command::{self, Candidate};
use super::{Draft, ProjectFacts};

const PORT: u16 = 3000;

pub(super) fn detect(facts: &ProjectFacts, draft: &mut Draft) {
    let Some(text) = facts.files.get("package.json") else { return };
    let Ok(package) = serde_json::from_str::<Value>(text) else {
        draft.found("package.json: it is not JSON and was left alone");
        return;
    };
    let (install, run) = if facts.paths.contains("pnpm-lock.yaml") {
        ("pnpm install --frozen-lockfile", "pnpm run")
    } else if facts.paths.contains("yarn.lock") {
        ("yarn install --frozen-lockfile", "yarn run")
    } else if facts.paths.contains("package-lock.json") {
        ("npm ci", "npm run")
    } else {
        draft.found("package.json: there is no lock file, so two builds of one commit may differ");
        ("npm install", "npm run")
    };
    let script = |name: &str| package["scripts"][name].as_str();
    draft.build.push(install.to_owned());
    if script("build").is_some() {
        draft.build.push(format!("{run} build"));
    }
    draft.found(format!("package.json: built by `{install}`"));
    match (package["engines"]["node"].as_str(), facts.files.get(".nvmrc")) {
        (Some(versions), _) => draft.runtime("node", versions, "package.json"),
        (None, Some(version)) => draft.runtime("node", version, ".nvmrc"),
        (None, None) => {}
    }
    if facts.paths.contains("prisma/") && draft.migrate.is_none() {
        draft.found("prisma: migrations run once per rollout");
        draft.migrate = Some("node_modules/.bin/prisma migrate deploy".to_owned());
    }
    // With Python or Ruby beside it, the package makes the assets and something else serves them.
    if draft.usual.is_none() && draft.program_folder.is_none() && !facts.files.contains_key("Gemfile") {
        match start(facts, script("start"), run) {
            Ok(candidate) => draft.usual = candidate,
            Err(why) => draft.found(format!("package.json: its start script is left out: {why}")),
        }
    }
}

/// What the start script runs; through the package manager only when it is more than a call of node.
fn start(facts: &ProjectFacts, script: Option<&str>, run: &str) -> Result<Option<Candidate>, String> {
    let mut candidate = match script {
        Some(script) if script.starts_with("node ") => {
            command::read("web", script, None, "package.json, scripts.start")?
        }
        Some(_) => Candidate::usual("web", &format!("{run} start"), None, "package.json, scripts.start"),
        None if facts.paths.contains("server.js") => {
            Candidate::usual("web", "node server.js", None, "server.js")
        }
        None => return Ok(None),
    };
    candidate.port = candidate.port.or(super::exposed_port(facts)).or(Some(PORT));
    Ok(Some(candidate))
}
