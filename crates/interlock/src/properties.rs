//! Whatever the world is, each rule refuses what it is there for. Worlds and actions are drawn by chance; what must be
//! refused is said here once more, from the rules' sentences alone, and in the simplest way.

use std::collections::BTreeMap;
use std::time::Duration;

use greenlight_model::action::{Action, Verb};
use greenlight_model::canary::{CanaryStep, Until};
use greenlight_model::host::{Claim, Guard, LedgerEntry, LedgerEvent};
use greenlight_model::id::{Generation, ReleaseId};
use greenlight_model::rollout::{FormerMigration, MigrationState};
use greenlight_model::traffic::{Admission, BalancerReport, ServerHealth};
use greenlight_model::world::{InFlight, Light, Traffic, World};

use crate::tests::{
    ELSE, GENERATION, NEW, OLD, at, instance, report, server, switch, take_out, turn_back, world,
};
use crate::{Rule, Violation, permit};

/// Worlds that are drawn: enough for each rule to refuse dozens of times.
const WORLDS: u64 = 20_000;
/// How often each rule must have refused, and how often nothing was refused, or the draw shows nothing.
const TIMES_MIN: u32 = 30;

const HOSTS: [&str; 3] = ["a", "b", "c"];

/// Numbers by chance (xorshift), the same in every run.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).unwrap()
    }

    fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn host(&mut self) -> &'static str {
        HOSTS[self.below(HOSTS.len())]
    }

    fn release(&mut self) -> ReleaseId {
        [OLD, NEW, NEW, ELSE][self.below(4)]
    }

    /// A world in the middle of something.
    fn world(&mut self) -> World {
        let mut drawn = world();
        for (index, host) in HOSTS.iter().enumerate() {
            // As far as a rollout comes, and sometimes further than it should.
            if self.once_in(3) {
                switch(&mut drawn, host);
                if self.once_in(2) {
                    drawn.rollout.waves_proven.insert(index, at(-60));
                }
            }
            if self.once_in(6) {
                take_out(&mut drawn, host);
            }
            let seen = server(&mut drawn, host);
            if self.once_in(8) {
                seen.health = ServerHealth::Down;
            }
            if self.once_in(6) {
                seen.sessions = 3;
            }
        }
        let host = self.host();
        match self.below(24) {
            0 => turn_back(&mut drawn),
            1 => drop(drawn.rollout.left_out.insert(instance(host), "broken".to_owned())),
            2 => {
                let claim = Claim {
                    rollout: "production-9".parse().unwrap(),
                    holder: "somebody@else".to_owned(),
                    reason: "hotfix".to_owned(),
                    expires_at: at(if self.once_in(3) { -60 } else { 60 }),
                };
                report(&mut drawn, host).ledger.claim = Some(claim);
            }
            3 => {
                let action = Action::Stage { instance: instance(host), release: NEW };
                drawn.in_flight.push(InFlight { action, since: at(0) });
            }
            4 => drawn.gates[0].light = Light::Amber { why: "nobody has approved".to_owned() },
            5 => drawn.gates[0].light = Light::Red { why: "tests fail".to_owned() },
            6 => drop(drawn.rollout.migrations.insert("web".parse().unwrap(), MigrationState::Begun)),
            7 => {
                let event = [LedgerEvent::MigrationBegun, LedgerEvent::Migrated][self.below(2)];
                let (generation, rollout, detail) = (Generation(3), None, String::new());
                let entry =
                    LedgerEntry { at: at(-9), event, release: Some(NEW), generation, rollout, detail };
                report(&mut drawn, host).ledger.history.push(entry);
            }
            8 => {
                let former = FormerMigration { on: instance(host), is_done: self.once_in(2) };
                drawn.rollout.migrated_before.insert("web".parse().unwrap(), former);
                if self.once_in(2) {
                    let (generation, rollout, detail) = (Generation(3), None, String::new());
                    let (event, release) = (LedgerEvent::Staged, Some(NEW));
                    let entry = LedgerEntry { at: at(-9), event, release, generation, rollout, detail };
                    report(&mut drawn, host).ledger.history.push(entry);
                }
            }
            9 => {
                let release = self.release();
                drawn.releases.get_mut(&release).unwrap().bad = Some("it leaks".to_owned());
            }
            10 => report(&mut drawn, host).staged.clear(),
            11 => drop(drawn.environment.standby.insert(host.parse().unwrap())),
            12 => drawn.rollout.plan.waves[1].after = Duration::from_secs(120),
            13 => {
                report(&mut drawn, host).ledger.guard = Some(Guard {
                    generation: GENERATION,
                    back_to: Some(OLD),
                    limit: Duration::from_secs(90),
                    fires_at: at(60),
                    boot: String::new(),
                    armed_at_ms: 0,
                    rearmed: None,
                    lost: None,
                });
            }
            14 => report(&mut drawn, host).ledger.generation = Generation(9),
            15 => drop(drawn.rollout.plan.baseline.remove(&instance(host))),
            16 => drawn.traffic = vec![BalancerReport::Unreachable { why: "no route".to_owned() }],
            17 => {
                let action = Action::Migrate { instance: instance(host), release: NEW };
                drawn.in_flight.push(InFlight { action, since: at(0) });
            }
            _ => {}
        }
        if self.once_in(2) {
            let step = |percent: u8| CanaryStep { share: percent.try_into().unwrap(), until: Until::Pass };
            drawn.rollout.plan.waves[0].steps = vec![step(5), step(50)];
            drawn.rollout.canaries.entry(0).or_default().passed = self.below(3);
        }
        drawn
    }

    fn action(&mut self) -> Action {
        let instance = instance(self.host());
        let (release, generation) = (self.release(), Generation(7 + u64::from(self.once_in(4))));
        match self.below(9) {
            8 => Action::Share {
                instance,
                canaries: std::iter::once(self.host().parse().unwrap()).collect(),
                share: [None, Some(5), Some(50)][self.below(3)]
                    .map(|percent: u8| percent.try_into().unwrap()),
            },
            0 | 1 => Action::Drain { instance },
            2 | 3 => Action::Activate { instance, release, generation },
            4 => Action::Admit { instance },
            5 => Action::Migrate { instance, release },
            6 => Action::Prune {
                instance,
                keep: [OLD, NEW, ELSE].into_iter().take(1 + self.below(3)).collect(),
            },
            _ => Action::Stage { instance, release },
        }
    }
}

/// The rules that an action would break.
fn broken(world: &World, action: &Action) -> Vec<Rule> {
    let rollout = &world.rollout;
    let plan = &rollout.plan;
    let one = action.instance();
    let verb = action.verb();
    let goes_back = rollout.goes_back(one);
    let linked = |host: &str| world.report(&instance(host)).and_then(|report| report.linked);
    let Some(seen) = world.report(one) else { return Vec::new() };
    let switches = verb == Verb::Activate;
    let disturbs = switches || verb == Verb::Drain;
    let (wanted, generation) = if goes_back { (OLD, Generation(8)) } else { (NEW, Generation(7)) };
    let mut broken = Vec::new();
    let mut refuse = |rule: Rule, is_broken: bool| broken.extend(is_broken.then_some(rule));

    refuse(Rule::Ownership, !plan.baseline.contains_key(one));

    let is_foreign = |claim: &Claim| claim.rollout != plan.id && claim.expires_at > world.now;
    refuse(Rule::Claim, seen.ledger.claim.as_ref().is_some_and(is_foreign));
    let under_way = |begun: &InFlight| begun.action.instance() == one && begun.action != *action;
    refuse(Rule::Claim, world.in_flight.iter().any(under_way));
    if let Action::Activate { release, generation: asked, .. } = action {
        refuse(Rule::Claim, (*release, *asked) != (wanted, generation) || seen.ledger.generation > *asked);
    }

    if let Action::Migrate { release, .. } = action {
        let trace = |host: &&str| {
            let report = world.report(&instance(host));
            let is_trace = |entry: &LedgerEntry| entry.event != LedgerEvent::Staged;
            report.is_some_and(|report| report.ledger.history.iter().any(is_trace))
        };
        let former = rollout.migrated_before.values().next();
        let is_forgotten = |former: &FormerMigration| {
            world.report(&former.on).is_some_and(|report| report.ledger.history.is_empty())
        };
        let is_other = |begun: &InFlight| begun.action.verb() == Verb::Migrate && begun.action != *action;
        refuse(Rule::Migration, goes_back || *release != NEW || !rollout.migrations.is_empty());
        refuse(Rule::Migration, *release == NEW && HOSTS.iter().any(trace));
        refuse(Rule::Migration, former.is_some_and(|former| former.is_done || is_forgotten(former)));
        refuse(Rule::Migration, world.in_flight.iter().any(is_other));
    }

    if let Action::Share { canaries, share: Some(share), .. } = action {
        let is_open = !plan.waves[0].steps.is_empty() && !rollout.waves_proven.contains_key(&0);
        let due = [5, 50, 0][rollout.canaries.get(&0).map_or(0, |canary| canary.passed)];
        let is_canary = canaries.iter().all(|host| host.as_str() == "a") && !rollout.is_turning_back();
        // One that was left out may go on with the canary's part until it is gone.
        let is_proven = rollout.goes_back(&instance("a")) || linked("a") == Some(NEW);
        refuse(Rule::Share, !is_open || !is_canary || share.get() > due || !is_proven);
    }
    if let Action::Prune { keep, .. } = action {
        let ledger = &seen.ledger;
        let needed = [ledger.active, ledger.last_good, Some(NEW), plan.baseline.get(one).copied().flatten()];
        refuse(Rule::Retention, needed.into_iter().flatten().any(|release| !keep.contains(&release)));
    }
    if let Action::Activate { release, .. } = action {
        let is_bad = world.releases[release].bad.is_some();
        refuse(Rule::Retention, is_bad && !goes_back || !seen.staged.contains(release));
    }

    let nothing_yet =
        rollout.touched.is_empty() && rollout.drained_at.is_empty() && rollout.migrations.is_empty();
    let is_red = !matches!(world.gates[0].light, Light::Green { .. });
    refuse(Rule::Gates, is_red && nothing_yet && !goes_back && (disturbs || verb == Verb::Migrate));

    if disturbs && !goes_back {
        let own = HOSTS.iter().position(|host| *host == one.host.as_str()).unwrap();
        let is_behind = |host: &&str| !rollout.goes_back(&instance(host)) && linked(host) != Some(NEW);
        for (index, host) in HOSTS.iter().enumerate().take(own) {
            refuse(Rule::Order, !rollout.waves_proven.contains_key(&index) || is_behind(host));
        }
        let standby = &world.environment.standby;
        let in_plan = |host: &&&str| plan.baseline.contains_key(&instance(host));
        let others = HOSTS.iter().filter(|host| !standby.contains(&host.parse().unwrap())).filter(in_plan);
        refuse(Rule::Fallback, standby.contains(&one.host) && others.into_iter().any(is_behind));
        let waits = own == 1 && !plan.waves[1].after.is_zero();
        refuse(
            Rule::Fallback,
            waits && rollout.waves_proven.get(&0).is_none_or(|at_last| *at_last > at(-120)),
        );
    }

    if verb == Verb::Admit {
        refuse(Rule::Proof, seen.linked != Some(wanted) || seen.ledger.guard.is_some());
        refuse(Rule::Proof, rollout.touched.contains(one) && seen.ledger.generation < generation);
    }

    if disturbs {
        match world.traffic(one) {
            Traffic::Unknown { .. } => refuse(Rule::Capacity, true),
            Traffic::Known { admitted, up, sessions } => {
                refuse(Rule::Capacity, switches && admitted);
                let drained_at = rollout.drained_at.get(one);
                let is_time_up =
                    drained_at.is_some_and(|at| *at + world.environment.timeouts.drain <= world.now);
                refuse(Rule::Capacity, switches && sessions > 0 && !is_time_up);
                let BalancerReport::Servers(servers) = &world.traffic[0] else { return broken };
                let serves = |host: &&&str| {
                    let other = instance(host);
                    let seen = &servers[&other.host];
                    other != *one
                        && (seen.admission, seen.health) == (Admission::Ready, ServerHealth::Up)
                        && !rollout.drained_at.contains_key(&other)
                        && world.report(&other).is_some_and(|report| report.ledger.guard.is_none())
                };
                refuse(Rule::Capacity, admitted && up && HOSTS.iter().filter(serves).count() < 2);
            }
            Traffic::None => {}
        }
    }
    broken
}

#[test]
fn each_rule_refuses_what_it_should_and_nothing_else_is_refused() {
    let mut chance = Chance(7);
    let mut refusals: BTreeMap<Rule, u32> = BTreeMap::new();
    let mut permitted = 0;
    for number in 0..WORLDS {
        let (world, action) = (chance.world(), chance.action());
        let broken = broken(&world, &action);
        match permit(&world, &action) {
            Ok(()) => {
                assert!(broken.is_empty(), "{number}: {action:?} breaks {broken:?}: {world:#?}");
                permitted += 1;
            }
            Err(Violation { rule, sentence }) => {
                assert!(
                    broken.contains(&rule),
                    "{number}: {action:?}: {rule}: {sentence}, and not {broken:?}"
                );
                *refusals.entry(rule).or_default() += 1;
                reads_well(&sentence);
            }
        }
    }
    for rule in Rule::ALL {
        let times = refusals.get(&rule).copied().unwrap_or(0);
        assert!(times >= TIMES_MIN, "{rule} has refused {times} times: {refusals:?}");
    }
    assert!(permitted >= TIMES_MIN, "{permitted} were permitted");
}

/// An operator is told who or what it is about, in one sentence without what only a programmer reads.
fn reads_well(sentence: &str) {
    let subjects = ["a/web", "b/web", "c/web", "web", "gate tests", "v1", "v2", "v3", "generation"];
    assert!(subjects.iter().any(|subject| sentence.contains(subject)), "{sentence}");
    let is_plain = !["Some(", "None", "Instance", "{", "\"", "  "].iter().any(|code| sentence.contains(code));
    assert!(is_plain && !sentence.ends_with('.') && sentence.len() > 20, "{sentence}");
}
