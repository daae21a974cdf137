//! `Procfile`: one process per line; `release` is what changes the database.

use super::{Draft, ProjectFacts, command, one_line, process_name};

pub(super) fn detect(facts: &ProjectFacts, draft: &mut Draft) {
    let Some(text) = facts.files.get("Procfile") else { return };
    for line in text.lines() {
        let line = line.trim();
        let Some((label, command)) = line.split_once(':').filter(|_| !line.starts_with('#')) else {
            continue;
        };
        let Some(name) = process_name(label.trim()) else {
            draft.found(format!("Procfile: `{}` is not the name of a process; left out", one_line(label)));
            continue;
        };
        let candidate = command::read(&name, command, draft.program_folder, "Procfile");
        match candidate {
            Ok(candidate) if label.trim() == "release" => {
                if candidate.mentions_port() {
                    draft.found("Procfile: `release` asks for a port, which a migration has not; left out");
                    continue;
                }
                draft.found("Procfile: `release` changes the database, once per rollout");
                draft.migrate = Some(candidate.run);
            }
            Ok(mut candidate) => {
                // By convention only `web` is given a port.
                if candidate.name == "web" && candidate.port.is_none() {
                    candidate.port = Some(super::exposed_port(facts).unwrap_or(command::PORT_USUAL));
                }
                draft.stated.push(candidate);
            }
            Err(why) => draft.found(format!("Procfile: `{}` is left out: {why}", one_line(label))),
        }
    }
}
