//! The simulation's own loop: what happens when, faults, and the end.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};

use greenlight_model::history::History;
use greenlight_model::host::{LEDGER_VERSION, Ledger, LedgerEntry, LedgerEvent};
use greenlight_model::id::{Generation, ProcessName, ReleaseId};
use greenlight_model::record::Record;
use greenlight_model::rollout::{Direction, OperatorRequest};
use greenlight_model::traffic::BalancerReport;

use super::agent::{Answered, From, Purpose, Request, Task};
use super::check::{Checker, Violation};
use super::controller::Controller;
use super::faults::Ambush;
use super::host::{Host, InstanceTruth, ProcessTruth};
use super::numbers::Numbers;
use super::scenario::{FaultKind, Ms, Part, SAFETY_ENDS_MS, Scenario, Strike};
use super::site::{Site, release, stamp};
use super::traffic::{BalancerTruth, CLIENTS_INTERVAL_MS, Command, Counted, HEALTH_INTERVAL_MS};

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
    Counted { controller: usize, balancer: usize, counts: Vec<Counted> },
    Health,
    Clients,
    SessionEnds { balancer: usize, host: usize, life: u32 },
    ProcessAnswers { host: usize, service: usize, serial: u32 },
    ProcessEnds { host: usize, service: usize, serial: u32 },
    GuardFires { host: usize, service: usize, serial: u32 },
    HostReturns(usize),
    Strikes { host: usize, strike: Strike, lasts: Ms },
    Mends(usize),
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
    pub(super) active: BTreeSet<usize>,
    pub(super) ambushes: Vec<Ambush>,
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
    pub(super) fn new(scenario: &'s Scenario, with_trace: bool) -> Self {
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
            ambushes: Vec::new(),
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

    pub(super) fn run(mut self) -> Report {
        for (index, fault) in self.scenario.faults.iter().enumerate() {
            self.at(fault.at, Event::FaultBegins(index));
        }
        self.after(HEALTH_INTERVAL_MS, Event::Health);
        self.after(CLIENTS_INTERVAL_MS, Event::Clients);
        self.after(SAFETY_ENDS_MS, Event::Mended);
        self.deploy(0, 2, Part::All);
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
            Event::Counted { controller, balancer, counts } => self.counted(controller, balancer, &counts),
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
            Event::Strikes { host, strike, lasts } => self.strikes(host, strike, lasts),
            Event::Mends(host) => self.mends(host),
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

    pub(super) fn count(&mut self, kind: &'static str) {
        *self.report.faults.entry(kind).or_default() += 1;
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

pub(super) fn host(scenario: &Scenario) -> Host {
    let instances = scenario.services.iter().enumerate().map(|(service, shape)| {
        let runs = (!scenario.is_first).then(|| release(service, 1));
        let before = (!scenario.is_first).then(|| release(service, 0));
        let generation = Generation(u64::from(!scenario.is_first));
        let entry = |event: LedgerEvent, release: ReleaseId| LedgerEntry {
            at: stamp(0, 0),
            event,
            release: Some(release),
            generation,
            rollout: None,
            detail: String::new(),
        };
        let ledger = Ledger {
            version: LEDGER_VERSION,
            generation,
            active: runs,
            previous: before,
            last_good: runs,
            confirmed: runs.map(|_| generation),
            history: vec![entry(LedgerEvent::Staged, release(service, 3))]
                .into_iter()
                .chain(runs.map(|runs| entry(LedgerEvent::Confirmed, runs)))
                .collect(),
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
    Host {
        is_up: true,
        boots: 0,
        clock_ms: 0,
        is_cut: false,
        crashes_at_write: None,
        instances: instances.collect(),
    }
}

/// Whether a rollout of this direction is guarded: only the way forward is.
pub(super) fn is_guarded(scenario: &Scenario, direction: Direction) -> bool {
    scenario.has_guard && direction == Direction::Forward
}
