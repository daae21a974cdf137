//! A controller as it runs one rollout: its own view, its own actions under way, its own copy of the history. It goes the
//! way of the real loop: absorb what came in, decide, ask the interlock, write the record, send.

use std::collections::BTreeMap;

use greenlight_interlock::Interlock;
use greenlight_model::Timestamp;
use greenlight_model::action::{Action, ActionDetail, ActionResult, Verb};
use greenlight_model::decision::{Decision, Running, Step, Wait};
use greenlight_model::host::HostReport;
use greenlight_model::id::RolloutId;
use greenlight_model::record::{History, Record, RecordBody};
use greenlight_model::rollout::{Note, OperatorRequest};
use greenlight_model::traffic::BalancerReport;
use greenlight_model::world::{Gate, InFlight, Light, Observation, Unreachable, World};
use greenlight_planner::decide;

use super::agent::{Purpose, Request};
use super::perform::Job;
use super::scenario::Ms;
use super::site::stamp;
use super::traffic::{BALANCER_TIMEOUT_MS, Command};
use super::trial::{Event, Trial};

/// How often the log is read, and balancers while a wait depends on them.
const TICK_MS: Ms = 400;
/// Every how many ticks everything is looked at.
const LOOK_TICKS: u64 = 5;
/// Every how many ticks claims are renewed: four times within their duration.
const RENEW_TICKS: u64 = 12;
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
    host_looks: Vec<u32>,
    balancer_looks: Vec<u32>,
    /// Claims of ended rollouts that hosts still have.
    ended_claims: BTreeMap<(usize, usize), RolloutId>,
    looking: Vec<Option<u32>>,
    reading: Vec<Option<u32>>,
    renewing: Vec<Vec<bool>>,
    waits: Vec<Wait>,
    ticks: u64,
    /// It dies after so many more step boundaries, and is replaced after a while, in this way.
    pub(super) dies_after: Option<(u8, Ms, OperatorRequest)>,
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
            ticks: 0,
            dies_after: None,
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

    /// Looks at everything at once, over the network as it is.
    pub(super) fn gather(&mut self, world: &mut World) {
        let now = self.controller_time();
        for host in 0..self.hosts.len() {
            let is_reached = self.hosts[host].is_up && !self.is_cut(host, true) && !self.is_cut(host, false);
            let seen = if is_reached { self.observe(host) } else { Err("connection timed out".to_owned()) };
            let observation = match seen {
                Ok(report) => Observation { report: Some((now, report)), unreachable: None },
                Err(why) => Observation { report: None, unreachable: Some(Unreachable { since: now, why }) },
            };
            world.inventory.insert(self.site.hosts[host].clone(), observation);
        }
        world
            .inventory
            .retain(|host, _| self.site.environment.hosts.values().any(|hosts| hosts.contains(host)));
        world.traffic = (0..self.balancers.len())
            .map(|balancer| match self.is_balancer_cut(balancer) {
                true => BalancerReport::Unreachable { why: "it does not answer".to_owned() },
                false => self.balancer_report(balancer),
            })
            .collect();
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
    fn begin(&mut self, index: usize, steps: Vec<Step>) -> Result<bool, Stopped> {
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

    /// Of two looks the one that was begun later is believed.
    fn read_was(&mut self, index: usize, balancer: usize, serial: u32, report: BalancerReport) {
        let controller = &mut self.controllers[index];
        if serial > controller.balancer_looks[balancer] {
            controller.balancer_looks[balancer] = serial;
            controller.world.traffic[balancer] = report;
        }
    }

    fn saw(&mut self, index: usize, host: usize, serial: u32, mut seen: Result<HostReport, String>) {
        if serial <= self.controllers[index].host_looks[host] {
            return;
        }
        self.controllers[index].host_looks[host] = serial;
        if let Ok(report) = &mut seen {
            self.forget_ended_claims(index, host, report);
        }
        let now = self.controller_time();
        let name = &self.site.hosts[host];
        let Some(observation) = self.controllers[index].world.inventory.get_mut(name) else { return };
        match seen {
            Ok(report) => {
                observation.report = Some((now, report));
                observation.unreachable = None;
            }
            Err(why) => {
                let since = observation.unreachable.take().map_or(now, |before| before.since);
                observation.unreachable = Some(Unreachable { since, why });
            }
        }
    }

    /// Claims of rollouts that have ended hold nobody up.
    fn forget_ended_claims(&mut self, index: usize, host: usize, report: &mut HostReport) {
        for (service, name) in self.site.names.iter().enumerate() {
            let Some(instance) = report.instances.get_mut(name) else { continue };
            let controller = &mut self.controllers[index];
            controller.ended_claims.remove(&(host, service));
            let Some(claim) = &mut instance.ledger.claim else { continue };
            // However wrong one of the two clocks is, what a claim has left there it has left here.
            claim.expires_at =
                shifted(claim.expires_at, self.controller_clock_ms - self.hosts[host].clock_ms);
            if controller.history.rollouts.get(&claim.rollout).is_some_and(|one| one.outcome.is_some()) {
                controller.ended_claims.insert((host, service), claim.rollout.clone());
                instance.ledger.claim = None;
            }
        }
    }

    pub(super) fn ended_claim(&self, index: usize, host: usize, service: usize) -> Option<RolloutId> {
        self.controllers[index].ended_claims.get(&(host, service)).cloned()
    }

    /// Begins the looks that are due.
    fn look(&mut self, index: usize) {
        let controller = &self.controllers[index];
        let ticks = controller.ticks;
        let depends_on_traffic = controller.waits.iter().any(|wait| {
            matches!(
                wait,
                Wait::Sessions { .. }
                    | Wait::BalancerHealth { .. }
                    | Wait::Balancer { .. }
                    | Wait::Floor { .. }
            )
        });
        let is_due = ticks.is_multiple_of(LOOK_TICKS);
        if depends_on_traffic || is_due {
            for balancer in 0..self.balancers.len() {
                let controller = &mut self.controllers[index];
                if controller.reading[balancer].is_none() {
                    controller.serial += 1;
                    controller.reading[balancer] = Some(controller.serial);
                    let purpose = Purpose::Look { serial: controller.serial };
                    self.command(index, purpose, self.now, balancer, Command::Read);
                    let event = Event::BalancerTimedOut { controller: index, balancer, purpose };
                    self.after(BALANCER_TIMEOUT_MS, event);
                }
            }
        }
        if is_due {
            for host in 0..self.hosts.len() {
                if !self.controllers[index].world.inventory.contains_key(&self.site.hosts[host]) {
                    continue;
                }
                let controller = &mut self.controllers[index];
                if controller.looking[host].is_none() {
                    controller.serial += 1;
                    controller.looking[host] = Some(controller.serial);
                    let purpose = Purpose::Look { serial: controller.serial };
                    self.send(index, purpose, self.now, host, 0, Request::Observe, OBSERVE_TIMEOUT_MS);
                }
            }
        }
        if ticks.is_multiple_of(RENEW_TICKS) {
            self.renew(index);
        }
    }

    /// Renews the claims that the rollout holds.
    fn renew(&mut self, index: usize) {
        let controller = &self.controllers[index];
        let Some(rollout) = controller.history.rollouts.get(&controller.rollout) else { return };
        let mut held = Vec::new();
        for instance in rollout.plan.baseline.keys() {
            let claim = controller.world.report(instance).and_then(|report| report.ledger.claim.as_ref());
            let is_given_back = controller.world.in_flight.iter().any(|in_flight| {
                in_flight.action.verb() == Verb::Unclaim && in_flight.action.instance() == instance
            });
            if !is_given_back && claim.is_some_and(|claim| claim.rollout == controller.rollout) {
                held.push((self.site.place(instance), rollout.desired(instance).1));
            }
        }
        let rollout = controller.rollout.clone();
        for ((host, service), generation) in held {
            if std::mem::replace(&mut self.controllers[index].renewing[host][service], true) {
                continue;
            }
            let request = Request::Claim { rollout: rollout.clone(), generation, ended: None };
            let purpose = Purpose::Renew { service };
            self.send(index, purpose, self.now, host, service, request, LEDGER_TIMEOUT_MS);
        }
    }

    /// A look at a host has come back.
    pub(super) fn looked(
        &mut self,
        index: usize,
        host: usize,
        serial: u32,
        seen: Result<HostReport, String>,
    ) {
        let controller = &mut self.controllers[index];
        if !controller.is_alive || controller.looking[host] != Some(serial) {
            return;
        }
        controller.looking[host] = None;
        self.saw(index, host, serial, seen);
        self.advance(index);
    }

    /// A balancer has been read.
    pub(super) fn read(
        &mut self,
        index: usize,
        balancer: usize,
        serial: u32,
        report: Result<BalancerReport, String>,
    ) {
        let controller = &mut self.controllers[index];
        if !controller.is_alive || controller.reading[balancer] != Some(serial) {
            return;
        }
        controller.reading[balancer] = None;
        let report = report.unwrap_or_else(|why| BalancerReport::Unreachable { why });
        self.read_was(index, balancer, serial, report);
        self.advance(index);
    }

    pub(super) fn renewed(&mut self, index: usize, host: usize, service: usize) {
        if self.controllers[index].is_alive
            && std::mem::replace(&mut self.controllers[index].renewing[host][service], false)
        {
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

    /// Takes in what others wrote.
    fn refresh(&mut self, index: usize) {
        let controller = &mut self.controllers[index];
        let known = usize::try_from(controller.history.last_seq).unwrap_or(usize::MAX);
        if known >= self.log.len() {
            return;
        }
        let own = controller.machine;
        let mut taker = None;
        for record in &self.log[known..] {
            if let RecordBody::OperatorAsked { rollout, request, .. } = &record.body
                && *rollout == controller.rollout
                && *request != OperatorRequest::Hold
                && record.by != format!("operator@m{own}")
            {
                taker = Some(record.by.clone());
            }
            if let Err(illegal) = controller.history.apply(record) {
                let why = illegal.to_string();
                self.violation("records", |_| format!("a record of the log is illegal: {why}"));
                return;
            }
        }
        self.learn_marks(index);
        if let Some(by) = taker {
            self.leaves(index, &format!("{by} has taken over"));
        }
    }

    /// Which releases are bad by now.
    fn learn_marks(&mut self, index: usize) {
        let Controller { history, world, .. } = &mut self.controllers[index];
        for (release, facts) in &mut world.releases {
            let bad = history.bad.get(release);
            if facts.bad.as_ref() != bad {
                facts.bad = bad.cloned();
            }
        }
    }

    /// Writes a record that stands on its own; what others wrote first is taken in.
    fn append(&mut self, index: usize, body: RecordBody) -> Result<(), Stopped> {
        self.boundary(index)?;
        self.refresh(index);
        if !self.controllers[index].is_alive {
            return Err(Stopped);
        }
        self.offer(index, body)
    }

    /// Writes a record that was decided upon what the log said. False, with nothing written, when somebody else wrote first.
    fn append_decision(&mut self, index: usize, body: RecordBody) -> Result<bool, Stopped> {
        self.boundary(index)?;
        if self.controllers[index].history.last_seq < self.history.last_seq {
            self.refresh(index);
            return Ok(false);
        }
        self.offer(index, body).map(|()| true)
    }

    fn offer(&mut self, index: usize, body: RecordBody) -> Result<(), Stopped> {
        let by = format!("controller@m{}", self.controllers[index].machine);
        let record = Record { seq: self.history.last_seq + 1, at: self.controller_time(), by, body };
        if let Err(illegal) = self.controllers[index].history.apply(&record) {
            // Somebody else has ended the rollout.
            self.leaves(index, &illegal.to_string());
            return Err(Stopped);
        }
        self.write(record);
        self.learn_marks(index);
        self.boundary(index)
    }

    /// Puts a record into the log.
    pub(super) fn write(&mut self, record: Record) {
        if let Err(illegal) = self.history.apply(&record) {
            let why = illegal.to_string();
            self.violation("records", |_| format!("an illegal record was written: {why}"));
            return;
        }
        self.say(|_| format!("record {}: {}", record.seq, show(&record.body)));
        self.recorded(&record.body);
        self.log.push(record);
    }

    /// A moment between two steps, at which the controller may die.
    pub(super) fn boundary(&mut self, index: usize) -> Result<(), Stopped> {
        let controller = &mut self.controllers[index];
        if !controller.is_alive {
            return Err(Stopped);
        }
        let Some((boundaries, lasts, then)) = &mut controller.dies_after else { return Ok(()) };
        if *boundaries > 0 {
            *boundaries -= 1;
            return Ok(());
        }
        let (lasts, then, machine) = (*lasts, *then, controller.machine);
        controller.is_alive = false;
        controller.jobs.clear();
        self.say(|_| format!("controller {index} is killed"));
        let latency = self.latency(index) + self.numbers.below(500);
        self.after(latency, Event::ConnectionEnds { controller: index });
        self.after(lasts, Event::Begins { machine, asks: Some(then) });
        Err(Stopped)
    }

    fn leaves(&mut self, index: usize, why: &str) {
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

fn shifted(moment: Timestamp, by_ms: i64) -> Timestamp {
    let shifted = moment.as_millisecond().saturating_add(by_ms);
    Timestamp::from_millisecond(shifted).unwrap_or(moment)
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

pub(super) fn show(body: &RecordBody) -> String {
    match body {
        RecordBody::RolloutStarted { plan, .. } => {
            format!("{} starts, generation {}", plan.id, plan.generation)
        }
        RecordBody::MigrationDone { service, .. } => {
            format!("the migration of {service} is done, somebody says")
        }
        RecordBody::RolloutAdopted { charter, .. } => format!("{} is adopted", charter.plan.id),
        RecordBody::ActionStarted { action, .. } => match action.release() {
            Some(release) => {
                let number = super::site::of_release(release).1;
                format!("begin to {} {} (v{number})", action.verb(), action.instance())
            }
            None => format!("begin to {} {}", action.verb(), action.instance()),
        },
        RecordBody::ActionFinished { action, result, .. } => {
            let how = match result {
                ActionResult::Succeeded => "done".to_owned(),
                ActionResult::Failed { why, blame } => format!("failed ({blame:?}): {why}"),
            };
            format!("{} {}: {how}", action.verb(), action.instance())
        }
        RecordBody::Noted { note, .. } => format!("{note:?}"),
        RecordBody::OperatorAsked { request, .. } => format!("the operator asks: {request:?}"),
        RecordBody::RolloutEnded { outcome, .. } => format!("ended: {outcome:?}"),
        RecordBody::ReleaseMarked { bad, .. } => format!("marked: {bad:?}"),
    }
}
