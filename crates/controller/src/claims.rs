//! Claims that outlived their rollout: its host could not be reached when they were to be given back.
//!
//! Nobody renews such a claim and nobody needs it. The records that this controller reads say so, so the next rollout does
//! not wait until it runs out.

use std::collections::BTreeMap;

use greenlight_model::history::History;
use greenlight_model::host::{Claim, InstanceReport};
use greenlight_model::id::{HostName, RolloutId};
use greenlight_model::world::Observation;

/// What the hosts said, without the claims of rollouts that have ended.
pub(crate) fn without_ended(
    inventory: &BTreeMap<HostName, Observation>,
    history: &History,
) -> BTreeMap<HostName, Observation> {
    let mut inventory = inventory.clone();
    let reports = inventory.values_mut().filter_map(|observation| observation.report.as_mut());
    for instance in reports.flat_map(|(_, report)| report.instances.values_mut()) {
        if instance.ledger.claim.as_ref().is_some_and(|claim| has_ended(claim, history)) {
            instance.ledger.claim = None;
        }
    }
    inventory
}

/// The ended rollout whose claim an instance still has.
pub(crate) fn ended_holder(report: &InstanceReport, history: &History) -> Option<RolloutId> {
    let claim = report.ledger.claim.as_ref()?;
    has_ended(claim, history).then(|| claim.rollout.clone())
}

fn has_ended(claim: &Claim, history: &History) -> bool {
    history.rollouts.get(&claim.rollout).is_some_and(|rollout| rollout.outcome.is_some())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use greenlight_model::Timestamp;
    use greenlight_model::decision::Outcome;
    use greenlight_model::host::{HostFacts, HostReport, Ledger};
    use greenlight_model::id::Generation;
    use greenlight_model::rollout::{Direction, Plan, Rollout};

    fn rollout(id: &str, outcome: Option<Outcome>) -> (RolloutId, Rollout) {
        let plan = Plan {
            id: id.parse().unwrap(),
            environment: "production".parse().unwrap(),
            direction: Direction::Forward,
            targets: BTreeMap::new(),
            baseline: BTreeMap::new(),
            waves: Vec::new(),
            generation: Generation(2),
            started_by: "op@desk".to_owned(),
            digest: None,
            is_partial: false,
            overrides: BTreeMap::new(),
            losses: Vec::new(),
        };
        (plan.id.clone(), Rollout { outcome, ..Rollout::new(plan, Timestamp::UNIX_EPOCH) })
    }

    fn facts() -> HostFacts {
        HostFacts {
            hostname: "web1".to_owned(),
            os: String::new(),
            architecture: "x86_64".to_owned(),
            machine_id: None,
            user: "root".to_owned(),
            is_root: true,
            managers: Vec::new(),
            agent_version: String::new(),
        }
    }

    /// What is left of a claim, and who is to be told to give it up.
    fn check(holder: &str, stays: bool) {
        let history = History {
            rollouts: [
                rollout("ended", Some(Outcome::Refused { why: "no".to_owned() })),
                rollout("open", None),
            ]
            .into(),
            ..History::default()
        };
        let claim = Claim {
            rollout: holder.parse().unwrap(),
            holder: "op@desk".to_owned(),
            reason: "web v2 to production".to_owned(),
            expires_at: Timestamp::MAX,
        };
        let report = InstanceReport {
            ledger: Ledger { claim: Some(claim.clone()), ..Ledger::default() },
            linked: None,
            staged: BTreeSet::new(),
            processes: BTreeMap::new(),
            disk_free_bytes: 0,
        };
        assert_eq!(ended_holder(&report, &history), (!stays).then(|| claim.rollout.clone()), "{holder}");
        let host: HostName = "web1".parse().unwrap();
        let instances = [("web".parse().unwrap(), report)].into();
        let seen = HostReport { facts: facts(), instances };
        let observation = Observation { report: Some((Timestamp::UNIX_EPOCH, seen)), unreachable: None };
        let left = without_ended(&[(host.clone(), observation)].into(), &history);
        let (_, seen) = left[&host].report.as_ref().unwrap();
        let left = seen.instances.values().next().unwrap().ledger.claim.as_ref();
        assert_eq!(left, stays.then_some(&claim), "{holder}");
    }

    #[test]
    fn only_the_claim_of_a_rollout_that_is_known_to_have_ended_is_nobodys() {
        check("ended", false);
        check("open", true);
        check("unknown", true);
    }
}
