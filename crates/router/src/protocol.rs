//! The control protocol: one JSON object per line, each answered by one line.
//!
//! | request | what it does |
//! | --- | --- |
//! | `{"get":{}}` | reads the router |
//! | `{"set":STATE}` | sets the whole state ([`RouterState`]) |
//! | `{"backend":CHANGE}` | changes one backend ([`BackendChange`]) |
//! | `{"canary":{"spec":{"release":…,"share_per_mille":…,"lease_ms":…}}}` | sets the canary ([`CanaryChange`]) |
//! | `{"renew":{"release":…,"lease_ms":…}}` | lends its share for longer ([`Renewal`]) |
//! | `{"conclude":{"release":…}}` | ends the trial: weights alone count again ([`Conclusion`]) |
//! | `{"alert":{"reason":…,"by":…}}` | the canary gets nothing until it is enabled ([`AlertRaised`]) |
//! | `{"enable":{"by":…}}` | a person ends the alert ([`Enabling`]) |
//! | `{"counts":{"by":"release"}}` | reads what was counted ([`CountsRequest`]) |
//! | `{"handover":{}}`, `{"takeover":{"token":…}}` | what a successor says, see `handover` |
//!
//! Answers: `{"ok":SNAPSHOT}` ([`RouterSnapshot`]), `{"counts":COUNTS}` ([`RouterCounts`]) or
//! `{"error":{"kind":…,"message":…}}`. An answer to a change is given when every core has made it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::canary::{AlertRaised, CanaryChange, Conclusion, Enabling, Renewal};
use crate::counts::{CountsRequest, RouterCounts};
use crate::handover::{Handover, TakingOver};
use crate::state::{BackendChange, RouterSnapshot, RouterState, StateError};

/// Longest line, in bytes: a state with [`crate::MAX_BACKENDS`] backends of the longest names and paths stays below.
pub(crate) const MAX_LINE_BYTES: usize = 4 * 1024 * 1024;
/// A change waits for every core, and a core for its current task; more than this means that something is broken.
pub(crate) const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ControlRequest {
    Get(Nothing),
    Set(Box<RouterState>),
    Backend(BackendChange),
    Canary(CanaryChange),
    Renew(Renewal),
    Conclude(Conclusion),
    Alert(AlertRaised),
    Enable(Enabling),
    Counts(CountsRequest),
    Handover(Nothing),
    Takeover(TakingOver),
}

/// The empty object of `get`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Nothing {}

/// What it is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ControlAnswer {
    Ok(Box<RouterSnapshot>),
    Counts(RouterCounts),
    Handover(Box<Handover>),
    Error(ControlError),
}

/// Why the router refused a command. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct ControlError {
    /// For programs.
    pub kind: ControlErrorKind,
    /// For people: what is wrong and what to do.
    pub message: String,
}

/// The kinds of [`ControlError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ControlErrorKind {
    /// The generation is older than the one in force: read, and build on that.
    Stale,
    /// The generation is in force with other content.
    Conflict,
    /// No backend of this name.
    UnknownBackend,
    /// The state is not legal.
    Invalid,
    /// An alert holds the canary at 0 until a person enables it again.
    Held,
    /// This release is not on trial, or its lease has ended: set the canary anew.
    NotOnTrial,
    /// There is too much to say: ask for less.
    TooMuch,
    /// The line is not a command.
    Malformed,
    /// The router is shutting down, or a worker has ended.
    Unavailable,
}

impl ControlError {
    pub(crate) fn unavailable(message: &str) -> Self {
        Self { kind: ControlErrorKind::Unavailable, message: message.to_owned() }
    }

    pub(crate) fn too_much() -> Self {
        let message = format!("the answer is longer than {MAX_LINE_BYTES} bytes; ask for counts by release");
        Self { kind: ControlErrorKind::TooMuch, message }
    }

    pub(crate) fn malformed(message: String) -> Self {
        Self { kind: ControlErrorKind::Malformed, message }
    }
}

impl From<StateError> for ControlError {
    fn from(error: StateError) -> Self {
        let kind = match error {
            StateError::Stale { .. } => ControlErrorKind::Stale,
            StateError::Conflict { .. } => ControlErrorKind::Conflict,
            StateError::UnknownBackend { .. } => ControlErrorKind::UnknownBackend,
            StateError::Invalid { .. } | StateError::TooMany { .. } | StateError::Wrong { .. } => {
                ControlErrorKind::Invalid
            }
            StateError::Held { .. } => ControlErrorKind::Held,
            StateError::NotOnTrial { .. } => ControlErrorKind::NotOnTrial,
        };
        Self { kind, message: error.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::canary::CanarySpec;
    use crate::state::{BackendSpec, BackendState, Health};

    #[test]
    fn the_lines_are_as_documented() {
        let requests = [
            (r#"{"get":{}}"#, ControlRequest::Get(Nothing {})),
            (
                r#"{"set":{"generation":2,"backends":[]}}"#,
                ControlRequest::Set(RouterState::new(2, Vec::new()).into()),
            ),
            (
                r#"{"backend":{"name":"a","state":"drain"}}"#,
                ControlRequest::Backend(BackendChange {
                    name: "a".to_owned(),
                    state: Some(BackendState::Drain),
                    ..BackendChange::default()
                }),
            ),
            (
                r#"{"canary":{"spec":{"release":"v2","share_per_mille":50,"lease_ms":10000}}}"#,
                ControlRequest::Canary(CanaryChange {
                    spec: CanarySpec { release: "v2".to_owned(), share_per_mille: 50, lease_ms: 10_000 },
                    generation: None,
                }),
            ),
            (
                r#"{"renew":{"release":"v2","lease_ms":10000}}"#,
                ControlRequest::Renew(Renewal { release: "v2".to_owned(), lease_ms: 10_000 }),
            ),
            (
                r#"{"conclude":{"release":"v2"}}"#,
                ControlRequest::Conclude(Conclusion { release: "v2".to_owned() }),
            ),
            (
                r#"{"alert":{"reason":"errors","by":"verdict"}}"#,
                ControlRequest::Alert(AlertRaised { reason: "errors".to_owned(), by: "verdict".to_owned() }),
            ),
            (r#"{"enable":{"by":"ada"}}"#, ControlRequest::Enable(Enabling { by: "ada".to_owned() })),
            (
                r#"{"counts":{"by":"release"}}"#,
                ControlRequest::Counts(CountsRequest { by: crate::counts::CountsBy::Release }),
            ),
        ];
        for (line, request) in requests {
            assert_eq!(serde_json::from_str::<ControlRequest>(line).unwrap(), request);
            assert_eq!(serde_json::to_string(&request).unwrap(), line);
        }
        for bad in
            ["{}", "[]", r#"{"get":{"x":1}}"#, r#"{"backend":{"name":"a","weigth":1}}"#, r#"{"stop":{}}"#]
        {
            assert!(serde_json::from_str::<ControlRequest>(bad).is_err(), "{bad}");
        }
        let error = ControlAnswer::Error(StateError::Conflict { generation: 3 }.into());
        assert_eq!(
            serde_json::to_string(&error).unwrap(),
            r#"{"error":{"kind":"conflict","message":"generation 3 is already in force with other content; use a higher one"}}"#
        );
    }

    #[test]
    fn the_largest_state_and_its_read_back_fit_into_a_line() {
        use crate::canary::{Alert, CanaryStatus, MAX_REASON_BYTES};
        use crate::state::{
            BackendStatus, MAX_BACKENDS, MAX_HEALTH_DETAIL_BYTES, MAX_HEALTH_PATH_BYTES, MAX_NAME_BYTES,
            MAX_RELEASE_BYTES,
        };
        let status = |index: usize| BackendStatus {
            spec: BackendSpec {
                name: format!("{index:\"<width$}", width = MAX_NAME_BYTES),
                address: "[2001:db8:ffff:ffff:ffff:ffff:ffff:ffff]:65535".parse().unwrap(),
                weight: u32::MAX,
                state: BackendState::Maintenance,
                release: Some("\"".repeat(MAX_RELEASE_BYTES)),
                health: Some(format!("/{}", "\\".repeat(MAX_HEALTH_PATH_BYTES - 1))),
            },
            health: Health::Down,
            is_left_out: true,
            health_detail: Some("\\".repeat(MAX_HEALTH_DETAIL_BYTES)),
            sessions: u64::MAX,
            requests: u64::MAX,
            errors: u64::MAX,
            answers_5xx: u64::MAX,
            retries: u64::MAX,
            connect_failures: u64::MAX,
        };
        let snapshot = RouterSnapshot {
            generation: u64::MAX,
            listen: "127.0.0.1:1".parse().unwrap(),
            connections: u64::MAX,
            unrouted: u64::MAX,
            refused: u64::MAX,
            handshakes_failed: u64::MAX,
            tls: None,
            log_lines_dropped: u64::MAX,
            canary: Some(CanaryStatus {
                spec: CanarySpec {
                    release: "\"".repeat(MAX_RELEASE_BYTES),
                    share_per_mille: u32::MAX,
                    lease_ms: u64::MAX,
                },
                share_in_force_per_mille: u32::MAX,
                lease_left_ms: u64::MAX,
            }),
            alert: Some(Alert {
                reason: "\"".repeat(MAX_REASON_BYTES),
                by: "\"".repeat(MAX_REASON_BYTES),
                at: jiff::Timestamp::MAX,
                release: Some("\"".repeat(MAX_RELEASE_BYTES)),
            }),
            backends: (0..MAX_BACKENDS).map(status).collect(),
        };
        let line = serde_json::to_string(&ControlAnswer::Ok(snapshot.clone().into())).unwrap();
        assert!(line.len() < MAX_LINE_BYTES, "{}", line.len());
        assert_eq!(serde_json::from_str::<ControlAnswer>(&line).unwrap(), ControlAnswer::Ok(snapshot.into()));
    }
}
