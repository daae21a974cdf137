//! What the link's tests share.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use greenlight_link::connection::{CallError, Connection, OpenOptions};
use greenlight_link::message::{Event, Reply, Request};
use greenlight_model::fleet::ManagerKind;
use greenlight_model::host::{InstanceSpec, ReleaseMark};
use greenlight_model::id::{ContentHash, HostName, ReleaseId};
use greenlight_model::manifest::{Entry, Manifest};

/// Far more than anything here takes: reaching it is the failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn options() -> OpenOptions {
    OpenOptions {
        agent_program: PathBuf::from(env!("CARGO_BIN_EXE_greenlight-link-test-agent")),
        become_root: false,
        connect_timeout: PATIENCE,
        ssh_config: None,
    }
}

pub(crate) fn host() -> HostName {
    "web1".parse().unwrap()
}

pub(crate) fn command(words: &[&str]) -> Request {
    let argv = words.iter().map(|word| (*word).to_owned()).collect();
    Request::Exec { argv, directory: None, timeout: PATIENCE }
}

/// Runs a command of the test agent and returns the lines it printed and its reply.
pub(crate) async fn run(connection: &Connection, words: &[&str]) -> (Vec<String>, Result<Reply, CallError>) {
    let mut lines = Vec::new();
    let reply = connection.call(command(words), PATIENCE, |event| lines.push(text(event))).await;
    (lines, reply)
}

pub(crate) fn text(event: Event) -> String {
    match event {
        Event::Line { text, .. } => text,
        other => format!("{other:?}"),
    }
}

/// A release whose files are numbered, each of so many bytes; `commit` tells the test agent how to behave, and `label`
/// is the socket on which it asks before it takes the next object.
pub(crate) fn stage(files: u64, bytes: usize, commit: &str, label: &str) -> Request {
    let entries = (0..files).map(|number| {
        let hash = ContentHash::from_bytes(*blake3::hash(&object(number, bytes)).as_bytes());
        let entry = Entry::File { size: bytes as u64, executable: false, hash, chunks: Vec::new() };
        (format!("file{number}"), entry)
    });
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
        manifest: Manifest { entries: entries.collect() },
        rollout: "test-1".parse().unwrap(),
        secrets: BTreeMap::new(),
    }
}

/// The content of a numbered file.
pub(crate) fn object(number: u64, bytes: usize) -> Vec<u8> {
    let mut content = number.to_be_bytes().to_vec();
    content.resize(bytes.max(8), 0);
    content
}
