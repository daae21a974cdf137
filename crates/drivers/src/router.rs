//! The built-in router's control socket: one JSON object per line. Its backends are what HAProxy calls servers.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use greenlight_model::id::HostName;
use greenlight_model::quantity::Percent;
use greenlight_model::traffic::{Admission, Server, ServerHealth, weights};
use serde::{Deserialize, Serialize};

use crate::balancer::{DriverProblem, word};
use crate::canary::{CountRow, Counts, Share};
use crate::transport::Transport;

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Request<'a> {
    Get {},
    Backend {
        name: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        state: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        release: Option<&'a str>,
    },
    Canary {
        spec: CanarySpec<'a>,
    },
    Renew {
        release: &'a str,
        lease_ms: u64,
    },
    Conclude {
        release: &'a str,
    },
    Alert {
        reason: &'a str,
        by: &'a str,
    },
    Enable {
        by: &'a str,
    },
    Counts {},
}

#[derive(Serialize)]
struct CanarySpec<'a> {
    release: &'a str,
    share_per_mille: u32,
    lease_ms: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Ok(Snapshot),
    Counts(RouterCounts),
    Error { message: String },
}

/// What is of interest here; the router says more.
#[derive(Deserialize)]
struct Snapshot {
    backends: Vec<Backend>,
    canary: Option<Canary>,
}

#[derive(Deserialize)]
struct Canary {
    spec: Trial,
    /// What it gets now: nothing once its lease has ended.
    share_in_force_per_mille: u32,
}

#[derive(Deserialize)]
struct Trial {
    release: String,
}

#[derive(Deserialize)]
struct RouterCounts {
    instance: u64,
    elapsed_ms: u64,
    latency_bounds_us: Vec<u64>,
    rows: Vec<RouterRow>,
}

#[derive(Deserialize)]
struct RouterRow {
    backend: String,
    release: Option<String>,
    route: String,
    since_generation: u64,
    requests: u64,
    answers: [u64; 5],
    failed: u64,
    broken: u64,
    moved: u64,
    latency: Vec<(usize, u64)>,
    in_flight_ages: Vec<(usize, u64)>,
}

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
    release: Option<String>,
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

/// Each backend of the router. It shares out by release; weights that come to the same are shown.
pub(crate) async fn read(transport: &dyn Transport) -> Result<BTreeMap<String, Server>, DriverProblem> {
    let Snapshot { backends, canary } = change(transport, &Request::Get {}).await?;
    let mut servers: BTreeMap<String, Server> =
        backends.iter().map(|backend| (backend.spec.name.clone(), server(backend))).collect();
    let Some(canary) = canary else { return Ok(servers) };
    // Weights are given to hosts; here a backend's name stands for its host.
    let named = |name: &str| name.parse::<HostName>().ok();
    let on_trial = backends.iter().filter(|one| one.spec.release.as_ref() == Some(&canary.spec.release));
    let canaries: BTreeSet<HostName> = on_trial.filter_map(|one| named(&one.spec.name)).collect();
    let by_host = servers.iter().filter_map(|(name, server)| Some((named(name)?, *server))).collect();
    let percent = u8::try_from(canary.share_in_force_per_mille / 10).ok();
    let share = percent.and_then(|percent| Percent::try_from(percent).ok()).filter(|share| share.get() > 0);
    let in_force = share.map(|share| weights(&by_host, &canaries, share));
    for (name, server) in &mut servers {
        let Some(host) = named(name) else { continue };
        server.weight = match &in_force {
            Some(weights) => weights.get(&host).copied().unwrap_or(server.weight),
            None if canaries.contains(&host) => 0,
            None => server.weight,
        };
    }
    Ok(servers)
}

/// Sets a backend's state, and which release answers there when that is known. The answer comes when every core of the router has made the change.
pub(crate) async fn set(
    transport: &dyn Transport,
    name: &str,
    wanted: Admission,
    release: Option<&str>,
) -> Result<(), DriverProblem> {
    change(transport, &Request::Backend { name, state: Some(word(wanted)), release }).await.map(drop)
}

/// Lends a share to the release that these backends run.
pub(crate) async fn lend(
    transport: &dyn Transport,
    backends: &[&str],
    share: &Share<'_>,
) -> Result<(), DriverProblem> {
    // They are not admitted yet, so nobody has told the router what they run by now.
    for name in backends {
        change(transport, &Request::Backend { name, state: None, release: Some(share.release) }).await?;
    }
    let spec = CanarySpec {
        release: share.release,
        share_per_mille: u32::from(share.share.get()) * 10,
        lease_ms: milliseconds(share.lease),
    };
    change(transport, &Request::Canary { spec }).await.map(drop)
}

pub(crate) async fn renew(
    transport: &dyn Transport,
    release: &str,
    lease: Duration,
) -> Result<(), DriverProblem> {
    change(transport, &Request::Renew { release, lease_ms: milliseconds(lease) }).await.map(drop)
}

pub(crate) async fn conclude(transport: &dyn Transport) -> Result<(), DriverProblem> {
    let Some(canary) = change(transport, &Request::Get {}).await?.canary else { return Ok(()) };
    change(transport, &Request::Conclude { release: &canary.spec.release }).await.map(drop)
}

pub(crate) async fn alert(transport: &dyn Transport, reason: &str, by: &str) -> Result<(), DriverProblem> {
    change(transport, &Request::Alert { reason, by }).await.map(drop)
}

pub(crate) async fn enable(transport: &dyn Transport, by: &str) -> Result<(), DriverProblem> {
    change(transport, &Request::Enable { by }).await.map(drop)
}

/// What was counted; `host` tells which host a backend is, if any of the fleet's.
pub(crate) async fn counts(
    transport: &dyn Transport,
    host: impl Fn(&str) -> Option<HostName>,
) -> Result<Counts, DriverProblem> {
    let Answer::Counts(counts) = ask(transport, &Request::Counts {}).await? else {
        return Err(malformed("it was asked for counts and told something else"));
    };
    let row = |row: RouterRow| {
        Some(CountRow {
            host: host(&row.backend)?,
            errors: row.answers[4] + row.failed + row.broken,
            release: row.release,
            route: row.route,
            since: row.since_generation,
            requests: row.requests,
            undelivered: row.moved,
            latency: row.latency,
            in_flight: row.in_flight_ages,
        })
    };
    Ok(Counts {
        instance: counts.instance,
        elapsed: Duration::from_millis(counts.elapsed_ms),
        bounds_us: counts.latency_bounds_us,
        rows: counts.rows.into_iter().filter_map(row).collect(),
    })
}

async fn change(transport: &dyn Transport, request: &Request<'_>) -> Result<Snapshot, DriverProblem> {
    match ask(transport, request).await? {
        Answer::Ok(snapshot) => Ok(snapshot),
        _ => Err(malformed("it was asked for a change and told counts")),
    }
}

fn malformed(why: &str) -> DriverProblem {
    DriverProblem::Malformed { why: why.to_owned() }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

async fn ask(transport: &dyn Transport, request: &Request<'_>) -> Result<Answer, DriverProblem> {
    let malformed = |error: serde_json::Error| DriverProblem::Malformed { why: error.to_string() };
    let command = serde_json::to_string(request).map_err(malformed)?;
    let answer = transport.exchange(&format!("{command}\n")).await?;
    match serde_json::from_str(&answer).map_err(malformed)? {
        Answer::Error { message } => Err(DriverProblem::Refused { command, said: message }),
        answer => Ok(answer),
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
        normal_weight: backend.spec.weight,
    }
}
