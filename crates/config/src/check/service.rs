//! Services by themselves: processes, log files, shared paths.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use greenlight_model::id::ProcessName;

use super::ports;
use crate::build::log_path;
use crate::language::{FleetFile, Process, Service};
use crate::problem::{Problems, suggest};
use crate::read::{At, Key, List};
use crate::requires;
use crate::text::{Command, RelativePath};

pub(super) fn check(file: &FleetFile, problems: &mut Problems) {
    let Some(services) = file.service.get() else { return };
    if services.entries.is_empty() && services.complete {
        problems.error(
            "no-service",
            &services.span,
            "there is nothing to release",
            "describe what is released in a table `[service.NAME]`".to_owned(),
        );
    }
    for (name, service) in services.good() {
        log_files(service, problems);
        shared_paths(&service.shared, problems);
        if let Some(requires) = service.requires.value() {
            requires::check(requires, problems);
        }
        if let Some(migrate) = service.migrate.value() {
            let parts = [&migrate.0.run, &migrate.0.contract, &migrate.0.dry_run, &migrate.0.backup];
            parts.into_iter().for_each(|part| command(part.get(), Port::HasNone, problems));
        }
        for (_, process) in service.process.good() {
            check_process(process, problems);
        }
        ports::check_service(name, service, problems);
    }
}

/// What `{port}` stands for in a command.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Port {
    /// The process's port.
    Stated,
    /// Nothing: the process states none.
    Missing,
    /// Nothing: the command is no process's.
    HasNone,
}

fn check_process(process: &Process, problems: &mut Problems) {
    let port = if process.port.is_absent() { Port::Missing } else { Port::Stated };
    command(process.run.get(), port, problems);
    command(process.stop.get(), port, problems);
    for (_, profile) in process.profile.good() {
        command(profile.run.get(), port, problems);
    }
    if let Some(health) = process.health.get() {
        if health.0.http.is_absent() && health.0.release.is_absent() {
            problems.error(
                "empty-health",
                &health.span,
                "this health check asks nothing",
                "state `http`, a path that answers 2xx, or `release`, a path that names the release"
                    .to_owned(),
            );
        } else if port == Port::Missing {
            problems.error(
                "health-without-port",
                &health.span,
                "there is a health check and no port to ask at",
                "state the process's `port`".to_owned(),
            );
        }
    }
    if let (Some(smoke), Port::Missing) = (process.smoke.get(), port) {
        problems.error(
            "smoke-without-port",
            &smoke.span,
            "there is a smoke start on another port, and the process has no port",
            "state the process's `port`, and `{port}` in `run`".to_owned(),
        );
    }
}

/// Placeholders, and what only a shell would understand.
fn command(command: Option<&At<Command>>, port: Port, problems: &mut Problems) {
    let Some(command) = command else { return };
    let placeholders: BTreeSet<&str> = command.placeholders().collect();
    for placeholder in placeholders {
        let (message, help) = match (placeholder, port) {
            ("port", Port::Stated) => continue,
            ("port", Port::Missing) => (
                "`{port}` stands for a port, and the process has none".to_owned(),
                "state its `port`".to_owned(),
            ),
            ("port", Port::HasNone) => (
                "`{port}` means something in a process's commands only".to_owned(),
                "write the number".to_owned(),
            ),
            _ => (
                format!("`{{{placeholder}}}` stands for nothing"),
                suggest(placeholder, "what may stand in braces", ["port"]).unwrap_or_default(),
            ),
        };
        problems.error("unknown-placeholder", &command.span, message, help);
    }
    if let Some(word) = command.shell_word() {
        problems.warning(
            "no-shell",
            &command.span,
            format!("no shell runs here: `{word}` is passed to the program as it stands"),
            "call a shell by name: `sh -c '…'`".to_owned(),
        );
    }
}

/// A process that shares a file for its two outputs, or shares one with another process, cannot be read afterwards.
fn log_files(service: &Service, problems: &mut Problems) {
    let Some(processes) = service.process.value() else { return };
    let mut written: BTreeMap<String, (&ProcessName, &str)> = BTreeMap::new();
    for (name, process) in processes.good() {
        for (stream, key) in [("stdout", &process.stdout), ("stderr", &process.stderr)] {
            if key.is_bad() {
                continue;
            }
            let path = log_path(key, name, stream);
            let span: &Range<usize> = key.get().map_or(&name.span, |path| &path.span);
            match written.get(&path) {
                Some((other, _)) if *other == &name.value => {
                    // Point at what was written; where that is `stdout` alone, the default of `stderr` is its equal.
                    let span = key.get().or_else(|| process.stdout.get()).map_or(span, |path| &path.span);
                    problems.error(
                        "shared-log",
                        span,
                        format!("process `{}` writes stdout and stderr to the same file, `{path}`", **name),
                        format!("keep them apart: `logs/{0}.stdout` and `logs/{0}.stderr`", **name),
                    );
                }
                Some((other, other_stream)) => problems.error(
                    "shared-log",
                    span,
                    format!(
                        "process `{}` writes {stream} to `{path}`, which is {other_stream} of process `{other}`",
                        **name
                    ),
                    "give each process its own two files".to_owned(),
                ),
                None => {
                    written.insert(path, (name, stream));
                }
            }
        }
    }
}

/// Two shared paths must be two places: each becomes a link in the release.
fn shared_paths(shared: &Key<List<RelativePath>>, problems: &mut Problems) {
    let Some(list) = shared.get() else { return };
    let mut before: BTreeSet<&str> = BTreeSet::new();
    let bare: Vec<&str> = list.items.iter().map(|path| path.0.trim_end_matches('/')).collect();
    let all: BTreeSet<&str> = bare.iter().copied().collect();
    for (path, item) in bare.iter().zip(&list.items) {
        if !before.insert(path) {
            problems.error("shared-twice", &item.span, format!("`{path}` is shared twice"), None);
            continue;
        }
        let parent = path.match_indices('/').map(|(at, _)| &path[..at]).find(|parent| all.contains(parent));
        if let Some(parent) = parent {
            problems.error(
                "shared-twice",
                &item.span,
                format!("`{path}` lies inside `{parent}`, which is shared as a whole"),
                "leave one of the two out".to_owned(),
            );
        }
    }
}
