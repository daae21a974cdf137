//! What a rollout's hosts keep of it, so that a controller without its records can go on: its charter, and what can be
//! told from ledgers and balancers.
//!
//! Guarantees: what is found errs on the side of going back. Not in here: whether the other controller is really gone
//! (`controller` waits for its claims to end).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::Timestamp;
use crate::fleet::{Environment, Service};
use crate::host::MigrationTrace;
use crate::id::{HostName, Instance, ReleaseId, ServiceName};
use crate::manifest::Release;
use crate::migration::MigrationPhase;
use crate::rollout::Plan;
use crate::traffic::BalancerReport;
use crate::world::{Observation, Traffic, traffic};

/// How many instances of a rollout keep its charter, the first by name. It names every instance, so a large fleet does
/// not send it to all of them.
pub const CHARTER_COPIES_MAX: usize = 50;

/// What a rollout is, for a controller that has no records of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Charter {
    /// What was asked for.
    pub plan: Plan,
    /// When it started.
    pub started_at: Timestamp,
    /// The releases that it brings and those that it may go back to.
    pub releases: BTreeMap<ReleaseId, Release>,
    /// How their services were defined when they last went to this environment.
    pub definitions: BTreeMap<ReleaseId, Service>,
}

/// How far a rollout is, as its hosts and balancers show it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Instances that have seen one of its generations: their switch was begun.
    pub touched: BTreeSet<Instance>,
    /// Instances that it claimed and that are out of traffic: going back lets them in again, whoever took them out.
    pub drained: BTreeSet<Instance>,
    /// Services whose migration was begun, and nothing says how it ended.
    pub migrating: BTreeSet<ServiceName>,
    /// The same of what migrations do last.
    #[serde(default)]
    pub contracting: BTreeSet<ServiceName>,
    /// Why it is turning back, when an instance was told to go back already.
    pub turning_back: Option<String>,
}

impl Found {
    /// What ledgers and balancers say of a rollout. Instances whose hosts have not answered are taken for untouched until
    /// they do: whatever they are told then is fenced by their own ledgers.
    #[must_use]
    pub fn of(
        plan: &Plan,
        environment: &Environment,
        inventory: &BTreeMap<HostName, Observation>,
        balancers: &[BalancerReport],
    ) -> Self {
        let mut found = Self::default();
        for instance in plan.baseline.keys() {
            let report = inventory.get(&instance.host).and_then(|seen| seen.report.as_ref());
            let Some(report) = report.and_then(|(_, report)| report.instances.get(&instance.service)) else {
                continue;
            };
            let ledger = &report.ledger;
            if ledger.rollout.as_ref() == Some(&plan.id) {
                found.touched.insert(instance.clone());
                if ledger.generation > plan.generation && found.turning_back.is_none() {
                    found.turning_back = Some(format!(
                        "its controller is lost, and it had told {instance} to go back already"
                    ));
                }
            }
            let is_claimed = ledger.claim.as_ref().is_some_and(|claim| claim.rollout == plan.id);
            let is_out =
                matches!(traffic(environment, balancers, instance), Traffic::Known { admitted: false, .. });
            if is_claimed && is_out {
                found.drained.insert(instance.clone());
            }
            let target = plan.targets.get(&instance.service);
            for (phase, begun) in [
                (MigrationPhase::Expand, &mut found.migrating),
                (MigrationPhase::Contract, &mut found.contracting),
            ] {
                let trace = target.and_then(|target| ledger.migration(*target, phase));
                if trace == Some(MigrationTrace::Begun) {
                    begun.insert(instance.service.clone());
                }
            }
        }
        found
    }
}
