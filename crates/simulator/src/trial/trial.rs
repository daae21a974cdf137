//! The simulation's own loop: what happens when, faults, and the end.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};

use greenlight_model::action::{Blame, Verb};
use greenlight_model::host::{LEDGER_VERSION, Ledger};
use greenlight_model::id::{Generation, ProcessName};
use greenlight_model::record::{History, Record};
use greenlight_model::rollout::{Direction, OperatorRequest};
use greenlight_model::traffic::{Admission, BalancerReport};

use super::agent::{Answered, From, Purpose, Request, Task};
use super::check::{Checker, Violation};
use super::controller::Controller;
use super::host::{Host, InstanceTruth, ProcessTruth};
use super::numbers::Numbers;
use super::scenario::{FaultKind, Ms, SAFETY_ENDS_MS, Scenario};
use super::site::{Site, release};
use super::traffic::{BalancerTruth, CLIENTS_INTERVAL_MS, Command, HEALTH_INTERVAL_MS};

/// How long the rollout has to end once everything is mended, and again once it is aborted.
const LIVENESS_MS: Ms = 240_000;
/// How often the operator looks whether somebody has to be resumed or aborted once everything is mended.
const CARE_INTERVAL_MS: Ms = 1_000;
/// Steps after which a simulation is broken off: one that does so much in so little time goes round in circles.
const EVENTS_MAX: u64 = 4_000_000;

/// What a scenario came to.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Its seed.
    pub seed: u64,
    /// Events that were simulated.
    pub steps: u64,
    /// Decisions that planners made.
    pub decisions: u64,
    /// Records in the log.
    pub records: u64,
    /// Requests that clients sent.
    pub requests: u64,
    /// Requests that came to nothing, to hosts that a fault had taken.
    pub requests_lost: u64,
    /// Faults that happened, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// How rollouts ended, by outcome.
    pub outcomes: BTreeMap<&'static str, u64>,
    /// The first promise that was broken.
    pub violation: Option<Violation>,
    /// What happened, a line each, when that was asked for.
    pub trace: Vec<String>,
}

/// Runs a scenario.
#[must_use]
pub fn run(scenario: &Scenario, with_trace: bool) -> Report {
    Trial::new(scenario, with_trace).run()
}

/// Something that happens.
pub(super) enum Event {
    FaultBegins(usize),
    FaultEnds(usize),
    Tick(usize),
    Arrives { from: From, host: usize, service: usize, request: Box<Request> },
    Answered { from: From, host: usize, result: Answered },
    TimedOut { controller: usize, host: usize, purpose: Purpose },
    Task(u32),
    BalancerCommanded { from: From, balancer: usize, command: Command },
    BalancerAnswered { from: From, balancer: usize, result: Result<Box<BalancerReport>, String> },
    BalancerTimedOut { controller: usize, balancer: usize, purpose: Purpose },
    Health,
    Clients,
    SessionEnds { balancer: usize, host: usize, life: u32 },
    ProcessAnswers { host: usize, service: usize, serial: u32 },
    ProcessEnds { host: usize, service: usize, serial: u32 },
    GuardFires { host: usize, service: usize, serial: u32 },
    HostReturns(usize),
    ConnectionEnds { controller: usize },
    Begins { machine: usize, asks: Option<OperatorRequest> },
    Mended,
    Care,
}

struct Entry {
    at: Ms,
    number: u64,
    event: Event,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// A scenario under way.
pub(super) struct Trial<'s> {
    pub(super) scenario: &'s Scenario,
    pub(super) site: Site,
    pub(super) main: ProcessName,
    pub(super) numbers: Numbers,
    pub(super) now: Ms,
    queue: BinaryHeap<Reverse<Entry>>,
    events: u64,
    pub(super) hosts: Vec<Host>,
    pub(super) balancers: Vec<BalancerTruth>,
    pub(super) tasks: HashMap<u32, Task>,
    pub(super) task_serial: u32,
    pub(super) controllers: Vec<Controller>,
    /// The shared record log, and what it folds to.
    pub(super) log: Vec<Record>,
    pub(super) history: History,
    /// Faults that are happening, by index.
    active: BTreeSet<usize>,
    pub(super) controller_clock_ms: i64,
    pub(super) is_mended: bool,
    /// When the rollout has to have ended, once everything is mended.
    pub(super) deadline: Ms,
    pub(super) resumes_left: u8,
    pub(super) has_aborted: bool,
    pub(super) check: Checker,
    pub(super) requests: u64,
    pub(super) requests_lost: u64,
    pub(super) report: Report,
    with_trace: bool,
}

impl<'s> Trial<'s> {
    fn new(scenario: &'s Scenario, with_trace: bool) -> Self {
        let site = Site::new(scenario);
        let hosts = (0..scenario.hosts).map(|_| host(scenario)).collect();
        let balancers = site
            .balancers
            .iter()
            .map(|service| {
                let members = &scenario.services[*service].hosts;
                BalancerTruth::new(*service, scenario.hosts, members, !scenario.is_first)
            })
            .collect();
        let check = Checker::new(scenario);
        #[expect(clippy::expect_used, reason = "`main` is a name")]
        let main = "main".parse().expect("a name");
        Self {
            scenario,
            site,
            main,
            numbers: Numbers::new(scenario.seed ^ 0x5eed),
            now: 0,
            queue: BinaryHeap::new(),
            events: 0,
            hosts,
            balancers,
            tasks: HashMap::new(),
            task_serial: 0,
            controllers: Vec::new(),
            log: Vec::new(),
            history: History::default(),
            active: BTreeSet::new(),
            controller_clock_ms: 0,
            is_mended: false,
            deadline: Ms::MAX,
            resumes_left: 2,
            has_aborted: false,
            check,
            requests: 0,
            requests_lost: 0,
            report: Report { seed: scenario.seed, ..Report::default() },
            with_trace,
        }
    }

    fn run(mut self) -> Report {
        for (index, fault) in self.scenario.faults.iter().enumerate() {
            self.at(fault.at, Event::FaultBegins(index));
        }
        self.after(HEALTH_INTERVAL_MS, Event::Health);
        self.after(CLIENTS_INTERVAL_MS, Event::Clients);
        self.after(SAFETY_ENDS_MS, Event::Mended);
        self.deploy(0, 2);
        while let Some(Reverse(entry)) = self.queue.pop() {
            self.now = entry.at;
            self.report.steps += 1;
            self.happens(entry.event);
            if self.report.violation.is_some() || self.is_over() {
                break;
            }
            if self.report.steps > EVENTS_MAX {
                self.violation("endless", |_| "the simulation goes round in circles".to_owned());
                break;
            }
        }
        if self.report.violation.is_none() {
            self.check_end();
        }
        self.report.records = self.log.len() as u64;
        self.report.requests = self.requests;
        self.report.requests_lost = self.requests_lost;
        self.report
    }

    /// Whether nothing is left to happen: no rollout is open, nobody works on one, and the operator wants nothing more.
    fn is_over(&self) -> bool {
        self.history.open_rollout(&self.site.environment.name).is_none()
            && self.tasks.is_empty()
            && self.controllers.iter().all(|controller| !controller.is_alive)
            && self.check.last_end.map_or(self.is_mended, |end| self.now >= end + 1_500)
            && !self.scenario.faults.iter().any(|fault| {
                fault.at > self.now && matches!(fault.kind, FaultKind::Deploys { .. }) && !self.is_mended
            })
    }

    pub(super) fn after(&mut self, ms: Ms, event: Event) {
        self.at(self.now + ms, event);
    }

    fn at(&mut self, at: Ms, event: Event) {
        self.events += 1;
        self.queue.push(Reverse(Entry { at, number: self.events, event }));
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::FaultBegins(index) => self.fault_begins(index),
            Event::FaultEnds(index) => self.fault_ends(index),
            Event::Tick(controller) => self.tick(controller),
            Event::Arrives { from, host, service, request } => self.arrives(from, host, service, *request),
            Event::Answered { from, host, result } => self.answered(from, host, result),
            Event::TimedOut { controller, host, purpose } => self.timed_out(controller, host, purpose),
            Event::Task(id) => self.step_task(id),
            Event::BalancerCommanded { from, balancer, command } => self.commanded(from, balancer, command),
            Event::BalancerAnswered { from, balancer, result } => {
                self.balancer_answered(from.controller, balancer, from.purpose, result.map(|report| *report));
            }
            Event::BalancerTimedOut { controller, balancer, purpose } => {
                let why = Err("it does not answer".to_owned());
                self.balancer_answered(controller, balancer, purpose, why);
            }
            Event::Health => {
                self.check_health();
                self.after(HEALTH_INTERVAL_MS, Event::Health);
            }
            Event::Clients => {
                self.clients_send();
                self.after(CLIENTS_INTERVAL_MS, Event::Clients);
            }
            Event::SessionEnds { balancer, host, life } => self.session_ends(balancer, host, life),
            Event::ProcessAnswers { host, service, serial } => {
                if let Some(process) = &mut self.hosts[host].instances[service].process
                    && process.serial == serial
                {
                    process.is_ready = true;
                }
            }
            Event::ProcessEnds { host, service, serial } => self.process_ends(host, service, serial),
            Event::GuardFires { host, service, serial } => self.guard_fires(host, service, serial),
            Event::HostReturns(host) => self.host_returns(host),
            Event::ConnectionEnds { controller } => self.connection_ends(controller, None),
            Event::Begins { machine, asks } => self.take_over(machine, asks),
            Event::Mended => self.mend(),
            Event::Care => self.care(),
        }
    }

    pub(super) fn process_ends(&mut self, host: usize, service: usize, serial: u32) {
        let truth = &mut self.hosts[host].instances[service];
        let Some(process) = truth.process.filter(|process| process.serial == serial) else { return };
        truth.process = None;
        if !process.is_stopping {
            self.say(|trial| format!("{}: the process ends", trial.place(host, service)));
            self.cut_sessions(host, service);
            self.hit(host, service);
        }
    }

    fn fault_begins(&mut self, index: usize) {
        let fault = &self.scenario.faults[index];
        self.say(|_| format!("fault: {:?} for {} ms", fault.kind, fault.lasts));
        let mut is_window = false;
        match fault.kind.clone() {
            FaultKind::KillController { boundaries, then } => {
                let lasts = fault.lasts;
                let alive = self.controllers.iter_mut().rev().find(|controller| controller.is_alive);
                let Some(controller) = alive else { return };
                controller.dies_after = Some((boundaries, lasts, then));
            }
            FaultKind::SecondController => {
                self.check.has_two = true;
                let machine = 1 + self.controllers.iter().map(|one| one.machine).max().unwrap_or(0);
                self.take_over(machine, Some(OperatorRequest::Resume));
            }
            FaultKind::Crash { host, keeps_disk } => self.host_crashes(host, keeps_disk, fault.lasts),
            FaultKind::CrashAtWrite { host, keeps_new } => {
                self.hosts[host].crashes_at_write = Some((fault.lasts, keeps_new));
                // It is counted when it happens.
                return;
            }
            FaultKind::RestartBalancer { balancer, has_state } => self.restart_balancer(balancer, has_state),
            FaultKind::ByHand { balancer, host, admission } => self.set_by_hand(balancer, host, admission),
            FaultKind::AgentKilled { host } => {
                self.agents_die(host, false);
                self.hit_all(host);
            }
            FaultKind::HostClock { host, by_ms } => {
                self.hosts[host].clock_ms += by_ms;
                self.check.has_clock_jumps = true;
            }
            FaultKind::ControllerClock { by_ms } => {
                self.controller_clock_ms += by_ms;
                self.check.has_clock_jumps = true;
            }
            FaultKind::ProcessDies { host, service } => {
                if let Some(process) = self.hosts[host].instances[service].process {
                    self.process_ends(host, service, process.serial);
                }
            }
            FaultKind::Asks(request) => self.operator_asks(request),
            FaultKind::Deploys { release } => self.deploy(0, release),
            FaultKind::MarksBad { release } => self.mark_bad(release),
            FaultKind::LedgerDamaged { host } => {
                self.hosts[host].instances.iter_mut().for_each(|truth| truth.is_damaged = true);
                self.hit_all(host);
                is_window = true;
            }
            FaultKind::Cut { host, .. } => {
                self.hit_all(host);
                is_window = true;
            }
            FaultKind::Messages { .. } => {
                self.check.has_weather = true;
                is_window = true;
            }
            FaultKind::DiskFull { host }
            | FaultKind::CommandFails { host, .. }
            | FaultKind::CommandHangs { host, .. } => {
                self.hit_all(host);
                is_window = true;
            }
            FaultKind::CutBalancer { .. } | FaultKind::Gate => is_window = true,
            FaultKind::BadRelease { .. } => {}
        }
        if is_window {
            self.active.insert(index);
            self.after(fault.lasts, Event::FaultEnds(index));
        }
        self.count(fault.kind.name());
    }

    fn fault_ends(&mut self, index: usize) {
        if !self.active.remove(&index) {
            return;
        }
        match &self.scenario.faults[index].kind {
            FaultKind::LedgerDamaged { host } => {
                self.hosts[*host].instances.iter_mut().for_each(|truth| truth.is_damaged = false);
                self.hit_all(*host);
            }
            FaultKind::Cut { host, .. } => {
                // What was connected over it has broken.
                for controller in 0..self.controllers.len() {
                    self.connection_ends(controller, Some(*host));
                }
                self.hit_all(*host);
            }
            FaultKind::DiskFull { host } | FaultKind::CommandHangs { host, .. } => self.hit_all(*host),
            _ => {}
        }
    }

    pub(super) fn host_crashes(&mut self, host: usize, keeps_disk: bool, lasts: Ms) {
        if !self.hosts[host].is_up {
            return;
        }
        self.say(|trial| format!("{} loses power", trial.site.hosts[host]));
        self.agents_die(host, true);
        let crashed = &mut self.hosts[host];
        crashed.is_up = false;
        crashed.boots += 1;
        for truth in &mut crashed.instances {
            truth.process = None;
            truth.lock = None;
            truth.guard_serial = None;
            truth.serial += 1;
            if !keeps_disk {
                let serial = truth.serial;
                let ledger = Ledger { version: LEDGER_VERSION, ..Ledger::default() };
                *truth = InstanceTruth { ledger, serial, ..InstanceTruth::default() };
            }
        }
        for service in 0..self.scenario.services.len() {
            self.cut_sessions(host, service);
        }
        self.hit_all(host);
        self.after(lasts, Event::HostReturns(host));
    }

    fn host_returns(&mut self, host: usize) {
        self.say(|trial| format!("{} has power again", trial.site.hosts[host]));
        self.hosts[host].is_up = true;
        self.hit_all(host);
        for service in 0..self.scenario.services.len() {
            let linked = self.hosts[host].instances[service].linked;
            if let Some(linked) = linked
                && self.scenario.starts_at_boot
                && self.scenario.services[service].has_process
            {
                self.start(host, service, linked);
            }
        }
    }

    /// Everything outside Greenlight is mended.
    fn mend(&mut self) {
        self.say(|_| "everything is mended".to_owned());
        self.is_mended = true;
        for index in std::mem::take(&mut self.active) {
            self.active.insert(index);
            self.fault_ends(index);
        }
        self.active.clear();
        for host in 0..self.hosts.len() {
            self.hosts[host].crashes_at_write = None;
            if !self.hosts[host].is_up {
                self.host_returns(host);
            }
        }
        for balancer in 0..self.balancers.len() {
            for host in 0..self.hosts.len() {
                let by_hand = self.balancers[balancer].servers[host]
                    .is_some_and(|server| server.is_foreign && server.admission != Admission::Ready);
                if by_hand {
                    // Whoever took it out lets it in again.
                    self.set_by_hand(balancer, host, Admission::Ready);
                }
            }
        }
        self.restart_the_dead();
        self.deadline = self.now + LIVENESS_MS;
        self.after(CARE_INTERVAL_MS, Event::Care);
    }

    /// What a fault ended outside the rollout's reach, somebody starts again.
    fn restart_the_dead(&mut self) {
        let open = self.history.open_rollout(&self.site.environment.name).cloned();
        for host in 0..self.hosts.len() {
            for service in 0..self.scenario.services.len() {
                let Some(instance) = self.site.instances[host][service].clone() else { continue };
                let truth = &self.hosts[host].instances[service];
                let (linked, process, lock) = (truth.linked, truth.process, truth.lock);
                let is_touched = open.as_ref().is_some_and(|open| open.touched.contains(&instance));
                if let Some(linked) = linked
                    && process.is_none()
                    && lock.is_none()
                    && !is_touched
                    && self.scenario.services[service].has_process
                {
                    self.hit(host, service);
                    self.start(host, service, linked);
                }
            }
        }
    }

    /// Once everything is mended: whoever is responsible looks after the rollout until it has ended.
    fn care(&mut self) {
        self.after(CARE_INTERVAL_MS, Event::Care);
        let Some(open) = self.history.open_rollout(&self.site.environment.name) else { return };
        let is_held = open.held.is_some();
        let is_driven = self.controllers.iter().any(|controller| controller.is_alive);
        if self.now > self.deadline {
            self.check_waits();
            if self.report.violation.is_some() {
                return;
            }
            if self.has_aborted {
                self.violation("does not end", |trial| trial.why_not_ended());
                return;
            }
            self.abort_at_last();
            return;
        }
        if is_driven {
            return;
        }
        if is_held {
            if self.resumes_left == 0 {
                self.abort_at_last();
                return;
            }
            self.resumes_left -= 1;
        }
        self.take_over(0, Some(OperatorRequest::Resume));
    }

    fn abort_at_last(&mut self) {
        self.has_aborted = true;
        self.deadline = self.now + LIVENESS_MS;
        self.take_over(0, Some(OperatorRequest::Abort));
    }

    pub(super) fn count(&mut self, kind: &'static str) {
        *self.report.faults.entry(kind).or_default() += 1;
    }

    pub(super) fn active(&self) -> impl Iterator<Item = &FaultKind> {
        self.active.iter().map(|index| &self.scenario.faults[*index].kind)
    }

    pub(super) fn is_disk_full(&self, host: usize) -> bool {
        self.active().any(|kind| matches!(kind, FaultKind::DiskFull { host: full } if *full == host))
    }

    pub(super) fn hangs(&self, host: usize, verb: Verb) -> bool {
        self.active().any(|kind| {
            matches!(kind, FaultKind::CommandHangs { host: at, verb: hanging } if *at == host && *hanging == verb)
        })
    }

    pub(super) fn command_fails(&self, host: usize, verb: Verb) -> Option<Blame> {
        self.active().find_map(|kind| match kind {
            FaultKind::CommandFails { host: at, verb: failing, blame } if *at == host && *failing == verb => {
                Some(*blame)
            }
            _ => None,
        })
    }

    pub(super) fn is_cut(&self, host: usize, inwards: bool) -> bool {
        self.active().any(|kind| {
            matches!(kind, FaultKind::Cut { host: at, to, from } if *at == host && if inwards { *to } else { *from })
        })
    }

    pub(super) fn is_balancer_cut(&self, balancer: usize) -> bool {
        self.active().any(|kind| matches!(kind, FaultKind::CutBalancer { balancer: cut } if *cut == balancer))
    }

    pub(super) fn is_gate_amber(&self) -> bool {
        self.active().any(|kind| *kind == FaultKind::Gate)
    }

    fn weather(&self) -> (u64, u64, Ms) {
        let mut weather = (0, 0, 0);
        for kind in self.active() {
            if let FaultKind::Messages { lost, repeated, late } = kind {
                weather = (weather.0.max(*lost), weather.1.max(*repeated), weather.2.max(*late));
            }
        }
        weather
    }

    pub(super) fn is_lost(&mut self) -> bool {
        let (lost, _, _) = self.weather();
        lost > 0 && self.numbers.chance(lost)
    }

    pub(super) fn is_repeated(&mut self) -> bool {
        let (_, repeated, _) = self.weather();
        repeated > 0 && self.numbers.chance(repeated)
    }

    pub(super) fn latency(&mut self, _controller: usize) -> Ms {
        let (_, _, late) = self.weather();
        self.numbers.between(1, 15) + if late > 0 { self.numbers.below(late) } else { 0 }
    }

    /// An agent's answer goes back to whoever asked.
    pub(super) fn answer(&mut self, from: From, host: usize, result: Answered) {
        if from.purpose == Purpose::Nothing || self.is_cut(host, false) || self.is_lost() {
            return;
        }
        let latency = self.latency(from.controller);
        self.after(latency, Event::Answered { from, host, result });
    }

    pub(super) fn say(&mut self, line: impl FnOnce(&Self) -> String) {
        if self.with_trace {
            let line = format!("{:>7.3} {}", self.now as f64 / 1_000.0, line(self));
            self.report.trace.push(line);
        }
    }

    pub(super) fn violation(&mut self, checker: &'static str, what: impl FnOnce(&Self) -> String) {
        if self.report.violation.is_none() {
            let what = what(self);
            self.say(|_| format!("VIOLATION ({checker}): {what}"));
            self.report.violation = Some(Violation { checker, what, at: self.now });
        }
    }

    /// An instance, for people.
    pub(super) fn place(&self, host: usize, service: usize) -> String {
        format!("{}/{}", self.site.hosts[host], self.site.names[service])
    }
}

fn host(scenario: &Scenario) -> Host {
    let instances = scenario.services.iter().enumerate().map(|(service, shape)| {
        let runs = (!scenario.is_first).then(|| release(service, 1));
        let before = (!scenario.is_first).then(|| release(service, 0));
        let generation = Generation(u64::from(!scenario.is_first));
        let ledger = Ledger {
            version: LEDGER_VERSION,
            generation,
            active: runs,
            previous: before,
            last_good: runs,
            confirmed: runs.map(|_| generation),
            ..Ledger::default()
        };
        InstanceTruth {
            ledger,
            linked: runs,
            staged: runs.into_iter().chain(before).chain([release(service, 3)]).collect(),
            runs: runs.into_iter().chain(before).collect(),
            process: runs.filter(|_| shape.has_process).map(|release| ProcessTruth {
                release,
                started_at: 0,
                is_ready: true,
                is_stopping: false,
                serial: 0,
                requests_left: None,
            }),
            is_proven: runs.is_some(),
            generation_seen: generation,
            ..InstanceTruth::default()
        }
    });
    Host { is_up: true, boots: 0, clock_ms: 0, crashes_at_write: None, instances: instances.collect() }
}

/// Whether a rollout of this direction is guarded: only the way forward is.
pub(super) fn is_guarded(scenario: &Scenario, direction: Direction) -> bool {
    scenario.has_guard && direction == Direction::Forward
}
