//! The checkers of canaries are shown what they are there to see.

use std::collections::BTreeSet;
use std::time::Duration;

use greenlight_model::canary::{Answer, Canary, CanaryStep, Judgement, Judging, OnInconclusive, Until};
use greenlight_model::decision::{Decision, Outcome};
use greenlight_model::fleet::{BatchSize, Strategy};
use greenlight_model::quantity::Percent;
use greenlight_model::rollout::Note;

use super::super::super::scenario::Scenario;
use super::super::super::site::release;
use super::super::super::traffic::Lent;
use super::super::super::trial::Trial;
use super::{bring, end, note, scenario, sees_in};

fn percent(value: u8) -> Percent {
    Percent::try_from(value).unwrap()
}

/// The first of four hosts is the canary, of two steps: a verdict at a fifth, and three seconds at a half.
fn canary() -> Scenario {
    let steps = vec![
        CanaryStep { share: percent(20), until: Until::Pass },
        CanaryStep { share: percent(50), until: Until::Elapsed(Duration::from_secs(3)) },
    ];
    let judging = Judging {
        warmup: Duration::ZERO,
        max_time: Duration::from_secs(30),
        on_inconclusive: OnInconclusive::Ask,
        false_aborts_per_mille: 10,
        compare: Vec::new(),
        guards: Vec::new(),
    };
    let (hosts, batch) = (BatchSize::Count(1), vec![BatchSize::Count(1)]);
    Scenario { strategy: Strategy::Canary(Canary { hosts, batch, steps, judging }), ..scenario() }
}

fn sees(checker: &str, says: &str, happens: impl FnOnce(&mut Trial<'_>)) {
    sees_in(&canary(), checker, says, |trial| {
        bring(trial, 0);
        happens(trial);
    });
}

fn lend(trial: &mut Trial<'_>, hosts: &[usize], share: u8) {
    let hosts = hosts.iter().copied().collect();
    trial.balancers[0].lent = Some(Lent { hosts, share: percent(share), until: None });
}

fn answer(trial: &mut Trial<'_>) {
    trial.check_share(0, 0, release(0, 2));
}

fn pass(trial: &mut Trial<'_>, step: usize) {
    note(trial, Note::StepPassed { wave: 0, step, why: String::new() });
}

fn turn_back(trial: &mut Trial<'_>) {
    note(trial, Note::TurnBack { why: String::new(), bad: BTreeSet::new() });
}

#[test]
fn what_a_canary_gets() {
    sees("share", "it is on trial and gets its usual part of the traffic", answer);
    sees("share", "gets a part of the traffic that is not the canary's", |trial| {
        lend(trial, &[1], 20);
        answer(trial);
    });
    sees("share", "h000/web: it gets 50%, and 20% is due", |trial| {
        lend(trial, &[0], 50);
        answer(trial);
    });
    let set = |trial: &mut Trial<'_>, host: usize, share: u8| {
        let began = trial.now;
        trial.check_lent(0, &BTreeSet::from([host]), percent(share), began);
    };
    sees("share", "50% is given to a canary, and 20% is due", |trial| set(trial, 0, 50));
    sees("share", "20% is given to h001/web, which is not the canary's", |trial| set(trial, 1, 20));
    sees_in(&canary(), "share", "given to h000/web, which does not prove its release", |trial| {
        set(trial, 0, 20);
    });
    sees("share", "20% is given to a canary that is over", |trial| {
        note(trial, Note::WaveProven { wave: 0 });
        trial.report.violation = None;
        set(trial, 0, 20);
    });
    sees("share", "20% is given to a canary after the rollout turned back", |trial| {
        turn_back(trial);
        trial.now += 1;
        set(trial, 0, 20);
    });
    sees("share", "balancer 0: a share is renewed after the rollout turned back", |trial| {
        turn_back(trial);
        trial.now += 1;
        trial.check_renewed(0, trial.now);
    });
}

#[test]
fn what_a_verdict_is_for() {
    sees("verdict", "step 1 passes, and web was not judged", |trial| {
        lend(trial, &[0], 20);
        // One answer less than a verdict takes.
        (1..trial.scenario.requests_needed).for_each(|_| answer(trial));
        pass(trial, 0);
    });
    let judged = |trial: &mut Trial<'_>| {
        lend(trial, &[0], 20);
        (0..trial.scenario.requests_needed).for_each(|_| answer(trial));
        pass(trial, 0);
        assert_eq!(trial.report.violation, None);
    };
    sees("verdict", "step 2 passes before its time is up", |trial| {
        judged(trial);
        trial.now += 2_999;
        pass(trial, 1);
    });
    sees("verdict", "step 1 passes out of turn", |trial| {
        judged(trial);
        pass(trial, 0);
    });
    sees("verdict", "step 1 passes, and nobody has answered", |trial| {
        note(trial, Note::Ask { wave: 0, step: 0, why: String::new() });
        pass(trial, 0);
    });
    sees("verdict", "wave 1 is called proven, and 1 of 2 steps of its canary passed", |trial| {
        judged(trial);
        note(trial, Note::WaveProven { wave: 0 });
    });
    sees("verdict", "the canary is worse, and the rollout goes on", |trial| {
        let (services, why) = (BTreeSet::new(), String::new());
        let judgement = Judgement { wave: 0, step: 0, services, answer: Answer::Abort, why };
        let controller = &mut trial.controllers[0];
        controller.world.judgement = Some(judgement);
        controller.history = trial.history.clone();
        trial.check_heeded(0, &Decision::Proceed { steps: Vec::new(), waits: Vec::new() });
    });
}

#[test]
fn what_a_rollout_leaves_behind() {
    sees("outcome", "it has ended, and balancer 0 still gives a canary its share", |trial| {
        lend(trial, &[0], 20);
        end(trial, Outcome::TurnedBack { why: String::new() });
    });
}
