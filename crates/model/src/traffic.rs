//! Traffic as the balancers report it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::HostName;

/// What one balancer said of its backend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BalancerReport {
    /// It answered.
    Servers(BTreeMap<HostName, Server>),
    /// It could not be read.
    Unreachable {
        /// Why.
        why: String,
    },
}

/// One server of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    /// What it was told to be.
    pub admission: Admission,
    /// What the balancer's own check found.
    pub health: ServerHealth,
    /// Requests or connections it handles right now.
    pub sessions: u64,
    /// Its configured weight.
    pub weight: u32,
}

/// Whether a server is to take requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Admission {
    /// It takes new requests.
    Ready,
    /// It finishes what it has and takes nothing new.
    Drain,
    /// It takes nothing at all; set by a person, or by its configuration.
    Maintenance,
}

/// What the balancer's check of a server found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerHealth {
    /// It answers, or is not checked.
    Up,
    /// It does not.
    Down,
    /// Not known yet.
    Checking,
}

impl Server {
    /// Whether requests are sent to it now.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.admission == Admission::Ready && self.health == ServerHealth::Up && self.weight > 0
    }
}
