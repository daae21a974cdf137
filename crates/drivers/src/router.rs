//! The built-in router's control socket: one JSON object per line. Its backends are what HAProxy calls servers.

use std::collections::BTreeMap;

use greenlight_model::traffic::{Admission, Server, ServerHealth};
use serde::{Deserialize, Serialize};

use crate::balancer::{DriverProblem, word};
use crate::transport::Transport;

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Request<'a> {
    Get {},
    Backend {
        name: &'a str,
        state: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        release: Option<&'a str>,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Ok { backends: Vec<Backend> },
    Error { message: String },
}

/// What is of interest here; the router says more.
#[derive(Deserialize)]
struct Backend {
    spec: Spec,
    health: Health,
    sessions: u64,
}

/// What the backend was told to be.
#[derive(Deserialize)]
struct Spec {
    name: String,
    weight: u32,
    state: State,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ready,
    Drain,
    Maintenance,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Health {
    Up,
    Down,
    Checking,
}

/// Each backend of the router.
pub(crate) async fn read(transport: &dyn Transport) -> Result<BTreeMap<String, Server>, DriverProblem> {
    let backends = ask(transport, &Request::Get {}).await?;
    Ok(backends.into_iter().map(|backend| (backend.spec.name.clone(), server(&backend))).collect())
}

/// Sets a backend's state, and which release answers there when that is known. The answer comes when every core of the router has made the change.
pub(crate) async fn set(
    transport: &dyn Transport,
    name: &str,
    wanted: Admission,
    release: Option<&str>,
) -> Result<(), DriverProblem> {
    ask(transport, &Request::Backend { name, state: word(wanted), release }).await.map(drop)
}

async fn ask(transport: &dyn Transport, request: &Request<'_>) -> Result<Vec<Backend>, DriverProblem> {
    let malformed = |error: serde_json::Error| DriverProblem::Malformed { why: error.to_string() };
    let command = serde_json::to_string(request).map_err(malformed)?;
    let answer = transport.exchange(&format!("{command}\n")).await?;
    match serde_json::from_str(&answer).map_err(malformed)? {
        Answer::Ok { backends } => Ok(backends),
        Answer::Error { message } => Err(DriverProblem::Refused { command, said: message }),
    }
}

fn server(backend: &Backend) -> Server {
    Server {
        admission: match backend.spec.state {
            State::Ready => Admission::Ready,
            State::Drain => Admission::Drain,
            State::Maintenance => Admission::Maintenance,
        },
        health: match backend.health {
            Health::Up => ServerHealth::Up,
            Health::Down => ServerHealth::Down,
            Health::Checking => ServerHealth::Checking,
        },
        sessions: backend.sessions,
        weight: backend.spec.weight,
    }
}
