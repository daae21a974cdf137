//! What the link's tests share.

use std::path::PathBuf;
use std::time::Duration;

use greenlight_link::connection::{CallError, Connection, OpenOptions};
use greenlight_link::message::{Event, Reply, Request};
use greenlight_model::id::HostName;

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
