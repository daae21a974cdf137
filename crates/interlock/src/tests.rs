//! Each rule is broken once or more, and the sentence that the operator reads is asserted.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use greenlight_model::Timestamp;
use greenlight_model::action::Action;
use greenlight_model::canary::{CanaryStep, Until};
use greenlight_model::fleet::{
    Balancer, BalancerKind, BecomeRoot, Environment, Floor, HostIdentity, HostSettings, LinkKind,
    ManagerKind, OnFailure, Strategy, Timeouts,
};
use greenlight_model::host::{
    Claim, Guard, HostFacts, HostReport, InstanceReport, Ledger, LedgerEntry, LedgerEvent,
};
use greenlight_model::id::{Generation, Instance, ReleaseId};
use greenlight_model::migration::{Loss, MigrationPhase};
use greenlight_model::rollout::{Course, Direction, FormerMigration, MigrationState, Plan, Rollout, Wave};
use greenlight_model::traffic::{Admission, BalancerReport, Server, ServerHealth};
use greenlight_model::world::{Gate, InFlight, Light, Observation, ReleaseFacts, World};

use crate::{Rule, permit};

pub(crate) const OLD: ReleaseId = ReleaseId::from_bytes([1; 32]);
pub(crate) const NEW: ReleaseId = ReleaseId::from_bytes([2; 32]);
pub(crate) const ELSE: ReleaseId = ReleaseId::from_bytes([3; 32]);
pub(crate) const GENERATION: Generation = Generation(7);

pub(crate) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

pub(crate) fn instance(host: &str) -> Instance {
    Instance::new(host.parse().unwrap(), "web".parse().unwrap())
}

/// Hosts a, b and c behind a balancer, all serving the old release, the new one staged, each in a wave of its own; the
/// floor is 2. A service without processes proves by its link.
pub(crate) fn world() -> World {
    let hosts = ["a", "b", "c"];
    let names: Vec<_> = hosts.iter().map(|host| host.parse().unwrap()).collect();
    let settings = HostSettings {
        link: LinkKind::Local,
        address: None,
        root: "/srv".to_owned(),
        ports: BTreeMap::new(),
        manager: ManagerKind::Auto,
        become_root: BecomeRoot::Auto,
        identity: HostIdentity::default(),
    };
    let environment = Environment {
        name: "production".parse().unwrap(),
        branch: None,
        hosts: BTreeMap::from([("web".parse().unwrap(), names.clone())]),
        host_settings: names.iter().map(|name| (name.clone(), settings.clone())).collect(),
        strategy: Strategy::BlueGreen,
        floor: Floor::Count(2),
        failure_budget: 0,
        on_failure: OnFailure::TurnBack,
        after: None,
        gates: Default::default(),
        standby: BTreeSet::new(),
        balancers: vec![Balancer {
            service: "web".parse().unwrap(),
            kind: BalancerKind::HaproxyTcp { address: "lb:9999".to_owned() },
            backend: "web".to_owned(),
            servers: BTreeMap::new(),
        }],
        timeouts: Timeouts::default(),
        tag: None,
        retries: 0,
        variables: BTreeMap::new(),
    };
    let wave = |host: &&str| Wave {
        instances: BTreeSet::from([instance(host)]),
        together: false,
        after: Duration::ZERO,
        steps: Vec::new(),
    };
    let plan = Plan {
        id: "production-1".parse().unwrap(),
        environment: "production".parse().unwrap(),
        direction: Direction::Forward,
        targets: BTreeMap::from([("web".parse().unwrap(), NEW)]),
        baseline: hosts.iter().map(|host| (instance(host), Some(OLD))).collect(),
        waves: hosts.iter().map(wave).collect(),
        generation: GENERATION,
        started_by: "op@desk".to_owned(),
        digest: None,
        is_partial: false,
        overrides: BTreeMap::new(),
        losses: Vec::new(),
    };
    let facts =
        |title: &str| ReleaseFacts { title: title.to_owned(), service: "web".parse().unwrap(), bad: None };
    let server = Server {
        admission: Admission::Ready,
        health: ServerHealth::Up,
        sessions: 0,
        weight: 100,
        normal_weight: 100,
    };
    World {
        now: at(0),
        environment,
        services: BTreeMap::new(),
        releases: BTreeMap::from([(OLD, facts("v1")), (NEW, facts("v2")), (ELSE, facts("v3"))]),
        rollout: Rollout::new(plan, at(0)),
        inventory: names.iter().map(|name| (name.clone(), observation())).collect(),
        traffic: vec![BalancerReport::Servers(names.iter().map(|name| (name.clone(), server)).collect())],
        gates: vec![Gate { name: "tests".to_owned(), light: Light::Green { why: "passed".to_owned() } }],
        judgement: None,
        in_flight: Vec::new(),
    }
}

fn observation() -> Observation {
    let ledger =
        Ledger { generation: Generation(6), active: Some(OLD), last_good: Some(OLD), ..Ledger::default() };
    let report = InstanceReport {
        ledger,
        linked: Some(OLD),
        staged: BTreeSet::from([OLD, NEW]),
        processes: BTreeMap::new(),
        disk_free_bytes: 1 << 30,
    };
    let facts = HostFacts {
        hostname: "host".to_owned(),
        os: "Debian".to_owned(),
        architecture: "x86_64".to_owned(),
        machine_id: None,
        user: "root".to_owned(),
        is_root: true,
        managers: Vec::new(),
        agent_version: "0.1.0".to_owned(),
    };
    let instances = BTreeMap::from([("web".parse().unwrap(), report)]);
    Observation { report: Some((at(0), HostReport { facts, instances })), unreachable: None }
}

pub(crate) fn report<'a>(world: &'a mut World, host: &str) -> &'a mut InstanceReport {
    let observation = world.inventory.get_mut(&host.parse().unwrap()).unwrap();
    let (_, report) = observation.report.as_mut().unwrap();
    report.instances.values_mut().next().unwrap()
}

pub(crate) fn server<'a>(world: &'a mut World, host: &str) -> &'a mut Server {
    match &mut world.traffic[0] {
        BalancerReport::Servers(servers) => servers.get_mut(&host.parse().unwrap()).unwrap(),
        BalancerReport::Unreachable { .. } => panic!("the balancer answers in these tests"),
    }
}

/// The host runs the new release under the rollout's generation.
pub(crate) fn switch(world: &mut World, host: &str) {
    let seen = report(world, host);
    seen.linked = Some(NEW);
    seen.ledger.active = Some(NEW);
    seen.ledger.generation = GENERATION;
    world.rollout.touched.insert(instance(host));
}

pub(crate) fn take_out(world: &mut World, host: &str) {
    server(world, host).admission = Admission::Drain;
    world.rollout.drained_at.insert(instance(host), at(-5));
}

pub(crate) fn turn_back(world: &mut World) {
    world.rollout.course = Course::TurningBack { why: "errors".to_owned(), since: at(0) };
}

fn drain(host: &str) -> Action {
    Action::Drain { instance: instance(host) }
}

fn admit(host: &str) -> Action {
    Action::Admit { instance: instance(host) }
}

fn activate(host: &str, release: ReleaseId, generation: u64) -> Action {
    Action::Activate { instance: instance(host), release, generation: Generation(generation) }
}

fn prune(keep: &[ReleaseId]) -> Action {
    Action::Prune { instance: instance("a"), keep: keep.iter().copied().collect() }
}

fn migrate() -> Action {
    Action::Migrate { instance: instance("a"), release: NEW }
}

/// Refused by this rule in these words, in a world changed this way.
fn refused(rule: Rule, sentence: &str, action: &Action, change: impl FnOnce(&mut World)) {
    let mut world = world();
    change(&mut world);
    let violation = permit(&world, action).expect_err(sentence);
    assert_eq!((violation.rule, violation.sentence.as_str()), (rule, sentence));
}

fn permitted(action: &Action, change: impl FnOnce(&mut World)) {
    let mut world = world();
    change(&mut world);
    assert_eq!(permit(&world, action), Ok(()));
}

#[test]
fn rule_1_capacity() {
    let rule = Rule::Capacity;
    permitted(&drain("a"), |_| {});
    refused(
        rule,
        "without a/web, 1 instances of web would serve, and the floor is 2",
        &drain("a"),
        |world| server(world, "b").health = ServerHealth::Down,
    );
    refused(
        rule,
        "without a/web, 1 instances of web would serve, and the floor is 2",
        &drain("a"),
        |world| world.in_flight.push(InFlight { action: drain("b"), since: at(0) }),
    );
    // One that does not serve anyway may always be drained.
    permitted(&drain("a"), |world| {
        server(world, "a").health = ServerHealth::Down;
        server(world, "b").health = ServerHealth::Down;
    });
    let go = activate("a", NEW, 7);
    refused(rule, "a/web still gets requests: it must be drained first", &go, |_| {});
    refused(rule, "a/web has 3 sessions, which may last until 2027-01-15T08:00:25Z", &go, |world| {
        take_out(world, "a");
        server(world, "a").sessions = 3;
    });
    permitted(&go, |world| {
        take_out(world, "a");
        server(world, "a").sessions = 3;
        world.now = at(25);
    });
    refused(rule, "a/web has 3 sessions and was not drained by this rollout", &go, |world| {
        server(world, "a").admission = Admission::Maintenance;
        server(world, "a").sessions = 3;
    });
    refused(
        rule,
        "whether a/web gets requests is not known: haproxy lb:9999 web: refused",
        &drain("a"),
        |world| world.traffic = vec![BalancerReport::Unreachable { why: "refused".to_owned() }],
    );
    refused(rule, "haproxy lb:9999 web has not been read", &drain("a"), |world| world.traffic.clear());
}

#[test]
fn rule_1_asks_no_more_on_the_way_back_than_ran_before() {
    let off = Action::Deactivate { instance: instance("a"), generation: Generation(8) };
    permitted(&drain("a"), |world| {
        turn_back(world);
        for before in world.rollout.plan.baseline.values_mut() {
            *before = None;
        }
        server(world, "b").health = ServerHealth::Down;
    });
    permitted(&off, |world| {
        turn_back(world);
        world.rollout.plan.baseline.insert(instance("a"), None);
        take_out(world, "a");
    });
}

#[test]
fn rule_2_claim() {
    let rule = Rule::Claim;
    let foreign = |seconds: i64| {
        move |world: &mut World| {
            report(world, "a").ledger.claim = Some(Claim {
                rollout: "production-9".parse().unwrap(),
                holder: "other@desk".to_owned(),
                reason: "deploy".to_owned(),
                expires_at: at(seconds),
            });
        }
    };
    let sentence = "a/web is claimed by other@desk for rollout production-9 until 2027-01-15T08:01:00Z";
    refused(rule, sentence, &drain("a"), foreign(60));
    refused(rule, sentence, &Action::Stage { instance: instance("a"), release: NEW }, foreign(60));
    permitted(&drain("a"), foreign(-60));
    permitted(&Action::Preflight { instance: instance("a"), release: NEW }, foreign(60));
    refused(rule, "generation 6 is not the rollout's for a/web, which is 7", &activate("a", NEW, 6), |_| {});
    refused(rule, "generation 7 brings v2 to a/web, not v3", &activate("a", ELSE, 7), |_| {});
    refused(
        rule,
        "the host of a/web has seen generation 9, so 7 is out of date",
        &activate("a", NEW, 7),
        |world| report(world, "a").ledger.generation = Generation(9),
    );
    refused(
        rule,
        "generation 7 is not the rollout's for a/web, which is 8",
        &activate("a", OLD, 7),
        turn_back,
    );
    refused(rule, "stage is under way on a/web", &drain("a"), |world| {
        let action = Action::Stage { instance: instance("a"), release: NEW };
        world.in_flight.push(InFlight { action, since: at(0) });
    });
}

#[test]
fn rule_3_proof() {
    let rule = Rule::Proof;
    refused(rule, "a/web does not prove v2: it is switched to 010101010101", &admit("a"), |_| {});
    permitted(&admit("a"), |world| switch(world, "a"));
    refused(rule, "a/web does not prove v1: it is switched to 020202020202", &admit("a"), |world| {
        switch(world, "a");
        turn_back(world);
    });
    refused(
        rule,
        "what a/web proves is of generation 6, and generation 8 was begun since",
        &admit("a"),
        |world| {
            world.rollout.touched.insert(instance("a"));
            turn_back(world);
        },
    );
    refused(rule, "a/web is to run nothing", &admit("a"), |world| {
        world.rollout.plan.baseline.insert(instance("a"), None);
        turn_back(world);
    });
    let sentence = "a/web was not confirmed: its host would go back by itself at 2027-01-15T08:01:30Z, in the middle of requests";
    refused(rule, sentence, &admit("a"), |world| {
        switch(world, "a");
        report(world, "a").ledger.guard = Some(Guard {
            generation: GENERATION,
            back_to: Some(OLD),
            limit: Duration::from_secs(90),
            fires_at: at(90),
            boot: "b".to_owned(),
            armed_at_ms: 1,
            rearmed: None,
            lost: None,
        });
    });
    refused(rule, "a/web has never reported", &admit("a"), |world| world.inventory.clear());
}

#[test]
fn rule_4_gates() {
    let rule = Rule::Gates;
    let light =
        |light: Light| move |world: &mut World| world.gates.push(Gate { name: "approval".to_owned(), light });
    let amber = || light(Light::Amber { why: "nobody has approved".to_owned() });
    refused(rule, "gate approval is amber: nobody has approved", &drain("a"), amber());
    refused(rule, "gate approval is amber: nobody has approved", &migrate(), amber());
    refused(
        rule,
        "gate approval is red: the plan has changed",
        &drain("a"),
        light(Light::Red { why: "the plan has changed".to_owned() }),
    );
    permitted(&Action::Stage { instance: instance("a"), release: NEW }, amber());
    // What was begun may be finished, and turning back is never held up.
    permitted(&drain("a"), |world| {
        amber()(world);
        world.rollout.admitted_at.insert(instance("a"), at(0));
    });
    permitted(&drain("a"), |world| {
        amber()(world);
        turn_back(world);
    });
}

#[test]
fn rule_5_order() {
    let rule = Rule::Order;
    refused(rule, "b/web is in wave 2, and wave 1 has not been proven", &drain("b"), |_| {});
    permitted(&drain("b"), |world| {
        switch(world, "a");
        world.rollout.waves_proven.insert(0, at(0));
    });
    refused(
        rule,
        "b/web is in wave 2, and a/web of wave 1 does not prove its release",
        &drain("b"),
        |world| {
            world.rollout.waves_proven.insert(0, at(0));
        },
    );
    permitted(&drain("b"), |world| {
        world.rollout.waves_proven.insert(0, at(0));
        world.rollout.left_out.insert(instance("a"), "broken".to_owned());
    });
    permitted(&drain("c"), turn_back);
}

#[test]
fn rule_6_migration() {
    let rule = Rule::Migration;
    permitted(&migrate(), |_| {});
    refused(rule, "the migration of web was begun before in this rollout", &migrate(), |world| {
        world.rollout.migrations.insert("web".parse().unwrap(), MigrationState::Begun);
    });
    refused(rule, "another migration is under way on b/web", &migrate(), |world| {
        let action = Action::Migrate { instance: instance("b"), release: NEW };
        world.in_flight.push(InFlight { action, since: at(0) });
    });
    refused(rule, "the migration of v2 ran before, on c/web", &migrate(), |world| {
        report(world, "c").ledger.history.push(LedgerEntry {
            at: at(-100),
            event: LedgerEvent::Migrated,
            release: Some(NEW),
            generation: Generation(3),
            rollout: None,
            detail: String::new(),
        });
    });
    let trace = |event: LedgerEvent| LedgerEntry {
        at: at(-50),
        event,
        release: Some(NEW),
        generation: Generation(3),
        rollout: None,
        detail: String::new(),
    };
    let sentence = "the migration of v2 was begun before, on c/web, and how it ended is not known";
    refused(rule, sentence, &migrate(), |world| {
        report(world, "c").ledger.history.push(trace(LedgerEvent::MigrationBegun));
    });
    permitted(&migrate(), |world| {
        let history = &mut report(world, "c").ledger.history;
        history.extend([LedgerEvent::MigrationBegun, LedgerEvent::MigrationFailed].map(trace));
    });
    let former = |is_done: bool| {
        move |world: &mut World| {
            let former = FormerMigration { on: instance("c"), is_done };
            world.rollout.migrated_before.insert("web".parse().unwrap(), former);
        }
    };
    refused(rule, "the migration of v2 ran before, on c/web, by the records", &migrate(), former(true));
    let unknown = "the migration of v2 was begun before, on c/web, which does not know how it ended";
    refused(rule, unknown, &migrate(), former(false));
    permitted(&migrate(), |world| {
        former(false)(world);
        report(world, "c").ledger.history.push(trace(LedgerEvent::Staged));
    });
    refused(rule, "a migration of web never runs on the way back", &migrate(), turn_back);
    refused(rule, "a migration of web never runs on the way back", &migrate(), |world| {
        world.rollout.plan.direction = Direction::Back;
    });
    let contract = Action::Contract { instance: instance("a"), release: NEW };
    let older = "a/web does not prove v2: what it runs may need what the contracting migration takes away";
    refused(rule, older, &contract, |_| {});
    let all_new = |world: &mut World| {
        ["a", "b", "c"].into_iter().for_each(|host| switch(world, host));
    };
    permitted(&contract, all_new);
    refused(rule, "the contracting migration of web was begun before in this rollout", &contract, |world| {
        all_new(world);
        world.rollout.contractions.insert("web".parse().unwrap(), MigrationState::Begun);
    });
    let loss = Loss {
        service: "web".parse().unwrap(),
        phase: MigrationPhase::Expand,
        place: "2.sql:1".to_owned(),
        statement: "DROP TABLE users".to_owned(),
        what: "takes away the table users".to_owned(),
    };
    let back = Action::Activate { instance: instance("a"), release: OLD, generation: GENERATION.next() };
    let taken_away = |state: MigrationState| {
        let loss = loss.clone();
        move |world: &mut World| {
            take_out(world, "a");
            switch(world, "a");
            turn_back(world);
            world.rollout.plan.losses.push(loss.clone());
            world.rollout.migrations.insert("web".parse().unwrap(), state);
        }
    };
    permitted(&back, taken_away(MigrationState::Failed));
    let sentence = "a/web would run older code, and a migration took away what that may need: 2.sql:1: DROP TABLE users \
        (takes away the table users)";
    refused(rule, sentence, &back, taken_away(MigrationState::Done));
    permitted(&back, |world| {
        taken_away(MigrationState::Done)(world);
        world.rollout.restored = Some("from the copy".to_owned());
    });
    let other = Action::Migrate { instance: instance("a"), release: ELSE };
    refused(rule, "v3 is not what this rollout brings to web", &other, |_| {});
}

#[test]
fn rule_7_fallback() {
    let rule = Rule::Fallback;
    let proven = |world: &mut World| {
        switch(world, "a");
        world.rollout.waves_proven.insert(0, at(-60));
        world.rollout.plan.waves[1].after = Duration::from_secs(90);
    };
    refused(rule, "b/web is kept as the way back until 2027-01-15T08:00:30Z", &drain("b"), proven);
    permitted(&drain("b"), |world| {
        proven(world);
        world.now = at(30);
    });
    // A standby waits for all others, whatever the waves say.
    refused(rule, "a/web is a standby, and b/web does not prove its release yet", &drain("a"), |world| {
        world.environment.standby.insert("a".parse().unwrap());
    });
    permitted(&drain("a"), |world| {
        world.environment.standby.insert("a".parse().unwrap());
        switch(world, "b");
        switch(world, "c");
    });
}

#[test]
fn rule_8_retention() {
    let rule = Rule::Retention;
    permitted(&prune(&[OLD, NEW]), |_| {});
    refused(rule, "v1 would be removed from a/web, which it runs", &prune(&[NEW]), |_| {});
    refused(rule, "v3 would be removed from a/web, which it ran before", &prune(&[OLD, NEW]), |world| {
        report(world, "a").ledger.previous = Some(ELSE);
    });
    refused(
        rule,
        "v3 would be removed from a/web, which was last good there",
        &prune(&[OLD, NEW]),
        |world| {
            report(world, "a").ledger.last_good = Some(ELSE);
        },
    );
    refused(rule, "v2 would be removed from a/web, which this rollout brings", &prune(&[OLD]), |_| {});
    refused(
        rule,
        "v1 would be removed from a/web, which this rollout could go back to",
        &prune(&[NEW]),
        |world| {
            switch(world, "a");
            report(world, "a").ledger.last_good = None;
        },
    );
    let bad = |world: &mut World| {
        let facts = world.releases.get_mut(&NEW).unwrap();
        facts.bad = Some("it leaks".to_owned());
        take_out(world, "a");
    };
    refused(rule, "v2 is marked bad: it leaks", &activate("a", NEW, 7), bad);
    refused(rule, "v2 is not complete on a", &activate("a", NEW, 7), |world| {
        report(world, "a").staged.remove(&NEW);
        take_out(world, "a");
    });
    // Where the baseline is bad, it is still what was there.
    permitted(&activate("a", OLD, 8), |world| {
        turn_back(world);
        world.releases.get_mut(&OLD).unwrap().bad = Some("slow".to_owned());
        take_out(world, "a");
    });
}

#[test]
fn rule_9_share() {
    let rule = Rule::Share;
    let share = |host: &str, percent: u8| Action::Share {
        instance: instance("a"),
        canaries: BTreeSet::from([host.parse().unwrap()]),
        share: Some(percent.try_into().unwrap()),
    };
    let canary = |world: &mut World| {
        let step = |percent: u8| CanaryStep { share: percent.try_into().unwrap(), until: Until::Pass };
        world.rollout.plan.waves[0].steps = vec![step(5), step(50)];
        switch(world, "a");
    };
    permitted(&share("a", 5), canary);
    refused(rule, "the canary of web is to get 5% of the traffic now, not 50%", &share("a", 50), canary);
    permitted(&share("a", 50), |world| {
        canary(world);
        world.rollout.canaries.entry(0).or_default().passed = 1;
    });
    refused(rule, "b/web is not of the canary", &share("b", 5), canary);
    // One that was left out is on its way back, and gets no more than the canary meanwhile.
    permitted(&share("a", 5), |world| {
        canary(world);
        world.rollout.left_out.insert(instance("a"), "it died".to_owned());
        report(world, "a").linked = None;
    });
    refused(
        rule,
        "a/web does not prove its release, so it gets no share of the traffic",
        &share("a", 5),
        |world| {
            canary(world);
            report(world, "a").linked = Some(OLD);
        },
    );
    refused(
        rule,
        "no canary of web is being judged, so none gets 5% of the traffic",
        &share("a", 5),
        |world| switch(world, "a"),
    );
    refused(
        rule,
        "the rollout turns back, so no canary of web gets 5% of the traffic",
        &share("a", 5),
        |world| {
            canary(world);
            turn_back(world);
        },
    );
    // What the configuration says may be given back at any time.
    let usual = Action::Share { instance: instance("a"), canaries: BTreeSet::new(), share: None };
    permitted(&usual, turn_back);
    permitted(&usual, |_| {});
}

#[test]
fn rule_10_ownership() {
    let rule = Rule::Ownership;
    refused(rule, "x/web is not part of rollout production-1", &drain("x"), |_| {});
    refused(rule, "a/web is no longer part of production", &drain("a"), |world| {
        world.environment.host_settings.remove(&"a".parse().unwrap());
    });
}

#[test]
fn a_rule_is_shown_with_its_number() {
    let numbers: Vec<u8> = Rule::ALL.iter().map(|rule| rule.number()).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    let violation = permit(&world(), &drain("x")).unwrap_err();
    assert_eq!(violation.to_string(), "rule 10 (ownership): x/web is not part of rollout production-1");
}
