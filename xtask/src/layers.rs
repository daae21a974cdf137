//! The layer rule: a crate depends only on crates of lower floors, and the floors that decide do no I/O, never
//! read the clock, and spawn nothing.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::syntax::{self, Mention, MentionKind};
use crate::{Error, workspace_root};

/// Every crate of the workspace with its floor. Crates of one floor do not know each other.
const FLOORS: [(&str, u8); 19] = [
    ("greenlight-model", 0),
    ("greenlight-verdict", 0),
    // Drives the program from outside, so it stands on none of its crates.
    ("greenlight-testbed", 0),
    ("greenlight-migration", 0),
    ("greenlight-config", 1),
    ("greenlight-gates", 1),
    ("greenlight-planner", 2),
    ("greenlight-interlock", 2),
    ("greenlight-simulator", 3),
    ("greenlight-store", 4),
    ("greenlight-depot", 5),
    ("greenlight-link", 6),
    ("greenlight-router", 7),
    ("greenlight-agent", 8),
    ("greenlight-drivers", 9),
    ("greenlight-controller", 10),
    ("greenlight", 11),
    ("greenlight-workbench", 12),
    ("xtask", 12),
];

/// What only developers run, and may boot real hosts for it.
const DEVELOPMENT: [&str; 2] = ["greenlight-workbench", "xtask"];

/// Floors up to this one know and decide; those above do.
const DECIDING: u8 = 3;

const IO: &str = "the floors that know and decide do no I/O";
const SOCKETS: &str = "the floors that know and decide do no I/O; addresses alone are in core::net";
const CLOCK: &str = "time is an input of the floors that know and decide";
const CHANCE: &str = "randomness is an input of the floors that know and decide";
const SPAWN: &str = "the floors that know and decide spawn nothing";
const HIDDEN: &str = "it could bring in what these floors must not use, out of this rule's sight";

/// What the deciding floors must not mention: the path's beginning, why.
const BANNED_PATHS: [(&[&str], &str); 11] = [
    (&["std", "fs"], IO),
    (&["std", "net"], SOCKETS),
    (&["std", "env"], IO),
    (&["std", "os"], IO),
    (&["std", "io", "stdin"], IO),
    (&["std", "io", "stdout"], IO),
    (&["std", "io", "stderr"], IO),
    (&["std", "process"], SPAWN),
    (&["std", "thread"], SPAWN),
    (&["std", "*"], HIDDEN),
    (&["std", "io", "*"], HIDDEN),
];

/// What they must not mention anywhere in a path.
const BANNED_SEGMENTS: [(&[&str], &str); 5] = [
    (&["SystemTime"], CLOCK),
    (&["Instant"], CLOCK),
    (&["Timestamp", "now"], CLOCK),
    (&["Zoned", "now"], CLOCK),
    (&["TimeZone", "system"], CLOCK),
];

/// What they must not depend on.
const BANNED_CRATES: [(&str, &str); 17] = [
    ("async-std", SPAWN),
    ("fastrand", CHANCE),
    ("getrandom", CHANCE),
    ("hyper", IO),
    ("libc", IO),
    ("mio", IO),
    ("nix", IO),
    ("rand", CHANCE),
    ("rayon", SPAWN),
    ("rusqlite", IO),
    ("rustix", IO),
    ("smol", SPAWN),
    ("socket2", IO),
    ("tempfile", IO),
    ("tokio", SPAWN),
    ("ureq", IO),
    ("walkdir", IO),
];

/// One place where the rule is broken.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Violation {
    file: PathBuf,
    line: usize,
    what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}: {}", self.file.display(), self.line, self.what)
    }
}

/// Reads the manifests and sources of the whole workspace.
pub(crate) fn check() -> Result<Vec<Violation>, Error> {
    let root = workspace_root();
    let mut manifests: Vec<_> =
        ["testbed", "workbench", "xtask"].iter().map(|name| root.join(name).join("Cargo.toml")).collect();
    for path in entries(&root.join("crates"))? {
        // A directory without a manifest is none of the workspace's.
        manifests.extend(Some(path.join("Cargo.toml")).filter(|manifest| manifest.exists()));
    }
    let mut violations = Vec::new();
    for path in manifests {
        let text = read(&path)?;
        let shown = path.strip_prefix(&root).unwrap_or(&path);
        let (found, decides) = check_manifest(shown, &text);
        violations.extend(found);
        if decides {
            let directory = path.parent().unwrap_or(&root);
            violations.extend(check_sources(&root, directory)?);
        }
    }
    violations.sort();
    Ok(violations)
}

/// Judges one manifest; true when its crate is one of those that decide.
fn check_manifest(path: &Path, text: &str) -> (Vec<Violation>, bool) {
    let mut violations = Vec::new();
    let mut violate = |name: &str, what: String| {
        let line = text.lines().position(|line| line.trim_start().trim_start_matches('"').starts_with(name));
        violations.push(Violation { file: path.into(), line: line.map_or(1, |line| line + 1), what });
    };
    let manifest: toml::Table = match toml::from_str(text) {
        Ok(manifest) => manifest,
        Err(error) => {
            violate("", format!("not a manifest: {}", error.message()));
            return (violations, false);
        }
    };
    let package = manifest.get("package").and_then(toml::Value::as_table);
    let name = package.and_then(|package| package.get("name")?.as_str()).unwrap_or_default();
    let Some(floor) = floor(name) else {
        violate("name", format!("crate {name:?} has no floor; give it one in xtask/src/layers.rs"));
        return (violations, false);
    };
    let decides = floor <= DECIDING && name != "greenlight-testbed";
    if decides && package.is_some_and(|package| package.contains_key("build")) {
        violate("build", format!("{name} has a build script: {HIDDEN}"));
    }
    for (kind, key, dependency) in dependencies(&manifest) {
        let is_ours = dependency == "xtask" || dependency.starts_with("greenlight");
        // A crate names itself to have features of its own in its tests.
        if dependency == name && kind == "dev-dependencies" {
            continue;
        }
        match self::floor(&dependency) {
            Some(below) if below >= floor && dependency != "greenlight-testbed" => violate(
                &key,
                format!(
                    "{name} (floor {floor}) depends on {dependency} (floor {below}); a crate depends only on crates of lower floors"
                ),
            ),
            Some(_)
                if dependency == "greenlight-testbed"
                    && kind != "dev-dependencies"
                    && !DEVELOPMENT.contains(&name) =>
            {
                violate(&key, format!("{name} depends on {dependency}, which is for tests"));
            }
            None if is_ours => {
                violate(&key, format!("{dependency} has no floor; give it one in xtask/src/layers.rs"));
            }
            _ => {}
        }
        let banned = BANNED_CRATES.iter().find(|(banned, _)| decides && *banned == dependency);
        if let Some((_, why)) = banned.filter(|_| kind != "dev-dependencies") {
            violate(&key, format!("{name} depends on {dependency}: {why}"));
        }
    }
    (violations, decides)
}

/// Kind, key and package name of every direct dependency, those for single platforms included.
fn dependencies(manifest: &toml::Table) -> Vec<(&'static str, String, String)> {
    let targets = manifest.get("target").and_then(toml::Value::as_table);
    let tables = targets.into_iter().flat_map(toml::Table::values).filter_map(toml::Value::as_table);
    let mut found = Vec::new();
    for table in tables.chain([manifest]) {
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            for (key, value) in table.get(kind).and_then(toml::Value::as_table).into_iter().flatten() {
                let package = value.get("package").and_then(toml::Value::as_str).unwrap_or(key);
                found.push((kind, key.clone(), package.to_owned()));
            }
        }
    }
    found
}

/// Judges the sources of a crate that decides, all but its tests.
fn check_sources(root: &Path, directory: &Path) -> Result<Vec<Violation>, Error> {
    let build = directory.join("build.rs");
    let shown = |path: &Path| path.strip_prefix(root).unwrap_or(path).to_owned();
    let mut violations = Vec::new();
    if build.exists() {
        violations.push(Violation {
            file: shown(&build),
            line: 1,
            what: format!("a build script: {HIDDEN}"),
        });
    }
    let mut files = Vec::new();
    collect(&directory.join("src"), &mut files)?;
    let mut tests = Vec::new();
    for file in &files {
        let (found, test_modules) = check_source(&shown(file), &read(file)?);
        violations.extend(found);
        tests.extend(test_modules.into_iter().map(|name| module_directory(file).join(name)));
    }
    violations.retain(|violation| {
        let file = root.join(&violation.file);
        !tests.iter().any(|test| file == test.with_extension("rs") || file.starts_with(test))
    });
    Ok(violations)
}

/// Where the modules of a file have their files.
fn module_directory(file: &Path) -> PathBuf {
    let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    if matches!(stem, "lib" | "main" | "mod") { file.with_file_name("") } else { file.with_extension("") }
}

/// Judges one source; with the modules that it has for tests only.
fn check_source(path: &Path, text: &str) -> (Vec<Violation>, Vec<String>) {
    let violation = |line, what| Violation { file: path.into(), line, what };
    let source = match syntax::read(text) {
        Ok(source) => source,
        Err(error) => return (vec![violation(1, format!("cannot be read: {error}"))], Vec::new()),
    };
    let mut violations: Vec<_> = source
        .mentions
        .iter()
        .filter_map(|mention| {
            let why = banned(mention)?;
            Some(violation(mention.line, format!("{}: {why}", mention.path.join("::"))))
        })
        .collect();
    violations.dedup();
    (violations, source.test_modules)
}

fn banned(mention: &Mention) -> Option<&'static str> {
    let path: Vec<_> = mention.path.iter().map(String::as_str).collect();
    let first = *path.first()?;
    match mention.kind {
        MentionKind::Rename if path == ["std"] || path == ["core"] || path == ["alloc"] => {
            return Some(HIDDEN);
        }
        MentionKind::Macro if first == "include" => return Some(HIDDEN),
        MentionKind::Attribute => return (first == "path").then_some(HIDDEN),
        _ => {}
    }
    let in_path =
        BANNED_PATHS.iter().find(|(start, _)| first == start[0] && path[1..].starts_with(&start[1..]));
    let segments =
        BANNED_SEGMENTS.iter().find(|(part, _)| path.windows(part.len()).any(|window| window == *part));
    // A name by itself may be a variable; it means the crate in an import and at the head of a path.
    let means_crate = path.len() > 1 || matches!(mention.kind, MentionKind::Import | MentionKind::Rename);
    let in_crate = BANNED_CRATES.iter().find(|(name, _)| means_crate && name.replace('-', "_") == first);
    in_path.or(segments).map(|(_, why)| *why).or(in_crate.map(|(_, why)| *why))
}

fn floor(name: &str) -> Option<u8> {
    FLOORS.iter().find(|(crate_name, _)| *crate_name == name).map(|(_, floor)| *floor)
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) -> Result<(), Error> {
    for path in entries(directory)? {
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = || Error::system(format!("read {}", directory.display()));
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(|error| failed()(error))? {
        paths.push(entry.map_err(|error| failed()(error))?.path());
    }
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(Error::system(format!("read {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_keeps_the_rule() {
        let violations = check().unwrap();
        let lines: Vec<_> = violations.iter().map(Violation::to_string).collect();
        assert!(lines.is_empty(), "\n{}", lines.join("\n"));
    }

    #[test]
    fn each_source_ban_is_caught() {
        for (source, reason) in [
            ("use std::fs;", IO),
            ("use std::{collections::BTreeMap, fs};", IO),
            ("use std::{fs as files, fmt};", IO),
            ("use ::std::fs::File;", IO),
            ("fn f() { std::fs::read(\"x\"); }", IO),
            ("pub use std::net::TcpStream;", SOCKETS),
            ("use std::net::IpAddr;", SOCKETS),
            ("fn f() { let x = std::env::var(\"HOME\"); }", IO),
            ("use std::os::unix::fs::MetadataExt;", IO),
            ("fn f() { std::io::stdin(); }", IO),
            ("use std::io; fn f() { io::stdout(); }", IO),
            ("use std::process::Command;", SPAWN),
            ("fn f() { std::thread::spawn(g); }", SPAWN),
            ("use std::{thread};", SPAWN),
            ("use tokio::sync::mpsc;", SPAWN),
            ("#[tokio::test] fn f() {}", SPAWN),
            ("use std::time::{Duration, Instant};", CLOCK),
            ("use std::time; fn f() { time::SystemTime::now(); }", CLOCK),
            ("use std::time as t; fn f() { t::Instant::now(); }", CLOCK),
            ("fn f() { crate::re_export::Instant::now(); }", CLOCK),
            ("use jiff::Timestamp; fn f() { Timestamp::now(); }", CLOCK),
            ("use jiff::Timestamp as T; fn f() { g(T::now); }", CLOCK),
            ("type T = jiff::Timestamp; fn f() { T::now(); }", CLOCK),
            ("fn f() { <jiff::Timestamp>::now(); }", CLOCK),
            ("fn f() { jiff::Zoned::now(); }", CLOCK),
            ("fn f() { jiff::tz::TimeZone::system(); }", CLOCK),
            ("fn f() { vec![jiff::Zoned::now()]; }", CLOCK),
            ("use rand::Rng;", CHANCE),
            ("fn f() { rand::random::<u8>(); }", CHANCE),
            ("use std as system;", HIDDEN),
            ("extern crate std as system;", HIDDEN),
            ("use std::*;", HIDDEN),
            ("include!(\"other.rs\");", HIDDEN),
            ("#[path = \"../../other.rs\"] mod other;", HIDDEN),
        ] {
            let text = format!("//! Header.\n\n{source}\n");
            let (violations, _) = check_source(Path::new("crates/x/src/lib.rs"), &text);
            let found = violations.first().map(Violation::to_string).unwrap_or_default();
            assert!(
                found.starts_with("crates/x/src/lib.rs:3: ") && found.ends_with(reason),
                "{source}: {found:?}"
            );
        }
    }

    #[test]
    fn what_is_allowed_is_let_through() {
        for source in [
            "use std::{collections::BTreeMap, fmt, time::Duration};",
            "fn f(address: core::net::IpAddr) {}",
            "use jiff::{Timestamp, tz::TimeZone}; fn f(now: Timestamp) { now.as_second(); }",
            "fn f(env: &Env) { env.process.thread(); let fs = env.fs; }",
            "/// Like std::fs, at an Instant.\nfn f() { g(\"std::fs\"); }",
            "#[cfg(test)]\nmod tests { use std::fs; fn f() { std::time::Instant::now(); } }",
            "#[serde(with = \"std::fs\")] struct S { rand: u8 } fn f(rand: u8) { g(rand) }",
        ] {
            let (violations, _) = check_source(Path::new("lib.rs"), source);
            assert_eq!(violations, [], "{source}");
        }
    }

    #[test]
    fn each_manifest_rule_can_be_broken() {
        let check = |name: &str, rest: &str| {
            let text = format!("[package]\nname = \"{name}\"\n{rest}\n");
            let lines: Vec<_> =
                check_manifest(Path::new("Cargo.toml"), &text).0.iter().map(ToString::to_string).collect();
            lines.join("\n")
        };
        for (name, rest, expected) in [
            (
                "greenlight-model",
                "[dependencies]\ngreenlight-store.workspace = true",
                "Cargo.toml:4: greenlight-model (floor 0) depends on greenlight-store (floor 4)",
            ),
            (
                "greenlight-planner",
                "[dependencies]\ngreenlight-interlock = { path = \"x\" }",
                "a crate depends only on crates of lower floors",
            ),
            (
                "greenlight-interlock",
                "[dev-dependencies]\ngreenlight-planner = { path = \"x\" }",
                "a crate depends only on crates of lower floors",
            ),
            (
                "greenlight-planner",
                "[dependencies]\nother = { package = \"greenlight-agent\", path = \"x\" }",
                "Cargo.toml:4: greenlight-planner (floor 2) depends on greenlight-agent",
            ),
            (
                "greenlight-agent",
                "[target.'cfg(unix)'.dependencies]\ngreenlight = { path = \"x\" }",
                "(floor 11)",
            ),
            ("greenlight-link", "[build-dependencies]\nxtask = { path = \"x\" }", "(floor 12)"),
            (
                "greenlight-agent",
                "[dependencies]\ngreenlight-testbed = { path = \"x\" }",
                "which is for tests",
            ),
            ("greenlight-testbed", "[dependencies]\ngreenlight-model = { path = \"x\" }", "lower floors"),
            ("greenlight-new", "", "\"greenlight-new\" has no floor"),
            (
                "greenlight",
                "[dependencies]\ngreenlight-new = { path = \"x\" }",
                "greenlight-new has no floor",
            ),
            (
                "greenlight-model",
                "[dependencies]\ntokio = \"1\"",
                "Cargo.toml:4: greenlight-model depends on tokio",
            ),
            (
                "greenlight-simulator",
                "[dependencies]\nchance = { package = \"rand\", version = \"1\" }",
                CHANCE,
            ),
            ("greenlight-config", "build = \"make.rs\"", HIDDEN),
        ] {
            let found = check(name, rest);
            assert!(found.contains(expected) && found.lines().count() == 1, "{name} {rest}: {found:?}");
        }
        assert_eq!(
            check(
                "greenlight-simulator",
                "[dependencies]\ngreenlight-planner = { path = \"x\" }\n[dev-dependencies]\ntempfile = \"3\""
            ),
            ""
        );
        assert_eq!(
            check("greenlight-simulator", "[dev-dependencies]\ngreenlight-simulator = { path = \"x\" }"),
            ""
        );
        assert_eq!(
            check(
                "greenlight-drivers",
                "[dependencies]\ntokio = \"1\"\n[dev-dependencies]\ngreenlight-testbed = { path = \"x\" }"
            ),
            ""
        );
    }

    #[test]
    fn modules_for_tests_are_found_in_their_files() {
        let of = |file: &str| module_directory(Path::new(file)).join("tests").with_extension("rs");
        assert_eq!(of("src/lib.rs"), Path::new("src/tests.rs"));
        assert_eq!(of("src/decide.rs"), Path::new("src/decide/tests.rs"));
        assert_eq!(of("src/decide/mod.rs"), Path::new("src/decide/tests.rs"));
    }
}
