//! A project in a directory of its own, its hosts on this machine, and the program run in it.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// The program that is tested.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_greenlight");
/// How long something may take that is waited for; a busy machine is not a failure.
const PATIENCE: Duration = Duration::from_secs(120);
/// Ports of hosts lie below those that the kernel gives to outgoing connections.
const PORTS: std::ops::Range<u16> = 10_000..30_000;

/// A service on two hosts, and on a third one after that. The application waits before it listens for as long as the
/// file `wait` is there, so that a test can stop a rollout in the middle.
pub(crate) const RING: &str = r#"
[service.hello]
build = ["sed -i s/commit/$GREENLIGHT_COMMIT/ page.txt"]

[service.hello.process.web]
run = "sh start.sh {port}"
port = PORT0
health = { http = "/health", release = "/version" }
start_timeout = "90s"

[environment.staging]
hosts.hello = ["one", "two"]
manager = "agent"
strategy = { kind = "rolling", batch = 1 }

[environment.staging.host]
one = { link = "local", address = "127.0.0.1", root = "DIRECTORY/hosts/one", ports = { web = PORT1 } }
two = { link = "local", address = "127.0.0.1", root = "DIRECTORY/hosts/two", ports = { web = PORT2 } }

[environment.production]
hosts.hello = ["three"]
manager = "agent"
after = { environment = "staging" }

[environment.production.host]
three = { link = "local", address = "127.0.0.1", root = "DIRECTORY/hosts/three", ports = { web = PORT3 } }
"#;

const START: &str = r#"
while [ -e "DIRECTORY/wait" ]; do : > "DIRECTORY/waiting"; sleep 0.05; done
exec "PROGRAM" demo-application --port "$1"
"#;

/// A directory with a project; whatever runs out of it ends with the value.
pub(crate) struct Site {
    temporary: TempDir,
    pub(crate) directory: PathBuf,
    ports: [u16; 5],
}

impl Site {
    /// A directory without anything.
    pub(crate) fn empty() -> Self {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path().join("project");
        for name in ["project", "home", "tmp"] {
            fs::create_dir(temporary.path().join(name)).unwrap();
        }
        Self { directory, temporary, ports: std::array::from_fn(|_| free_port()) }
    }

    /// A repository with this fleet file and the application; nothing is committed yet.
    pub(crate) fn new(fleet: &str) -> Self {
        let site = Self::empty();
        site.git(&["init", "--quiet", "--initial-branch", "main"]);
        site.write("greenlight.toml", &site.fill(fleet));
        site.write("start.sh", &site.fill(START));
        site.write(".gitignore", ".greenlight/\nhosts/\nwait\nwaiting\n");
        site
    }

    /// A [`RING`] with the releases `v1` and `v2` committed and tagged.
    pub(crate) fn ring() -> Self {
        let site = Self::new(RING);
        site.commit("v1");
        site.commit("v2");
        site
    }

    /// Text with its directory, program and ports put in.
    fn fill(&self, text: &str) -> String {
        let mut text =
            text.replace("DIRECTORY", self.directory.to_str().unwrap()).replace("PROGRAM", PROGRAM);
        for (index, port) in self.ports.iter().enumerate() {
            text = text.replace(&format!("PORT{index}"), &port.to_string());
        }
        text
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The directory around the project: the home and the temporary files of what is run are in it too.
    pub(crate) fn around(&self) -> &Path {
        self.temporary.path()
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Changes the fleet file; what is to be replaced must be there.
    pub(crate) fn edit(&self, from: &str, to: &str) {
        let text = self.read("greenlight.toml");
        assert!(text.contains(from), "{from} is not in the fleet file");
        self.write("greenlight.toml", &self.fill(&text.replace(from, to)));
    }

    /// Commits a version of the application that answers as it should.
    pub(crate) fn commit(&self, tag: &str) {
        self.commit_as(tag, tag);
    }

    /// Commits a version of the application that answers as `answer`.
    pub(crate) fn commit_as(&self, tag: &str, answer: &str) {
        self.write("VERSION", &format!("{answer}\n"));
        self.write("page.txt", &format!("page of {tag}, commit\n"));
        self.git(&["add", "--all"]);
        self.git(&["commit", "--quiet", "--message", &format!("make {tag}")]);
        self.git(&["tag", tag]);
    }

    pub(crate) fn git(&self, arguments: &[&str]) -> String {
        let output = self
            .command("git")
            .args(["-c", "user.name=A tester", "-c", "user.email=tester@localhost"])
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "git {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("HOME", self.around().join("home"))
            .env("TMPDIR", self.around().join("tmp"))
            .env("GREENLIGHT_TEST_PERSON", "tester")
            .current_dir(&self.directory)
            .stdin(Stdio::null());
        command
    }

    /// The program, to be run here.
    pub(crate) fn greenlight(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(PROGRAM);
        command.args(arguments);
        command
    }

    /// Runs the program to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        Ran::new(arguments, self.greenlight(arguments).output().unwrap())
    }

    /// Runs it to its end as somebody else.
    pub(crate) fn run_as(&self, user: &str, arguments: &[&str]) -> Ran {
        Ran::new(arguments, self.greenlight(arguments).env("GREENLIGHT_TEST_PERSON", user).output().unwrap())
    }

    /// Starts the program and leaves it running.
    pub(crate) fn start(&self, arguments: &[&str]) -> Running {
        let mut command = self.greenlight(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let what = arguments.iter().map(|&argument| argument.to_owned()).collect();
        Running { child: command.spawn().unwrap(), what }
    }

    /// Begins a deployment of v2 over v1 to staging and comes back when its first host waits in its start.
    pub(crate) fn stop_in_the_middle(&self) -> Running {
        self.stop_in_the_middle_of(|| self.start(&["deploy", "staging", "v2"]))
    }

    /// The same, started in another way.
    pub(crate) fn stop_in_the_middle_of<T>(&self, start: impl FnOnce() -> T) -> T {
        for release in ["v1", "v2"] {
            self.run(&["build", "hello", "--commit", release]).exits(0);
        }
        self.run(&["deploy", "staging", "v1"]).exits(0);
        self.write("wait", "");
        let deploying = start();
        wait_until("the first host starts", || self.path("waiting").exists());
        deploying
    }

    /// Starts the program in a terminal of its own, which closes when the process that is returned ends.
    pub(crate) fn start_in_terminal(&self, arguments: &[&str]) -> Child {
        let mut command = self.command("python3");
        command.args(["-c", "import pty, sys; pty.spawn(sys.argv[1:])", PROGRAM]).args(arguments);
        command.stdout(Stdio::null()).spawn().unwrap()
    }

    /// Waits until no controller on this machine drives staging.
    pub(crate) fn wait_until_nobody_drives(&self) {
        let lease = self.path(".greenlight/controller-staging");
        wait_until("the controller is gone", || {
            flock(fs::File::open(&lease).unwrap(), FlockOperation::NonBlockingLockExclusive).is_ok()
        });
    }

    /// Lets the application listen.
    pub(crate) fn go_on(&self) {
        fs::remove_file(self.path("wait")).unwrap();
    }

    /// What runs on each instance of an environment and is proven there: `one/hello` and the like with the label.
    pub(crate) fn proven(&self, environment: &str) -> Vec<(String, Option<String>)> {
        let status = self.run(&["status", environment, "--json"]).json();
        let releases = self.run(&["releases", "--json"]).json();
        let label = |id: &Value| {
            let all = releases["releases"].as_array().unwrap();
            let found = all.iter().find(|entry| entry["release"]["id"] == *id);
            found.map(|entry| entry["release"]["label"].as_str().unwrap().to_owned())
        };
        status["environments"][0]["instances"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| (entry["instance"].as_str().unwrap().to_owned(), label(&entry["proven"])))
            .collect()
    }

    /// Asserts what is proven on every instance of an environment.
    pub(crate) fn runs(&self, environment: &str, expected: &[(&str, Option<&str>)]) {
        let expected: Vec<(String, Option<String>)> = expected
            .iter()
            .map(|(instance, label)| ((*instance).to_owned(), label.map(str::to_owned)))
            .collect();
        assert_eq!(self.proven(environment), expected);
    }

    /// The processes that run out of this directory, supervisors first.
    pub(crate) fn processes(&self) -> Vec<(i32, String)> {
        processes_of(self.around())
    }
}

impl Site {
    /// Agents end when their controller has gone: after a while no process of the site is left.
    pub(crate) fn ends_quietly(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let left = self.processes();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "still there: {left:?}");
            pause();
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // A supervisor that is gone starts nothing again; then what it started goes.
        loop {
            let left = self.processes();
            if left.is_empty() {
                break;
            }
            for (pid, _) in left {
                // It may have ended by itself meanwhile.
                let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
            }
            pause();
        }
        make_writable(self.around());
    }
}

/// The processes whose command line or working directory lies in a directory; supervisors first.
pub(crate) fn processes_of(directory: &Path) -> Vec<(i32, String)> {
    let needle = directory.to_str().unwrap();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let works_in = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        // A dead process that nobody has collected yet has neither.
        if line.contains(needle) || works_in.starts_with(directory) {
            found.push((pid, line));
        }
    }
    found.sort_by_key(|(pid, line)| (!line.contains(" supervise "), *pid));
    found
}

/// A run of the program that is not over.
pub(crate) struct Running {
    child: Child,
    what: Vec<String>,
}

impl Running {
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Closes what it prints to, as when the job that reads it is gone.
    pub(crate) fn close_output(&mut self) {
        drop((self.child.stdout.take(), self.child.stderr.take()));
    }

    pub(crate) fn end(self) -> Ran {
        let what: Vec<&str> = self.what.iter().map(String::as_str).collect();
        Ran::new(&what, self.child.wait_with_output().unwrap())
    }
}

/// A run of the program and what came of it.
pub(crate) struct Ran {
    pub(crate) what: String,
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    fn new(arguments: &[&str], output: Output) -> Self {
        Self {
            what: format!("greenlight {}", arguments.join(" ")),
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Asserts the exit code.
    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}{}", self.what, self.stdout, self.stderr);
        self
    }

    /// Asserts that each of these stands in its output.
    #[track_caller]
    pub(crate) fn says(self, texts: &[&str]) -> Self {
        for text in texts {
            let is_said = self.stdout.contains(text) || self.stderr.contains(text);
            assert!(is_said, "{} does not say `{text}`:\n{}{}", self.what, self.stdout, self.stderr);
        }
        self
    }

    /// Standard output as one JSON document of the version that is documented.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        let document: Value = serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{}: {error}:\n{}{}", self.what, self.stdout, self.stderr));
        assert_eq!(document["version"], 1, "{}", self.what);
        assert!(document["command"].is_string(), "{}", self.what);
        document
    }
}

/// Looks again and again until something is so that gives no signal of its own.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        pause();
    }
}

#[expect(clippy::disallowed_methods, reason = "a process that is not our child gives no signal to wait on")]
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

/// A port that nothing listens on and that no other test of this run was given.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Test runs beside each other begin at different places.
    let begin = (std::process::id() % 100) as u16 * 200;
    loop {
        let port = PORTS.start + (begin + NEXT.fetch_add(1, Ordering::SeqCst)) % (PORTS.end - PORTS.start);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// Releases are read-only on purpose; whoever is not root could not remove them as they are.
fn make_writable(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let _ = fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o755));
            make_writable(&entry.path());
        }
    }
}
