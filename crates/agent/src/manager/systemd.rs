//! systemd, the system's manager or the user's: one unit per process, written by us.
//!
//! `systemctl` is run with argument vectors; a unit of our name that somebody else wrote is never touched.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use greenlight_model::id::{ProcessName, ServiceName};
use serde::{Deserialize, Serialize};

use super::{ANSWER_TIMEOUT, Live, Manager, Site, at_boot_name, unit_name};
use crate::account::{self, Account};
use crate::command::{self, Captured};
use crate::failure::{OrHost as _, Outcome, host, release};
use crate::files;
use crate::plan::Plan;
use crate::process::Identity;

/// What is there when systemd has booted the machine.
pub(crate) const BOOTED: &str = "/run/systemd/system";
/// The first line of every unit that is ours.
const HEADER: &str = "# Written by greenlight. Changes are lost with the next activation.";
const UNIT_BYTES_MAX: u64 = 1024 * 1024;
/// The first that can append to log files, and that starts as we need it (`Type=exec`).
const VERSION_MIN: u32 = 240;
/// So many failures within [`RESTARTS_WITHIN_S`] seconds, and the process is given up.
const RESTARTS_MAX: u32 = 5;
const RESTARTS_WITHIN_S: u32 = 120;
/// The pause before a new start, in seconds: long enough that an ended process is seen as such.
const RESTART_PAUSE_S: u32 = 1;

/// Whose manager it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Scope {
    /// The system's.
    System,
    /// The user's.
    User,
}

/// systemd.
pub(crate) struct Systemd {
    site: Site,
    scope: Scope,
}

/// Whether the account that the agent works under has a manager of its own that runs.
pub(crate) fn has_user_manager() -> bool {
    user_runtime_directory().join("systemd/private").exists()
}

fn user_runtime_directory() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(directory) if !directory.is_empty() => directory.into(),
        _ => PathBuf::from(format!("/run/user/{}", rustix::process::geteuid().as_raw())),
    }
}

/// Runs a program that gives orders to one of the managers (`systemctl`, `systemd-run`).
pub(crate) fn invoke(
    scope: Scope,
    program: &str,
    arguments: &[&str],
    timeout: Duration,
) -> Outcome<Captured> {
    let mut argv = vec![program, "--no-ask-password"];
    let mut environment = command::helper_environment();
    let directory = user_runtime_directory();
    if scope == Scope::User {
        argv.push("--user");
        let directory = directory.to_str().ok_or_else(|| host("XDG_RUNTIME_DIR is not UTF-8"))?;
        environment.insert("XDG_RUNTIME_DIR".to_owned(), directory.to_owned());
    }
    argv.extend(arguments);
    command::capture_with(&argv, &environment, timeout).or_host(|| format!("run `{}`", argv.join(" ")))
}

impl Systemd {
    pub(crate) fn new(site: Site, scope: Scope) -> Self {
        Self { site, scope }
    }

    fn unit(&self, process: &ProcessName) -> String {
        format!("{}.service", unit_name(&self.site.service, process))
    }

    fn directory(&self) -> Outcome<PathBuf> {
        Ok(match self.scope {
            Scope::System => PathBuf::from("/etc/systemd/system"),
            Scope::User => Path::new(&Account::own()?.home).join(".config/systemd/user"),
        })
    }

    fn unit_path(&self, process: &ProcessName) -> Outcome<PathBuf> {
        Ok(self.directory()?.join(self.unit(process)))
    }

    fn systemctl(&self, arguments: &[&str], timeout: Duration) -> Outcome<Captured> {
        let arguments: Vec<&str> = std::iter::once("--no-pager").chain(arguments.iter().copied()).collect();
        invoke(self.scope, "systemctl", &arguments, timeout)
    }

    /// Runs `systemctl` and fails when it does.
    fn order(&self, arguments: &[&str], timeout: Duration) -> Outcome<()> {
        let captured = self.systemctl(arguments, timeout)?;
        match captured.status.success() {
            true => Ok(()),
            false => Err(host(format!(
                "`systemctl {}` {}: {}",
                arguments.join(" "),
                command::ended_how(captured.status),
                captured.stderr.trim()
            ))),
        }
    }

    fn show(&self, process: &ProcessName) -> Outcome<BTreeMap<String, String>> {
        let unit = self.unit(process);
        let properties = "LoadState,ActiveState,SubState,MainPID,Result,ExecMainCode,ExecMainStatus";
        let captured = self.systemctl(&["show", "--property", properties, "--", &unit], ANSWER_TIMEOUT)?;
        if !captured.status.success() {
            return Err(host(format!("systemd does not say how {unit} is: {}", captured.stderr.trim())));
        }
        let values = captured.stdout.lines().filter_map(|line| line.split_once('='));
        Ok(values.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    /// Whether our unit is there.
    fn is_written(&self, process: &ProcessName) -> Outcome<bool> {
        Ok(written(&self.unit_path(process)?)?.is_some())
    }

    /// Whether our unit is started when the manager is: its link is there, and leads to it. To enable it once more would do
    /// nothing but have systemd read all units again, which is most of what a restart takes.
    fn is_enabled(&self, path: &Path, unit: &str) -> bool {
        let link = path.with_file_name(format!("{}.wants", target(self.scope))).join(unit);
        fs::read_link(&link).is_ok_and(|found| found == path)
    }
}

impl Manager for Systemd {
    fn check(&self, processes: &[&ProcessName]) -> Outcome<()> {
        match self.scope {
            Scope::System if !Path::new(BOOTED).exists() => {
                return Err(host("systemd does not run this machine: choose another manager for this host"));
            }
            Scope::System if !account::is_root() => {
                return Err(host(format!(
                    "systemd's system manager needs root, and the agent works as {}: allow it `sudo -n`, or use the manager \
                     `systemd-user` or `agent` for this host",
                    Account::own()?.name
                )));
            }
            Scope::User if !has_user_manager() => {
                let name = Account::own()?.name;
                return Err(host(format!(
                    "{name} has no systemd manager of its own that runs: as root, `loginctl enable-linger {name}`"
                )));
            }
            Scope::User => {
                let name = Account::own()?.name;
                if !account::is_root() && !Path::new("/var/lib/systemd/linger").join(&name).exists() {
                    return Err(host(format!(
                        "the processes of {name} would end with its last session: as root, `loginctl enable-linger {name}`"
                    )));
                }
            }
            Scope::System => {}
        }
        let shown = self.systemctl(&["show", "--property", "Version"], ANSWER_TIMEOUT)?;
        let digits: String = shown
            .stdout
            .chars()
            .skip_while(|c| !c.is_ascii_digit())
            .take_while(char::is_ascii_digit)
            .collect();
        match digits.parse::<u32>() {
            Ok(version) if version >= VERSION_MIN => {}
            Ok(version) => {
                return Err(host(format!(
                    "systemd {version} is too old: its units cannot append to log files before {VERSION_MIN}; use the manager `agent` \
                     for this host"
                )));
            }
            Err(_) => return Err(host(format!("systemd cannot be asked: {}", shown.stderr.trim()))),
        }
        for process in processes {
            self.is_written(process)?;
        }
        Ok(())
    }

    fn start(&self, plan: &Plan) -> Outcome<()> {
        self.is_written(&plan.process)?;
        plan.create_logs()?;
        let (path, unit) = (self.unit_path(&plan.process)?, self.unit(&plan.process));
        if let Some(directory) = path.parent() {
            files::create_directory(directory, 0o755)
                .or_host(|| format!("create {}", directory.display()))?;
        }
        let text = render(plan, self.scope)?;
        // Nothing secret is in it, and operators want to read it.
        files::write_atomically(&path, text.as_bytes(), 0o644, None)
            .or_host(|| format!("write the unit {}", path.display()))?;
        self.order(&["daemon-reload"], ANSWER_TIMEOUT * 2)?;
        // An earlier process that was given up would keep a new one from starting; that there was none is as good.
        self.systemctl(&["reset-failed", "--", &unit], ANSWER_TIMEOUT)?;
        if !self.is_enabled(&path, &unit) {
            self.order(&["enable", "--quiet", "--", &unit], ANSWER_TIMEOUT)?;
        }
        let started = self.systemctl(&["start", "--", &unit], ANSWER_TIMEOUT + plan.start_timeout)?;
        match started.status.success() {
            true => Ok(()),
            // What is wrong is in the program or its unit: systemd itself answers.
            false => Err(release(format!(
                "process {} could not be started: {}",
                plan.process,
                started.stderr.trim().replace('\n', " ")
            ))),
        }
    }

    fn stop(&self, process: &ProcessName, timeout: Duration) -> Outcome<()> {
        if !self.is_written(process)? {
            return Ok(());
        }
        let unit = self.unit(process);
        // It stays enabled: a machine that is started anew in the middle of a switch runs what the unit says then, which is
        // the old release until the new one's is written, and not nothing.
        // systemd itself kills what takes longer than the unit's own time-out.
        self.order(&["stop", "--", &unit], timeout * 2 + ANSWER_TIMEOUT)
    }

    fn state(&self, process: &ProcessName) -> Outcome<Live> {
        if !self.is_written(process)? {
            return Ok(Live::Stopped);
        }
        Ok(live(&self.show(process)?))
    }

    fn written(&self, plan: &Plan) -> Outcome<Vec<(PathBuf, String)>> {
        Ok(vec![(self.unit_path(&plan.process)?, render(plan, self.scope)?)])
    }

    fn remove(&self, process: &ProcessName) -> Outcome<()> {
        if !self.is_written(process)? {
            return Ok(());
        }
        let path = self.unit_path(process)?;
        self.order(&["disable", "--quiet", "--", &self.unit(process)], ANSWER_TIMEOUT)?;
        fs::remove_file(&path).or_host(|| format!("remove the unit {}", path.display()))?;
        self.order(&["daemon-reload"], ANSWER_TIMEOUT * 2)?;
        self.systemctl(&["reset-failed", "--", &self.unit(process)], ANSWER_TIMEOUT).map(|_| ())
    }

    /// Files alone, which it reads at the next boot.
    fn at_boot(&self, argv: Option<&[String]>) -> Outcome<()> {
        let directory = self.directory()?;
        let unit = format!("{}.service", at_boot_name(&self.site.service));
        let (path, link) =
            (directory.join(&unit), directory.join(format!("{}.wants/{unit}", target(self.scope))));
        let there = written(&path)?;
        let Some(argv) = argv else {
            for path in [&link, &path] {
                files::remove_if_there(path).or_host(|| format!("remove {}", path.display()))?;
            }
            return Ok(());
        };
        let text = render_at_boot(&self.site.service, argv, self.scope);
        if there.as_deref() == Some(text.as_bytes()) && link.is_symlink() {
            return Ok(());
        }
        let wants = link.parent().unwrap_or(&directory);
        files::create_directory(wants, 0o755).or_host(|| format!("create {}", wants.display()))?;
        files::write_atomically(&path, text.as_bytes(), 0o644, None)
            .and_then(|()| files::link_atomically(&link, &path))
            .or_host(|| format!("write the unit {}", path.display()))
    }
}

/// What is in a unit of ours, if it is there. One of the same name that is not ours is an error.
fn written(path: &Path) -> Outcome<Option<Vec<u8>>> {
    let read = files::read_if_there(path, UNIT_BYTES_MAX).or_host(|| format!("read {}", path.display()))?;
    match read {
        Some(bytes) if !bytes.starts_with(HEADER.as_bytes()) => Err(host(format!(
            "the unit {} is not greenlight's, so it is not touched: remove it, or name the process differently",
            path.display()
        ))),
        read => Ok(read),
    }
}

/// What is started when the manager is.
fn target(scope: Scope) -> &'static str {
    match scope {
        Scope::System => "multi-user.target",
        Scope::User => "default.target",
    }
}

fn live(properties: &BTreeMap<String, String>) -> Live {
    let property = |name: &str| properties.get(name).map_or("", String::as_str);
    let pid: u32 = property("MainPID").parse().unwrap_or(0);
    let ended = || {
        let how = match (property("ExecMainCode"), property("ExecMainStatus")) {
            ("1", status) => format!("it ended with exit status {status}"),
            ("2" | "3", signal) => format!("it was ended by signal {signal}"),
            _ => "it does not run".to_owned(),
        };
        Live::Ended { why: format!("{how} (systemd: {}, {})", property("SubState"), property("Result")) }
    };
    match (property("ActiveState"), property("SubState")) {
        ("active" | "reloading" | "deactivating", _) if pid != 0 => match Identity::of(pid) {
            Some(identity) => Live::Running(identity),
            None => ended(),
        },
        (_, "auto-restart" | "auto-restart-queued") | ("failed", _) => ended(),
        ("activating", _) => Live::Starting,
        _ => Live::Stopped,
    }
}

fn render(plan: &Plan, scope: Scope) -> Outcome<String> {
    let mut text = format!("{HEADER}\n\n[Unit]\n");
    let mut line = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    line(format!("Description=greenlight {} {}", plan.service, plan.process));
    line("After=network.target".to_owned());
    line(format!("StartLimitIntervalSec={RESTARTS_WITHIN_S}\nStartLimitBurst={RESTARTS_MAX}"));
    line("\n[Service]\nType=exec".to_owned());
    line(format!("WorkingDirectory={}", plain_path(&plan.directory)?));
    line(format!("ExecStart={}", exec_line(&plan.argv)));
    for (name, value) in &plan.variables {
        line(format!("Environment={}", quoted(&format!("{name}={value}"), false)));
    }
    if let Some(secrets) = &plan.secrets {
        line(format!("EnvironmentFile={}", plain_path(secrets)?));
    }
    if let Some(account) = &plan.account {
        line(format!("User={}", account.name.replace('%', "%%")));
    }
    line(format!("StandardOutput=append:{}", plain_path(&plan.stdout)?));
    line(format!("StandardError=append:{}", plain_path(&plan.stderr)?));
    line(format!("Restart=on-failure\nRestartSec={RESTART_PAUSE_S}\nKillMode=mixed"));
    line(format!("TimeoutStopSec={}ms", plan.stop_timeout.as_millis().max(1)));
    line(format!("\n[Install]\nWantedBy={}", target(scope)));
    Ok(text)
}

fn render_at_boot(service: &ServiceName, argv: &[String], scope: Scope) -> String {
    format!(
        "{HEADER}\n\n[Unit]\nDescription=greenlight, at a boot: the guard of {service}\n\n[Service]\nType=oneshot\nExecStart={}\n\n\
         [Install]\nWantedBy={}\n",
        exec_line(argv),
        target(scope)
    )
}

/// The command as a unit has it. The program's own path is no place for variables, the arguments are.
fn exec_line(argv: &[String]) -> String {
    let words = argv.iter().enumerate().map(|(number, argument)| quoted(argument, number > 0));
    words.collect::<Vec<_>>().join(" ")
}

/// One word in the quoting of units, in which nothing is replaced: not by a specifier (`%`), and not by a variable (`$`).
fn quoted(word: &str, has_variables: bool) -> String {
    let mut text = String::from("\"");
    for c in word.chars() {
        match c {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '%' => text.push_str("%%"),
            '$' if has_variables => text.push_str("$$"),
            c if c.is_ascii_control() => text.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => text.push(c),
        }
    }
    text.push('"');
    text
}

/// A path in a setting that knows no quotes: specifiers are doubled, and what would end the line is refused.
fn plain_path(path: &Path) -> Outcome<String> {
    let refuse =
        |why: &str| host(format!("the path {} cannot be written into a unit: {why}", path.display()));
    let text = path.to_str().ok_or_else(|| refuse("it is not UTF-8"))?;
    if text.chars().any(|c| c.is_control() || c == '\\') || text.trim() != text {
        return Err(refuse("it has control characters, backslashes, or spaces at an end"));
    }
    Ok(text.replace('%', "%%"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(properties: &[(&str, &str)], expected: &str) {
        let properties =
            properties.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let found = format!("{:?}", live(&properties));
        assert!(found.contains(expected), "{properties:?}: {found}");
    }

    #[test]
    fn states_are_read() {
        let own = std::process::id().to_string();
        check(&[("ActiveState", "active"), ("SubState", "running"), ("MainPID", &own)], "Running");
        check(
            &[
                ("ActiveState", "active"),
                ("SubState", "running"),
                ("MainPID", "4194305"),
                ("ExecMainCode", "2"),
                ("ExecMainStatus", "9"),
            ],
            "signal 9",
        );
        check(&[("ActiveState", "activating"), ("SubState", "start"), ("MainPID", "0")], "Starting");
        check(
            &[
                ("ActiveState", "activating"),
                ("SubState", "auto-restart"),
                ("ExecMainCode", "1"),
                ("ExecMainStatus", "3"),
            ],
            "ended with exit status 3",
        );
        check(
            &[
                ("ActiveState", "failed"),
                ("Result", "exit-code"),
                ("ExecMainCode", "1"),
                ("ExecMainStatus", "1"),
            ],
            "exit-code",
        );
        check(&[("ActiveState", "inactive"), ("MainPID", "0")], "Stopped");
        check(&[], "Stopped");
    }

    #[test]
    fn words_are_quoted_so_that_nothing_is_replaced() {
        let argv = ["/srv/a b/app", "$HOME", "50%", "say \"hi\"", "a\\b", "one\ntwo", ";", "", "{port}"]
            .map(str::to_owned);
        assert_eq!(
            exec_line(&argv),
            r#""/srv/a b/app" "$$HOME" "50%%" "say \"hi\"" "a\\b" "one\ntwo" ";" "" "{port}""#
        );
        assert_eq!(quoted("A=$x %h", false), r#""A=$x %%h""#);
        assert_eq!(plain_path(Path::new("/srv/50%/a b")).unwrap(), "/srv/50%%/a b");
        assert!(plain_path(Path::new("/srv/a\nb")).is_err());
    }
}
