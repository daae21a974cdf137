//! Going on with a rollout that a controller elsewhere began and whose records are not here: from what its hosts keep.
//!
//! Guarantees: nothing is taken over from a controller that may still be at work. Its claims are renewed while it lives
//! and end by themselves when it does not, so whoever wants to go on waits until all that were seen have ended and none
//! was renewed.

use std::collections::BTreeSet;
use std::sync::Arc;

use greenlight_link::message::{Reply, Request};
use greenlight_model::Timestamp;
use greenlight_model::charter::{Charter, Found};
use greenlight_model::fleet::Environment;
use greenlight_model::history::History;
use greenlight_model::host::Claim;
use greenlight_model::id::{HostName, Instance, ReleaseId, RolloutId};
use greenlight_model::record::RecordBody;

use crate::gather::{Gathered, Gatherer};
use crate::hosts::HostError;

/// How long a host may take to send its charter.
const CHARTER_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(20);

/// A rollout that holds instances of an environment and is not in the records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Elsewhere {
    /// Which.
    pub rollout: RolloutId,
    /// The claims that it holds, or held until they ended.
    pub claims: Vec<(Instance, Claim)>,
}

/// Why a rollout cannot be taken over.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AdoptError {
    /// No host that it claimed has its charter.
    #[error(
        "rollout {rollout} was begun elsewhere, and no host that answers knows what it is{}; go on where it was begun",
        list(failed)
    )]
    NoCharter {
        /// Which.
        rollout: RolloutId,
        /// Hosts that could not be asked, and why.
        failed: Vec<(HostName, HostError)>,
    },
    /// It cannot go forward from here.
    #[error(
        "{title} is not in this project's depot and not complete on {hosts}: build it here (`greenlight build {service} --commit {commit}`), or go back (`greenlight abort {environment}`)"
    )]
    NotStaged {
        /// The release as people see it.
        title: String,
        /// Where its bytes are missing.
        hosts: String,
        /// Its service.
        service: String,
        /// Its commit.
        commit: String,
        /// The environment.
        environment: String,
    },
}

fn list(failed: &[(HostName, HostError)]) -> String {
    failed.iter().map(|(host, error)| format!("; {host}: {error}")).collect()
}

/// The rollouts that hold instances of an environment and that the records do not know.
#[must_use]
pub fn elsewhere(environment: &Environment, history: &History, gathered: &Gathered) -> Vec<Elsewhere> {
    let mut all: Vec<Elsewhere> = Vec::new();
    for instance in environment.instances() {
        let claim = gathered.report(&instance).and_then(|report| report.ledger.claim.clone());
        let Some(claim) = claim.filter(|claim| !history.rollouts.contains_key(&claim.rollout)) else {
            continue;
        };
        match all.iter_mut().find(|known| known.rollout == claim.rollout) {
            Some(known) => known.claims.push((instance, claim)),
            None => all.push(Elsewhere { rollout: claim.rollout.clone(), claims: vec![(instance, claim)] }),
        }
    }
    all
}

impl Elsewhere {
    /// When the last of its claims ends unless it is renewed, by the hosts' clocks.
    #[must_use]
    pub fn ends_at(&self) -> Timestamp {
        self.claims.iter().map(|(_, claim)| claim.expires_at).max().unwrap_or(Timestamp::MIN)
    }

    /// Who began it and why, as its claims say.
    #[must_use]
    pub fn title(&self) -> String {
        let claim = self.claims.first().map(|(_, claim)| claim);
        claim.map_or_else(String::new, |claim| format!("by {} ({})", claim.holder, claim.reason))
    }
}

/// What a rollout is, from the first of its hosts that keeps it.
///
/// # Errors
/// When none of them does.
pub async fn charter(gatherer: &Arc<Gatherer>, of: &Elsewhere) -> Result<Charter, AdoptError> {
    let mut failed = Vec::new();
    for (instance, _) in &of.claims {
        let Some(spec) = gatherer.spec(instance, None) else { continue };
        let request = Request::Charter { spec };
        match gatherer.hosts().call(&instance.host, request, CHARTER_TIMEOUT, |_| {}).await {
            Ok(Reply::Charter(Some(charter))) if charter.plan.id == of.rollout => return Ok(*charter),
            Ok(_) => {}
            Err(error) => failed.push((instance.host.clone(), error)),
        }
    }
    Err(AdoptError::NoCharter { rollout: of.rollout.clone(), failed })
}

/// The record with which it is gone on with here.
#[must_use]
pub fn adoption(charter: Charter, environment: &Environment, gathered: &Gathered) -> RecordBody {
    let found = Found::of(&charter.plan, environment, &gathered.inventory, &gathered.traffic);
    RecordBody::RolloutAdopted { charter, found }
}

/// Whether the rollout can go forward from here: every release that it brings is in the depot, or complete on each host.
///
/// # Errors
/// Names the release that is not, and what to do.
pub fn can_go_forward(
    charter: &Charter,
    depot: &BTreeSet<ReleaseId>,
    gathered: &Gathered,
) -> Result<(), AdoptError> {
    for (service, release) in charter.plan.targets.iter().filter(|(_, release)| !depot.contains(release)) {
        let of_service = charter.plan.baseline.keys().filter(|instance| instance.service == *service);
        let lacks = of_service.filter(|instance| {
            !gathered.report(instance).is_some_and(|report| report.staged.contains(release))
        });
        let hosts: Vec<&str> = lacks.map(|instance| instance.host.as_str()).collect();
        if hosts.is_empty() {
            continue;
        }
        let known = charter.releases.get(release);
        return Err(AdoptError::NotStaged {
            title: known.map_or_else(|| release.short(), |known| known.title()),
            hosts: hosts.join(", "),
            service: service.to_string(),
            commit: known.map_or_else(|| "COMMIT".to_owned(), |known| known.commit.clone()),
            environment: charter.plan.environment.to_string(),
        });
    }
    Ok(())
}
