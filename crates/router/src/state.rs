//! What the router should be ([`RouterState`]) and what it is ([`RouterSnapshot`]): the types that cross the control
//! socket. Both are plain values; nothing here does I/O.

use std::collections::HashSet;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::affinity::{RequestKey, TesterSpec};
use crate::canary::{
    Alert, AlertRaised, CanaryChange, CanarySpec, CanaryStatus, Conclusion, MAX_REASON_BYTES,
};
use crate::routes::Routes;
use crate::standing::{MaintenancePage, Pause};
use crate::tls::{TlsFiles, TlsStatus};

/// More backends than this in one state are refused: a choice walks over all of them.
pub const MAX_BACKENDS: usize = 1024;
/// Longest name of a backend, in bytes. Names are printed in every access log line.
pub const MAX_NAME_BYTES: usize = 128;
/// Longest release label, in bytes. It is printed in every access log line.
pub const MAX_RELEASE_BYTES: usize = 256;
/// Longest health path, in bytes.
pub const MAX_HEALTH_PATH_BYTES: usize = 512;
/// Longest reason for a backend being down, in bytes; it is cut there.
pub const MAX_HEALTH_DETAIL_BYTES: usize = 256;
/// Largest weight. The sum over [`MAX_BACKENDS`] stays far inside 64 bits.
pub const MAX_WEIGHT: u32 = 1_000_000;

/// Longest slow start, in milliseconds.
pub const MAX_SLOW_START_MS: u64 = 10 * 60 * 1000;
/// Longest time that passive health leaves a backend out, in milliseconds.
pub const MAX_OUT_MS: u64 = 10 * 60 * 1000;

/// The whole desired state. It replaces what was there; connections and requests in flight are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterState {
    /// Rises with every change. An older one is refused, and so is the same one with other content.
    pub generation: u64,
    /// Every backend, in any order. An empty list is legal: all requests are then answered with 503.
    pub backends: Vec<BackendSpec>,
    /// A release on trial, with its share. Without one all backends share the traffic by their weights. Its lease begins
    /// when a state is set that has another canary than before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<CanarySpec>,
    /// What makes a user sticky: requests with the same value go to the same backend, and to the canary or to stable, for
    /// as long as that can serve. A larger share keeps those who are with the canary already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sticky: Option<RequestKey>,
    /// Whose requests go to the canary whatever its share. They are not counted for its judgement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tester: Option<TesterSpec>,
    /// Route templates by which requests are counted: `/users/{id}`, `/static/*`. The first that matches counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<String>,
    /// When a backend comes up its weight rises from a tenth to the whole over this time, in milliseconds. 0: at once.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub slow_start_ms: u64,
    /// Backends whose answers to clients fail are left out for a while, whatever the checks say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passive: Option<PassiveHealth>,
    /// Answers everything with a page instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maintenance: Option<MaintenancePage>,
    /// Lets requests wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<Pause>,
    /// The certificate to show in place of the one that the router was started with. Only where it was started with one: what
    /// speaks TLS goes on to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsFiles>,
}

/// When a backend is left out because of what it answers to clients. Never the last one: when all are left out, all take
/// requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PassiveHealth {
    /// After so many requests in a row that got a status of 500 or more, or no answer.
    pub errors_in_a_row: u32,
    /// For so long, in milliseconds.
    pub out_ms: u64,
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// One backend as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendSpec {
    /// Unique within the state; the name in the read-back and in the access log.
    pub name: String,
    /// Where it listens. A backend keeps its counts and its health for as long as name and address stay the same.
    pub address: SocketAddr,
    /// Its share of the requests, relative to the other ready backends. 0 takes no requests.
    #[serde(default = "default_weight")]
    pub weight: u32,
    /// Whether it takes requests.
    #[serde(default)]
    pub state: BackendState,
    /// The release it runs, as the access log shall name it. Any string.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    /// Path for the active check: healthy is an answer of 200–399. Without it the check is a TCP connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<String>,
}

fn default_weight() -> u32 {
    100
}

/// Whether a backend takes requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendState {
    /// Takes requests while it is healthy.
    #[default]
    Ready,
    /// No new requests; those in flight finish; idle connections to it are closed; still checked.
    Drain,
    /// As `drain`, and not checked either.
    Maintenance,
}

/// What the checks say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// No check has ended since the backend was added or became ready again (or it is in maintenance and not
    /// checked). It takes requests only when no backend is up.
    Checking,
    /// The checks pass.
    Up,
    /// The checks fail, or connecting failed repeatedly.
    Down,
}

/// A change of one backend; what is `None` stays. The generation rises by one.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendChange {
    /// Which backend.
    pub name: String,
    /// Its new state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<BackendState>,
    /// Its new weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// The release it now runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    /// When given, the change is made only if this is the present generation: compare and set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
}

/// The router as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterSnapshot {
    /// The generation in force on every core.
    pub generation: u64,
    /// Where it listens.
    pub listen: SocketAddr,
    /// Client connections now open.
    pub connections: u64,
    /// Requests answered with 503 because no backend could take them.
    pub unrouted: u64,
    /// Requests refused because their framing or head was not safe to forward.
    pub refused: u64,
    /// Connections that ended before TLS was agreed on.
    #[serde(default)]
    pub handshakes_failed: u64,
    /// The certificate that clients are shown, where they speak TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsStatus>,
    /// Access log lines that were dropped because the file was slower than the traffic, or could not be written.
    pub log_lines_dropped: u64,
    /// The release on trial, with the share that is in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<CanaryStatus>,
    /// The alert that holds the canary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alert: Option<Alert>,
    /// Every backend, in the order of the state.
    pub backends: Vec<BackendStatus>,
}

/// One backend as it is. Counts begin when the backend (name and address) was first seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendStatus {
    /// The specification in force.
    pub spec: BackendSpec,
    /// What the checks say.
    pub health: Health,
    /// It is left out now because of what it answered to clients.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_left_out: bool,
    /// Why it is down, as a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_detail: Option<String>,
    /// Requests in flight now, summed over the cores. Upgraded connections count until they close.
    pub sessions: u64,
    /// Requests sent to it.
    pub requests: u64,
    /// Requests sent to it that got no whole answer: broken connection, timeout, an answer that is not HTTP.
    pub errors: u64,
    /// Answers with a status of 500 or more.
    pub answers_5xx: u64,
    /// Requests that were moved off it because they could not have been processed (not counted in `requests`).
    pub retries: u64,
    /// Connections to it that could not be opened.
    pub connect_failures: u64,
}

/// Why a state or a change is refused. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The generation is older than the one in force.
    #[error("generation {given} is older than the present {present}; read the state again and build on that")]
    Stale {
        /// The one that was sent.
        given: u64,
        /// The one in force.
        present: u64,
    },
    /// The generation is in force with other content.
    #[error("generation {generation} is already in force with other content; use a higher one")]
    Conflict {
        /// The generation.
        generation: u64,
    },
    /// The change names a backend that is not there.
    #[error("no backend is named {name:?}; there are: {known}")]
    UnknownBackend {
        /// The name.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// The state is not legal.
    #[error("backend {name:?}: {problem}")]
    Invalid {
        /// The backend at fault.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Something else in the state, or a command's value, is not legal.
    #[error("{problem}")]
    Wrong {
        /// What is wrong.
        problem: String,
    },
    /// An alert holds the canary.
    #[error(
        "the canary is held at 0 by an alert of {at} by {by}: {reason}; all requests go to stable until a person enables it \
         again"
    )]
    Held {
        /// Why.
        reason: String,
        /// Who said so.
        by: String,
        /// When.
        at: String,
    },
    /// There is no canary of this release to renew or conclude.
    #[error("{problem}")]
    NotOnTrial {
        /// What there is instead.
        problem: String,
    },
    /// Too many backends.
    #[error("{count} backends are more than the {MAX_BACKENDS} that one router takes")]
    TooMany {
        /// How many there were.
        count: usize,
    },
}

impl RouterState {
    /// A state of these backends and nothing else.
    #[must_use]
    pub fn new(generation: u64, backends: Vec<BackendSpec>) -> Self {
        Self {
            generation,
            backends,
            canary: None,
            sticky: None,
            tester: None,
            routes: Vec::new(),
            slow_start_ms: 0,
            passive: None,
            maintenance: None,
            pause: None,
            tls: None,
        }
    }

    /// Checks names, weights, labels, paths and the rest.
    ///
    /// # Errors
    /// The first thing that is not legal.
    pub fn validate(&self) -> Result<(), StateError> {
        if self.backends.len() > MAX_BACKENDS {
            return Err(StateError::TooMany { count: self.backends.len() });
        }
        self.validate_rules().map_err(|problem| StateError::Wrong { problem })?;
        let mut names = HashSet::new();
        for backend in &self.backends {
            let fail = |problem: String| Err(StateError::Invalid { name: backend.name.clone(), problem });
            if !is_label(&backend.name, MAX_NAME_BYTES) {
                return fail(format!("a name is 1 to {MAX_NAME_BYTES} bytes without control characters"));
            }
            if !names.insert(backend.name.as_str()) {
                return fail("the name is used twice".to_owned());
            }
            if backend.weight > MAX_WEIGHT {
                return fail(format!("weight {} is more than {MAX_WEIGHT}", backend.weight));
            }
            if backend.address.port() == 0 {
                return fail("port 0 cannot be connected to".to_owned());
            }
            if let Some(release) = &backend.release
                && !is_label(release, MAX_RELEASE_BYTES)
            {
                return fail(format!(
                    "a release is 1 to {MAX_RELEASE_BYTES} bytes without control characters"
                ));
            }
            if let Some(path) = &backend.health
                && !(path.starts_with('/')
                    && path.len() <= MAX_HEALTH_PATH_BYTES
                    && path.bytes().all(|byte| byte.is_ascii_graphic()))
            {
                return fail(format!(
                    "health path {path:?} must begin with '/', be at most {MAX_HEALTH_PATH_BYTES} bytes and hold only \
                     printable ASCII without spaces"
                ));
            }
        }
        Ok(())
    }

    /// What concerns no single backend.
    fn validate_rules(&self) -> Result<(), String> {
        if let Some(canary) = &self.canary {
            canary.validate()?;
            if !is_label(&canary.release, MAX_RELEASE_BYTES) {
                return Err(format!(
                    "the release on trial is 1 to {MAX_RELEASE_BYTES} bytes without control characters"
                ));
            }
        }
        self.sticky.as_ref().map_or(Ok(()), RequestKey::validate)?;
        self.tester.as_ref().map_or(Ok(()), TesterSpec::validate)?;
        self.maintenance.as_ref().map_or(Ok(()), MaintenancePage::validate)?;
        self.pause.as_ref().map_or(Ok(()), Pause::validate)?;
        if self.slow_start_ms > MAX_SLOW_START_MS {
            return Err(format!(
                "a slow start of {} ms is more than {MAX_SLOW_START_MS} ms",
                self.slow_start_ms
            ));
        }
        if let Some(passive) = &self.passive
            && (passive.errors_in_a_row == 0 || !(1..=MAX_OUT_MS).contains(&passive.out_ms))
        {
            return Err(format!("passive health needs at least 1 error in a row, and 1 to {MAX_OUT_MS} ms"));
        }
        Routes::new(&self.routes).map(drop)
    }

    /// Whether `next` may follow this state: `Ok(false)` when it is the same state again.
    pub(crate) fn admits(&self, next: &Self) -> Result<bool, StateError> {
        next.validate()?;
        if next.generation < self.generation {
            return Err(StateError::Stale { given: next.generation, present: self.generation });
        }
        if next.generation == self.generation {
            if next == self {
                return Ok(false);
            }
            return Err(StateError::Conflict { generation: next.generation });
        }
        Ok(true)
    }

    /// The state after `change`, one generation on.
    pub(crate) fn changed(&self, change: BackendChange) -> Result<Self, StateError> {
        if let Some(given) = change.generation
            && given != self.generation
        {
            return Err(StateError::Stale { given, present: self.generation });
        }
        let mut next = self.clone();
        next.generation += 1;
        let Some(backend) = next.backends.iter_mut().find(|backend| backend.name == change.name) else {
            let known: Vec<&str> = self.backends.iter().map(|backend| backend.name.as_str()).collect();
            return Err(StateError::UnknownBackend { name: change.name, known: known.join(", ") });
        };
        if let Some(state) = change.state {
            backend.state = state;
        }
        if let Some(weight) = change.weight {
            backend.weight = weight;
        }
        if let Some(release) = change.release {
            backend.release = Some(release);
        }
        next.validate()?;
        Ok(next)
    }

    /// The state with a canary set, one generation on. An alert, if there is one, refuses it.
    pub(crate) fn with_canary(
        &self,
        change: CanaryChange,
        alert: Option<&Alert>,
    ) -> Result<Self, StateError> {
        if let Some(given) = change.generation
            && given != self.generation
        {
            return Err(StateError::Stale { given, present: self.generation });
        }
        let next = Self { generation: self.generation + 1, canary: Some(change.spec), ..self.clone() };
        next.permitted_by(alert)?;
        next.validate()?;
        Ok(next)
    }

    /// The state without its canary, one generation on.
    pub(crate) fn concluded(
        &self,
        conclusion: &Conclusion,
        alert: Option<&Alert>,
    ) -> Result<Self, StateError> {
        self.on_trial(&conclusion.release)?;
        let next = Self { generation: self.generation + 1, canary: None, ..self.clone() };
        if let Some(alert) = alert {
            return Err(held(alert));
        }
        Ok(next)
    }

    /// The state after an alert, one generation on: its canary has no share.
    pub(crate) fn alerted(&self) -> Self {
        let mut next = self.clone();
        next.generation += 1;
        if let Some(canary) = &mut next.canary {
            canary.share_per_mille = 0;
        }
        next
    }

    /// Whether this state gives the canary nothing that `alert` holds back.
    pub(crate) fn permitted_by(&self, alert: Option<&Alert>) -> Result<(), StateError> {
        let Some(alert) = alert else { return Ok(()) };
        let is_held = |canary: &CanarySpec| {
            canary.share_per_mille == 0
                && alert.release.as_ref().is_none_or(|release| *release == canary.release)
        };
        match &self.canary {
            Some(canary) if is_held(canary) => Ok(()),
            // Without a canary its backends would be like all others.
            None if !self
                .backends
                .iter()
                .any(|backend| backend.release.is_some() && backend.release == alert.release) =>
            {
                Ok(())
            }
            _ => Err(held(alert)),
        }
    }

    /// The canary, if it is of this release.
    pub(crate) fn on_trial(&self, release: &str) -> Result<&CanarySpec, StateError> {
        match &self.canary {
            Some(canary) if canary.release == release => Ok(canary),
            Some(canary) => Err(StateError::NotOnTrial {
                problem: format!("release {release:?} is not on trial, {:?} is", canary.release),
            }),
            None => Err(StateError::NotOnTrial { problem: "no release is on trial".to_owned() }),
        }
    }
}

/// Checks what an alert, or whoever ends it, says.
pub(crate) fn validate_words(words: &str) -> Result<(), StateError> {
    if is_label(words, MAX_REASON_BYTES) {
        return Ok(());
    }
    let problem = format!("a reason or a name is 1 to {MAX_REASON_BYTES} bytes without control characters");
    Err(StateError::Wrong { problem })
}

/// The alert that this command raises.
pub(crate) fn raised(
    raised: AlertRaised,
    state: &RouterState,
    at: jiff::Timestamp,
) -> Result<Alert, StateError> {
    validate_words(&raised.reason)?;
    validate_words(&raised.by)?;
    let release = state.canary.as_ref().map(|canary| canary.release.clone());
    Ok(Alert { reason: raised.reason, by: raised.by, at, release })
}

fn held(alert: &Alert) -> StateError {
    StateError::Held { reason: alert.reason.clone(), by: alert.by.clone(), at: alert.at.to_string() }
}

fn is_label(text: &str, limit: usize) -> bool {
    !text.is_empty() && text.len() <= limit && !text.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(name: &str) -> BackendSpec {
        BackendSpec {
            name: name.to_owned(),
            address: "127.0.0.1:7071".parse().unwrap(),
            weight: 100,
            state: BackendState::Ready,
            release: None,
            health: None,
        }
    }

    fn state(generation: u64, names: &[&str]) -> RouterState {
        RouterState::new(generation, names.iter().map(|name| backend(name)).collect())
    }

    #[test]
    fn generations_only_rise() {
        let present = state(5, &["a"]);
        assert_eq!(present.admits(&state(6, &["b"])), Ok(true));
        assert_eq!(present.admits(&state(5, &["a"])), Ok(false));
        assert_eq!(present.admits(&state(5, &["b"])), Err(StateError::Conflict { generation: 5 }));
        assert_eq!(present.admits(&state(4, &["a"])), Err(StateError::Stale { given: 4, present: 5 }));
    }

    #[test]
    fn a_change_raises_the_generation_and_can_be_conditional() {
        let present = state(5, &["a", "b"]);
        let drain = BackendChange {
            name: "b".to_owned(),
            state: Some(BackendState::Drain),
            ..BackendChange::default()
        };
        let next = present.changed(drain.clone()).unwrap();
        assert_eq!((next.generation, next.backends[1].state), (6, BackendState::Drain));
        assert_eq!(next.backends[0], present.backends[0]);
        assert_eq!(
            present.changed(BackendChange { generation: Some(4), ..drain.clone() }),
            Err(StateError::Stale { given: 4, present: 5 })
        );
        assert_eq!(
            present.changed(BackendChange { name: "c".to_owned(), ..drain }),
            Err(StateError::UnknownBackend { name: "c".to_owned(), known: "a, b".to_owned() })
        );
    }

    #[test]
    fn what_is_not_legal_is_refused() {
        type Spoil = fn(&mut BackendSpec);
        let cases: [(&str, Spoil); 8] = [
            ("empty name", |b| b.name = String::new()),
            ("control character", |b| b.name = "a\nb".to_owned()),
            ("long name", |b| b.name = "a".repeat(MAX_NAME_BYTES + 1)),
            ("weight", |b| b.weight = MAX_WEIGHT + 1),
            ("port", |b| b.address.set_port(0)),
            ("release", |b| b.release = Some(String::new())),
            ("relative path", |b| b.health = Some("health".to_owned())),
            ("path with a line end", |b| b.health = Some("/health\r\nX: y".to_owned())),
        ];
        for (what, spoil) in cases {
            let mut state = state(1, &["a"]);
            assert_eq!(state.validate(), Ok(()));
            spoil(&mut state.backends[0]);
            assert!(matches!(state.validate(), Err(StateError::Invalid { .. })), "{what}");
        }
        assert!(state(1, &["a", "a"]).validate().is_err(), "a name used twice");
    }

    #[test]
    fn the_wire_form_is_stable() {
        let text = r#"{"generation":3,"backends":[{"name":"a","address":"10.99.0.1:80","weight":70,"state":"drain","release":"v1","health":"/health"},{"name":"b","address":"[::1]:80"}]}"#;
        let state: RouterState = serde_json::from_str(text).unwrap();
        assert_eq!(state.backends[0].state, BackendState::Drain);
        assert_eq!((state.backends[1].weight, state.backends[1].state), (100, BackendState::Ready));
        let again: RouterState = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
        assert_eq!(again, state);
        assert!(serde_json::from_str::<RouterState>(r#"{"generation":3,"backends":[],"extra":1}"#).is_err());
    }
}
