//! Whether an instance could take a release: looks at everything, changes nothing. What cannot be read has failed.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use greenlight_depot::host::{ChangeKind, HostDepot, LocalChange};
use greenlight_model::fleet::{ManagerKind, Process, Requirements};
use greenlight_model::host::{Check, CheckOutcome, InstanceSpec};
use greenlight_model::id::ReleaseId;
use greenlight_model::quantity::ByteSize;

use crate::account;
use crate::command;
use crate::context::Context;
use crate::failure::{OrHost as _, Outcome};
use crate::layout::Layout;
use crate::ledger;
use crate::manager::{self, Live, Manager};
use crate::observe;
use crate::plan;
use crate::ports;
use crate::run::Run;
use crate::version;

/// What must be free beyond twice the release, so that logs and the ledger can still be written.
const DISK_MARGIN_BYTES: u64 = 64 << 20;
/// How long a program of the host may take to say what it is.
const ASK_TIMEOUT: Duration = Duration::from_secs(20);
/// How many paths a message names.
const PATHS_SHOWN_MAX: usize = 5;

/// What was found: all good, or what is wrong and how to mend it.
struct Found {
    expected: String,
    result: Result<String, Wrong>,
}

struct Wrong {
    found: String,
    mend: String,
}

fn wrong(found: impl Into<String>, mend: impl Into<String>) -> Wrong {
    Wrong { found: found.into(), mend: mend.into() }
}

fn conclude(name: impl Into<String>, outcome: Outcome<Found>) -> Check {
    let name = name.into();
    match outcome {
        Ok(Found { expected, result: Ok(found) }) => {
            Check { name, outcome: CheckOutcome::Passed, expected, found, mend: String::new() }
        }
        Ok(Found { expected, result: Err(Wrong { found, mend }) }) => {
            Check { name, outcome: CheckOutcome::Failed, expected, found, mend }
        }
        Err(error) => Check {
            name,
            outcome: CheckOutcome::Failed,
            expected: "something that can be read".to_owned(),
            found: error.message,
            mend: "see to it that the agent's account can read this, and check again".to_owned(),
        },
    }
}

/// Makes every check.
pub(crate) fn check(
    context: &Context,
    spec: &InstanceSpec,
    requires: &Requirements,
    release_bytes: u64,
    release: ReleaseId,
) -> Vec<Check> {
    let layout = Layout::new(&spec.root);
    let kind = manager::resolve(spec.manager);
    let manager = manager::of(kind, context.site(spec));
    let mut checks = vec![
        conclude("root", root(&layout)),
        conclude("ledger", ledger_readable(&layout)),
        conclude("manager", manager_usable(&*manager, kind, spec)),
        conclude("disk", disk(&layout, requires, release_bytes, release)),
    ];
    checks.extend(packages(&requires.packages));
    checks.extend(
        requires
            .runtimes
            .iter()
            .map(|(name, wanted)| conclude(format!("runtime {name}"), runtime(name, wanted))),
    );
    for process in spec.processes.values() {
        if let Some(user) = &process.user {
            checks.push(conclude(format!("user {user}"), user_usable(process)));
        }
        checks.push(conclude(format!("logs {}", process.name), logs_apart(&layout, process)));
    }
    match running(context, &layout, spec) {
        Ok(own) => {
            for process in spec.processes.values() {
                let smoke = process.smoke.as_ref().map(|smoke| smoke.port);
                let ports =
                    process.port.into_iter().map(|port| (port, true)).chain(smoke.map(|port| (port, false)));
                checks.extend(ports.map(|(port, may_be_own)| {
                    conclude(format!("port {port}"), port_free(port, if may_be_own { &own } else { &[] }))
                }));
            }
        }
        Err(error) => checks.push(conclude("ports", Err(error))),
    }
    checks.extend(local_changes(&layout));
    checks
}

fn root(layout: &Layout) -> Outcome<Found> {
    let place = observe::existing_ancestor(layout.root());
    let metadata = std::fs::metadata(place).or_host(|| format!("look at {}", place.display()))?;
    let expected = format!("{} can be written to", layout.root().display());
    if !metadata.is_dir() {
        let mend = "move it away, or give the service another root".to_owned();
        return Ok(Found {
            expected,
            result: Err(wrong(format!("{} is no directory", place.display()), mend)),
        });
    }
    let result = match rustix::fs::access(place, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK) {
        Ok(()) => Ok(if place == layout.root() { "it is there" } else { "it can be created" }.to_owned()),
        Err(error) => {
            let own = account::Account::own()?.name;
            let root = layout.root().display();
            Err(wrong(
                format!("{own} may not write to {}: {error}", place.display()),
                format!("as root: install -d -o {own} {root} (or let the agent be root)"),
            ))
        }
    };
    Ok(Found { expected, result })
}

fn ledger_readable(layout: &Layout) -> Outcome<Found> {
    let ledger = ledger::load(layout)?;
    Ok(Found {
        expected: "a readable ledger".to_owned(),
        result: Ok(format!("generation {}", ledger.generation)),
    })
}

fn manager_usable(manager: &dyn Manager, kind: ManagerKind, spec: &InstanceSpec) -> Outcome<Found> {
    let name = match kind {
        ManagerKind::Systemd => "systemd",
        ManagerKind::SystemdUser => "systemd of the user",
        ManagerKind::Supervisord => "supervisord",
        ManagerKind::Agent | ManagerKind::Auto => "the agent's own supervision",
    };
    let processes: Vec<_> = spec.processes.keys().collect();
    let result = match manager.check(&processes) {
        Ok(()) => Ok(format!("{name} can be used")),
        // The message says both.
        Err(error) => Err(wrong(error.message, "see there; `manager` in the fleet file chooses another")),
    };
    Ok(Found { expected: name.to_owned(), result })
}

fn disk(layout: &Layout, requires: &Requirements, release_bytes: u64, release: ReleaseId) -> Outcome<Found> {
    let is_staged = match observe::depot(layout)? {
        Some(depot) => depot.mark(release).or_host(|| "read which releases are staged".to_owned())?.is_some(),
        None => false,
    };
    // Placing needs the objects and, while they are unpacked, once more the largest of them; twice is on the safe side.
    let own = if is_staged { 0 } else { release_bytes.saturating_mul(2).saturating_add(DISK_MARGIN_BYTES) };
    let needed = own.max(requires.disk.unwrap_or_default().0);
    let free = observe::free_bytes(layout.root())?;
    let expected = format!("{} free under {}", ByteSize(needed), layout.root().display());
    let found = format!("{} free", ByteSize(free));
    let result = if free >= needed {
        Ok(found)
    } else {
        Err(wrong(found, "free some space, prune old releases, or put the service on a larger disk"))
    };
    Ok(Found { expected, result })
}

fn packages(wanted: &[String]) -> Vec<Check> {
    let check = |name: &String| {
        let argv = ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Version}", "--", name];
        let captured = command::capture(&argv, ASK_TIMEOUT).or_host(|| "ask dpkg-query".to_owned())?;
        let installed = captured.stdout.lines().find_map(|line| line.strip_prefix("installed "));
        let result = match installed {
            Some(version) => Ok(format!("version {version}")),
            None => Err(wrong("not installed", format!("as root: apt-get install {name}"))),
        };
        Ok(Found { expected: "installed".to_owned(), result })
    };
    wanted.iter().map(|name| conclude(format!("package {name}"), check(name))).collect()
}

fn runtime(name: &str, wanted: &str) -> Outcome<Found> {
    // There is no program `python` on a current Debian.
    let programs: &[&str] = if name == "python" { &["python3", "python"] } else { &[name] };
    let mut result =
        Err(wrong(format!("there is no {name}"), format!("install {name} {wanted} on this host")));
    for program in programs {
        // Some say it with a word, and some on the standard error.
        let asked = command::capture(&[program, "--version"], ASK_TIMEOUT).and_then(|captured| {
            if captured.status.success() {
                Ok(captured)
            } else {
                command::capture(&[program, "version"], ASK_TIMEOUT)
            }
        });
        let captured = match asked {
            Err(command::RunError::NotStarted { .. }) => continue,
            asked => asked.or_host(|| format!("ask {program} for its version"))?,
        };
        let version = version::find(&captured.stdout).or_else(|| version::find(&captured.stderr));
        result = match version {
            None => Err(wrong(
                format!("{program} does not say its version"),
                format!("install {name} {wanted} on this host"),
            )),
            Some(version) => match version::meets(&version, wanted) {
                Ok(true) => Ok(version::shown(&version)),
                Ok(false) => {
                    let mend = format!("install {name} {wanted} on this host");
                    Err(wrong(version::shown(&version), mend))
                }
                Err(error) => Err(wrong(error, "write it as in `>=3.11` or `>=2.7.10, <3`")),
            },
        };
        break;
    }
    Ok(Found { expected: wanted.to_owned(), result })
}

fn user_usable(process: &Process) -> Outcome<Found> {
    let result = match plan::account_of(process) {
        Ok(_) => Ok("it exists and can be used".to_owned()),
        Err(error) => Err(wrong(error.message, "create the account, or let the agent be root")),
    };
    Ok(Found { expected: "an account that processes can be started under".to_owned(), result })
}

/// Two names can still be one file: by a link.
fn logs_apart(layout: &Layout, process: &Process) -> Outcome<Found> {
    let (stdout, stderr) = (layout.under_root(&process.stdout), layout.under_root(&process.stderr));
    let identity = |path: &Path| match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some((metadata.dev(), metadata.ino()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).or_host(|| format!("look at {}", path.display())),
    };
    let are_one = stdout == stderr
        || matches!((identity(&stdout)?, identity(&stderr)?), (Some(one), Some(other)) if one == other);
    let result = if are_one {
        let found = format!("{} and {} are the same file", stdout.display(), stderr.display());
        Err(wrong(found, "give each stream a file of its own"))
    } else {
        Ok("two files".to_owned())
    };
    Ok(Found { expected: "one file for each stream".to_owned(), result })
}

/// The main processes of the instance as they run now.
fn running(context: &Context, layout: &Layout, spec: &InstanceSpec) -> Outcome<Vec<u32>> {
    let run = match ledger::load(layout)?.active {
        Some(active) => Run::load(layout, active)?,
        None => None,
    };
    let Some(run) = run else { return Ok(Vec::new()) };
    let manager = manager::of(run.manager, context.site(spec));
    let mut pids = Vec::new();
    for name in run.desired.spec.processes.keys() {
        if let Live::Running(identity) = manager.state(name)? {
            pids.push(identity.pid);
        }
    }
    Ok(pids)
}

fn port_free(port: u16, own: &[u32]) -> Outcome<Found> {
    let result = match ports::listener(port)? {
        None => Ok("free".to_owned()),
        Some(listener)
            if listener.pids.iter().any(|pid| own.iter().any(|main| ports::belongs(*pid, *main))) =>
        {
            Ok("held by the service itself".to_owned())
        }
        Some(listener) => Err(wrong(
            format!("held by {}", listener.who()),
            "stop that process, or give this one another port",
        )),
    };
    Ok(Found { expected: "free, or held by the service itself".to_owned(), result })
}

/// What somebody wrote into the active release: data that the next release would not have, and edits that would be lost.
fn local_changes(layout: &Layout) -> Vec<Check> {
    let changes = (|| {
        let active = match ledger::load(layout)?.active {
            Some(active) => Some(active),
            None => observe::linked(layout)?,
        };
        match (active, observe::depot(layout)?) {
            (Some(active), Some(depot)) => changes_in(&depot, active),
            _ => Ok(Vec::new()),
        }
    })();
    let changes = match changes {
        Ok(changes) => changes,
        Err(error) => return vec![conclude("data", Err(error))],
    };
    let (added, edited): (Vec<_>, Vec<_>) =
        changes.into_iter().partition(|change| change.kind == ChangeKind::Added);
    let data = match added.is_empty() {
        true => Ok("none".to_owned()),
        false => Err(wrong(
            format!(
                "{} were written into the active release and would be missing in the next one",
                listed(&added)
            ),
            format!(
                "keep them outside of releases: shared = [{}] in the fleet file, and move them to {} on this host",
                shared_paths(&added),
                layout.shared().display()
            ),
        )),
    };
    let edits = match edited.is_empty() {
        true => Ok("none".to_owned()),
        false => Err(wrong(
            format!("{} differ from what was released", listed(&edited)),
            "take the edits over into the repository, or undo them on this host",
        )),
    };
    vec![
        conclude(
            "data",
            Ok(Found { expected: "no data inside the active release".to_owned(), result: data }),
        ),
        conclude(
            "local edits",
            Ok(Found { expected: "the active release as it was staged".to_owned(), result: edits }),
        ),
    ]
}

fn changes_in(depot: &HostDepot, active: ReleaseId) -> Outcome<Vec<LocalChange>> {
    depot.local_changes(active).or_host(|| "compare the active release with what was staged".to_owned())
}

fn listed(changes: &[LocalChange]) -> String {
    let shown: Vec<&str> = changes.iter().take(PATHS_SHOWN_MAX).map(|change| change.path.as_str()).collect();
    match changes.len().saturating_sub(PATHS_SHOWN_MAX) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// The paths as the fleet file would name them; what lies in a directory that was added is covered by it.
fn shared_paths(added: &[LocalChange]) -> String {
    let all: BTreeSet<&str> = added.iter().map(|change| change.path.as_str()).collect();
    let is_covered = |path: &str| path.match_indices('/').any(|(at, _)| all.contains(&path[..at]));
    let has_more_below = |path: &str| {
        all.iter().any(|other| other.strip_prefix(path).is_some_and(|rest| rest.starts_with('/')))
    };
    let shown = all.iter().filter(|path| !is_covered(path)).take(PATHS_SHOWN_MAX);
    shown
        .map(|path| format!("\"{path}{}\"", if has_more_below(path) { "/" } else { "" }))
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;
    use std::fs;

    fn outcome(check: &Check) -> (&str, bool) {
        (&check.name, check.outcome == CheckOutcome::Passed)
    }

    fn context() -> Context {
        Context {
            events: Box::new(|_| {}),
            cancelled: Default::default(),
            program: std::env::current_exe().unwrap(),
        }
    }

    #[test]
    fn every_check_says_what_it_expected_found_and_how_to_mend_it() {
        let root = tempfile::tempdir().unwrap();
        let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut process = fixture::process("web", &["sh"]);
        process.port = Some(held.local_addr().unwrap().port());
        process.user = Some("no-such-account".parse().unwrap());
        let spec = fixture::spec(root.path().join("srv/web").to_str().unwrap(), [process]);
        let requires = Requirements {
            disk: Some(ByteSize(u64::MAX)),
            runtimes: [("python", ">=3.0"), ("no-such-runtime", ">=1")]
                .map(|(n, v)| (n.to_owned(), v.to_owned()))
                .into(),
            packages: vec!["dpkg".to_owned(), "no-such-package".to_owned()],
        };
        let checks = check(&context(), &spec, &requires, 1, fixture::mark(1, "v1").id);
        let port = format!("port {}", held.local_addr().unwrap().port());
        let found: Vec<_> = checks.iter().map(outcome).collect();
        for expected in [
            ("root", true),
            ("ledger", true),
            ("manager", true),
            ("disk", false),
            ("package dpkg", true),
            ("package no-such-package", false),
            ("runtime python", true),
            ("runtime no-such-runtime", false),
            ("user no-such-account", false),
            ("logs web", true),
            (&port, false),
            ("data", true),
            ("local edits", true),
        ] {
            assert!(found.contains(&expected), "{expected:?} not in {found:?}");
        }
        for check in &checks {
            assert_eq!(check.mend.is_empty(), check.outcome == CheckOutcome::Passed, "{check:?}");
        }
        let held_by = checks.iter().find(|check| check.name == port).unwrap();
        assert!(held_by.found.contains(&std::process::id().to_string()), "{held_by:?}");
        assert!(!root.path().join("srv").exists(), "nothing was created");
    }

    #[test]
    fn two_names_for_one_log_are_found() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::new(root.path());
        fs::create_dir(root.path().join("logs")).unwrap();
        fs::write(root.path().join("logs/web.stdout"), "").unwrap();
        std::os::unix::fs::symlink("web.stdout", root.path().join("logs/web.stderr")).unwrap();
        let check = conclude("logs", logs_apart(&layout, &fixture::process("web", &["sh"])));
        assert_eq!(check.outcome, CheckOutcome::Failed, "{check:?}");
    }

    #[test]
    fn a_damaged_ledger_fails_and_does_not_end_the_checks() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::new(root.path());
        fs::create_dir(layout.state()).unwrap();
        fs::write(layout.ledger(), "{").unwrap();
        let spec = fixture::spec(root.path().to_str().unwrap(), [fixture::process("web", &["sh"])]);
        let checks = check(&context(), &spec, &Requirements::default(), 1, fixture::mark(1, "v1").id);
        let ledger = checks.iter().find(|check| check.name == "ledger").unwrap();
        assert!(ledger.outcome == CheckOutcome::Failed && ledger.found.contains("damaged"), "{ledger:?}");
        assert!(checks.iter().any(|check| outcome(check) == ("disk", true)));
    }

    #[test]
    fn paths_are_proposed_as_the_fleet_file_names_them() {
        let change = |path: &str| LocalChange { path: path.to_owned(), kind: ChangeKind::Added };
        let added = ["app.db", "var", "var/a", "var/b", "x/y"].map(change);
        assert_eq!(shared_paths(&added), r#""app.db", "var/", "x/y""#);
    }
}
