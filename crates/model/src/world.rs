//! The world as the planner and the interlock see it: one value, complete, with the time in it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Timestamp;
use crate::action::Action;
use crate::canary::Judgement;
use crate::fleet::{Environment, Service};
use crate::host::{HostReport, InstanceReport};
use crate::id::{HostName, Instance, ReleaseId, ServiceName};
use crate::rollout::Rollout;
use crate::traffic::{Admission, BalancerReport, Server, ServerHealth};

/// Everything a decision may depend on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct World {
    /// The time now.
    pub now: Timestamp,
    /// The environment the rollout goes to.
    pub environment: Environment,
    /// The services of the fleet.
    pub services: BTreeMap<ServiceName, Service>,
    /// Releases that are known, with their marks.
    pub releases: BTreeMap<ReleaseId, ReleaseFacts>,
    /// The rollout, folded from its records.
    pub rollout: Rollout,
    /// What is known of each host.
    pub inventory: BTreeMap<HostName, Observation>,
    /// What each balancer of the environment said, in the environment's order.
    pub traffic: Vec<BalancerReport>,
    /// The lights on the way.
    pub gates: Vec<Gate>,
    /// What judging the canary has come to, while there is one.
    pub judgement: Option<Judgement>,
    /// Actions that were begun and have not ended.
    pub in_flight: Vec<InFlight>,
}

/// What matters of a release for deciding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseFacts {
    /// How people see it.
    pub title: String,
    /// Its service.
    pub service: ServiceName,
    /// Why it is marked bad, when it is.
    pub bad: Option<String>,
}

/// What is known of a host: what it last said, and whether it can be reached.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Observation {
    /// Its last report and when that was made.
    pub report: Option<(Timestamp, HostReport)>,
    /// Since when and why it cannot be reached, when it cannot.
    pub unreachable: Option<Unreachable>,
}

/// A host that does not answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unreachable {
    /// Since when.
    pub since: Timestamp,
    /// Why.
    pub why: String,
}

/// A condition on the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gate {
    /// Its name: "after staging".
    pub name: String,
    /// Its light.
    pub light: Light,
}

/// The light of a gate, always with its reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Light {
    /// Go.
    Green {
        /// Why.
        why: String,
    },
    /// Not yet.
    Amber {
        /// What is waited for.
        why: String,
    },
    /// No.
    Red {
        /// Why not, and what would turn it green.
        why: String,
    },
}

/// An action under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InFlight {
    /// Which.
    pub action: Action,
    /// Since when.
    pub since: Timestamp,
}

/// Whether an instance gets requests, over all balancers of its service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Traffic {
    /// No balancer sends it any: a worker, or a service without a port.
    None,
    /// At least one balancer could not be read, or does not know the server.
    Unknown {
        /// Which, and why.
        why: String,
    },
    /// All balancers agree on what follows.
    Known {
        /// Whether any balancer sends it new requests, or would as soon as it is up.
        admitted: bool,
        /// Whether every balancer that admits it sees it up.
        up: bool,
        /// Sessions over all balancers.
        sessions: u64,
    },
}

impl World {
    /// The last report of an instance, if its host ever made one.
    #[must_use]
    pub fn report(&self, instance: &Instance) -> Option<&InstanceReport> {
        let (_, report) = self.inventory.get(&instance.host)?.report.as_ref()?;
        report.instances.get(&instance.service)
    }

    /// Since when and why the host cannot be reached, when it cannot.
    #[must_use]
    pub fn unreachable(&self, host: &HostName) -> Option<&Unreachable> {
        self.inventory.get(host)?.unreachable.as_ref()
    }

    /// Whether an instance gets requests.
    #[must_use]
    pub fn traffic(&self, instance: &Instance) -> Traffic {
        traffic(&self.environment, &self.traffic, instance)
    }

    /// Whether an instance serves: admitted and up where there is a balancer, proven where there is none.
    #[must_use]
    pub fn serves(&self, instance: &Instance) -> bool {
        match self.traffic(instance) {
            Traffic::Known { admitted, up, .. } => admitted && up,
            Traffic::Unknown { .. } => false,
            Traffic::None => {
                self.unreachable(&instance.host).is_none()
                    && self.report(instance).is_some_and(|report| report.proven().is_some())
            }
        }
    }

    /// How many instances of a service serve now.
    #[must_use]
    pub fn serving(&self, service: &ServiceName) -> usize {
        self.environment.instances_of(service).filter(|instance| self.serves(instance)).count()
    }

    /// How many instances of a service must serve. A service with one instance cannot be changed without a pause, so
    /// nothing is asked of it.
    #[must_use]
    pub fn floor(&self, service: &ServiceName) -> usize {
        match self.environment.hosts.get(service).map_or(0, Vec::len) {
            0 | 1 => 0,
            count => self.environment.floor.of(count),
        }
    }

    /// Whether an action on this instance is under way.
    #[must_use]
    pub fn action_in_flight(&self, instance: &Instance) -> Option<&InFlight> {
        self.in_flight.iter().find(|in_flight| in_flight.action.instance() == instance)
    }

    /// How people see a release.
    #[must_use]
    pub fn title(&self, release: ReleaseId) -> String {
        self.releases.get(&release).map_or_else(|| release.short(), |facts| facts.title.clone())
    }
}

/// Whether an instance gets requests, by what each balancer of the environment said, in the environment's order.
#[must_use]
pub fn traffic(environment: &Environment, reports: &[BalancerReport], instance: &Instance) -> Traffic {
    let mut result = Traffic::None;
    for (balancer, report) in environment.balancers.iter().zip(reports) {
        if balancer.service != instance.service {
            continue;
        }
        let server = match report {
            BalancerReport::Unreachable { why } => {
                return Traffic::Unknown { why: format!("{}: {why}", balancer.title()) };
            }
            BalancerReport::Servers(servers) => servers.get(&instance.host),
        };
        let Some(server) = server else {
            let why = format!("{} has no server {}", balancer.title(), balancer.server(&instance.host));
            return Traffic::Unknown { why };
        };
        result = merge(&result, server);
    }
    result
}

/// Whether one balancer sends an instance requests and another one was told not to: an admission or a drain that was
/// broken off between the two leaves it so.
#[must_use]
pub fn is_partly_admitted(
    environment: &Environment,
    reports: &[BalancerReport],
    instance: &Instance,
) -> bool {
    let mut is_ready = false;
    let mut is_drained = false;
    for (balancer, report) in environment.balancers.iter().zip(reports) {
        if let BalancerReport::Servers(servers) = report
            && balancer.service == instance.service
            && let Some(server) = servers.get(&instance.host)
        {
            is_ready |= server.admission == Admission::Ready;
            is_drained |= server.admission == Admission::Drain;
        }
    }
    is_ready && is_drained
}

fn merge(before: &Traffic, server: &Server) -> Traffic {
    let admits = server.admission == Admission::Ready;
    let is_up = server.health == ServerHealth::Up;
    match before {
        Traffic::Known { admitted, up, sessions } => Traffic::Known {
            admitted: *admitted || admits,
            up: *up && (is_up || !admits),
            sessions: sessions + server.sessions,
        },
        Traffic::None | Traffic::Unknown { .. } => {
            Traffic::Known { admitted: admits, up: is_up || !admits, sessions: server.sessions }
        }
    }
}
