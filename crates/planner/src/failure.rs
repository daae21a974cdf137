//! What follows from instances that cannot go on: they are left out while the budget lasts, else the rollout holds or
//! turns back, as the environment asks.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_model::action::{Blame, Verb};
use greenlight_model::fleet::OnFailure;
use greenlight_model::id::{HostName, Instance, ReleaseId, ServiceName};
use greenlight_model::rollout::Note;

use crate::view::View;

/// An instance that cannot go on, and why.
pub(crate) struct GivenUp<'a> {
    pub(crate) instance: &'a Instance,
    pub(crate) why: String,
}

/// What is to be done about failures on the way forward.
pub(crate) enum Verdict {
    /// Record this turn.
    Note(Note),
    /// Nothing was changed and nothing is to be marked: the rollout is refused.
    Refuse(String),
}

/// Judges failures, of which there is at least one.
///
/// The budget counts hosts, over all services of the environment. It never lets the last instance of a service be left
/// out: a release that runs nowhere is not released.
pub(crate) fn judge(view: &View<'_>, failures: &[GivenUp<'_>]) -> Option<Verdict> {
    let first = failures.first()?;
    if is_within_budget(view, failures) {
        return Some(Verdict::Note(Note::LeaveOut {
            instance: first.instance.clone(),
            why: first.why.clone(),
        }));
    }
    let why = list(failures.iter().map(|failure| (failure.instance, failure.why.as_str())));
    Some(match view.world.environment.on_failure {
        OnFailure::Hold => Verdict::Note(Note::Hold { why }),
        OnFailure::TurnBack => {
            let bad = guilty(view);
            if bad.is_empty() && !view.has_changed() {
                Verdict::Refuse(why)
            } else {
                Verdict::Note(Note::TurnBack { why, bad })
            }
        }
    })
}

/// Target releases whose own fault a failure looks like.
pub(crate) fn guilty(view: &View<'_>) -> BTreeSet<ReleaseId> {
    let rollout = view.rollout();
    rollout
        .failures
        .iter()
        .filter(|failure| failure.blame == Blame::Release)
        .filter(|failure| matches!(failure.action.verb(), Verb::Activate | Verb::Smoke | Verb::Migrate))
        .filter_map(|failure| failure.action.release())
        .filter(|release| rollout.plan.targets.values().any(|target| target == release))
        .collect()
}

/// Instances with what is wrong, as one sentence for the operator.
pub(crate) fn list<'a>(instances: impl Iterator<Item = (&'a Instance, &'a str)>) -> String {
    let parts: Vec<String> = instances.map(|(instance, why)| format!("{instance}: {why}")).collect();
    parts.join("; ")
}

fn is_within_budget(view: &View<'_>, failures: &[GivenUp<'_>]) -> bool {
    let left_out = &view.rollout().left_out;
    let hosts: BTreeSet<&HostName> =
        left_out.keys().chain(failures.iter().map(|failure| failure.instance)).map(|i| &i.host).collect();
    let budget = usize::try_from(view.world.environment.failure_budget).unwrap_or(usize::MAX);
    if hosts.len() > budget {
        return false;
    }
    let mut remaining: BTreeMap<&ServiceName, usize> = BTreeMap::new();
    let failed: BTreeSet<&Instance> = failures.iter().map(|failure| failure.instance).collect();
    for facts in &view.facts {
        let stays = !facts.is_left_out && !failed.contains(facts.instance);
        *remaining.entry(&facts.instance.service).or_default() += usize::from(stays);
    }
    remaining.values().all(|count| *count > 0)
}
