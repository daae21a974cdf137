//! Planner, interlock and records, run against a simulated world exactly as the controller runs them against hosts.

use greenlight_interlock::{Interlock, Violation};
use greenlight_model::Timestamp;
use greenlight_model::action::{Action, ActionDetail, ActionResult};
use greenlight_model::decision::{Decision, Outcome, Running, Step, Wait};
use greenlight_model::history::History;
use greenlight_model::id::RolloutId;
use greenlight_model::record::{IllegalRecord, Record, RecordBody};
use greenlight_model::rollout::{Note, OperatorRequest, Rollout};
use greenlight_model::world::World;
use greenlight_planner::decide;

use crate::effect::later;
use crate::simulated::{Faults, SimulatedWorld};

/// A rollout in a simulated world.
pub struct Simulation<'f> {
    simulated: SimulatedWorld<'f>,
    history: History,
    rollout: RolloutId,
}

/// What one turn of the loop brought.
#[derive(Debug, Clone, PartialEq)]
pub enum Turn {
    /// These were begun, all at once.
    Began(Vec<Step>),
    /// Time passed until something happened; these actions ended, if that was it.
    Passed(Vec<(Action, ActionResult)>),
    /// The rollout took a turn of its own.
    Noted(Note),
    /// It is over.
    Ended(Outcome),
    /// Nothing is under way and nothing will happen by itself: these are waited for.
    Stopped(Vec<Wait>),
}

/// What must not happen: planner, interlock and records disagree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SimulationError {
    /// The interlock refuses what the planner proposes.
    #[error("the interlock refuses to {verb} {instance}: {violation}", verb = action.verb(), instance = action.instance())]
    Interlock {
        /// What was proposed.
        action: Box<Action>,
        /// What it would break.
        violation: Violation,
    },
    /// A record cannot follow the ones before it.
    #[error(transparent)]
    Record(#[from] IllegalRecord),
    /// The rollout does not come to an end.
    #[error("the rollout did not end within {0} turns")]
    Endless(usize),
}

impl<'f> Simulation<'f> {
    /// The rollout of this world, from where it stands.
    #[must_use]
    pub fn new(world: World, faults: Faults<'f>) -> Self {
        let rollout = world.rollout.plan.id.clone();
        let mut history = History::default();
        history.order.push(rollout.clone());
        history.rollouts.insert(rollout.clone(), world.rollout.clone());
        Self { simulated: SimulatedWorld::new(world, faults), history, rollout }
    }

    /// The world now.
    #[must_use]
    pub fn world(&self) -> &World {
        self.simulated.world()
    }

    /// To change the world from outside.
    pub fn world_mut(&mut self) -> &mut World {
        self.simulated.world_mut()
    }

    /// One turn: a decision, and what follows from it.
    ///
    /// # Errors
    /// When planner, interlock and records disagree, which is a defect in one of them.
    pub fn turn(&mut self) -> Result<Turn, SimulationError> {
        match decide(self.world()) {
            Decision::Note(note) => {
                self.record(RecordBody::Noted { rollout: self.rollout.clone(), note: note.clone() })?;
                Ok(Turn::Noted(note))
            }
            Decision::End(outcome) => {
                let running = running(self.world());
                let rollout = self.rollout.clone();
                if self.world().rollout.outcome.is_none() {
                    let outcome = outcome.clone();
                    self.record(RecordBody::RolloutEnded { rollout, outcome, running })?;
                }
                Ok(Turn::Ended(outcome))
            }
            Decision::Proceed { steps, waits } if steps.is_empty() => self.wait(waits),
            Decision::Proceed { steps, .. } => {
                self.begin(&steps)?;
                Ok(Turn::Began(steps))
            }
        }
    }

    /// An operator asks something of the rollout.
    ///
    /// # Errors
    /// When the rollout is over.
    pub fn ask(&mut self, request: OperatorRequest, why: &str) -> Result<(), SimulationError> {
        let (rollout, why) = (self.rollout.clone(), why.to_owned());
        self.record(RecordBody::OperatorAsked { rollout, request, why })
    }

    fn begin(&mut self, steps: &[Step]) -> Result<(), SimulationError> {
        let mut interlock = Interlock::new(self.world());
        for Step { action, .. } in steps {
            if let Err(violation) = interlock.permit(action) {
                return Err(SimulationError::Interlock { action: Box::new(action.clone()), violation });
            }
            interlock.begin(action);
        }
        for Step { action, .. } in steps {
            self.simulated.begin(action);
        }
        for Step { action, why } in steps {
            let (rollout, action, why) = (self.rollout.clone(), action.clone(), why.clone());
            self.apply(RecordBody::ActionStarted { rollout, action, why })?;
        }
        self.fold();
        Ok(())
    }

    fn wait(&mut self, waits: Vec<Wait>) -> Result<Turn, SimulationError> {
        let now = self.world().now;
        if waits.iter().any(|wait| matches!(wait, Wait::Verdict { .. })) {
            self.simulated.judge();
        }
        let ends = waits.iter().filter_map(|wait| self.end_of(wait)).filter(|end| *end > now);
        let Some(until) = ends.chain(self.simulated.next_event()).min() else {
            return Ok(Turn::Stopped(waits));
        };
        let ended = self.simulated.pass(until);
        for (action, result) in &ended {
            let (rollout, action, result) = (self.rollout.clone(), action.clone(), result.clone());
            let detail = ActionDetail::default();
            self.apply(RecordBody::ActionFinished { rollout, action, result, detail })?;
        }
        self.fold();
        Ok(Turn::Passed(ended))
    }

    /// When a wait ends by time alone.
    fn end_of(&self, wait: &Wait) -> Option<Timestamp> {
        match wait {
            Wait::Sessions { until, .. }
            | Wait::BalancerHealth { until, .. }
            | Wait::Fallback { until }
            | Wait::Learning { until }
            | Wait::Verdict { until, .. } => Some(*until),
            Wait::Claim { expires_at, .. } => Some(*expires_at),
            Wait::Unreachable { since, .. } => Some(later(*since, self.world().environment.timeouts.connect)),
            _ => None,
        }
    }

    fn record(&mut self, body: RecordBody) -> Result<(), SimulationError> {
        self.apply(body)?;
        self.fold();
        Ok(())
    }

    fn apply(&mut self, body: RecordBody) -> Result<(), IllegalRecord> {
        let world = self.simulated.world();
        let by = world.rollout.plan.started_by.clone();
        let record = Record { seq: self.history.last_seq + 1, at: world.now, by, body };
        self.history.apply(&record)
    }

    /// Brings what the records say into the world.
    fn fold(&mut self) {
        let world = self.simulated.world_mut();
        if let Some(rollout) = self.history.rollouts.get(&self.rollout) {
            world.rollout = Rollout::clone(rollout);
        }
        for (release, facts) in &mut world.releases {
            if let Some(why) = self.history.bad.get(release) {
                facts.bad = Some(why.clone());
            }
        }
    }
}

fn running(world: &World) -> Running {
    let instances = world.rollout.plan.baseline.keys();
    instances
        .map(|instance| (instance.clone(), world.report(instance).and_then(|report| report.linked)))
        .collect()
}
