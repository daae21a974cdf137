//! Unit files of systemd that the project carries.

use super::{Draft, ProjectFacts, command, one_line, process_name};

pub(super) fn detect(facts: &ProjectFacts, draft: &mut Draft) {
    for (path, text) in facts.files.iter().filter(|(path, _)| path.ends_with(".service")) {
        let unit = Unit::read(text);
        let stem = path.rsplit('/').next().unwrap_or(path).trim_end_matches(".service");
        let shown = one_line(path);
        if stem.contains('@') || unit.value("Type") == Some("oneshot") {
            draft.found(format!("{shown}: a template or a one-time job is not proposed as a process"));
            continue;
        }
        let (Some(name), Some(start)) = (process_name(stem), unit.value("ExecStart")) else {
            draft.found(format!("{shown}: it states no command that could be proposed"));
            continue;
        };
        if draft.stated.iter().any(|stated| stated.name == name) {
            continue;
        }
        let start = start.trim_start_matches(['-', '@', ':', '+', '!']);
        if start.contains('%') {
            draft.found(format!("{shown}: its command holds specifiers of systemd (`%`); left out"));
            continue;
        }
        let directory = unit.value("WorkingDirectory").map(|path| format!("{}/", path.trim_end_matches('/')));
        let start = match &directory {
            // The release is the working directory wherever it lies.
            Some(directory) if directory.len() > 1 => start.replace(directory.as_str(), ""),
            _ => start.to_owned(),
        };
        match command::read(&name, &start, draft.program_folder, &shown) {
            Ok(mut candidate) => {
                for line in unit.values("Environment") {
                    for assignment in shell_words::split(line).unwrap_or_default() {
                        if let Some((name, value)) = assignment.split_once('=') {
                            candidate.set_variable(name, value);
                        }
                    }
                }
                if let Some(user) = unit.value("User") {
                    candidate.set_user(user);
                }
                if candidate.run.starts_with('/') {
                    draft.found(format!("{shown}: its program lies outside the release; check the path"));
                }
                draft.stated.push(candidate);
            }
            Err(why) => draft.found(format!("{shown}: left out: {why}")),
        }
    }
}

/// The `[Service]` section of a unit, lines that go on joined.
struct Unit(Vec<(String, String)>);

impl Unit {
    fn read(text: &str) -> Self {
        let joined = text.replace("\\\r\n", " ").replace("\\\n", " ");
        let mut section = "";
        let mut entries = Vec::new();
        for line in joined.lines().map(str::trim) {
            if line.starts_with('[') {
                section = line;
            } else if let (Some((key, value)), "[Service]", false) =
                (line.split_once('='), section, line.starts_with(['#', ';']))
            {
                entries.push((key.trim().to_owned(), value.trim().to_owned()));
            }
        }
        Self(entries)
    }

    fn value(&self, key: &str) -> Option<&str> {
        self.values(key).next()
    }

    /// What is stated under a key, as often as it is.
    fn values(&self, key: &str) -> impl Iterator<Item = &str> {
        self.0
            .iter()
            .filter(move |(own, value)| own == key && !value.is_empty())
            .map(|(_, value)| value.as_str())
    }
}
