//! A world that behaves: actions take their time and then have their effect, sessions end, balancers notice.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use greenlight_model::Timestamp;
use greenlight_model::action::{Action, ActionResult, Blame, Verb};
use greenlight_model::canary::{Answer, Judgement};
use greenlight_model::id::Instance;
use greenlight_model::traffic::BalancerReport;
use greenlight_model::world::{InFlight, World};

use crate::{effect, estimate};

/// How one attempt of an action goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Why, as the action's failure says it.
    pub why: String,
    /// Whose fault it looks like. An activation that fails by the release's fault leaves it switched to, and dead.
    pub blame: Blame,
    /// Whether it was done all the same, and only the answer was lost.
    pub takes_effect: bool,
}

/// How an attempt of an action fails, when it does.
pub type Fail<'f> = Box<dyn FnMut(&Action) -> Option<Fault> + 'f>;
/// How long after an activation the processes die, when they do.
pub type Crash<'f> = Box<dyn FnMut(&Action) -> Option<Duration> + 'f>;

/// What goes wrong: nothing, unless the caller says so. Each is asked once per attempt.
pub struct Faults<'f> {
    /// Asked when an attempt begins.
    pub fail: Fail<'f>,
    /// Asked when an activation has taken effect.
    pub crash: Crash<'f>,
}

impl Default for Faults<'_> {
    fn default() -> Self {
        Self { fail: Box::new(|_| None), crash: Box::new(|_| None) }
    }
}

/// A world with what is about to happen in it.
pub(crate) struct SimulatedWorld<'f> {
    world: World,
    faults: Faults<'f>,
    /// By time, then in the order in which they were caused.
    pending: BTreeMap<(Timestamp, u64), Event>,
    events: u64,
}

enum Event {
    Ends { action: Action, fault: Option<Fault> },
    SessionsEnd(Instance),
    BalancersLook(Instance),
    Crashes(Instance),
    Judged(Judgement),
}

impl<'f> SimulatedWorld<'f> {
    /// The world as it is, with actions already in flight about to succeed.
    pub(crate) fn new(world: World, faults: Faults<'f>) -> Self {
        let mut simulated = Self { world, faults, pending: BTreeMap::new(), events: 0 };
        for InFlight { action, .. } in simulated.world.in_flight.clone() {
            simulated.after(estimate::of(action.verb()), Event::Ends { action, fault: None });
        }
        simulated
    }

    /// How it is now.
    pub(crate) fn world(&self) -> &World {
        &self.world
    }

    /// To change it from outside: a host that is lost, a balancer that somebody touches, the rollout as folded.
    pub(crate) fn world_mut(&mut self) -> &mut World {
        &mut self.world
    }

    /// Begins an action. It ends while time passes.
    pub(crate) fn begin(&mut self, action: &Action) {
        let fault = self.obstacle(action).or_else(|| (self.faults.fail)(action));
        let is_felt = fault.as_ref().is_none_or(|fault| fault.takes_effect || fault.blame == Blame::Release);
        if is_felt {
            effect::begin(&mut self.world, action);
        }
        self.world.in_flight.push(InFlight { action: action.clone(), since: self.world.now });
        self.after(estimate::of(action.verb()), Event::Ends { action: action.clone(), fault });
    }

    /// A canary has its share: it is found to be good enough after a while, unless it has been judged already.
    pub(crate) fn judge(&mut self) {
        let rollout = &self.world.rollout;
        let Some(wave) = rollout.open_canary() else { return };
        let Some((step, _)) = rollout.canary_step(wave) else { return };
        let is_judged = |judgement: &Judgement| judgement.wave == wave && judgement.step == step;
        let is_pending = self.pending.values().any(|event| matches!(event, Event::Judged(_)));
        if is_pending || self.world.judgement.as_ref().is_some_and(is_judged) {
            return;
        }
        let services =
            rollout.plan.waves[wave].instances.iter().map(|instance| instance.service.clone()).collect();
        let why = "it is taken to be as good as the rest".to_owned();
        self.after(
            estimate::VERDICT,
            Event::Judged(Judgement { wave, step, services, answer: Answer::Pass, why }),
        );
    }

    /// When something happens next, if anything is under way.
    pub(crate) fn next_event(&self) -> Option<Timestamp> {
        self.pending.keys().next().map(|(at, _)| *at)
    }

    /// Lets time pass up to a moment. The actions that ended are returned with their results, in order.
    pub(crate) fn pass(&mut self, until: Timestamp) -> Vec<(Action, ActionResult)> {
        let mut ended = Vec::new();
        while let Some(entry) = self.pending.first_entry() {
            let at = entry.key().0;
            if at > until {
                break;
            }
            let event = entry.remove();
            self.world.now = self.world.now.max(at);
            ended.extend(self.happen(event));
        }
        self.world.now = self.world.now.max(until);
        let gone: BTreeSet<&Action> = ended.iter().map(|(action, _)| action).collect();
        self.world.in_flight.retain(|in_flight| !gone.contains(&in_flight.action));
        ended
    }

    fn happen(&mut self, event: Event) -> Option<(Action, ActionResult)> {
        match event {
            Event::SessionsEnd(instance) => effect::end_sessions(&mut self.world, &instance),
            Event::BalancersLook(instance) => effect::look(&mut self.world, &instance),
            Event::Judged(judgement) => self.world.judgement = Some(judgement),
            Event::Crashes(instance) => effect::crash(&mut self.world, &instance, "it crashed"),
            Event::Ends { action, fault } => {
                return Some(self.end(action, fault));
            }
        }
        None
    }

    fn end(&mut self, action: Action, fault: Option<Fault>) -> (Action, ActionResult) {
        let fault = fault.or_else(|| self.disproof(&action));
        match &fault {
            Some(fault) if fault.takes_effect => self.succeed(&action),
            Some(fault) if fault.blame == Blame::Release => {
                effect::break_release(&mut self.world, &action, &fault.why);
            }
            Some(_) => {}
            None => self.succeed(&action),
        }
        let result = fault.map_or(ActionResult::Succeeded, |fault| ActionResult::Failed {
            why: fault.why,
            blame: fault.blame,
        });
        (action, result)
    }

    fn succeed(&mut self, action: &Action) {
        effect::succeed(&mut self.world, action);
        let instance = action.instance();
        match action.verb() {
            Verb::Drain => self.after(estimate::SESSIONS, Event::SessionsEnd(instance.clone())),
            Verb::Activate => {
                self.after(estimate::HEALTH, Event::BalancersLook(instance.clone()));
                if let Some(after) = (self.faults.crash)(action) {
                    self.after(after, Event::Crashes(instance.clone()));
                }
            }
            _ => {}
        }
    }

    /// A confirmation looks again, over a fresh connection: what has died meanwhile is not confirmed.
    fn disproof(&self, action: &Action) -> Option<Fault> {
        let Action::Confirm { instance, release, .. } = action else { return None };
        let why = self.world.report(instance)?.why_not_proven(*release)?;
        Some(Fault { why, blame: Blame::Release, takes_effect: false })
    }

    /// What stands in the way of an action in this very world.
    fn obstacle(&self, action: &Action) -> Option<Fault> {
        let instance = action.instance();
        let (why, blame) = match action.verb() {
            Verb::Drain | Verb::Admit | Verb::Share => {
                let mut reports = self.world.environment.balancers.iter().zip(&self.world.traffic);
                let why = reports.find_map(|(balancer, report)| match report {
                    BalancerReport::Unreachable { why } if balancer.service == instance.service => Some(why),
                    _ => None,
                })?;
                (why.clone(), Blame::Passing)
            }
            verb => {
                if let Some(unreachable) = self.world.unreachable(&instance.host) {
                    (unreachable.why.clone(), Blame::Passing)
                } else {
                    let claim = self.world.report(instance)?.ledger.claim.as_ref()?;
                    let is_foreign =
                        claim.rollout != self.world.rollout.plan.id && claim.expires_at > self.world.now;
                    if !is_foreign || matches!(verb, Verb::Preflight | Verb::Unclaim) {
                        return None;
                    }
                    (format!("claimed by {} for rollout {}", claim.holder, claim.rollout), Blame::Host)
                }
            }
        };
        Some(Fault { why, blame, takes_effect: false })
    }

    fn after(&mut self, duration: Duration, event: Event) {
        self.events += 1;
        self.pending.insert((effect::later(self.world.now, duration), self.events), event);
    }
}
