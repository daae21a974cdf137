//! The lights on the way into an environment, judged from what is recorded, the time and the traffic; and the readers
//! that make evidence out of the reports of tests and analyses.
//!
//! Guarantees: a light is green only by evidence for exactly the releases that are to go out, in the environment that they
//! go to, and an approval only for the plan that was shown; what is missing or cannot be compared is never green; every
//! light has its reason, and every one that is not green says what would turn it green. Amber is what time brings by itself,
//! red is what somebody must see to.
//!
//! Not in here: fetching evidence, running commands and probes (`controller`, `cli`), and stopping a rollout at a light
//! (`planner`, `interlock`). Going back passes no gate: nothing may stand in the way of it.

mod after;
mod analysis;
mod looks;
mod migration;
mod people;
pub mod read;
mod suites;
mod times;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use greenlight_model::Timestamp;
use greenlight_model::evidence::{Fact, Recorded};
use greenlight_model::fleet::{Environment, Fleet};
use greenlight_model::history::History;
use greenlight_model::id::{PlanDigest, ReleaseId, ServiceName};
use greenlight_model::manifest::Release;
use greenlight_model::migration::Loss;
use greenlight_model::rollout::Direction;
use greenlight_model::traffic::BalancerReport;
use greenlight_model::world::{Gate, Light};

pub use looks::FRESH_FOR;

/// What is to go out, and everything its lights depend on.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The fleet.
    pub fleet: &'a Fleet,
    /// Where it is to go.
    pub environment: &'a Environment,
    /// What is recorded.
    pub history: &'a History,
    /// The release of each service.
    pub targets: &'a BTreeMap<ServiceName, ReleaseId>,
    /// Forward or back.
    pub direction: Direction,
    /// Known releases: how people call them and who built them.
    pub releases: &'a [Release],
    /// The plan as it is now, when there is one.
    pub plan: Option<PlanNow<'a>>,
    /// Who asks for the rollout, when that is known.
    pub asked_by: Option<&'a str>,
    /// What its migrations take away from the database.
    pub losses: &'a [Loss],
    /// What the balancers of the environment said.
    pub traffic: &'a [BalancerReport],
    /// The time.
    pub now: Timestamp,
    /// When the rollout was begun, if it was: what was looked at shortly before then counts as long as it waits.
    pub begun: Option<Timestamp>,
}

/// A plan that approvals are held against.
#[derive(Debug, Clone, Copy)]
pub struct PlanNow<'a> {
    /// Its digest.
    pub digest: PlanDigest,
    /// What the digest is of, when it is at hand: to say what moved.
    pub text: Option<&'a str>,
}

/// Every gate of the environment with its light.
#[must_use]
pub fn gates(asked: &Asked<'_>) -> Vec<Gate> {
    if asked.direction == Direction::Back {
        return Vec::new();
    }
    let mut gates = after::gates(asked);
    gates.extend(suites::gates(asked));
    gates.extend(analysis::gates(asked));
    gates.extend(people::gates(asked));
    gates.extend(looks::gates(asked));
    gates.extend(migration::gates(asked));
    gates.extend(times::gates(asked));
    gates.into_iter().map(|gate| overridden(asked, gate)).collect()
}

/// The gate, green when somebody let it be so for these releases in this environment.
fn overridden(asked: &Asked<'_>, gate: Gate) -> Gate {
    let is_of_gate = |fact: &Fact| matches!(fact, Fact::Override { gate: name, .. } if *name == gate.name);
    let (Light::Amber { why: state } | Light::Red { why: state }) = &gate.light else { return gate };
    let Some(found) = asked.latest_here(is_of_gate) else { return gate };
    let Fact::Override { why, .. } = &found.evidence.fact else { return gate };
    let why = format!("overridden by {}: {why} (by itself: {state})", found.by);
    Gate { light: Light::Green { why }, ..gate }
}

impl Asked<'_> {
    /// Evidence for exactly these releases in this environment, latest first.
    fn here(&self) -> impl Iterator<Item = &Recorded> {
        self.history.evidence.iter().rev().filter(|recorded| {
            recorded.evidence.environment.as_ref() == Some(&self.environment.name)
                && recorded.evidence.releases == *self.targets
        })
    }

    fn latest_here(&self, is_wanted: impl Fn(&Fact) -> bool) -> Option<&Recorded> {
        self.here().find(|recorded| is_wanted(&recorded.evidence.fact))
    }

    /// The latest evidence of this kind about one release.
    fn latest_of(
        &self,
        service: &ServiceName,
        release: ReleaseId,
        is_wanted: impl Fn(&Fact) -> bool,
    ) -> Option<&Recorded> {
        self.history.evidence.iter().rev().find(|recorded| {
            let evidence = &recorded.evidence;
            evidence.environment.is_none()
                && evidence.releases.get(service) == Some(&release)
                && is_wanted(&evidence.fact)
        })
    }

    /// What the environment runs of a service, by the records.
    fn present(&self, service: &ServiceName) -> Option<ReleaseId> {
        self.history.current(&self.environment.name, service)
    }

    fn release(&self, id: ReleaseId) -> Option<&Release> {
        self.releases.iter().find(|release| release.id == id)
    }

    /// How people call a release.
    fn label(&self, id: ReleaseId) -> String {
        self.release(id).map_or_else(|| id.short(), |release| release.label.clone())
    }

    /// How one would name it in a command.
    fn argument(&self, service: &ServiceName, id: ReleaseId) -> String {
        format!("{service}={}", self.label(id))
    }

    /// How one would name all of them in a command.
    fn arguments(&self) -> String {
        let all: Vec<String> =
            self.targets.iter().map(|(service, release)| self.argument(service, *release)).collect();
        all.join(" ")
    }
}

/// Green when nothing is wrong, else red with all that is.
fn green_or_red(good: &[String], wrong: &[String]) -> Light {
    if wrong.is_empty() {
        Light::Green { why: good.join("; ") }
    } else {
        Light::Red { why: wrong.join("; ") }
    }
}

/// The first few of many, for one line.
fn some(items: &[String]) -> String {
    const SHOWN_MAX: usize = 3;
    let shown = items.iter().take(SHOWN_MAX).cloned().collect::<Vec<_>>().join(", ");
    match items.len().saturating_sub(SHOWN_MAX) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
