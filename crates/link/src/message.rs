//! What controller and agent say to each other.
//!
//! The controller numbers its requests; the agent answers each number with any count of events and then exactly one
//! reply. Several requests may be under way at once. The agent's first message is a greeting, unasked.
//!
//! Every request that changes an instance names the rollout (and, where it switches, the generation): the agent refuses
//! one whose claim it does not hold, or whose generation is older than its ledger's.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use greenlight_model::Timestamp;
use greenlight_model::action::Blame;
use greenlight_model::charter::Charter;
use greenlight_model::check::Check;
use greenlight_model::fleet::{HostIdentity, Migration};
use greenlight_model::host::{
    Claim, ClaimRequest, Desired, HostFacts, HostReport, InstanceReport, InstanceSpec, ReleaseMark,
};
use greenlight_model::id::{ContentHash, Generation, ProcessName, ReleaseId, RolloutId, VariableName};
use greenlight_model::migration::MigrationPhase;
use greenlight_model::quantity::{duration_ms, optional_duration_ms};
use greenlight_model::requirements::Requirements;
use greenlight_model::sample::HostSample;
use serde::{Deserialize, Serialize};

/// The version of the protocol. Over ssh both ends are the same build; agents that dial in may be older.
pub const PROTOCOL_VERSION: u32 = 4;

/// Anything that travels as JSON in one frame.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// The agent's first message.
    Greeting {
        /// Its [`PROTOCOL_VERSION`].
        protocol: u32,
        /// The machine it runs on.
        facts: HostFacts,
    },
    /// Controller to agent.
    Request {
        /// Chosen by the controller, unique on this connection.
        id: u64,
        /// What is asked.
        request: Box<Request>,
    },
    /// Agent to controller, while a request is under way.
    Event {
        /// The request's number.
        id: u64,
        /// What happened.
        event: Event,
    },
    /// Agent to controller: the request is over.
    Reply {
        /// The request's number.
        id: u64,
        /// How it ended.
        result: Result<Reply, AgentError>,
    },
}

/// What a controller asks of an agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// What these instances are. Answered by [`Reply::Observed`].
    Observe {
        /// Each service to look at.
        specs: Vec<InstanceSpec>,
    },
    /// Whether the instance could take the release; changes nothing. Answered by [`Reply::Checked`].
    Preflight {
        /// The instance as it is to be.
        spec: InstanceSpec,
        /// What the host must have.
        requires: Box<Requirements>,
        /// The release's size in bytes, for the disk check.
        release_bytes: u64,
        /// Whether the host already holds the release may be found by this.
        release: ReleaseId,
        /// Who the host must prove to be.
        #[serde(default)]
        identity: HostIdentity,
        /// The values of the secrets that its outside services are asked with.
        #[serde(default)]
        secrets: BTreeMap<VariableName, SecretValue>,
    },
    /// Whether the instance is what was released; changes nothing. Answered by [`Reply::Checked`].
    Compare {
        /// The instance as the release defines it.
        spec: InstanceSpec,
        /// The release that it should run; none when it should run nothing.
        release: Option<ReleaseMark>,
        /// What the host must have.
        requires: Box<Requirements>,
    },
    /// Take or renew the lease. Answered by [`Reply::Claimed`], or refused with the holder.
    Claim {
        /// The instance.
        spec: InstanceSpec,
        /// The wish.
        claim: ClaimRequest,
        /// What the rollout is, for a host that is to keep it; one that keeps it already is not told again.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        charter: Option<Box<Charter>>,
    },
    /// The charter of the rollout that claimed the instance last. Answered by [`Reply::Charter`].
    Charter {
        /// The instance.
        spec: InstanceSpec,
    },
    /// Give the lease back; nothing to do when it is not held. Answered by [`Reply::Done`].
    Unclaim {
        /// The instance.
        spec: InstanceSpec,
        /// Whose lease.
        rollout: RolloutId,
    },
    /// Bring a release there. The controller sends the manifest as a parcel of data frames under this request's number; the
    /// agent says with [`Event::Missing`] what it lacks of it; the controller sends that in parcels and ends with an
    /// end-of-data frame; the agent verifies, places and prepares. Answered by [`Reply::Done`].
    Stage {
        /// The instance as it is to be.
        spec: InstanceSpec,
        /// The release.
        release: ReleaseMark,
        /// The rollout that wants it.
        rollout: RolloutId,
        /// The values of the secrets that the release's processes read.
        secrets: BTreeMap<VariableName, SecretValue>,
    },
    /// Start the staged release on its smoke port and stop it again. Answered by [`Reply::Done`].
    Smoke {
        /// The instance as it is to be.
        spec: InstanceSpec,
        /// The release.
        release: ReleaseMark,
    },
    /// Run a part of the release's migration; its lines come as events. Answered by [`Reply::Done`].
    Migrate {
        /// The instance as it is to be.
        spec: InstanceSpec,
        /// The release.
        release: ReleaseMark,
        /// What there is of it.
        migration: Migration,
        /// Which part of it.
        #[serde(default)]
        phase: MigrationPhase,
        /// Whether the part takes something away, so that a copy of the database is kept first.
        #[serde(default)]
        is_lossy: bool,
        /// The rollout that wants it.
        rollout: RolloutId,
    },
    /// Be this: switch, restart, and wait until it answers as the release (or is gone, when no release is wanted).
    /// Answered by [`Reply::Instance`].
    Activate {
        /// The whole desired state.
        desired: Desired,
        /// How long from now the host waits for [`Request::Confirm`] before it goes back by itself to what it runs now; it
        /// does not when absent.
        #[serde(default, with = "optional_duration_ms")]
        guard: Option<Duration>,
    },
    /// The release was proven over a fresh connection: it is the last good one from now on, and its guard is disarmed.
    /// Answered by [`Reply::Instance`].
    Confirm {
        /// The instance.
        spec: InstanceSpec,
        /// The release.
        release: ReleaseId,
        /// The activation's number.
        generation: Generation,
        /// The rollout that wants it.
        rollout: RolloutId,
    },
    /// Remove releases that nothing needs. Answered by [`Reply::Pruned`].
    Prune {
        /// The instance.
        spec: InstanceSpec,
        /// What stays besides the active, the previous and the last good release.
        keep: BTreeSet<ReleaseId>,
        /// How many of the newest stay besides those.
        keep_releases: u32,
        /// The rollout that wants it.
        rollout: RolloutId,
    },
    /// Write to a stream socket of the host and return what it answers until it closes. Answered by [`Reply::Output`].
    Socket {
        /// The socket's path.
        path: String,
        /// What is written.
        input: String,
        /// How long it may take.
        #[serde(with = "duration_ms")]
        timeout: Duration,
    },
    /// Lend something through a stream socket of the host: it is taken back when the lease is not renewed. Answered by
    /// [`Reply::Done`] at once.
    Lease {
        /// The socket's path.
        path: String,
        /// What is lent: of each there is one lease.
        what: String,
        /// What becomes of the lease.
        lease: Lease,
    },
    /// The last lines of a process's logs; with `follow`, lines as events until the connection ends.
    /// Answered by [`Reply::Done`].
    Logs {
        /// The instance.
        spec: InstanceSpec,
        /// Only this process; all when absent.
        process: Option<ProcessName>,
        /// Only this stream; both when absent.
        stream: Option<Stream>,
        /// How many lines of each file.
        lines: u32,
        /// Whether to go on.
        follow: bool,
    },
    /// What the host and these services use, as [`Event::Sampled`]: at once, and then again and again for a while.
    /// Answered by [`Reply::Done`] when that is over.
    Sample {
        /// Each service to look at.
        specs: Vec<InstanceSpec>,
        /// How long from one sample to the next: 100 ms to 10 s, or the nearer of the two.
        #[serde(with = "duration_ms")]
        every: Duration,
        /// For how long, at most an hour; 0 gives one sample.
        #[serde(with = "duration_ms")]
        during: Duration,
    },
    /// Run a command; its lines come as events. Answered by [`Reply::Exited`].
    Exec {
        /// Program and arguments.
        argv: Vec<String>,
        /// The working directory.
        directory: Option<String>,
        /// How long it may take.
        #[serde(with = "duration_ms")]
        timeout: Duration,
    },
}

impl Request {
    /// What it is, as a word for messages: "the staging".
    #[must_use]
    pub fn title(&self) -> &'static str {
        match self {
            Self::Observe { .. } => "the observation",
            Self::Preflight { .. } => "the preflight",
            Self::Compare { .. } => "the comparison",
            Self::Claim { .. } => "the claim",
            Self::Charter { .. } => "reading the charter",
            Self::Unclaim { .. } => "giving the claim back",
            Self::Stage { .. } => "the staging",
            Self::Smoke { .. } => "the smoke start",
            Self::Migrate { .. } => "the migration",
            Self::Activate { .. } => "the activation",
            Self::Confirm { .. } => "the confirmation",
            Self::Prune { .. } => "the pruning",
            Self::Socket { .. } => "asking a socket",
            Self::Lease { .. } => "a lease",
            Self::Logs { .. } => "reading logs",
            Self::Sample { .. } => "sampling",
            Self::Exec { .. } => "a command",
        }
    }
}

/// What becomes of a lease on something that is lent through a socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lease {
    /// It begins, in the place of one that there was.
    Begin {
        /// What is written to the socket when it has lapsed.
        input: String,
        /// How long it lasts without being renewed, at most [`LEASE_MAX`].
        #[serde(with = "duration_ms")]
        lasts: Duration,
    },
    /// It lasts so long from now on. One that has lapsed or was ended stays so.
    Renew {
        /// As where it began.
        #[serde(with = "duration_ms")]
        lasts: Duration,
    },
    /// It ends, and nothing is taken back.
    End,
}

/// Longest lease: an agent on whose host one has begun lives on for as long as that when its controller has gone.
pub const LEASE_MAX: Duration = Duration::from_secs(60);

/// What happens while a request is under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The objects that the host lacks.
    Missing {
        /// Their numbers, by [`greenlight_model::manifest::Manifest::objects`], in rising order: the first of each run,
        /// and how many.
        objects: Vec<(u32, u32)>,
        /// What the host has in the place of some of them: the same path of the release before. A lacking object may be
        /// sent as its difference to that.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        bases: BTreeMap<u32, ContentHash>,
    },
    /// A step of a longer request began: "placing", "preparing", "stopping web", "starting web", "probing web".
    Phase {
        /// Which.
        name: String,
    },
    /// A sample was taken.
    Sampled(Box<HostSample>),
    /// A line was printed.
    Line {
        /// By which process, where several may speak.
        process: Option<ProcessName>,
        /// On which stream.
        stream: Stream,
        /// The line, without its end, cut at [`LINE_BYTES_MAX`].
        text: String,
    },
}

/// One of a process's two outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What a request comes to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// What the host is.
    Observed {
        /// When it looked, by its own clock: what its claims' ends are to be measured against.
        at: Timestamp,
        /// What it saw.
        report: Box<HostReport>,
    },
    /// What the checks found.
    Checked {
        /// The host's own clock, right after the checks.
        at: Timestamp,
        /// Each of them.
        checks: Vec<Check>,
    },
    /// The lease, as granted.
    Claimed(Claim),
    /// The charter, when the host keeps one.
    Charter(Option<Box<Charter>>),
    /// The instance after the change.
    Instance(Box<InstanceReport>),
    /// The releases that were removed.
    Pruned(BTreeSet<ReleaseId>),
    /// What a socket answered, at most [`SOCKET_OUTPUT_BYTES_MAX`].
    Output(String),
    /// How a command ended.
    Exited {
        /// Its exit code; none when a signal ended it.
        code: Option<i32>,
    },
    /// It is done.
    Done,
}

/// Why a request was refused or failed: one message for the operator, complete in itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct AgentError {
    /// What happened and why, and what to do where that is known.
    pub message: String,
    /// Whose fault it looks like.
    pub blame: Blame,
    /// The last lines that the failing process or step printed on its standard error, at most 20.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub output: Vec<String>,
}

/// A secret's value: travels inside the ssh connection, is written to files of mode 0600, never shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretValue(String);

impl SecretValue {
    /// Wraps a value.
    #[must_use]
    pub fn new(value: String) -> Self {
        Self(value)
    }

    /// The value, for writing it where it belongs.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretValue(…)")
    }
}

/// Longest line of output that is passed on.
pub const LINE_BYTES_MAX: usize = 16 * 1024;
/// Most that a socket's answer may have: `show servers state` of some thousand servers.
pub const SOCKET_OUTPUT_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Most bytes of a message in JSON: the manifest of two million entries.
pub const MESSAGE_BYTES_MAX: usize = 512 * 1024 * 1024;
/// Most bytes of a parcel's data in one frame: what a message may have to wait for.
pub const DATA_BYTES_MAX: usize = 1024 * 1024;
/// Most bytes of a parcel; objects and packs are of at most 4 MiB before compression.
pub const PARCEL_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Most bytes of a manifest's parcel: two million entries, compressed.
pub const MANIFEST_PARCEL_BYTES_MAX: usize = 256 * 1024 * 1024;
