//! The host around the service: who it is, its memory, accounts, paths, and what else runs there.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use greenlight_model::check::Check;
use greenlight_model::fleet::HostIdentity;
use greenlight_model::host::InstanceSpec;
use greenlight_model::quantity::ByteSize;
use greenlight_model::requirements::Requirements;

use super::{Found, conclude, wrong};
use crate::account::Account;
use crate::command::{self, Step};
use crate::facts;
use crate::failure::{OrHost as _, Outcome, host};
use crate::plan;
use crate::process;

/// How long `test` may take to look at a path: a network's file system may hang.
const LOOK_TIMEOUT: Duration = Duration::from_secs(10);
/// How much of a command line is shown.
const COMMAND_CHARS_MAX: usize = 120;

/// Accounts, paths and jobs.
pub(super) fn check(spec: &InstanceSpec, requires: &Requirements) -> Vec<Check> {
    let mut checks = Vec::new();
    for user in &requires.users {
        let found = Account::named(user.as_str()).map(|account| {
            let result = match account {
                Some(account) => Ok(format!("its number is {}", account.uid)),
                None => Err(wrong("there is none", format!("as root: adduser --system {user}"))),
            };
            Found::new(format!("an account {user}"), result)
        });
        checks.push(conclude(format!("account {user}"), found));
    }
    let accounts = accounts(spec);
    for path in &requires.paths {
        let found = may(&accounts, "-r", path, "can be read by");
        checks.push(conclude(format!("path {path}"), found));
    }
    for path in &requires.writable {
        let found = may(&accounts, "-w", path, "can be written to by");
        checks.push(conclude(format!("writable {path}"), found));
    }
    for words in &requires.not_running {
        checks.push(conclude(format!("job {}", words.join(" ")), not_running(words)));
    }
    checks
}

/// Who the host is, against who it should be.
pub(super) fn identity(expected: &HostIdentity) -> Outcome<Found> {
    let facts = facts::gather()?;
    let found = format!("{}, {}", facts.hostname, facts.os);
    let is_name = expected.hostname.as_ref().is_none_or(|name| *name == facts.hostname);
    let is_os = expected.os.as_ref().is_none_or(|os| {
        let rest = facts.os.strip_prefix(os.as_str());
        rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '.'))
    });
    let wanted: Vec<&str> =
        [&expected.hostname, &expected.os].into_iter().flatten().map(String::as_str).collect();
    let wanted = if wanted.is_empty() { "any host that answers".to_owned() } else { wanted.join(", ") };
    let result = if is_name && is_os {
        Ok(found)
    } else {
        Err(wrong(
            found,
            "this is another host than the fleet file means: see to its address, or to `hostname` and `os` there",
        ))
    };
    Ok(Found::new(wanted, result))
}

/// What the kernel thinks could be had without swapping.
pub(super) fn memory(wanted: ByteSize) -> Outcome<Found> {
    let text = fs::read_to_string("/proc/meminfo").or_host(|| "read /proc/meminfo".to_owned())?;
    let available = text
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        })
        .ok_or_else(|| host("/proc/meminfo does not say how much memory is available"))?;
    let available = ByteSize(available.saturating_mul(1024));
    let found = format!("{available} available");
    let result = if available >= wanted {
        Ok(found)
    } else {
        Err(wrong(found, "stop what else uses it, or give the host more"))
    };
    Ok(Found::new(format!("{wanted} available"), result))
}

/// The accounts of the service's processes by name; that of the agent stands for those that name none. What cannot be looked up is
/// named by its own check.
fn accounts(spec: &InstanceSpec) -> BTreeMap<String, Option<Account>> {
    let mut accounts = BTreeMap::new();
    for process in spec.processes.values() {
        if let Ok(Some(account)) = plan::account_of(process) {
            accounts.insert(account.name.clone(), Some(account));
        }
    }
    if accounts.is_empty() {
        accounts.insert(String::new(), None);
    }
    accounts
}

fn may(accounts: &BTreeMap<String, Option<Account>>, access: &str, path: &str, what: &str) -> Outcome<Found> {
    let mut names = Vec::new();
    for account in accounts.values() {
        let name =
            account.as_ref().map_or_else(|| "the agent's account".to_owned(), |account| account.name.clone());
        let argv = ["test", access, path].map(str::to_owned);
        let environment = command::helper_environment();
        let step = Step {
            argv: &argv,
            directory: None,
            environment: &environment,
            account: account.as_ref(),
            timeout: LOOK_TIMEOUT,
        };
        let ended = command::run(&step, &AtomicBool::new(false), &mut |_, _| {})
            .or_host(|| format!("look at {path}"))?;
        if !ended.status.success() {
            let found = match fs::symlink_metadata(path) {
                Ok(_) => format!("it is there, and {name} may not"),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => "it is not there".to_owned(),
                Err(error) => format!("it cannot be looked at: {error}"),
            };
            let expected = format!("{path} {what} {name}");
            return Ok(Found::new(
                expected,
                Err(wrong(found, "make it, or change its owner or mode, on this host")),
            ));
        }
        names.push(name);
    }
    let names = names.join(", ");
    Ok(Found::new(format!("{path} {what} {names}"), Ok("it can".to_owned())))
}

/// Whether a command runs here: its words, one after another, in the command line of any process.
fn not_running(words: &[String]) -> Outcome<Found> {
    let expected = "not running";
    // Where the processes of others are hidden (`hidepid`), none of them could be found.
    fs::read("/proc/1/cmdline").or_host(|| "see the processes of other accounts".to_owned())?;
    let own = std::process::id();
    for stat in process::all().or_host(|| "look at processes".to_owned())? {
        if stat.pid == own {
            continue;
        }
        // One that has ended meanwhile does not run.
        let Ok(line) = fs::read(format!("/proc/{}/cmdline", stat.pid)) else { continue };
        let line: Vec<String> = line
            .split(|byte| *byte == 0)
            .filter(|word| !word.is_empty())
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        if has_words(&line, words) {
            let shown: String = line.join(" ").chars().take(COMMAND_CHARS_MAX).collect();
            let since = stat.identity().started_at().map(|at| format!(" since {at:.0}")).unwrap_or_default();
            let found = format!("process {} runs{since}: {shown}", stat.pid);
            return Ok(Found::new(expected, Err(wrong(found, "wait until it has ended, and try again"))));
        }
    }
    Ok(Found::new(expected, Ok("not running".to_owned())))
}

/// A word stands for itself, and for a path that ends in it.
fn has_words(line: &[String], words: &[String]) -> bool {
    let is_same = |found: &String, word: &String| {
        found == word || found.strip_suffix(word.as_str()).is_some_and(|rest| rest.ends_with('/'))
    };
    line.windows(words.len()).any(|part| part.iter().zip(words).all(|(found, word)| is_same(found, word)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::{Command, Stdio};

    use greenlight_model::check::CheckOutcome;

    use super::*;
    use crate::fixture;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn a_job_is_known_by_its_words() {
        let line = words("/usr/bin/python3 -u /srv/web/bin/import.py --all");
        for (job, is_it) in [
            ("bin/import.py", true),
            ("import.py --all", true),
            ("python3 -u bin/import.py", true),
            ("python3 bin/import.py", false),
            ("port.py", false),
            ("--all more", false),
        ] {
            assert_eq!(has_words(&line, &words(job)), is_it, "{job}");
        }
    }

    #[test]
    fn a_job_that_runs_is_named_with_its_process() {
        // Another run of this test on the same machine has another.
        let seconds = format!("86399.{}", std::process::id());
        let job = ["sleep".to_owned(), seconds.clone()];
        let of = |job: &[String]| conclude("job", not_running(job));
        assert_eq!(of(&job).outcome, CheckOutcome::Passed);
        let mut child = Command::new("sleep").arg(&seconds).stdout(Stdio::null()).spawn().unwrap();
        let check = of(&job);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(check.outcome, CheckOutcome::Failed);
        assert!(check.found.contains(&format!("process {} runs since", child.id())), "{check:?}");
    }

    #[test]
    fn who_the_host_is_is_compared_in_whole_words() {
        let facts = facts::gather().unwrap();
        let of = |hostname: Option<&str>, os: Option<&str>| {
            let identity = HostIdentity { hostname: hostname.map(str::to_owned), os: os.map(str::to_owned) };
            conclude("identity", super::identity(&identity)).outcome == CheckOutcome::Passed
        };
        let first = facts.os.split(' ').next().unwrap();
        assert!(of(None, None) && of(Some(&facts.hostname), Some(&facts.os)) && of(None, Some(first)));
        assert!(!of(Some("another"), None) && !of(None, Some(&first[..first.len() - 1])));
    }

    #[test]
    fn paths_are_looked_at_as_the_processes_would() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
        fs::write(path("file"), "").unwrap();
        fs::set_permissions(path("file"), fs::Permissions::from_mode(0o644)).unwrap();
        let requires = Requirements {
            paths: vec![path("file"), path("missing")],
            writable: vec![path("")],
            memory: None,
            users: vec!["root".parse().unwrap(), "no-such-account".parse().unwrap()],
            ..Requirements::default()
        };
        let spec = fixture::spec(root.path().to_str().unwrap(), [fixture::process("web", &["sh"])]);
        let outcomes: Vec<_> = check(&spec, &requires).into_iter().map(|check| check.outcome).collect();
        let (passed, failed) = (CheckOutcome::Passed, CheckOutcome::Failed);
        assert_eq!(outcomes, [passed, failed, passed, failed, passed]);
        let of = |size| conclude("memory", super::memory(ByteSize(size))).outcome;
        assert_eq!([of(1), of(u64::MAX)], [passed, failed]);
    }
}
