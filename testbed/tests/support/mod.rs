//! What the scenarios share: a project on the hub of a bed, and `greenlight` as an operator runs it there.

// Each file of scenarios is a crate of its own and uses its part of this.
#![allow(dead_code, reason = "no single file of scenarios uses all of it")]

pub(crate) mod served;

use std::cell::RefCell;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use greenlight_testbed::{Bed, Host, Project, output_of, wait};
use serde_json::Value;

/// For what answers in a second on an idle machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// The process of the test application as a fleet file defines it. Releases are told by their label, which is the tag of
/// their commit.
pub(crate) const PROCESS: &str = r#"
run = "python3 app.py --port {port}"
health = { http = "/health", release = "/version" }
start_timeout = "20s"
stop_timeout = "5s"
"#;

/// The files by which a release of the application is made bad.
const MARKERS: [&str; 8] =
    ["BROKEN", "UNHEALTHY", "WRONG", "SLOW_START", "IGNORE_TERM", "STATE_INTOLERANT", "ERRORS", "BURN"];

/// A project with a fleet file, on the controller's place of a bed.
pub(crate) struct Site<'a> {
    pub(crate) bed: &'a Bed,
    pub(crate) project: Project,
    /// All that any command printed.
    pub(crate) printed: RefCell<String>,
}

impl<'a> Site<'a> {
    /// A project with the test application and this fleet file, and a release v1.
    pub(crate) fn new(bed: &'a Bed, fleet: &str) -> Self {
        let site = Self { bed, project: Project::new().unwrap(), printed: RefCell::default() };
        site.project.write("app.py", greenlight_testbed::APPLICATION).unwrap();
        site.fleet(fleet);
        site.release("v1", &[]);
        site
    }

    /// Replaces the fleet file.
    pub(crate) fn fleet(&self, text: &str) {
        self.project.write("greenlight.toml", text).unwrap();
    }

    /// Commits a release of the application, with files that make it bad.
    pub(crate) fn release(&self, version: &str, files: &[(&str, &str)]) {
        for marker in MARKERS.iter().filter(|marker| self.project.path().join(marker).exists()) {
            self.project.remove(marker).unwrap();
        }
        self.project.write("VERSION", version).unwrap();
        for (name, content) in files {
            self.project.write(name, content).unwrap();
        }
        self.project.write(".gitignore", ".greenlight/\n").unwrap();
        self.project.commit(version).unwrap();
        self.project.git(&["tag", version]).unwrap();
    }

    /// Runs `greenlight` to its end.
    pub(crate) fn greenlight(&self, arguments: &[&str]) -> Ended {
        self.begin(arguments).end()
    }

    /// What `greenlight ARGUMENTS --json` prints, whatever its exit code.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let ended = self.greenlight(&[arguments, &["--json"]].concat());
        serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}\n{ended}"))
    }

    /// Starts `greenlight`, to do something beside it.
    pub(crate) fn begin(&self, arguments: &[&str]) -> Begun<'_> {
        self.begin_with(arguments, |_| ())
    }

    /// The same, with something about the command changed: its directory, a variable.
    pub(crate) fn begin_with(&self, arguments: &[&str], change: impl FnOnce(&mut Command)) -> Begun<'_> {
        let mut command = self.project.greenlight(self.bed, arguments).unwrap();
        change(&mut command);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = [collect(child.stdout.take().unwrap()), collect(child.stderr.take().unwrap())];
        Begun { shown: arguments.join(" "), child, lines, printed: &self.printed }
    }

    /// The records of the last rollout of an environment, oldest first.
    pub(crate) fn records(&self, environment: &str) -> Vec<Value> {
        let history = self.json(&["history", environment, "-n", "1"]);
        let id = history["rollouts"][0]["plan"]["id"].as_str().unwrap().to_owned();
        self.json(&["history", "--rollout", &id])["records"].as_array().unwrap().clone()
    }

    /// How often the last rollout began an action on a host (`drain px1`).
    pub(crate) fn begun(&self, environment: &str) -> Vec<String> {
        let records = self.records(environment);
        records.iter().filter(|record| record["body"]["record"] == "action_started").map(action_of).collect()
    }

    /// The version that answers on a host's port.
    pub(crate) fn answer(&self, host: &str, port: u16) -> String {
        let response = self.bed.get(self.address(host, port), "/version").unwrap();
        let value: Value = serde_json::from_slice(&response.body).unwrap();
        value["version"].as_str().unwrap().to_owned()
    }

    /// The version that the link `current` of a service leads to.
    pub(crate) fn linked(&self, host: &str, service: &str) -> String {
        self.bed.host(host).read(&format!("/srv/{service}/current/VERSION")).unwrap()
    }

    /// The process that answers on a host's port.
    pub(crate) fn pid(&self, host: &str, port: u16) -> String {
        let response = self.bed.get(self.address(host, port), "/version").unwrap();
        let value: Value = serde_json::from_slice(&response.body).unwrap();
        value["pid"].to_string()
    }

    pub(crate) fn address(&self, host: &str, port: u16) -> SocketAddr {
        (self.bed.host(host).address(), port).into()
    }

    /// Asserts what link and process of each host say.
    #[track_caller]
    pub(crate) fn runs(&self, service: &str, port: u16, hosts: &[(&str, &str)]) {
        for (host, version) in hosts {
            assert_eq!(self.linked(host, service), *version, "the link on {host}");
            assert_eq!(self.answer(host, port), *version, "the answer of {host}");
        }
    }

    /// Asserts that a service was never put on a host.
    #[track_caller]
    pub(crate) fn is_untouched(&self, service: &str, host: &str) {
        let path = format!("/srv/{service}");
        assert!(!self.bed.host(host).exists(&path).unwrap(), "{path} is on {host}");
    }
}

/// `stage px1` of a record that speaks of an action.
pub(crate) fn action_of(record: &Value) -> String {
    let action = &record["body"]["action"];
    let instance = action["instance"].as_str().unwrap_or_default();
    let host = instance.split('/').next().unwrap_or_default();
    format!("{} {host}", action["do"].as_str().unwrap_or_default())
}

/// A fleet file with one service of this name on this port, whose environments follow.
pub(crate) fn fleet(service: &str, port: u16, rest: &str) -> String {
    format!("[service.{service}]\n\n[service.{service}.process.web]\nport = {port}{PROCESS}\n{rest}")
}

/// Ends a process on a host, and waits until it is gone.
pub(crate) fn kill(host: &Host, pid: &str) {
    host.run("kill", &["-KILL", pid]).unwrap();
    wait::until("the killed process to be gone", DEADLINE, || {
        if host.exists(&format!("/proc/{pid}/exe")).unwrap() { Err(pid.to_owned()) } else { Ok(()) }
    })
    .unwrap();
}

type Lines = (Arc<Mutex<String>>, JoinHandle<()>);

fn collect(stream: impl std::io::Read + Send + 'static) -> Lines {
    let text = Arc::new(Mutex::new(String::new()));
    let shared = Arc::clone(&text);
    let thread = std::thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n') {
            let line = line.unwrap();
            let mut text = shared.lock().unwrap();
            text.push_str(&String::from_utf8_lossy(&line));
            text.push('\n');
        }
    });
    (text, thread)
}

/// A command that runs.
pub(crate) struct Begun<'a> {
    shown: String,
    child: Child,
    lines: [Lines; 2],
    printed: &'a RefCell<String>,
}

impl Begun<'_> {
    /// Waits until it has printed this.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, text: &str) {
        wait::until(&format!("greenlight {} to print {text:?}", self.shown), DEADLINE, || {
            let printed: Vec<_> = self.lines.iter().map(|(text, _)| text.lock().unwrap().clone()).collect();
            if printed.iter().any(|printed| printed.contains(text)) { Ok(()) } else { Err(printed.concat()) }
        })
        .unwrap();
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, name: &str) {
        // The program replaced `nsenter`, so it has the child's own id.
        let mut command = Command::new("kill");
        let output = output_of(command.args(["-s", name, &self.child.id().to_string()])).unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    /// Whether it has not ended.
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end, which must come in time.
    #[track_caller]
    pub(crate) fn end_within(mut self, deadline: Duration) -> Ended {
        let ended = wait::until(&format!("the end of greenlight {}", self.shown), deadline, || {
            let printed = || self.lines.iter().map(|(text, _)| text.lock().unwrap().clone()).collect();
            self.child.try_wait().unwrap().map_or_else(|| Err(printed()), |_| Ok(()))
        });
        if ended.is_err() {
            self.child.kill().unwrap();
        }
        ended.unwrap();
        self.end()
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> Ended {
        let status = self.child.wait().unwrap();
        let [stdout, stderr] = self.lines.map(|(text, thread)| {
            thread.join().unwrap();
            std::mem::take(&mut *text.lock().unwrap())
        });
        let (code, signal) = (status.code(), status.signal());
        let ended = Ended { shown: self.shown, code, signal, stdout, stderr };
        self.printed.borrow_mut().push_str(&ended.to_string());
        ended
    }
}

/// A command that has ended.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    shown: String,
    pub(crate) code: Option<i32>,
    /// The signal that ended it.
    pub(crate) signal: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { shown, code, signal, stdout, stderr } = self;
        let how = signal.map_or_else(|| format!("exit {code:?}"), |signal| format!("signal {signal}"));
        write!(f, "$ greenlight {shown}\n{stdout}--- stderr\n{stderr}--- {how}\n")
    }
}

impl Ended {
    /// Asserts its exit code.
    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self}");
        self
    }

    /// Asserts that it printed each of these, on whichever stream.
    #[track_caller]
    pub(crate) fn says(self, texts: &[&str]) -> Self {
        for text in texts {
            assert!(self.stdout.contains(text) || self.stderr.contains(text), "{text:?} is not in\n{self}");
        }
        self
    }

    /// Asserts that it printed none of these.
    #[track_caller]
    pub(crate) fn leaves_out(self, texts: &[&str]) -> Self {
        for text in texts {
            assert!(!self.stdout.contains(text) && !self.stderr.contains(text), "{text:?} is in\n{self}");
        }
        self
    }

    /// Asserts that its last lines say which host runs what: `("px1", "v2")`, or `nothing`.
    #[track_caller]
    pub(crate) fn ends_with(self, hosts: &[(&str, &str)]) -> Self {
        let lines: Vec<_> = self.stdout.trim_end().lines().rev().take(hosts.len()).collect();
        let named = |host: &str, release: &str| {
            lines.iter().any(|line| {
                let mut words = line.split_whitespace();
                let is_host = words.next().is_some_and(|word| word.starts_with(&format!("{host}/")));
                is_host && words.next() == Some(release)
            })
        };
        for (host, release) in hosts {
            assert!(named(host, release), "the last lines do not say that {host} runs {release}:\n{self}");
        }
        self
    }

    /// The line that begins with this word, less what stands before it, with what stands below it further in.
    #[track_caller]
    pub(crate) fn line(&self, start: &str) -> String {
        let indent = |line: &str| line.len() - line.trim_start().len();
        let mut lines = self.stdout.lines().chain(self.stderr.lines()).peekable();
        let found = lines.find(|line| line.trim_start().starts_with(start));
        let first = found.unwrap_or_else(|| panic!("no line begins with {start:?}:\n{self}"));
        // A reason that would widen the columns stands below its line, further in.
        let mut whole = first.trim_start().to_owned();
        while let Some(below) = lines.next_if(|line| indent(line) > indent(first)) {
            whole.push(' ');
            whole.push_str(below.trim_start());
        }
        whole
    }
}
