//! Fleets written as text, rollouts run to their end with a readable trace, every turn judged by the checker.

#![allow(dead_code, clippy::allow_attributes, reason = "each test binary uses its own part of this")]

pub(crate) mod checker;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use greenlight_model::Timestamp;
use greenlight_model::action::{Action, Verb};
use greenlight_model::decision::{Outcome, Step, Wait};
use greenlight_model::fleet::{
    Balancer, BalancerKind, BatchSize, BecomeRoot, Environment, Floor, HostIdentity, HostSettings, LinkKind,
    ManagerKind, Migration, OnFailure, Process, Service, Smoke, Source, Strategy, Timeouts,
};
use greenlight_model::host::{
    Answer, Claim, HostFacts, HostReport, InstanceReport, Ledger, ProcessReport, ProcessState,
};
use greenlight_model::id::{Generation, HostName, Instance, ReleaseId, ServiceName};
use greenlight_model::rollout::{Direction, Note, Plan, Rollout};
use greenlight_model::traffic::{Admission, BalancerReport, Server, ServerHealth};
use greenlight_model::world::{Observation, ReleaseFacts, Unreachable, World};
use greenlight_simulator::{Faults, Simulation, Turn};

use checker::Checker;

pub(crate) const START_SECOND: i64 = 1_800_000_000;

/// Turns after which a rollout of so few hosts is taken not to end.
const TURNS_MAX: usize = 400;

pub(crate) fn instance(text: &str) -> Instance {
    Instance::try_from(text.to_owned()).unwrap()
}

pub(crate) fn host(text: &str) -> HostName {
    text.parse().unwrap()
}

pub(crate) fn start() -> Timestamp {
    Timestamp::from_second(START_SECOND).unwrap()
}

/// The old and the new release of a service, by its position among the services.
fn release(service: usize, is_new: bool) -> ReleaseId {
    ReleaseId::from_bytes([u8::try_from(service * 2).unwrap() + u8::from(is_new) + 1; 32])
}

/// What a fleet is before its rollout begins.
#[derive(Debug, Clone)]
pub(crate) struct Fleet {
    /// `web: a b c; worker: b d`.
    pub(crate) hosts: String,
    pub(crate) strategy: Strategy,
    pub(crate) floor: Floor,
    pub(crate) failure_budget: u32,
    pub(crate) on_failure: OnFailure,
    pub(crate) retries: u32,
    pub(crate) standby: &'static str,
    /// Services with a balancer.
    pub(crate) balanced: Vec<String>,
    pub(crate) direction: Direction,
    pub(crate) is_first: bool,
    /// The services that migrate.
    pub(crate) migrating: &'static str,
    pub(crate) has_smoke: bool,
    /// The target is what runs already.
    pub(crate) is_again: bool,
    pub(crate) sessions: u64,
}

pub(crate) fn fleet(hosts: &str) -> Fleet {
    Fleet {
        hosts: hosts.to_owned(),
        strategy: rolling(&[BatchSize::Count(1)]),
        floor: Floor::Count(1),
        failure_budget: 0,
        on_failure: OnFailure::TurnBack,
        retries: 1,
        standby: "",
        balanced: vec!["web".to_owned()],
        direction: Direction::Forward,
        is_first: false,
        migrating: "",
        has_smoke: false,
        is_again: false,
        sessions: 0,
    }
}

pub(crate) fn rolling(batch: &[BatchSize]) -> Strategy {
    Strategy::Rolling { batch: batch.to_vec() }
}

impl Fleet {
    /// The world in which the rollout has just started.
    pub(crate) fn world(&self) -> World {
        let hosts: BTreeMap<ServiceName, Vec<HostName>> = self
            .hosts
            .split(';')
            .map(|part| {
                let (service, hosts) = part.split_once(':').unwrap();
                (service.trim().parse().unwrap(), hosts.split_whitespace().map(host).collect())
            })
            .collect();
        let settings = HostSettings {
            link: LinkKind::Local,
            address: None,
            root: "/srv".to_owned(),
            ports: BTreeMap::new(),
            manager: ManagerKind::Auto,
            become_root: BecomeRoot::Auto,
            identity: HostIdentity::default(),
        };
        let is_balanced = |service: &ServiceName| self.balanced.iter().any(|name| name == service.as_str());
        let balancers: Vec<Balancer> = hosts
            .keys()
            .filter(|service| is_balanced(service))
            .map(|service| Balancer {
                service: service.clone(),
                kind: BalancerKind::HaproxyTcp { address: "lb:9999".to_owned() },
                backend: service.to_string(),
                servers: BTreeMap::new(),
            })
            .collect();
        let all: BTreeSet<HostName> = hosts.values().flatten().cloned().collect();
        let environment = Environment {
            name: "production".parse().unwrap(),
            branch: None,
            hosts: hosts.clone(),
            host_settings: all.iter().map(|name| (name.clone(), settings.clone())).collect(),
            strategy: self.strategy.clone(),
            floor: self.floor,
            failure_budget: self.failure_budget,
            on_failure: self.on_failure,
            after: None,
            gates: Default::default(),
            standby: self.standby.split_whitespace().map(host).collect(),
            balancers,
            timeouts: Timeouts::default(),
            tag: None,
            retries: self.retries,
            variables: BTreeMap::new(),
        };
        let services: BTreeSet<ServiceName> = hosts.keys().cloned().collect();
        let traffic =
            environment.balancers.iter().map(|balancer| self.servers(&hosts[&balancer.service])).collect();
        let numbered: BTreeMap<&ServiceName, usize> =
            hosts.keys().enumerate().map(|(number, service)| (service, number)).collect();
        let plan = Plan {
            id: "production-1".parse().unwrap(),
            environment: environment.name.clone(),
            direction: self.direction,
            targets: numbered
                .iter()
                .map(|(service, number)| ((*service).clone(), release(*number, !self.is_again)))
                .collect(),
            baseline: environment
                .instances()
                .map(|instance| {
                    let number = numbered[&instance.service];
                    (instance, (!self.is_first).then(|| release(number, false)))
                })
                .collect(),
            waves: greenlight_planner::waves(&environment, &services, self.direction),
            generation: Generation(2),
            started_by: "op@desk".to_owned(),
            digest: None,
            is_partial: false,
            overrides: BTreeMap::new(),
            losses: Vec::new(),
        };
        let releases = numbered.iter().flat_map(|(service, number)| {
            [(false, "v1"), (true, "v2")].map(|(is_new, title)| {
                let service = (*service).clone();
                (release(*number, is_new), ReleaseFacts { title: title.to_owned(), service, bad: None })
            })
        });
        let inventory = all.iter().map(|name| {
            let instances = hosts.iter().filter(|(_, hosts)| hosts.contains(name)).map(|(service, _)| {
                let old = (!self.is_first).then(|| release(numbered[service], false));
                (service.clone(), instance_report(old))
            });
            let report = HostReport { facts: facts(name), instances: instances.collect() };
            (name.clone(), Observation { report: Some((start(), report)), unreachable: None })
        });
        World {
            now: start(),
            services: services.iter().map(|name| (name.clone(), self.service(name))).collect(),
            releases: releases.collect(),
            rollout: Rollout::new(plan, start()),
            inventory: inventory.collect(),
            traffic,
            gates: Vec::new(),
            judgement: None,
            in_flight: Vec::new(),
            environment,
        }
    }

    fn servers(&self, hosts: &[HostName]) -> BalancerReport {
        let health = if self.is_first { ServerHealth::Down } else { ServerHealth::Up };
        let server = Server {
            admission: Admission::Ready,
            health,
            sessions: self.sessions,
            weight: 100,
            normal_weight: 100,
        };
        BalancerReport::Servers(hosts.iter().map(|name| (name.clone(), server)).collect())
    }

    fn service(&self, name: &ServiceName) -> Service {
        let migrates = self.migrating.split_whitespace().any(|migrating| migrating == name.as_str());
        let process = Process {
            name: "main".parse().unwrap(),
            argv: vec!["serve".to_owned()],
            port: Some(8000),
            health: None,
            variables: BTreeMap::new(),
            stdout: "logs/main.stdout".to_owned(),
            stderr: "logs/main.stderr".to_owned(),
            profiles: BTreeMap::new(),
            user: None,
            smoke: self.has_smoke.then_some(Smoke { port: 9000 }),
            start_timeout: Duration::from_secs(10),
            stop_timeout: Duration::from_secs(10),
            stop_argv: None,
        };
        Service {
            name: name.clone(),
            source: Source { git: ".".to_owned(), branch: None, directory: None },
            build: Vec::new(),
            include: Vec::new(),
            exclude: Vec::new(),
            shared: Vec::new(),
            prepare: Vec::new(),
            requires: greenlight_model::requirements::Requirements::default(),
            migrate: migrates.then(|| Migration::new(vec!["migrate".to_owned()], Duration::from_secs(60))),
            processes: BTreeMap::from([(process.name.clone(), process)]),
            secrets: BTreeSet::new(),
            keep_releases: 1,
        }
    }
}

fn instance_report(old: Option<ReleaseId>) -> InstanceReport {
    let process = old.map(|release| {
        let process = ProcessReport {
            state: ProcessState::Running { pid: 1, started_at: start() },
            answer: Answer::Release { release, proof: "version endpoint".to_owned() },
            profile: None,
        };
        ("main".parse().unwrap(), process)
    });
    let generation = Generation(u64::from(old.is_some()));
    InstanceReport {
        ledger: Ledger {
            generation,
            active: old,
            last_good: old,
            confirmed: old.map(|_| generation),
            ..Ledger::default()
        },
        linked: old,
        staged: old.into_iter().collect(),
        processes: process.into_iter().collect(),
        disk_free_bytes: 1 << 30,
    }
}

fn facts(name: &HostName) -> HostFacts {
    HostFacts {
        hostname: name.to_string(),
        os: "Debian".to_owned(),
        architecture: "x86_64".to_owned(),
        machine_id: None,
        user: "root".to_owned(),
        is_root: true,
        managers: Vec::new(),
        agent_version: "0.1.0".to_owned(),
    }
}

/// Sets or ends the loss of a host.
pub(crate) fn cut(world: &mut World, name: &str, is_cut: bool) {
    let since = world.now;
    let unreachable = is_cut.then(|| Unreachable { since, why: "connection timed out".to_owned() });
    world.inventory.get_mut(&host(name)).unwrap().unreachable = unreachable;
}

pub(crate) fn report_mut<'a>(world: &'a mut World, instance: &Instance) -> &'a mut InstanceReport {
    let observation = world.inventory.get_mut(&instance.host).unwrap();
    observation.report.as_mut().unwrap().1.instances.get_mut(&instance.service).unwrap()
}

/// Another rollout's claim.
pub(crate) fn foreign_claim(seconds: i64) -> Claim {
    Claim {
        rollout: "production-9".parse().unwrap(),
        holder: "other@desk".to_owned(),
        reason: "deploy web v9 to production".to_owned(),
        expires_at: Timestamp::from_second(START_SECOND + seconds).unwrap(),
    }
}

/// How a rollout went.
pub(crate) struct Run {
    /// A line per turn that did something.
    pub(crate) trace: Vec<String>,
    /// How it ended; none when it stopped to wait.
    pub(crate) outcome: Option<Outcome>,
    /// What it stopped to wait for.
    pub(crate) waits: Vec<Wait>,
    /// Turns in which steps were begun.
    pub(crate) begun: usize,
    pub(crate) world: World,
}

/// A rollout under way, every turn of it checked.
pub(crate) struct Driver<'f> {
    pub(crate) simulation: Simulation<'f>,
    checker: Checker,
    trace: Vec<String>,
    begun: usize,
    turns: usize,
}

impl<'f> Driver<'f> {
    pub(crate) fn new(world: World, faults: Faults<'f>) -> Self {
        let checker = Checker::new(&world);
        let simulation = Simulation::new(world, faults);
        Self { simulation, checker, trace: Vec::new(), begun: 0, turns: 0 }
    }

    /// One turn; anything that must not be is a panic with the trace.
    pub(crate) fn turn(&mut self) -> Turn {
        self.turns += 1;
        assert!(self.turns < TURNS_MAX, "does not end:\n{}", self.trace.join("\n"));
        let before = self.simulation.world().clone();
        let turn = match self.simulation.turn() {
            Ok(turn) => turn,
            Err(error) => panic!("{error}\n{}", self.trace.join("\n")),
        };
        if let Some(line) = show(&turn, &before) {
            self.trace.push(line);
        }
        self.begun += usize::from(matches!(turn, Turn::Began(_)));
        if let Err(complaint) = self.checker.judge(&before, self.simulation.world(), &turn) {
            panic!("{complaint}\n{}", self.trace.join("\n"));
        }
        turn
    }

    pub(crate) fn begun(&self) -> usize {
        self.begun
    }

    pub(crate) fn trace(&self) -> String {
        self.trace.join("\n")
    }

    /// Until it ends or stops.
    pub(crate) fn finish(mut self) -> Run {
        loop {
            match self.turn() {
                Turn::Ended(outcome) => return self.end(Some(outcome), Vec::new()),
                Turn::Stopped(waits) => return self.end(None, waits),
                Turn::Began(_) | Turn::Passed(_) | Turn::Noted(_) => {}
            }
        }
    }

    fn end(self, outcome: Option<Outcome>, waits: Vec<Wait>) -> Run {
        let world = self.simulation.world().clone();
        Run { trace: self.trace, outcome, waits, begun: self.begun, world }
    }
}

pub(crate) fn run(world: World, faults: Faults<'_>) -> Run {
    Driver::new(world, faults).finish()
}

/// Runs without faults and compares what happens from the first change on, up to tidying up.
pub(crate) fn expect(fleet: &Fleet, expected: &[&str]) -> Run {
    expect_with(fleet.world(), Faults::default(), expected)
}

pub(crate) fn expect_with(world: World, faults: Faults<'_>, expected: &[&str]) -> Run {
    let run = run(world, faults);
    let is_preparation = |line: &&String| {
        ["preflight", "claim", "stage", "smoke", "prune", "unclaim"].iter().any(|verb| line.starts_with(verb))
    };
    let seen: Vec<&str> = run.trace.iter().filter(|line| !is_preparation(line)).map(String::as_str).collect();
    assert_eq!(seen, expected, "\nwhole trace:\n{}", run.trace.join("\n"));
    run
}

/// `drain a/web b/web`, `note: …`, `done`.
fn show(turn: &Turn, world: &World) -> Option<String> {
    match turn {
        Turn::Began(steps) => Some(show_steps(steps, world)),
        Turn::Passed(ended) => {
            let failed = ended.iter().filter_map(|(action, result)| match result {
                greenlight_model::action::ActionResult::Succeeded => None,
                greenlight_model::action::ActionResult::Failed { why, .. } => {
                    Some(format!("failed: {} {}: {why}", action.verb(), action.instance()))
                }
            });
            let failed: Vec<String> = failed.collect();
            (!failed.is_empty()).then(|| failed.join(", "))
        }
        Turn::Noted(note) => Some(match note {
            Note::WaveProven { wave } => format!("wave {} proven", wave + 1),
            Note::StepPassed { step, .. } => format!("step {} passed", step + 1),
            Note::Ask { step, .. } => format!("ask about step {}", step + 1),
            Note::LeaveOut { instance, why } => format!("leave out {instance}: {why}"),
            Note::TurnBack { why, bad } => format!("turn back, {} bad: {why}", bad.len()),
            Note::Hold { why } => format!("hold: {why}"),
        }),
        Turn::Ended(outcome) => Some(match outcome {
            Outcome::Done { left_out } if left_out.is_empty() => "done".to_owned(),
            Outcome::Done { left_out } => format!("done without {}", names(left_out.keys())),
            Outcome::Refused { why } => format!("refused: {why}"),
            Outcome::TurnedBack { why } => format!("turned back: {why}"),
            Outcome::Stuck { instances, .. } => format!("stuck: {}", names(instances.keys())),
        }),
        Turn::Stopped(_) => Some("stopped".to_owned()),
    }
}

fn show_steps(steps: &[Step], world: &World) -> String {
    let shared: Vec<String> = steps
        .iter()
        .filter_map(|step| match &step.action {
            Action::Share { instance, canaries, share: Some(share) } => {
                let hosts: Vec<&str> = canaries.iter().map(HostName::as_str).collect();
                Some(format!("share {share} of {} to {}", instance.service, hosts.join(" ")))
            }
            Action::Share { instance, share: None, .. } => {
                Some(format!("share {} as usual", instance.service))
            }
            _ => None,
        })
        .collect();
    let others: Vec<&Step> = steps.iter().filter(|step| step.action.verb() != Verb::Share).collect();
    let groups = show_groups(&others, world);
    [shared.join(", "), groups].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ")
}

fn show_groups(steps: &[&Step], world: &World) -> String {
    let mut groups: Vec<(Verb, Option<ReleaseId>, Vec<&Instance>)> = Vec::new();
    for Step { action, .. } in steps {
        let release = action.release().filter(|_| matches!(action, Action::Activate { .. }));
        match groups.iter_mut().find(|(verb, known, _)| *verb == action.verb() && *known == release) {
            Some((_, _, instances)) => instances.push(action.instance()),
            None => groups.push((action.verb(), release, vec![action.instance()])),
        }
    }
    let groups = groups.into_iter().map(|(verb, release, instances)| {
        let release = release.map(|id| format!(" {}", world.title(id))).unwrap_or_default();
        format!("{verb}{release} {}", names(instances.into_iter()))
    });
    groups.collect::<Vec<_>>().join(", ")
}

fn names<'a>(instances: impl Iterator<Item = &'a Instance>) -> String {
    instances.map(Instance::to_string).collect::<Vec<_>>().join(" ")
}
