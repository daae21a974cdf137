//! Proposes a fleet file for a project, from what lies in it.
//!
//! The caller reads the project ([`wants`] says which files) and hands over [`ProjectFacts`]; [`propose`] answers with a
//! commented file. Guarantees: the text passes [`crate::parse`], whatever the project's files hold; what could not be
//! told, or was left out, is among the findings. Not in here: any I/O, and any certainty. It is a draft to be read.

mod command;
mod node;
mod procfile;
mod python;
mod render;
mod ruby;
mod rust;
mod systemd;

use std::collections::{BTreeMap, BTreeSet};

use greenlight_model::id::{ProcessName, ServiceName};

use crate::read::Text;
use crate::text::{VersionRequirement, Word};
use command::Candidate;

/// What a caller found by reading a project.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProjectFacts {
    /// The name of the project's directory.
    pub directory: String,
    /// The git branch that is checked out.
    pub branch: Option<String>,
    /// The address of the git remote.
    pub remote: Option<String>,
    /// Files and directories, relative to the project, [`PATH_DEPTH`] levels deep; a directory ends with `/`.
    pub paths: BTreeSet<String>,
    /// The contents of those files of `paths` that [`wants`] asks for.
    pub files: BTreeMap<String, String>,
}

/// How deep [`ProjectFacts::paths`] goes: `mysite/wsgi.py` and `deploy/web.service` are two levels deep.
pub const PATH_DEPTH: usize = 2;
/// Longest file that is worth reading here; a longer one is not written by hand.
pub const FILE_BYTES_MAX: usize = 1 << 20;

/// A fleet file to begin with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposal {
    /// The commented text of `greenlight.toml`. It passes [`crate::parse`].
    pub text: String,
    /// What was found and what is left to do, one sentence each.
    pub findings: Vec<String>,
}

/// Whether the contents of a file, by its path relative to the project, help to propose a fleet file.
#[must_use]
pub fn wants(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    let depth = path.split('/').count();
    let is_top = matches!(
        name,
        "pyproject.toml"
            | ".python-version"
            | "package.json"
            | ".nvmrc"
            | "server.js"
            | "Cargo.toml"
            | "Gemfile"
            | ".ruby-version"
            | "Makefile"
            | "Procfile"
            | "Dockerfile"
            | ".env.example"
            | "app.py"
            | "main.py"
            | "wsgi.py"
            | "asgi.py"
    ) || name.starts_with("requirements") && name.ends_with(".txt");
    let is_below =
        name.ends_with(".service") || matches!(name, "settings.py" | "urls.py" | "routes.rb" | "main.rs");
    depth <= PATH_DEPTH && (depth == 1 && is_top || is_below)
}

/// What the proposal is going to say; filled in by one kind of project after another.
#[derive(Debug, Default)]
struct Draft {
    build: Vec<String>,
    include: Vec<String>,
    shared: Vec<String>,
    prepare: Vec<String>,
    runtimes: BTreeMap<String, String>,
    migrate: Option<String>,
    /// Processes that the project states itself.
    stated: Vec<Candidate>,
    /// The process that projects of this kind usually have, where none is stated.
    usual: Option<Candidate>,
    /// Directories in which the programs of the project's own environment lie, by the program's name before.
    program_folder: Option<&'static str>,
    findings: Vec<String>,
}

impl Draft {
    fn found(&mut self, finding: impl Into<String>) {
        self.findings.push(finding.into());
    }

    /// Notes which versions of a runtime will do, when `text` can be put as a requirement.
    fn runtime(&mut self, name: &str, text: &str, source: &str) {
        match requirement(text) {
            Some(requirement) => {
                self.found(format!("{source}: {name} {requirement}"));
                self.runtimes.insert(name.to_owned(), requirement);
            }
            None => {
                self.found(format!(
                    "{source}: `{}` was not understood as versions of {name}",
                    one_line(text)
                ));
            }
        }
    }
}

/// Proposes a fleet file.
#[must_use]
pub fn propose(facts: &ProjectFacts) -> Proposal {
    let mut draft = Draft::default();
    python::detect(facts, &mut draft);
    node::detect(facts, &mut draft);
    rust::detect(facts, &mut draft);
    ruby::detect(facts, &mut draft);
    makefile(facts, &mut draft);
    procfile::detect(facts, &mut draft);
    systemd::detect(facts, &mut draft);
    shared_paths(facts, &mut draft);
    let processes = processes(facts, &mut draft);
    let name = service_name(facts);
    let branch = facts.branch.as_deref().filter(|branch| Word::from_text(branch).is_ok());
    draft.found(format!("hosts: put your own in place of `{name}.example.org`"));
    let text = render::render(&name, branch, &draft, &processes, &secrets(facts));
    Proposal { text, findings: draft.findings }
}

/// The repository's name, else the directory's, as a service may be called.
fn service_name(facts: &ProjectFacts) -> ServiceName {
    let repository = facts.remote.as_deref().and_then(|remote| {
        let name = remote.trim_end_matches('/').rsplit(['/', ':']).next()?;
        Some(name.trim_end_matches(".git"))
    });
    repository
        .into_iter()
        .chain([facts.directory.as_str(), "app"])
        .find_map(|name| name_from(name)?.parse().ok())
        .unwrap_or_else(fallback_name)
}

#[expect(clippy::expect_used, reason = "a constant that is a name")]
fn fallback_name() -> ServiceName {
    "app".parse().expect("`app` is a name")
}

/// A text as a name: what a name may not hold becomes a dash.
fn name_from(text: &str) -> Option<String> {
    let dashed: String = text
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c.to_ascii_lowercase() } else { '-' })
        .take(greenlight_model::id::NAME_BYTES_MAX)
        .collect();
    let name = dashed.trim_matches(['-', '.', '_']);
    (!name.is_empty()).then(|| name.to_owned())
}

/// The processes to propose: those that the project states, else the usual one; each with a name and a port of its own.
fn processes(facts: &ProjectFacts, draft: &mut Draft) -> Vec<Candidate> {
    let mut candidates = std::mem::take(&mut draft.stated);
    if candidates.is_empty() {
        candidates.extend(draft.usual.take());
    }
    if candidates.is_empty() {
        draft.found("nothing says which command runs it: state it in `[service.….process.web]`");
    }
    let mut names = BTreeSet::new();
    let mut ports = BTreeSet::new();
    candidates.retain(|candidate| names.insert(candidate.name.clone()));
    for candidate in &mut candidates {
        if candidate.port.is_none() && candidate.mentions_port() {
            candidate.port = Some(exposed_port(facts).unwrap_or(command::PORT_USUAL));
        }
        while let Some(port) = candidate.port
            && !ports.insert(port)
        {
            candidate.port = port.checked_add(1);
            draft.findings.push(format!(
                "`{}`: port {port} is taken by another process, so the next one",
                candidate.name
            ));
        }
        if candidate.port.is_none() && candidate.mentions_port() {
            candidate.port = Some(command::PORT_USUAL).filter(|port| ports.insert(*port));
        }
        candidate.health = candidate.port.and_then(|_| health(facts));
        match (&candidate.port, &candidate.health) {
            (Some(_), Some(path)) => {
                draft.findings.push(format!(
                    "`{}`: health is asked at `{path}`, which the code mentions",
                    candidate.name
                ));
            }
            (Some(_), None) => draft.findings.push(format!(
                "`{}`: give it a path that answers 2xx when it is healthy, and state it as `health`",
                candidate.name
            )),
            (None, _) => {}
        }
        draft.findings.push(format!("`{}`: from {}", candidate.name, candidate.source));
    }
    candidates.retain(|candidate| candidate.port.is_some() || !candidate.mentions_port());
    candidates
}

/// A path for health checks that the code mentions.
fn health(facts: &ProjectFacts) -> Option<String> {
    let code = |path: &str| [".py", ".js", ".rb", ".rs"].iter().any(|end| path.ends_with(end));
    let texts: Vec<&String> =
        facts.files.iter().filter(|(path, _)| code(path)).map(|(_, text)| text).collect();
    // `rails/health#show` is what new Rails applications answer `/up` with.
    ["/health", "/healthz", "/_health", "/up", "/status", "/ping", "/__heartbeat__", "/__lbheartbeat__"]
        .into_iter()
        .find(|path| {
            let quoted = |quote: char| [format!("{quote}{path}{quote}"), format!("{quote}{path}/{quote}")];
            // Django and Rails write routes without the slash in front.
            let bare = |quote: char| {
                [format!("{quote}{}{quote}", &path[1..]), format!("{quote}{}/{quote}", &path[1..])]
            };
            let needles: Vec<String> =
                ['"', '\''].into_iter().flat_map(|quote| [quoted(quote), bare(quote)].concat()).collect();
            texts.iter().any(|text| {
                text.lines().any(|line| {
                    (line.contains("rout")
                        || line.contains("path(")
                        || line.contains("get(")
                        || line.contains("get "))
                        && needles.iter().any(|needle| line.contains(needle.as_str()))
                })
            })
        })
        .map(str::to_owned)
}

/// The port that a Dockerfile exposes.
fn exposed_port(facts: &ProjectFacts) -> Option<u16> {
    let text = facts.files.get("Dockerfile")?;
    text.lines().find_map(|line| {
        let port = line.trim().strip_prefix("EXPOSE ")?.trim().split(['/', ' ']).next()?.parse().ok()?;
        (port > 0).then_some(port)
    })
}

/// Targets of a Makefile that make what belongs to a release.
fn makefile(facts: &ProjectFacts, draft: &mut Draft) {
    let Some(text) = facts.files.get("Makefile") else { return };
    let targets: BTreeSet<&str> = text
        .lines()
        .filter(|line| !line.starts_with(['\t', ' ', '#', '.']))
        .filter_map(|line| line.split_once(':').filter(|(_, after)| !after.starts_with('=')))
        .flat_map(|(targets, _)| targets.split_whitespace())
        .collect();
    let mut wanted: Vec<&str> = ["assets", "css", "js", "static", "i18n"]
        .into_iter()
        .filter(|target| targets.contains(target))
        .collect();
    if wanted.is_empty() && draft.build.is_empty() {
        wanted.extend(["build", "all"].into_iter().find(|target| targets.contains(target)));
    }
    if !wanted.is_empty() {
        let step = format!("make {}", wanted.join(" "));
        draft.found(format!("Makefile: `{step}` belongs to the build"));
        draft.build.push(step);
    }
}

/// Places that usually hold what users brought, or a database: they must outlive releases.
fn shared_paths(facts: &ProjectFacts, draft: &mut Draft) {
    let directories =
        ["uploads/", "media/", "public/uploads/", "static/uploads/", "var/uploads/", "instance/", "storage/"];
    for directory in directories {
        if facts.paths.contains(directory) {
            draft.found(format!("`{directory}`: shared, so that what is in it outlives releases"));
            draft.shared.push(directory.to_owned());
        }
    }
    for path in &facts.paths {
        let is_database = [".sqlite3", ".sqlite", ".db"].iter().any(|end| path.ends_with(end));
        if is_database && !path.contains('/') && crate::text::RelativePath::from_text(path).is_ok() {
            draft
                .findings
                .push(format!("`{path}`: a data file; shared, so that a release does not replace it"));
            draft.shared.push(path.clone());
        }
    }
}

/// Variables of `.env.example` that look like secrets.
fn secrets(facts: &ProjectFacts) -> Vec<String> {
    let Some(text) = facts.files.get(".env.example") else { return Vec::new() };
    let names = text
        .lines()
        .filter_map(|line| Some(line.trim().trim_start_matches("export ").split_once('=')?.0.trim()));
    let is_secret = |name: &&str| {
        ["SECRET", "PASSWORD", "TOKEN", "DATABASE_URL", "_KEY"].iter().any(|part| name.contains(part))
            && name.parse::<greenlight_model::id::VariableName>().is_ok()
    };
    let mut names: Vec<String> = names.filter(is_secret).map(str::to_owned).collect();
    names.dedup();
    names
}

/// Versions as other tools write them, as a requirement: `^3.9` and `~=3.9` are `>=3.9`, `3.11.4` is `>=3.11`.
fn requirement(text: &str) -> Option<String> {
    let text = text.trim().trim_matches(['"', '\'']);
    let first = text.split("||").next().unwrap_or(text).trim();
    let parts: Vec<String> = first
        .split([',', ' '])
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(|part| {
            let bare =
                part.trim_start_matches(['^', '~', '=', 'v']).trim_end_matches(".x").trim_end_matches(".*");
            match part.chars().next() {
                Some('>' | '<' | '!') => part.to_owned(),
                _ => format!(">={}", bare.splitn(3, '.').take(2).collect::<Vec<_>>().join(".")),
            }
        })
        .collect();
    let requirement = parts.join(", ");
    VersionRequirement::from_text(&requirement).is_ok().then_some(requirement)
}

/// A text of another file as it may stand in a finding or a comment.
fn one_line(text: &str) -> String {
    const CHARS_MAX: usize = 80;
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(CHARS_MAX).collect()
}

/// The name of a process, from a text of another file.
fn process_name(text: &str) -> Option<String> {
    name_from(text).filter(|name| name.parse::<ProcessName>().is_ok())
}

#[cfg(test)]
mod tests;
