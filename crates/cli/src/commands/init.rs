//! `init`: a commented fleet file for the project that lies here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use greenlight_config::init::{FILE_BYTES_MAX, PATH_DEPTH, ProjectFacts, propose, wants};
use serde_json::json;

use crate::args::{Global, Init};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::FLEET_FILE;

/// Directories that hold what others wrote.
const SKIPPED: [&str; 7] = [".git", ".greenlight", "node_modules", "target", "venv", ".venv", "__pycache__"];
/// Paths that are looked at; a project has fewer within two levels.
const PATHS_MAX: usize = 5_000;

pub(crate) fn run(global: &Global, init: &Init, printer: &Printer) -> Result<Exit, Failure> {
    let here = std::env::current_dir()
        .map_err(|error| Failure::usage(format!("cannot read the current directory: {error}")))?;
    let path = global.file.clone().unwrap_or_else(|| here.join(FLEET_FILE));
    let proposal = propose(&read_project(&here));
    if init.print {
        printer.raw(&proposal.text);
    } else {
        write_new(&path, &proposal.text)?;
    }
    for finding in &proposal.findings {
        printer.progress(format!("- {finding}"));
    }
    if !init.print {
        printer.result(format!("wrote {}", path.display()));
        printer.progress("read it, fill in your hosts, then: greenlight check");
        printer.json("init", json!({ "file": path, "findings": proposal.findings }));
    }
    Ok(Exit::Done)
}

/// Writes a file that must not be there yet: a fleet file is somebody's work.
fn write_new(path: &Path, text: &str) -> Result<(), Failure> {
    let created = OpenOptions::new().write(true).create_new(true).open(path);
    let written = created.and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
    written.map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => {
            Failure::usage(format!("{} is there already; nothing was changed", path.display()))
                .help("`greenlight init --print` shows what would be written")
        }
        _ => Failure::new(Exit::Failed, format!("cannot write {}: {error}", path.display())),
    })
}

fn read_project(directory: &Path) -> ProjectFacts {
    let mut paths = BTreeSet::new();
    list(directory, "", 1, &mut paths);
    let files = paths
        .iter()
        .filter(|path| wants(path))
        .filter_map(|path| Some((path.clone(), read_text(&directory.join(path))?)))
        .collect::<BTreeMap<_, _>>();
    let name = directory.file_name().map(|name| name.to_string_lossy().into_owned());
    ProjectFacts {
        directory: name.unwrap_or_default(),
        branch: git(directory, &["symbolic-ref", "--quiet", "--short", "HEAD"]),
        remote: git(directory, &["remote", "get-url", "origin"]),
        paths,
        files,
    }
}

fn list(directory: &Path, prefix: &str, depth: usize, paths: &mut BTreeSet<String>) {
    // A directory that cannot be read has nothing to propose.
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        if paths.len() >= PATHS_MAX || SKIPPED.contains(&name.as_str()) {
            continue;
        }
        let path = format!("{prefix}{name}");
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => {
                let path = format!("{path}/");
                if depth < PATH_DEPTH {
                    list(&entry.path(), &path, depth + 1, paths);
                }
                paths.insert(path);
            }
            Ok(kind) if kind.is_file() => {
                paths.insert(path);
            }
            _ => {}
        }
    }
}

fn read_text(path: &Path) -> Option<String> {
    let mut text = String::new();
    std::fs::File::open(path).ok()?.take(FILE_BYTES_MAX as u64).read_to_string(&mut text).ok()?;
    Some(text)
}

/// What git says; nothing where there is no repository.
fn git(directory: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new("git")
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
