//! Packages and runtimes: which versions this host has.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use greenlight_model::check::Check;
use greenlight_model::fleet::Process;
use greenlight_model::host::InstanceSpec;
use greenlight_model::id::ReleaseId;
use greenlight_model::requirements::Requirements;

use super::{Found, conclude, wrong};
use crate::command;
use crate::failure::{OrHost as _, Outcome, host};
use crate::layout::Layout;
use crate::observe;
use crate::version;

/// How long a program of the host may take to say what it is.
const ASK_TIMEOUT: Duration = Duration::from_secs(20);

/// Prints each package of its arguments with its version, or with nothing. Python 3.8 and later.
const PIP_SCRIPT: &str = "\
import sys, importlib.metadata as m
for n in sys.argv[1:]:
    try: v = m.version(n)
    except m.PackageNotFoundError: v = ''
    print(n, v, sep='\\t')
";

/// Every package and runtime that is required.
pub(crate) fn check(
    spec: &InstanceSpec,
    requires: &Requirements,
    layout: &Layout,
    release: ReleaseId,
) -> Vec<Check> {
    let tree = tree(layout, release);
    let mut checks: Vec<Check> = packages(&requires.packages);
    checks.extend(pip(requires, layout, &tree));
    let runtimes = requires.runtimes.iter();
    checks.extend(runtimes.map(|(name, wanted)| {
        let found =
            tree.as_ref().map_err(Clone::clone).and_then(|tree| runtime(name, wanted, spec, tree.as_deref()));
        conclude(format!("runtime {name}"), found)
    }));
    checks
}

/// The tree that programs inside the release are looked for in: the release itself where it is staged, else what runs now.
fn tree(layout: &Layout, release: ReleaseId) -> Outcome<Option<PathBuf>> {
    let is_staged = match observe::depot(layout)? {
        Some(depot) => depot.mark(release).or_host(|| "read which releases are staged".to_owned())?.is_some(),
        None => false,
    };
    if is_staged {
        return Ok(Some(layout.release(release)));
    }
    Ok(observe::linked(layout)?.map(|active| layout.release(active)))
}

fn packages(wanted: &[String]) -> Vec<Check> {
    let check = |name: &String| {
        let argv = ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Version}\n", "--", name];
        let captured = command::capture(&argv, ASK_TIMEOUT).or_host(|| "ask dpkg-query".to_owned())?;
        let installed = captured.stdout.lines().find_map(|line| line.strip_prefix("installed "));
        let result = match installed {
            Some(version) => Ok(format!("version {version}")),
            None => Err(wrong("not installed", format!("as root: apt-get install {name}"))),
        };
        let version = Some(installed.map_or_else(|| "none".to_owned(), str::to_owned));
        Ok(Found { version, ..Found::new("installed", result) })
    };
    wanted.iter().map(|name| conclude(format!("package {name}"), check(name))).collect()
}

fn pip(requires: &Requirements, layout: &Layout, tree: &Outcome<Option<PathBuf>>) -> Vec<Check> {
    let Some(venv) = requires.venv.as_ref().filter(|_| !requires.pip.is_empty()) else { return Vec::new() };
    let each = |found: &dyn Fn(&String) -> Outcome<Found>| -> Vec<Check> {
        requires.pip.iter().map(|name| conclude(format!("pip {name}"), found(name))).collect()
    };
    let directory = match (venv.starts_with('/'), tree) {
        (true, _) => PathBuf::from(venv),
        (false, Err(error)) => return each(&|_| Err(error.clone())),
        (false, Ok(Some(tree))) => tree.join(venv),
        (false, Ok(None)) => {
            let found =
                format!("no release under {} yet; `prepare` makes {venv} in it", layout.root().display());
            return each(&|name| Ok(Found::new(format!("{name} in {venv}"), Ok(found.clone()))));
        }
    };
    let python = directory.join("bin/python");
    let asked = ask_pip(&python, &requires.pip);
    each(&|name| {
        let versions = asked.clone()?;
        let version = versions.lines().find_map(|line| line.strip_prefix(name.as_str())?.strip_prefix('\t'));
        let version = version.filter(|version| !version.is_empty());
        let result = match version {
            Some(version) => Ok(format!("version {version}")),
            None => Err(wrong("not installed", format!("{} -m pip install {name}", python.display()))),
        };
        let version = Some(version.unwrap_or("none").to_owned());
        Ok(Found { version, ..Found::new(format!("installed in {}", directory.display()), result) })
    })
}

fn ask_pip(python: &Path, names: &[String]) -> Outcome<String> {
    let program = python.to_str().ok_or_else(|| host(format!("{} is not UTF-8", python.display())))?;
    // Isolated: neither the working directory nor the environment may add packages.
    let mut argv = vec![program, "-I", "-c", PIP_SCRIPT];
    argv.extend(names.iter().map(String::as_str));
    let captured =
        command::capture(&argv, ASK_TIMEOUT).or_host(|| format!("ask {program} for its packages"))?;
    if !captured.status.success() {
        let last = captured.stderr.lines().last().unwrap_or_default().to_owned();
        return Err(host(format!("{program} could not list its packages: {last}")));
    }
    Ok(captured.stdout)
}

/// Asks every interpreter of this runtime that a process will use; where no process names one, the first in the path.
fn runtime(name: &str, wanted: &str, spec: &InstanceSpec, tree: Option<&Path>) -> Outcome<Found> {
    let mut programs: BTreeSet<(String, String)> =
        spec.processes.values().filter_map(|process| interpreter(name, process, tree)).collect();
    if programs.is_empty() {
        // There is no program `python` on a current Debian.
        let usual: &[&str] = if name == "python" { &["python3", "python"] } else { &[name] };
        let path = command::PATH.to_owned();
        let first = usual.iter().find(|program| find(program, &path)).unwrap_or(&usual[0]);
        programs.insert(((*first).to_owned(), path));
    }
    let several = programs.len() > 1;
    let mend = format!("install {name} {wanted} on this host");
    let mut found = Vec::new();
    for (program, path) in programs {
        let Some(version) = ask(&program, &path)? else {
            return Ok(Found::new(wanted, Err(wrong(format!("there is no {program}"), mend))));
        };
        let Some(version) = version else {
            return Ok(Found::new(wanted, Err(wrong(format!("{program} does not say its version"), mend))));
        };
        let named = several || program.contains('/');
        let shown = format!(
            "{}{}",
            version::shown(&version),
            if named { format!(" ({program})") } else { String::new() }
        );
        match version::meets(&version, wanted) {
            Ok(true) => found.push(shown),
            Ok(false) => return Ok(Found::new(wanted, Err(wrong(shown, mend)))),
            Err(error) => {
                let mend = "write it as in `>=3.11` or `>=2.7.10, <3`";
                return Ok(Found::new(wanted, Err(wrong(error, mend))));
            }
        }
    }
    Ok(Found::new(wanted, Ok(found.join(", "))))
}

/// The program that a process is interpreted by, when that is this runtime, and where it is looked for: the process's own
/// program, or the runtime beside a program of the release (`venv/bin/python` beside `venv/bin/gunicorn`).
fn interpreter(name: &str, process: &Process, tree: Option<&Path>) -> Option<(String, String)> {
    let program = process.argv.first()?;
    let path = process.variables.iter().find(|(name, _)| name.as_str() == "PATH");
    let path = path.map_or(command::PATH, |(_, path)| path).to_owned();
    let file = program.rsplit('/').next().unwrap_or(program);
    let is_it = file
        .strip_prefix(name)
        .is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.'));
    if is_it && (!program.contains('/') || program.starts_with('/')) {
        return Some((program.clone(), path));
    }
    // What lies in a release that is not here yet, `prepare` brings: it is made with what is found in the path.
    let inside = |program: &str| {
        let place = tree?.join(program);
        place.exists().then(|| place.to_str().map(str::to_owned)).flatten()
    };
    if is_it {
        return inside(program).map(|program| (program, path));
    }
    let (directory, _) = program.rsplit_once('/')?;
    let beside = format!("{directory}/{name}");
    let beside = if program.starts_with('/') {
        Path::new(&beside).exists().then_some(beside)
    } else {
        inside(&beside)
    };
    beside.map(|program| (program, path))
}

fn find(program: &str, path: &str) -> bool {
    path.split(':').any(|directory| Path::new(directory).join(program).exists())
}

/// The version that a program says it has: none when there is no such program, and then none when it does not say.
fn ask(program: &str, path: &str) -> Outcome<Option<Option<Vec<u64>>>> {
    let mut environment = command::helper_environment();
    environment.insert("PATH".to_owned(), path.to_owned());
    // Some say it with a word, and some on the standard error.
    let asked =
        command::capture_with(&[program, "--version"], &environment, ASK_TIMEOUT).and_then(|captured| {
            if captured.status.success() {
                Ok(captured)
            } else {
                command::capture_with(&[program, "version"], &environment, ASK_TIMEOUT)
            }
        });
    match asked {
        Err(command::RunError::NotStarted { .. }) => Ok(None),
        asked => {
            let captured = asked.or_host(|| format!("ask {program} for its version"))?;
            Ok(Some(version::find(&captured.stdout).or_else(|| version::find(&captured.stderr))))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use greenlight_model::check::CheckOutcome;

    use super::*;
    use crate::fixture;

    /// A program that says it has this version.
    fn program(path: &Path, says: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("#!/bin/sh\necho '{says}'\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn the_interpreter_that_the_process_will_use_is_asked() {
        let root = tempfile::tempdir().unwrap();
        let old = root.path().join("old/python2.7");
        program(&old, "Python 2.7.6");
        program(&root.path().join("new/python2.7"), "Python 2.7.10");
        let required = |argv: &[&str], path: Option<&str>| {
            let mut process = fixture::process("web", argv);
            if let Some(path) = path {
                let directory = root.path().join(path).to_str().unwrap().to_owned();
                process.variables.insert("PATH".parse().unwrap(), directory);
            }
            let spec = fixture::spec(root.path().to_str().unwrap(), [process]);
            conclude("runtime python", runtime("python", ">=2.7.10, <3", &spec, Some(root.path())))
        };
        for (argv, path) in [
            (&[old.to_str().unwrap()][..], None),
            (&["python2.7", "app.py"], Some("old")),
            (&["old/python2.7", "app.py"], None),
        ] {
            let check = required(argv, path);
            assert!(check.found.starts_with("2.7.6"), "{check:?}");
            assert_eq!((check.outcome, check.expected.as_str()), (CheckOutcome::Failed, ">=2.7.10, <3"));
            assert!(check.mend.contains("install python >=2.7.10, <3"), "{check:?}");
        }
        let check = required(&["python2.7", "app.py"], Some("new"));
        assert_eq!((check.outcome, check.found.as_str()), (CheckOutcome::Passed, "2.7.10"));
        program(&root.path().join("venv/bin/python"), "Python 2.7.6");
        program(&root.path().join("venv/bin/gunicorn"), "gunicorn");
        let check = required(&["venv/bin/gunicorn", "app:app"], None);
        assert!(
            check.outcome == CheckOutcome::Failed && check.found.contains("venv/bin/python"),
            "{check:?}"
        );
    }

    #[test]
    fn packages_of_a_virtual_environment_are_asked_for_by_its_own_python() {
        let root = tempfile::tempdir().unwrap();
        let site = root.path().join("venv");
        program(&site.join("bin/python"), "Flask\t2.3.2\nSQLAlchemy\t");
        let layout = Layout::new(root.path());
        let mut requires = Requirements {
            pip: vec!["Flask".to_owned(), "SQLAlchemy".to_owned()],
            venv: Some(site.to_str().unwrap().to_owned()),
            ..Requirements::default()
        };
        let found = |requires: &Requirements| -> Vec<_> {
            let checks = pip(requires, &layout, &Ok(None)).into_iter();
            checks.map(|check| (check.name, check.outcome, check.version)).collect()
        };
        let version = |text: &str| Some(text.to_owned());
        assert_eq!(
            found(&requires),
            [
                ("pip Flask".to_owned(), CheckOutcome::Passed, version("2.3.2")),
                ("pip SQLAlchemy".to_owned(), CheckOutcome::Failed, version("none")),
            ]
        );
        requires.venv = Some(root.path().join("nowhere").to_str().unwrap().to_owned());
        assert!(found(&requires).iter().all(|(_, outcome, _)| *outcome == CheckOutcome::Failed));
        requires.venv = Some("venv".to_owned());
        assert!(
            found(&requires)
                .iter()
                .all(|(_, outcome, version)| { *outcome == CheckOutcome::Passed && version.is_none() })
        );
    }
}
