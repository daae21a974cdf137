//! Whether an instance could take a release: looks at everything, changes nothing. What cannot be read has failed.

pub(crate) mod changes;
mod reach;
pub(crate) mod software;
mod surroundings;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use greenlight_link::message::SecretValue;
use greenlight_model::check::{Check, CheckOutcome};
use greenlight_model::fleet::{HostIdentity, ManagerKind, Process};
use greenlight_model::host::InstanceSpec;
use greenlight_model::id::{ReleaseId, VariableName};
use greenlight_model::quantity::ByteSize;
use greenlight_model::requirements::Requirements;

use crate::account;
use crate::context::Context;
use crate::failure::{OrHost as _, Outcome};
use crate::layout::Layout;
use crate::ledger;
use crate::manager::{self, Live, Manager};
use crate::observe;
use crate::plan;
use crate::ports;
use crate::run::Run;

/// What must be free beyond twice the release, so that logs and the ledger can still be written.
const DISK_MARGIN_BYTES: u64 = 64 << 20;

/// What was found: all good, or what is wrong and how to mend it.
pub(crate) struct Found {
    expected: String,
    result: Result<String, Wrong>,
    /// Where every host of the service must have the same.
    version: Option<String>,
}

impl Found {
    pub(crate) fn new(expected: impl Into<String>, result: Result<String, Wrong>) -> Self {
        Self { expected: expected.into(), result, version: None }
    }

    /// What every host of the service must have the same of.
    pub(crate) fn same_everywhere(
        expected: impl Into<String>,
        result: Result<String, Wrong>,
        version: String,
    ) -> Self {
        Self { expected: expected.into(), result, version: Some(version) }
    }
}

/// What is wrong.
pub(crate) struct Wrong {
    found: String,
    mend: String,
}

pub(crate) fn wrong(found: impl Into<String>, mend: impl Into<String>) -> Wrong {
    Wrong { found: found.into(), mend: mend.into() }
}

/// A look becomes a check; one that could not be made has failed.
pub(crate) fn conclude(name: impl Into<String>, outcome: Outcome<Found>) -> Check {
    let (expected, result, version) = match outcome {
        Ok(Found { expected, result, version }) => (expected, result, version),
        Err(error) => {
            let mend = "see to it that the agent's account can read this, and check again";
            ("something that can be read".to_owned(), Err(wrong(error.message, mend)), None)
        }
    };
    let (outcome, found, mend) = match result {
        Ok(found) => (CheckOutcome::Passed, found, String::new()),
        Err(Wrong { found, mend }) => (CheckOutcome::Failed, found, mend),
    };
    Check { name: name.into(), outcome, expected, found, mend, version }
}

/// What a preflight is about.
pub(crate) struct Asked<'a> {
    pub(crate) spec: &'a InstanceSpec,
    pub(crate) requires: &'a Requirements,
    pub(crate) release_bytes: u64,
    pub(crate) release: ReleaseId,
    pub(crate) identity: &'a HostIdentity,
    pub(crate) secrets: &'a BTreeMap<VariableName, SecretValue>,
}

/// Makes every check.
pub(crate) fn check(context: &Context, asked: &Asked<'_>) -> Vec<Check> {
    let Asked { spec, requires, release_bytes, release, identity, secrets } = *asked;
    let layout = Layout::new(&spec.root);
    let kind = manager::resolve(spec.manager);
    let manager = manager::of(kind, context.site(spec));
    let mut checks = vec![
        conclude("identity", surroundings::identity(identity)),
        conclude("root", root(&layout)),
        conclude("ledger", ledger_readable(&layout)),
        conclude("manager", manager_usable(&*manager, kind, spec)),
        conclude("disk", disk(&layout, requires, release_bytes, release)),
    ];
    checks.extend(requires.memory.map(|wanted| conclude("memory", surroundings::memory(wanted))));
    checks.extend(software::check(spec, requires, &layout, release));
    for process in spec.processes.values() {
        if let Some(user) = &process.user {
            checks.push(conclude(format!("user {user}"), user_usable(process)));
        }
        checks.push(conclude(format!("logs {}", process.name), logs_apart(&layout, process)));
    }
    checks.extend(surroundings::check(spec, requires));
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
    checks.extend(changes::local_changes(&layout));
    checks.extend(reach::check(&requires.reach, secrets));
    checks
}

fn root(layout: &Layout) -> Outcome<Found> {
    let place = observe::existing_ancestor(layout.root());
    let metadata = std::fs::metadata(place).or_host(|| format!("look at {}", place.display()))?;
    let expected = format!("{} can be written to", layout.root().display());
    if !metadata.is_dir() {
        let mend = "move it away, or give the service another root".to_owned();
        return Ok(Found::new(expected, Err(wrong(format!("{} is no directory", place.display()), mend))));
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
    Ok(Found::new(expected, result))
}

fn ledger_readable(layout: &Layout) -> Outcome<Found> {
    let ledger = ledger::load(layout)?;
    Ok(Found::new("a readable ledger", Ok(format!("generation {}", ledger.generation))))
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
    Ok(Found::new(name, result))
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
    Ok(Found::new(expected, result))
}

fn user_usable(process: &Process) -> Outcome<Found> {
    let result = match plan::account_of(process) {
        Ok(_) => Ok("it exists and can be used".to_owned()),
        Err(error) => Err(wrong(error.message, "create the account, or let the agent be root")),
    };
    Ok(Found::new("an account that processes can be started under", result))
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
    Ok(Found::new("one file for each stream", result))
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
    Ok(Found::new("free, or held by the service itself", result))
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

    fn all(spec: &InstanceSpec, requires: &Requirements) -> Vec<Check> {
        let (identity, secrets) = (HostIdentity::default(), BTreeMap::new());
        let release = fixture::mark(1, "v1").id;
        let asked =
            Asked { spec, requires, release_bytes: 1, release, identity: &identity, secrets: &secrets };
        check(&context(), &asked)
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
            ..Requirements::default()
        };
        let checks = all(&spec, &requires);
        let port = format!("port {}", held.local_addr().unwrap().port());
        let found: Vec<_> = checks.iter().map(outcome).collect();
        for expected in [
            ("identity", true),
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
        let checks = all(&spec, &Requirements::default());
        let ledger = checks.iter().find(|check| check.name == "ledger").unwrap();
        assert!(ledger.outcome == CheckOutcome::Failed && ledger.found.contains("damaged"), "{ledger:?}");
        assert!(checks.iter().any(|check| outcome(check) == ("disk", true)));
    }
}
