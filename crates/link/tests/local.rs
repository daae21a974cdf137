//! A connection to a local agent: calls beside each other, deaths, and the sending of a release.

#![expect(clippy::unwrap_used, reason = "these are tests")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Cursor, Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use greenlight_link::connection::{
    CallError, Connection, Lacking, OpenOptions, Parcel, Parcels, ReleaseSource, StageProgress,
};
use greenlight_link::frame::Encoding;
use greenlight_link::message::{PROTOCOL_VERSION, Reply, Request};
use greenlight_model::fleet::{LinkKind, ManagerKind};
use greenlight_model::host::{InstanceSpec, ReleaseMark};
use greenlight_model::id::{ContentHash, ReleaseId};
use support::{PATIENCE, command, host, options, run, text};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

async fn open() -> Connection {
    Connection::open(&host(), &LinkKind::Local, &options()).await.unwrap()
}

/// A call that is under way until somebody releases `a`; returns when the agent has it.
async fn hold(connection: &Connection) -> JoinHandle<Result<Reply, CallError>> {
    let (tell, mut told) = mpsc::unbounded_channel();
    let connection = connection.clone();
    let call = tokio::spawn(async move {
        connection.call(command(&["hold", "a"]), PATIENCE, |event| tell.send(event).unwrap()).await
    });
    assert_eq!(told.recv().await.map(text).as_deref(), Some("held"));
    call
}

#[tokio::test]
async fn the_agent_greets_and_inherits_little() {
    let connection = open().await;
    let facts = connection.facts();
    assert_eq!(facts.agent_version, options().agent_program.display().to_string());
    let inherited: Vec<&str> = facts.user.split(' ').collect();
    assert!(inherited.contains(&"PATH"), "{inherited:?}");
    assert!(!inherited.iter().any(|name| name.starts_with("CARGO")), "{inherited:?}");
    connection.close().await;
}

#[tokio::test]
async fn calls_run_beside_each_other() {
    let connection = open().await;
    let first = hold(&connection).await;
    let (lines, reply) = run(&connection, &["echo", "one", "two"]).await;
    assert_eq!(lines, ["one", "two"]);
    assert_eq!(reply.unwrap(), Reply::Exited { code: Some(0) });
    assert_eq!(run(&connection, &["release", "a"]).await.1.unwrap(), Reply::Done);
    assert_eq!(first.await.unwrap().unwrap(), Reply::Exited { code: Some(7) });

    let calls = (0..50).map(|number| {
        let connection = connection.clone();
        tokio::spawn(async move { run(&connection, &["echo", &number.to_string()]).await.0 })
    });
    for (number, call) in calls.enumerate() {
        assert_eq!(call.await.unwrap(), [number.to_string()]);
    }
}

#[tokio::test]
async fn large_frames_and_many_events_arrive() {
    let connection = open().await;
    let (_, reply) = run(&connection, &["large", "9000000"]).await;
    assert!(matches!(reply.unwrap(), Reply::Output(text) if text.len() == 9_000_000));
    let (lines, _) = run(&connection, &["lines", "20000"]).await;
    assert_eq!(lines.len(), 20_000);
    assert_eq!(lines[19_999], "19999");
    // The same the other way round: a request as large as a manifest of many files.
    let input = "y".repeat(9_000_000);
    let request = Request::Socket { path: String::new(), input: input.clone(), timeout: PATIENCE };
    assert_eq!(connection.call(request, PATIENCE, |_| {}).await.unwrap(), Reply::Output(input));
}

#[tokio::test]
async fn a_refusal_is_the_agents_own_words() {
    let connection = open().await;
    let error = run(&connection, &["refuse"]).await.1.unwrap_err();
    assert_eq!(error.to_string(), "it is not to be");
    assert!(connection.is_alive());
}

#[tokio::test]
async fn a_call_that_times_out_leaves_the_connection_usable() {
    let connection = open().await;
    let error =
        connection.call(command(&["hold", "x"]), Duration::from_millis(50), |_| {}).await.unwrap_err();
    assert_eq!(error.to_string(), "web1 did not finish a command within 50ms");
    // The late reply to it is ignored.
    assert_eq!(run(&connection, &["release", "x"]).await.1.unwrap(), Reply::Done);
    assert_eq!(run(&connection, &["echo", "still"]).await.0, ["still"]);
}

#[tokio::test]
async fn a_death_fails_every_call_with_its_reason() {
    for (words, expected) in [
        (&["die", "segmentation fault, say"][..], "exit code 3: segmentation fault, say"),
        (&["die-inside-a-frame"][..], "exit code 4"),
        (&["babble"][..], "unknown kind 32"),
    ] {
        let connection = open().await;
        let waiting = hold(&connection).await;
        for error in [run(&connection, words).await.1.unwrap_err(), waiting.await.unwrap().unwrap_err()] {
            assert!(matches!(error, CallError::Lost { .. }), "{error}");
            assert!(error.to_string().contains(expected), "{error}");
        }
        assert!(!connection.is_alive());
        let error = run(&connection, &["echo", "x"]).await.1.unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[tokio::test]
async fn closing_fails_what_is_under_way() {
    let connection = open().await;
    let waiting = hold(&connection).await;
    connection.close().await;
    let error = waiting.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "the connection to web1 was lost during a command: it was closed");
}

#[tokio::test]
async fn an_agent_that_does_not_greet_is_explained() {
    for (behaviour, expected) in [
        (
            "loader",
            "web1: the agent does not run there (agent: /lib/libc.so.6: version `GLIBC_2.99' not found",
        ),
        ("chatty", "web1: what answers there is not a greenlight agent"),
        ("newer", &format!("web1: the agent there speaks protocol {}", PROTOCOL_VERSION + 1)),
        ("mute", "web1: it does not answer (its agent did not greet within 200ms)"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("agent");
        let script =
            format!("#!/bin/sh\nTEST_AGENT={behaviour} exec {} \"$@\"\n", options().agent_program.display());
        write_program(&program, &script);
        let connect_timeout = if behaviour == "mute" { Duration::from_millis(200) } else { PATIENCE };
        let options = OpenOptions { agent_program: program, connect_timeout, ..options() };
        let error = Connection::open(&host(), &LinkKind::Local, &options).await.unwrap_err();
        assert!(error.to_string().starts_with(expected), "{error}");
    }
    let options = OpenOptions { agent_program: "/nonexistent/agent".into(), ..options() };
    let error = Connection::open(&host(), &LinkKind::Local, &options).await.unwrap_err();
    assert!(error.to_string().contains("`/nonexistent/agent` cannot be started here"), "{error}");
}

/// Writes an executable in another process: a file that this one has open for writing while it forks elsewhere cannot
/// be executed.
fn write_program(path: &std::path::Path, script: &str) {
    let written = std::process::Command::new("/bin/sh")
        .args(["-c", "printf %s \"$2\" > \"$1\" && chmod 700 \"$1\"", "sh"])
        .arg(path)
        .arg(script)
        .status()
        .unwrap();
    assert!(written.success());
}

/// A release of numbered objects, each of so many bytes, of which only the first `held` are there; with a count of those that
/// were read.
struct Numbered {
    objects: u64,
    held: u64,
    bytes: usize,
    read: AtomicU64,
}

impl Numbered {
    fn new(objects: u64, held: u64, bytes: usize) -> Arc<Self> {
        Arc::new(Self { objects, held, bytes, read: AtomicU64::new(0) })
    }
}

/// What the test agent is told of how many objects there are.
struct Source(Arc<Numbered>);

impl ReleaseSource for Source {
    fn manifest(&self) -> std::io::Result<Parcel> {
        let content = self.0.objects.to_string().into_bytes();
        Ok(parcel(Encoding::Manifest, 0, content))
    }

    fn parcels(&self, lacking: Lacking) -> std::io::Result<Box<dyn Parcels>> {
        let numbers: Vec<u64> =
            lacking.objects.iter().flat_map(|(first, count)| *first..first + count).map(u64::from).collect();
        if numbers.iter().any(|number| *number >= self.0.objects) {
            return Err(std::io::Error::other("the release does not have it"));
        }
        Ok(Box::new(Reading { of: Arc::clone(&self.0), numbers: numbers.into_iter() }))
    }
}

struct Reading {
    of: Arc<Numbered>,
    numbers: std::vec::IntoIter<u64>,
}

impl Parcels for Reading {
    fn next(&mut self) -> std::io::Result<Option<Parcel>> {
        let Some(number) = self.numbers.next() else { return Ok(None) };
        self.of.read.fetch_add(1, Ordering::SeqCst);
        match number < self.of.held {
            true => Ok(Some(parcel(Encoding::Raw, 1, object(number, self.of.bytes)))),
            false => Err(std::io::Error::other("it is gone")),
        }
    }

    fn left_bytes(&self) -> u64 {
        (self.numbers.len() * self.of.bytes) as u64
    }
}

fn parcel(encoding: Encoding, objects: u64, content: Vec<u8>) -> Parcel {
    let hash = ContentHash::from_bytes(*blake3::hash(&content).as_bytes());
    Parcel { hash, encoding, objects, bytes: content.len() as u64, content: Box::new(Cursor::new(content)) }
}

#[tokio::test]
async fn a_stage_sends_what_is_missing() {
    for (files, bytes) in [(0, 0), (1, 8), (2_000, 100), (20, 4 << 20)] {
        let connection = open().await;
        let objects = Arc::new(Source(Numbered::new(files, files, bytes)));
        let mut told: Vec<StageProgress> = Vec::new();
        let reply =
            connection.stage(stage("", ""), objects, PATIENCE, |progress| told.push(progress), |_| {}).await;
        let total = files * bytes as u64;
        assert_eq!(reply.unwrap(), Reply::Output(format!("{files} objects, {total} bytes")));
        let last = StageProgress {
            objects_sent: files,
            objects_total: files,
            bytes_sent: total,
            bytes_total: total,
        };
        assert_eq!(told.last(), Some(&last));
        assert!(told.is_sorted_by_key(|progress| progress.bytes_sent));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_host_slows_down_the_reading() {
    const FILES: u64 = 40;
    const BYTES: usize = 1 << 20;
    // One being read, one queued, one being written, one in the pipe and the agent's buffer, one in its hands.
    const AHEAD_MAX: u64 = 5;

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pace");
    let listener = UnixListener::bind(&path).unwrap();
    let request = stage("", path.to_str().unwrap());
    let objects = Numbered::new(FILES, FILES, BYTES);
    let pace = std::thread::spawn({
        let objects = Arc::clone(&objects);
        move || {
            let (mut agent, _) = listener.accept().unwrap();
            let mut ahead_max = 0;
            for taken in 0..FILES {
                agent.read_exact(&mut [0]).unwrap();
                ahead_max = ahead_max.max(objects.read.load(Ordering::SeqCst) - taken);
                agent.write_all(b".").unwrap();
            }
            ahead_max
        }
    });
    let connection = open().await;
    connection.stage(request, Arc::new(Source(objects)), PATIENCE, |_| {}, |_| {}).await.unwrap();
    let ahead_max = pace.join().unwrap();
    assert!((1..=AHEAD_MAX).contains(&ahead_max), "{ahead_max} objects were read ahead");
}

#[tokio::test]
async fn a_stage_that_fails_leaves_the_connection_usable() {
    const FILES: u64 = 30;
    const BYTES: usize = 1 << 20;
    for (held, commit, expected) in [
        (3, "", "could not be read for web1: it is gone"),
        (30, "5", "the disk is full"),
        (30, "foreign", "the release does not have it"),
    ] {
        let connection = open().await;
        let objects = Arc::new(Source(Numbered::new(FILES, held, BYTES)));
        let error = connection.stage(stage(commit, ""), objects, PATIENCE, |_| {}, |_| {}).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(run(&connection, &["echo", "still"]).await.0, ["still"]);
    }
}

#[tokio::test]
async fn a_stage_that_is_dropped_ends_its_data() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pace");
    let listener = UnixListener::bind(&path).unwrap();
    let request = stage("", path.to_str().unwrap());
    let objects = Arc::new(Source(Numbered::new(20, 20, 1 << 20)));
    let connection = open().await;
    let mut events = Vec::new();
    {
        let staging = connection.stage(request, objects, PATIENCE, |_| {}, |event| events.push(text(event)));
        let begun = tokio::task::spawn_blocking(move || {
            let (mut agent, _) = listener.accept().unwrap();
            agent.read_exact(&mut [0]).unwrap();
            agent
        });
        let mut agent = tokio::select! {
            result = staging => panic!("the stage ended: {result:?}"),
            agent = begun => agent.unwrap(),
        };
        // From now on the agent is asked nothing any more: it takes what comes.
        tokio::task::spawn_blocking(move || {
            while agent.write_all(b".").is_ok() && agent.read_exact(&mut [0]).is_ok() {}
        });
    }
    assert_eq!(run(&connection, &["echo", "still"]).await.0, ["still"]);
    connection.close().await;
}

#[tokio::test]
async fn an_agent_that_takes_nothing_any_more_can_be_closed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pace");
    let listener = UnixListener::bind(&path).unwrap();
    let request = stage("", path.to_str().unwrap());
    let objects = Arc::new(Source(Numbered::new(20, 20, 1 << 20)));
    let connection = open().await;
    let staging = tokio::spawn({
        let connection = connection.clone();
        async move { connection.stage(request, objects, PATIENCE, |_| {}, |_| {}).await }
    });
    // It has taken one object and gets no permission for the next.
    let agent = tokio::task::spawn_blocking(move || {
        let (mut agent, _) = listener.accept().unwrap();
        agent.read_exact(&mut [0]).unwrap();
        agent
    });
    let _agent = agent.await.unwrap();
    connection.close().await;
    let error = staging.await.unwrap().unwrap_err();
    assert!(error.to_string().ends_with("during the staging: it was closed"), "{error}");
}

/// A stage; `commit` tells the test agent how to behave, and `label` is the socket on which it asks before it takes the next
/// object.
fn stage(commit: &str, label: &str) -> Request {
    Request::Stage {
        spec: InstanceSpec {
            service: "web".parse().unwrap(),
            environment: "test".parse().unwrap(),
            host: host(),
            root: "/nowhere".to_owned(),
            manager: ManagerKind::Agent,
            shared: Vec::new(),
            prepare: Vec::new(),
            processes: BTreeMap::new(),
            profiles: BTreeMap::new(),
            secrets: BTreeSet::new(),
        },
        release: ReleaseMark {
            id: ReleaseId::from_bytes([1; 32]),
            label: label.to_owned(),
            commit: commit.to_owned(),
        },
        rollout: "test-1".parse().unwrap(),
        secrets: BTreeMap::new(),
    }
}

/// The content of a numbered file.
fn object(number: u64, bytes: usize) -> Vec<u8> {
    let mut content = number.to_be_bytes().to_vec();
    content.resize(bytes.max(8), 0);
    content
}
