//! A controller's end of a connection to a real agent, and a small real application to release.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{PipeReader, PipeWriter, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use greenlight_agent::{Agent, AgentFailure};
use greenlight_link::frame::{Encoding, Frame, read_frame, write_frame};
use greenlight_link::message::{AgentError, Event, Message, Reply, Request, SecretValue};
use greenlight_model::check::Check;
use greenlight_model::fleet::{Health, HostIdentity, ManagerKind, Process};
use greenlight_model::host::{
    ClaimRequest, Desired, HostFacts, InstanceReport, InstanceSpec, ProcessState, ReleaseMark,
};
use greenlight_model::id::{ContentHash, Generation, ReleaseId, VariableName};
use greenlight_model::manifest::{Entry, Manifest};

/// The rollout that every request of these tests belongs to, unless it says otherwise.
pub(crate) const ROLLOUT: &str = "test-1";

/// An application in Python: answers `/health` and `/version`, tells its environment, and misbehaves as its file MODE says.
const APPLICATION: &str = r#"
import http.server, os, signal, socketserver, sys, time
mode, version = open("MODE").read(), open("VERSION").read()
print("starting", version, flush=True)
print("mode", mode, file=sys.stderr, flush=True)
if mode == "crash":
    sys.exit("cannot read the state file")
if mode == "slow":
    time.sleep(600)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "child":
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = {"/health": "ok", "/version": "v999" if mode == "wrong" else version}.get(self.path)
        if self.path == "/environment":
            body = "\n".join(f"{name}={value}" for name, value in sorted(os.environ.items()))
        if self.path == "/arguments":
            body = repr(sys.argv[2:]) + repr(os.getuid())
        self.send_response(200 if body else 404)
        self.end_headers()
        self.wfile.write((body or "").encode())
        if mode == "flapping" and self.path == "/version":
            self.wfile.flush()
            os._exit(1)
    def log_message(self, *arguments):
        pass
class Server(http.server.HTTPServer):
    allow_reuse_address = True
    def server_bind(self):
        # Not its own: that one asks the name service who we are.
        socketserver.TCPServer.server_bind(self)
Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"#;

/// One host: a directory, and an agent that serves it.
pub(crate) struct Host {
    pub(crate) directory: tempfile::TempDir,
    agent: Agent,
    input: Option<PipeWriter>,
    output: PipeReader,
    serving: Option<std::thread::JoinHandle<Result<(), AgentFailure>>>,
    pub(crate) facts: HostFacts,
    next_id: u64,
    pub(crate) events: Vec<Event>,
}

/// What a release consists of.
pub(crate) struct Release {
    pub(crate) mark: ReleaseMark,
    pub(crate) manifest: Manifest,
    objects: BTreeMap<ContentHash, Vec<u8>>,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self::with_program(Path::new(env!("CARGO_BIN_EXE_greenlight-agent")))
    }

    pub(crate) fn with_program(program: &Path) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // Other accounts must get to their release.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let agent = Agent::with_program(program.to_owned());
        let (input, output, serving, facts) = connect(&agent);
        Self {
            directory,
            agent,
            input: Some(input),
            output,
            serving: Some(serving),
            facts,
            next_id: 0,
            events: Vec::new(),
        }
    }

    /// The service's root on this host.
    pub(crate) fn root(&self) -> PathBuf {
        self.directory.path().join("srv/web")
    }

    /// The service with one process, on a free port.
    pub(crate) fn spec(&self) -> InstanceSpec {
        let web = process("web", free_port());
        InstanceSpec {
            service: "web".parse().unwrap(),
            environment: "test".parse().unwrap(),
            host: "host1".parse().unwrap(),
            root: self.root().to_str().unwrap().to_owned(),
            manager: ManagerKind::Agent,
            shared: Vec::new(),
            prepare: Vec::new(),
            processes: [(web.name.clone(), web)].into(),
            profiles: BTreeMap::new(),
            secrets: BTreeSet::new(),
        }
    }

    /// Ends the connection as a controller that dies does, waits for the agent's end, and connects anew.
    pub(crate) fn reconnect(&mut self) {
        self.hang_up();
        let (input, output, serving, facts) = connect(&self.agent);
        (self.input, self.output, self.serving, self.facts) = (Some(input), output, Some(serving), facts);
    }

    /// Connects anew, to an agent that is a process of its own and can be killed.
    pub(crate) fn connect_to_process(&mut self, program: &Path) -> std::process::Child {
        self.hang_up();
        let (agent_input, input) = std::io::pipe().unwrap();
        let (output, agent_output) = std::io::pipe().unwrap();
        let mut command = std::process::Command::new(program);
        let child = command.arg("agent").stdin(agent_input).stdout(agent_output).spawn().unwrap();
        // The pipes' other ends are the child's alone, so that its end is seen.
        drop(command);
        (self.input, self.output) = (Some(input), output);
        assert!(matches!(
            read_frame(&mut self.output).unwrap(),
            Some(Frame::Message(Message::Greeting { .. }))
        ));
        child
    }

    /// From here on another program is started for what must outlive the agent.
    pub(crate) fn set_program(&mut self, program: &Path) {
        self.agent = Agent::with_program(program.to_owned());
        self.reconnect();
    }

    pub(crate) fn hang_up(&mut self) {
        self.input = None;
        if let Some(serving) = self.serving.take() {
            serving.join().unwrap().unwrap();
        }
    }

    pub(crate) fn send(&mut self, request: Request) -> u64 {
        self.next_id += 1;
        let message = Message::Request { id: self.next_id, request: Box::new(request) };
        self.write(&Frame::Message(message));
        self.next_id
    }

    fn write(&mut self, frame: &Frame) {
        let input = self.input.as_mut().expect("connected");
        write_frame(input, frame).unwrap();
        input.flush().unwrap();
    }

    /// The next message about a request.
    pub(crate) fn next(&mut self, id: u64) -> Result<Event, Result<Reply, AgentError>> {
        loop {
            match read_frame(&mut self.output).unwrap().expect("the agent ended without an answer") {
                Frame::Message(Message::Event { id: about, event }) if about == id => {
                    self.events.push(event.clone());
                    return Ok(event);
                }
                Frame::Message(Message::Reply { id: about, result }) if about == id => return Err(result),
                _ => {}
            }
        }
    }

    /// Waits until the request says that it is in this phase.
    pub(crate) fn wait_for_phase(&mut self, id: u64, phase: &str) {
        loop {
            match self.next(id) {
                Ok(Event::Phase { name }) if name == phase => return,
                Ok(_) => {}
                Err(result) => panic!("it ended before {phase}: {result:?}"),
            }
        }
    }

    pub(crate) fn finish(&mut self, id: u64) -> Result<Reply, AgentError> {
        loop {
            if let Err(result) = self.next(id) {
                return result;
            }
        }
    }

    pub(crate) fn ask(&mut self, request: Request) -> Result<Reply, AgentError> {
        self.events.clear();
        let id = self.send(request);
        self.finish(id)
    }

    pub(crate) fn claim(
        &mut self,
        spec: &InstanceSpec,
        rollout: &str,
        generation: u64,
    ) -> Result<Reply, AgentError> {
        let claim = ClaimRequest {
            rollout: rollout.parse().unwrap(),
            holder: "ada@desk".to_owned(),
            reason: "a test".to_owned(),
            duration: Duration::from_secs(120),
            generation: Generation(generation),
        };
        self.ask(Request::Claim { spec: spec.clone(), claim, charter: None })
    }

    pub(crate) fn stage(&mut self, spec: &InstanceSpec, release: &Release) -> Result<Reply, AgentError> {
        self.stage_with(spec, release, &[])
    }

    pub(crate) fn stage_with(
        &mut self,
        spec: &InstanceSpec,
        release: &Release,
        secrets: &[(&str, &str)],
    ) -> Result<Reply, AgentError> {
        let id = self.begin_stage(spec, release, secrets);
        self.finish(id)
    }

    /// Sends the request and the objects that it lacks.
    pub(crate) fn begin_stage(
        &mut self,
        spec: &InstanceSpec,
        release: &Release,
        secrets: &[(&str, &str)],
    ) -> u64 {
        self.events.clear();
        let secrets = secrets
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), SecretValue::new((*value).to_owned())));
        let id = self.send(Request::Stage {
            spec: spec.clone(),
            release: release.mark.clone(),
            rollout: ROLLOUT.parse().unwrap(),
            secrets: secrets.collect::<BTreeMap<VariableName, SecretValue>>(),
        });
        let hash = ContentHash::from_bytes(*release.mark.id.as_bytes());
        let data = zstd::encode_all(
            serde_json::json!({ "version": 1, "content": release.manifest }).to_string().as_bytes(),
            3,
        )
        .unwrap();
        self.write(&Frame::Data { id, hash, encoding: Encoding::Manifest, has_more: false, data });
        match self.next(id) {
            Ok(Event::Missing { objects, .. }) => {
                let all = release.manifest.objects();
                for number in objects.into_iter().flat_map(|(first, count)| first..first + count) {
                    let (hash, _) = all[number as usize];
                    let data = release.objects[&hash].clone();
                    self.write(&Frame::Data { id, hash, encoding: Encoding::Raw, has_more: false, data });
                }
                self.write(&Frame::EndOfData { id });
            }
            other => panic!("it was to say what it lacks: {other:?}"),
        }
        id
    }

    pub(crate) fn activate(
        &mut self,
        spec: &InstanceSpec,
        release: Option<&Release>,
        generation: u64,
    ) -> Result<InstanceReport, AgentError> {
        self.activate_guarded(spec, release, generation, None)
    }

    /// The same with a limit after which the host goes back.
    pub(crate) fn activate_guarded(
        &mut self,
        spec: &InstanceSpec,
        release: Option<&Release>,
        generation: u64,
        guard: Option<Duration>,
    ) -> Result<InstanceReport, AgentError> {
        match self.ask(Request::Activate { desired: desired(spec, release, generation), guard })? {
            Reply::Instance(report) => Ok(*report),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn confirm(
        &mut self,
        spec: &InstanceSpec,
        release: &Release,
        generation: u64,
    ) -> Result<InstanceReport, AgentError> {
        let request = Request::Confirm {
            spec: spec.clone(),
            release: release.mark.id,
            generation: Generation(generation),
            rollout: ROLLOUT.parse().unwrap(),
        };
        match self.ask(request)? {
            Reply::Instance(report) => Ok(*report),
            other => panic!("{other:?}"),
        }
    }

    /// Claims, stages and activates; everything must work.
    pub(crate) fn deploy(
        &mut self,
        spec: &InstanceSpec,
        release: &Release,
        generation: u64,
    ) -> InstanceReport {
        self.claim(spec, ROLLOUT, generation).unwrap();
        self.stage(spec, release).unwrap();
        let report = self.activate(spec, Some(release), generation).unwrap();
        assert_eq!(report.proven(), Some(release.mark.id), "{report:?}");
        report
    }

    pub(crate) fn observe(&mut self, spec: &InstanceSpec) -> InstanceReport {
        match self.ask(Request::Observe { specs: vec![spec.clone()] }).unwrap() {
            Reply::Observed { mut report, .. } => report.instances.remove(&spec.service).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn preflight(&mut self, spec: &InstanceSpec, release: ReleaseId) -> BTreeMap<String, Check> {
        let request = Request::Preflight {
            spec: spec.clone(),
            requires: Box::default(),
            release_bytes: 1000,
            release,
            identity: HostIdentity::default(),
            secrets: BTreeMap::new(),
        };
        match self.ask(request).unwrap() {
            Reply::Checked { checks, .. } => {
                checks.into_iter().map(|check| (check.name.clone(), check)).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    /// Stops what runs and takes it off the host. Every test that started something ends with this.
    pub(crate) fn clean_up(&mut self, spec: &InstanceSpec, generation: u64) {
        self.claim(spec, ROLLOUT, generation).unwrap();
        self.activate(spec, None, generation).unwrap();
    }
}

fn connect(
    agent: &Agent,
) -> (PipeWriter, PipeReader, std::thread::JoinHandle<Result<(), AgentFailure>>, HostFacts) {
    let (agent_input, input) = std::io::pipe().unwrap();
    let (mut output, agent_output) = std::io::pipe().unwrap();
    let agent = agent.clone();
    let serving = std::thread::spawn(move || agent.serve(agent_input, agent_output));
    match read_frame(&mut output).unwrap() {
        Some(Frame::Message(Message::Greeting { facts, .. })) => (input, output, serving, facts),
        other => panic!("no greeting: {other:?}"),
    }
}

pub(crate) fn desired(spec: &InstanceSpec, release: Option<&Release>, generation: u64) -> Desired {
    Desired {
        generation: Generation(generation),
        rollout: ROLLOUT.parse().unwrap(),
        release: release.map(|release| release.mark.clone()),
        spec: spec.clone(),
    }
}

/// The application as a process that listens on the port.
pub(crate) fn process(name: &str, port: u16) -> Process {
    Process {
        name: name.parse().unwrap(),
        argv: ["python3", "-B", "app.py", "{port}"].map(str::to_owned).into(),
        port: Some(port),
        health: Some(Health { http: Some("/health".to_owned()), release: Some("/version".to_owned()) }),
        variables: BTreeMap::new(),
        stdout: format!("logs/{name}.stdout"),
        stderr: format!("logs/{name}.stderr"),
        profiles: BTreeMap::new(),
        user: None,
        smoke: None,
        start_timeout: Duration::from_secs(30),
        stop_timeout: Duration::from_secs(2),
        stop_argv: None,
    }
}

/// The one process of the service, to be changed.
pub(crate) fn web(spec: &mut InstanceSpec) -> &mut Process {
    spec.processes.values_mut().next().unwrap()
}

pub(crate) fn release(label: &str, mode: &str) -> Release {
    release_of(label, &[("app.py", APPLICATION), ("VERSION", label), ("MODE", mode)])
}

pub(crate) fn release_of(label: &str, files: &[(&str, &str)]) -> Release {
    let (mut manifest, mut objects) = (Manifest::default(), BTreeMap::new());
    for (path, content) in files {
        let hash = ContentHash::from_bytes(*blake3::hash(content.as_bytes()).as_bytes());
        let size = content.len() as u64;
        for directory in Path::new(path).ancestors().skip(1).filter(|directory| directory.as_os_str() != "") {
            manifest.entries.insert(directory.to_str().unwrap().to_owned(), Entry::Directory);
        }
        manifest
            .entries
            .insert((*path).to_owned(), Entry::File { size, executable: false, hash, chunks: Vec::new() });
        objects.insert(hash, content.as_bytes().to_vec());
    }
    let digest = blake3::hash(&serde_json::to_vec(&(label, &manifest)).unwrap());
    let id = ReleaseId::from_bytes(*digest.as_bytes());
    let commit = digest.to_hex()[..40].to_owned();
    Release { mark: ReleaseMark { id, label: label.to_owned(), commit }, manifest, objects }
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub(crate) fn get(spec: &InstanceSpec, path: &str) -> String {
    let port = spec.processes.values().next().unwrap().port.unwrap();
    ureq::get(format!("http://127.0.0.1:{port}{path}")).call().unwrap().body_mut().read_to_string().unwrap()
}

/// The process id of the one process.
pub(crate) fn pid(report: &InstanceReport) -> u32 {
    let process = report.processes.values().next().unwrap();
    match process.state {
        ProcessState::Running { pid, .. } => pid,
        _ => panic!("{process:?}"),
    }
}

/// Whether a process is there and has not ended.
pub(crate) fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])))
}

/// Polls for what another process does by itself.
#[expect(clippy::disallowed_methods, reason = "a process that is not our child gives no signal")]
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(std::time::Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn mode_of(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Every regular file under a directory.
pub(crate) fn walk(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            files.extend(walk(&path));
        } else if metadata.is_file() {
            files.push(path);
        }
    }
    files
}

/// Sends a signal such as `-9`.
pub(crate) fn kill(pid: u32, signal: &str) {
    assert!(std::process::Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

/// The living members of a process group, as the kernel shows them.
pub(crate) fn members_of(group: u32) -> Vec<String> {
    let pids = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<u32>().ok());
    let stats = pids.filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok());
    stats
        .filter(|stat| {
            let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
            fields[2] == group.to_string() && fields[0] != "Z"
        })
        .collect()
}
