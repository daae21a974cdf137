//! A controller as it runs one rollout: its own view, its own actions under way, its own copy of the history. It goes the
//! way of the real loop: absorb what came in, decide, ask the interlock, write the record, send.

use std::collections::BTreeMap;

use greenlight_interlock::Interlock;
use greenlight_model::action::{Action, ActionDetail, ActionResult, Verb};
use greenlight_model::decision::{Decision, Running, Step, Wait};
use greenlight_model::history::History;
use greenlight_model::host::HostReport;
use greenlight_model::id::RolloutId;
use greenlight_model::record::RecordBody;
use greenlight_model::rollout::{Note, OperatorRequest};
use greenlight_model::traffic::BalancerReport;
use greenlight_model::world::{Gate, InFlight, Light, World};
use greenlight_planner::decide;

use super::agent::{Purpose, Request};
use super::judging::Court;
use super::perform::Job;
use super::scenario::Ms;
use super::site::stamp;
use super::trial::{Event, Trial};

/// How often the log is read, and balancers while a wait depends on them.
pub(super) const TICK_MS: Ms = 400;
/// How long a look at a host may take.
pub(super) const OBSERVE_TIMEOUT_MS: Ms = 3_000;
/// How long a request that only touches the ledger may take.
pub(super) const LEDGER_TIMEOUT_MS: Ms = 3_000;
/// Turns of its own that a decision may take at once.
const NOTES_MAX: usize = 1_000;

pub(super) struct Controller {
    pub(super) is_alive: bool,
    /// Controllers of one machine exclude each other.
    pub(super) machine: usize,
    pub(super) rollout: RolloutId,
    pub(super) history: History,
    /// What it believes; the rollout in it is that of `history`, brought in for each decision.
    pub(super) world: World,
    pub(super) jobs: BTreeMap<u32, Job>,
    pub(super) serial: u32,
    /// The number of the look at each host and balancer that was taken in last.
    pub(super) host_looks: Vec<u32>,
    pub(super) balancer_looks: Vec<u32>,
    /// Claims of ended rollouts that hosts still have.
    pub(super) ended_claims: BTreeMap<(usize, usize), RolloutId>,
    pub(super) looking: Vec<Option<u32>>,
    pub(super) reading: Vec<Option<u32>>,
    pub(super) renewing: Vec<Vec<bool>>,
    pub(super) waits: Vec<Wait>,
    /// What it has counted of the canary's present step.
    pub(super) court: Option<Court>,
    pub(super) ticks: u64,
    /// How it will die.
    pub(super) doom: Option<Doom>,
}

/// A controller's death.
#[derive(Debug, Clone, Copy)]
pub(super) struct Doom {
    /// What it has to begin first.
    pub(super) amid: Option<Verb>,
    /// After so many more step boundaries.
    pub(super) boundaries: u8,
    /// How long nobody replaces it.
    pub(super) lasts: Ms,
    /// In which way it is replaced.
    pub(super) then: OperatorRequest,
}

/// Why a controller goes no further.
pub(super) struct Stopped;

impl Trial<'_> {
    /// A controller begins to work on a rollout, with a look at everything.
    pub(super) fn begin_controller(&mut self, machine: usize, rollout: RolloutId) {
        let history = self.history.clone();
        let Some(folded) = history.rollouts.get(&rollout) else { return };
        let mut world = World {
            now: stamp(0, 0),
            environment: self.site.environment.clone(),
            services: self.site.services.clone(),
            releases: self.site.releases.clone(),
            rollout: folded.clone(),
            inventory: BTreeMap::new(),
            traffic: Vec::new(),
            gates: Vec::new(),
            judgement: None,
            in_flight: Vec::new(),
        };
        self.gather(&mut world);
        let hosts = self.hosts.len();
        let index = self.controllers.len();
        self.controllers.push(Controller {
            is_alive: true,
            machine,
            rollout,
            history,
            world,
            jobs: BTreeMap::new(),
            serial: 0,
            host_looks: vec![0; hosts],
            balancer_looks: vec![0; self.balancers.len()],
            ended_claims: BTreeMap::new(),
            looking: vec![None; hosts],
            reading: vec![None; self.balancers.len()],
            renewing: vec![vec![false; self.scenario.services.len()]; hosts],
            waits: Vec::new(),
            court: None,
            ticks: 0,
            doom: None,
        });
        self.say(|_| format!("controller {index} begins on machine {machine}"));
        for host in 0..hosts {
            let name = &self.site.hosts[host];
            let observation = self.controllers[index].world.inventory.get_mut(name);
            if let Some((at, mut report)) = observation.and_then(|observation| observation.report.take()) {
                self.forget_ended_claims(index, host, &mut report);
                let name = &self.site.hosts[host];
                if let Some(observation) = self.controllers[index].world.inventory.get_mut(name) {
                    observation.report = Some((at, report));
                }
            }
        }
        self.learn_marks(index);
        self.after(TICK_MS, Event::Tick(index));
        self.advance(index);
    }

    pub(super) fn controller_time(&self) -> greenlight_model::Timestamp {
        stamp(self.now, self.controller_clock_ms)
    }

    /// A tick: what others wrote is read, and looks that are due are begun.
    pub(super) fn tick(&mut self, index: usize) {
        if !self.controllers[index].is_alive {
            return;
        }
        self.after(TICK_MS, Event::Tick(index));
        self.controllers[index].ticks += 1;
        self.refresh(index);
        self.look(index);
        self.count_canary(index);
        self.advance(index);
    }

    /// Decides until there is nothing more to begin.
    pub(super) fn advance(&mut self, index: usize) {
        for _ in 0..NOTES_MAX {
            match self.decide_once(index) {
                Ok(true) => {}
                Ok(false) | Err(Stopped) => return,
            }
        }
        self.violation("endless", |_| "decisions go round in circles".to_owned());
    }

    /// True when it is to be asked again.
    fn decide_once(&mut self, index: usize) -> Result<bool, Stopped> {
        if !self.controllers[index].is_alive {
            return Err(Stopped);
        }
        let now = self.controller_time();
        let is_amber = self.is_gate_amber();
        self.report.decisions += 1;
        let Controller { history, world, rollout: id, .. } = &mut self.controllers[index];
        let Some(rollout) = history.rollouts.get_mut(id) else { return Err(Stopped) };
        std::mem::swap(&mut world.rollout, rollout);
        world.now = now;
        set_gate(world, is_amber);
        let is_over = world.rollout.outcome.is_some();
        let decision = decide(world);
        self.check_heeded(index, &decision);
        if is_over {
            swap_back(&mut self.controllers[index]);
            self.leaves(index, "the rollout has ended");
            return Err(Stopped);
        }
        match decision {
            Decision::Note(note) => {
                swap_back(&mut self.controllers[index]);
                let rollout = self.controllers[index].rollout.clone();
                self.append_decision(index, RecordBody::Noted { rollout, note })?;
                Ok(true)
            }
            Decision::End(outcome) => {
                let running = running(&self.controllers[index].world);
                if let Some(under_way) = self.controllers[index].world.in_flight.first().cloned() {
                    self.violation("records", |_| {
                        format!("it ends, and {:?} is under way", under_way.action)
                    });
                }
                swap_back(&mut self.controllers[index]);
                let rollout = self.controllers[index].rollout.clone();
                if !self.append_decision(index, RecordBody::RolloutEnded { rollout, outcome, running })? {
                    return Ok(true);
                }
                self.leaves(index, "it has ended the rollout");
                Err(Stopped)
            }
            Decision::Proceed { steps, waits } => {
                let is_held = waits.iter().any(|wait| matches!(wait, Wait::Held { .. }));
                let is_idle = self.controllers[index].world.in_flight.is_empty();
                if steps.is_empty() && is_held && is_idle {
                    swap_back(&mut self.controllers[index]);
                    self.leaves(index, "the rollout is held");
                    return Err(Stopped);
                }
                let begun = self.begin(index, steps);
                let controller = &mut self.controllers[index];
                if controller.waits != waits {
                    controller.waits = waits;
                }
                Ok(!begun?)
            }
        }
    }

    /// Begins every step that the interlock permits. The rollout is in the world here, and goes back before records are
    /// written. False when somebody else wrote meanwhile, so that it is to be decided anew.
    pub(super) fn begin(&mut self, index: usize, steps: Vec<Step>) -> Result<bool, Stopped> {
        let mut permitted = Vec::with_capacity(steps.len());
        let mut refused = None;
        {
            let mut interlock = Interlock::new(&self.controllers[index].world);
            for step in steps {
                if let Err(violation) = interlock.permit(&step.action) {
                    refused = Some((step.action, violation.to_string()));
                    break;
                }
                interlock.begin(&step.action);
                permitted.push(step);
            }
        }
        swap_back(&mut self.controllers[index]);
        for Step { action, why } in permitted {
            let (host, service) = self.site.place(action.instance());
            if action.verb() == Verb::Unclaim && self.controllers[index].renewing[host][service] {
                // A renewal that comes after it would claim it anew; it is decided again when that has ended.
                continue;
            }
            let rollout = self.controllers[index].rollout.clone();
            let body = RecordBody::ActionStarted { rollout, action: action.clone(), why };
            if !self.append_decision(index, body)? {
                return Ok(false);
            }
            self.check_told(index, &action);
            if let Some(doom) = &mut self.controllers[index].doom
                && doom.amid == Some(action.verb())
            {
                doom.amid = None;
            }
            let since = self.controller_time();
            self.controllers[index].world.in_flight.push(InFlight { action: action.clone(), since });
            self.boundary(index)?;
            self.perform(index, action);
            self.boundary(index)?;
        }
        if let Some((action, sentence)) = refused {
            self.violation("interlock", |_| {
                format!("the interlock refuses to {} {}: {sentence}", action.verb(), action.instance())
            });
            let why = format!("the interlock refused to {} {}: {sentence}", action.verb(), action.instance());
            let rollout = self.controllers[index].rollout.clone();
            self.append(index, RecordBody::Noted { rollout, note: Note::Hold { why } })?;
        }
        Ok(true)
    }

    /// An action has ended.
    pub(super) fn finished(
        &mut self,
        index: usize,
        action: Action,
        result: ActionResult,
        host: Option<(u32, Result<HostReport, String>)>,
        traffic: Vec<(usize, u32, BalancerReport)>,
    ) {
        if !self.controllers[index].is_alive {
            return;
        }
        self.controllers[index].world.in_flight.retain(|in_flight| in_flight.action != action);
        if let Some((serial, seen)) = host {
            let place = self.site.host_places[action.host()];
            self.saw(index, place, serial, seen);
        }
        for (balancer, serial, report) in traffic {
            self.read_was(index, balancer, serial, report);
        }
        if self.boundary(index).is_err() {
            return;
        }
        let rollout = self.controllers[index].rollout.clone();
        let detail = ActionDetail::default();
        let body = RecordBody::ActionFinished { rollout, action, result, detail };
        if self.append(index, body).is_ok() {
            self.advance(index);
        }
    }

    /// Sends a request to a host, with its time-out.
    #[expect(clippy::too_many_arguments, reason = "each is a different thing that only the caller has")]
    pub(super) fn send(
        &mut self,
        index: usize,
        purpose: Purpose,
        began: Ms,
        host: usize,
        service: usize,
        request: Request,
        timeout: Ms,
    ) {
        self.after(timeout, Event::TimedOut { controller: index, host, purpose });
        if self.is_cut(host, true) || self.is_lost() {
            return;
        }
        let from = super::agent::From { controller: index, purpose, began };
        if self.is_repeated() {
            let latency = self.latency(index) + self.latency(index);
            let request = Box::new(request.clone());
            self.after(latency, Event::Arrives { from, host, service, request });
        }
        let latency = self.latency(index);
        self.after(latency, Event::Arrives { from, host, service, request: Box::new(request) });
    }

    /// A moment between two steps, at which the controller may die.
    pub(super) fn boundary(&mut self, index: usize) -> Result<(), Stopped> {
        let controller = &mut self.controllers[index];
        if !controller.is_alive {
            return Err(Stopped);
        }
        let Some(doom) = controller.doom.as_mut().filter(|doom| doom.amid.is_none()) else { return Ok(()) };
        if doom.boundaries > 0 {
            doom.boundaries -= 1;
            return Ok(());
        }
        let (Doom { lasts, then, .. }, machine) = (*doom, controller.machine);
        controller.is_alive = false;
        controller.jobs.clear();
        self.say(|_| format!("controller {index} is killed"));
        let latency = self.latency(index) + self.numbers.below(500);
        self.after(latency, Event::ConnectionEnds { controller: index });
        self.after(lasts, Event::Begins { machine, asks: Some(then) });
        Err(Stopped)
    }

    pub(super) fn leaves(&mut self, index: usize, why: &str) {
        self.say(|_| format!("controller {index} leaves: {why}"));
        self.controllers[index].is_alive = false;
        self.controllers[index].jobs.clear();
        self.after(50, Event::ConnectionEnds { controller: index });
    }
}

impl Controller {
    /// What it waited for when it last decided.
    pub(super) fn waits(&self) -> &[Wait] {
        &self.waits
    }
}

fn swap_back(controller: &mut Controller) {
    if let Some(rollout) = controller.history.rollouts.get_mut(&controller.rollout) {
        std::mem::swap(&mut controller.world.rollout, rollout);
    }
}

fn set_gate(world: &mut World, is_amber: bool) {
    match (is_amber, world.gates.is_empty()) {
        (true, true) => world.gates.push(Gate {
            name: "approval".to_owned(),
            light: Light::Amber { why: "nobody has approved it".to_owned() },
        }),
        (false, false) => world.gates.clear(),
        _ => {}
    }
}

fn running(world: &World) -> Running {
    let instances = world.rollout.plan.baseline.keys();
    instances
        .map(|instance| (instance.clone(), world.report(instance).and_then(|report| report.linked)))
        .collect()
}
