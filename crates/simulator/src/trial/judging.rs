//! What a controller counts of a canary, and what it makes of it: so many wrong answers are worse than tolerated, so many
//! requests without them are good enough. The statistics of real verdicts are `greenlight-verdict`'s, and not in here.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_model::action::Verb;
use greenlight_model::canary::{Answer, Judgement};

use super::agent::Purpose;
use super::traffic::{Command, Counted};
use super::trial::Trial;

/// Every how many ticks counts are read, and what is lent is lent for longer: three times within a lease.
const COUNT_TICKS: u64 = 3;
/// So many wrong answers are shown to be worse than tolerated.
const ERRORS_MAX: u64 = 2;

/// What has been counted since a step of a canary began, by this controller.
pub(super) struct Court {
    wave: usize,
    step: usize,
    /// What each balancer said last.
    last: Vec<Option<Vec<Counted>>>,
    /// By service.
    sums: BTreeMap<usize, Counted>,
}

impl Trial<'_> {
    /// Asks for counts where they are due.
    pub(super) fn count_canary(&mut self, index: usize) {
        let controller = &self.controllers[index];
        if !controller.is_alive || !controller.ticks.is_multiple_of(COUNT_TICKS) {
            return;
        }
        let Some(rollout) = controller.history.rollouts.get(&controller.rollout) else { return };
        if rollout.plan.waves.iter().all(|wave| wave.steps.is_empty()) {
            return;
        }
        let renews = self.judged(index).is_some();
        for balancer in 0..self.balancers.len() {
            self.command(index, Purpose::Nothing, self.now, balancer, Command::Count { renews });
        }
    }

    /// The wave and the step that are judged now: its hosts are let in and have their share.
    fn judged(&self, index: usize) -> Option<(usize, usize)> {
        let controller = &self.controllers[index];
        let rollout = controller.history.rollouts.get(&controller.rollout)?;
        let wave = rollout.open_canary()?;
        let (step, _) = rollout.canary_step(wave)?;
        let in_flight = &controller.world.in_flight;
        let is_sharing = in_flight.iter().any(|in_flight| in_flight.action.verb() == Verb::Share);
        let balancers = &self.site.environment.balancers;
        let is_let_in =
            rollout.is_let_in(wave, |service| balancers.iter().any(|one| one.service == *service));
        (is_let_in && !is_sharing).then_some((wave, step))
    }

    /// Counts have come.
    pub(super) fn counted(&mut self, index: usize, balancer: usize, counts: &[Counted]) {
        if !self.controllers[index].is_alive {
            return;
        }
        let Some((wave, step)) = self.judged(index) else {
            self.controllers[index].court = None;
            self.controllers[index].world.judgement = None;
            return;
        };
        let members = self.members(index, wave);
        let service = self.balancers[balancer].service;
        let balancers = self.balancers.len();
        let needed = self.scenario.requests_needed;
        let judged: BTreeSet<usize> = members
            .iter()
            .map(|(_, service)| *service)
            .filter(|service| self.balancers_of(*service).next().is_some())
            .collect();
        let controller = &mut self.controllers[index];
        let court = controller.court.take().filter(|court| (court.wave, court.step) == (wave, step));
        let mut court =
            court.unwrap_or(Court { wave, step, last: vec![None; balancers], sums: BTreeMap::new() });
        if let Some(before) = court.last[balancer].replace(counts.to_vec()) {
            let sum = court.sums.entry(service).or_default();
            for (host, _) in members.iter().filter(|(_, of)| *of == service) {
                // Fewer than before: it was started again, and what it counted until then is not known.
                let requests = counts[*host].requests.checked_sub(before[*host].requests);
                let errors = counts[*host].errors.checked_sub(before[*host].errors);
                if let (Some(requests), Some(errors)) = (requests, errors) {
                    sum.requests += requests;
                    sum.errors += errors;
                }
            }
        }
        let of = |service: &usize| court.sums.get(service).copied().unwrap_or_default();
        let (worse, good): (Vec<usize>, Vec<usize>) = (
            judged.iter().copied().filter(|service| of(service).errors > ERRORS_MAX).collect(),
            judged.iter().copied().filter(|service| is_good(of(service), needed)).collect(),
        );
        let is_all_good = good.len() == judged.len();
        let (answer, shown) = match (worse.is_empty(), is_all_good) {
            (false, _) => (Answer::Abort, worse),
            (true, true) => (Answer::Pass, good),
            (true, false) => (Answer::Inconclusive { requests_needed: None }, Vec::new()),
        };
        let services = shown.into_iter().map(|service| self.site.names[service].clone()).collect();
        controller.court = Some(court);
        controller.world.judgement = Some(Judgement { wave, step, services, answer, why: String::new() });
        self.advance(index);
    }

    /// Host and service of each member of a wave that was not left out.
    fn members(&self, index: usize, wave: usize) -> Vec<(usize, usize)> {
        let controller = &self.controllers[index];
        let Some(rollout) = controller.history.rollouts.get(&controller.rollout) else { return Vec::new() };
        let of_wave = &rollout.plan.waves[wave].instances;
        let members = of_wave.iter().filter(|one| !rollout.left_out.contains_key(*one));
        members.map(|instance| self.site.place(instance)).collect()
    }
}

/// A single wrong answer makes a verdict take more.
fn is_good(counted: Counted, needed: u64) -> bool {
    counted.requests >= needed + 10 * counted.errors
}
