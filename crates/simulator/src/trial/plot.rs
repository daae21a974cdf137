//! Plots: several faults that belong together, because each alone is harmless and chance seldom brings all of them.
//!
//! A plot leads to where one rule is all that stands between a rollout and harm. It promises nothing: the scenario's other
//! faults may come before it.

use greenlight_model::action::{Blame, Verb};
use greenlight_model::fleet::{OnFailure, Strategy};
use greenlight_model::rollout::OperatorRequest;

use super::numbers::Numbers;
use super::scenario::{Fault, FaultKind, Ms, Part, Scenario, ServiceShape, Strike};

/// Adds a plot to a scenario, which is changed to have what the plot needs.
pub(super) fn add(numbers: &mut Numbers, scenario: &mut Scenario) {
    // What else happens must leave the plot a chance.
    scenario.faults.truncate(numbers.place(3));
    match numbers.below(6) {
        0 => lost_migration(numbers, scenario),
        1 => migrated_before(numbers, scenario),
        2 => cut_before_admission(numbers, scenario),
        3 => goes_back_by_itself(numbers, scenario),
        4 => lost_disk(numbers, scenario),
        _ => failed_migration(numbers, scenario),
    }
}

fn push(scenario: &mut Scenario, at: Ms, lasts: Ms, kind: FaultKind) {
    scenario.faults.push(Fault { at, lasts, kind });
}

/// The first service on every host, of which there are at least so many.
fn everywhere(scenario: &mut Scenario, hosts: usize) -> &mut ServiceShape {
    scenario.hosts = scenario.hosts.max(hosts);
    scenario.services[0].hosts = (0..scenario.hosts).collect();
    &mut scenario.services[0]
}

fn forward(scenario: &mut Scenario) {
    scenario.direction = greenlight_model::rollout::Direction::Forward;
}

/// A host is lost while it migrates, and the controller with it: whoever goes on does not know how the migration ended,
/// and other hosts could run it.
fn lost_migration(numbers: &mut Numbers, scenario: &mut Scenario) {
    forward(scenario);
    everywhere(scenario, 2).migrates = true;
    let strike =
        numbers.pick(&[Strike::Cut, Strike::Crash { keeps_disk: true }, Strike::Crash { keeps_disk: false }]);
    let after = numbers.between(10, 600);
    push(scenario, 0, numbers.between(8_000, 30_000), FaultKind::Amid { verb: Verb::Migrate, after, strike });
    let kill = FaultKind::KillController {
        amid: Some(Verb::Migrate),
        boundaries: numbers.boundaries(3),
        then: OperatorRequest::Resume,
    };
    push(scenario, 0, numbers.between(1_000, 3_000), kill);
}

/// Some hosts have the release, and so its migration ran; then the others are to have it.
fn migrated_before(numbers: &mut Numbers, scenario: &mut Scenario) {
    forward(scenario);
    let hosts = 2 + numbers.place(3);
    everywhere(scenario, hosts).migrates = true;
    let (first, second) = numbers.pick(&[
        (Part::Odd, Part::All),
        (Part::Odd, Part::Even),
        (Part::Even, Part::All),
        (Part::Even, Part::Odd),
        (Part::All, Part::All),
    ]);
    if first != Part::All {
        scenario.only = (0..scenario.hosts).filter(|host| first.contains(*host)).collect();
    } else if numbers.chance(70) {
        push(scenario, numbers.between(4_000, 12_000), 1_000, FaultKind::Asks(OperatorRequest::Abort));
    }
    push(scenario, numbers.between(20_000, 45_000), 1_000, FaultKind::Deploys { release: 2, part: second });
}

/// Hosts of a wave that goes together are ready at different times, and one that is ready is out of reach when the last is.
fn cut_before_admission(numbers: &mut Numbers, scenario: &mut Scenario) {
    forward(scenario);
    scenario.strategy = Strategy::BlueGreen;
    scenario.standby.clear();
    scenario.only.clear();
    scenario.retries += 1;
    scenario.on_failure = OnFailure::TurnBack;
    let hosts = 4 + numbers.place(2);
    let shape = everywhere(scenario, hosts);
    shape.balancers = shape.balancers.max(1);
    scenario.floor = greenlight_model::fleet::Floor::Count(1);
    let late = numbers.place(2);
    let hangs = FaultKind::CommandHangs { host: late, verb: numbers.pick(&[Verb::Activate, Verb::Confirm]) };
    push(scenario, 0, numbers.between(6_000, 16_000), hangs);
    if numbers.chance(70) {
        let after = numbers.between(100, 2_500);
        let strike = numbers.pick(&[Strike::Cut, Strike::Crash { keeps_disk: true }]);
        push(
            scenario,
            0,
            numbers.between(5_000, 20_000),
            FaultKind::Amid { verb: Verb::Confirm, after, strike },
        );
    }
}

/// Nobody confirms what was switched, again and again, so that its host goes back by itself.
fn goes_back_by_itself(numbers: &mut Numbers, scenario: &mut Scenario) {
    forward(scenario);
    scenario.has_guard = true;
    scenario.retries = u32::try_from(numbers.below(2)).unwrap_or(0);
    let mut at = 0;
    for _ in 0..=scenario.retries {
        let kill = FaultKind::KillController {
            amid: Some(Verb::Activate),
            boundaries: numbers.boundaries(8),
            then: OperatorRequest::Resume,
        };
        let lasts = numbers.between(10_000, 15_000);
        push(scenario, at, lasts, kill);
        at += 12_000 + lasts;
    }
}

/// A host returns without its disk when the rollout turns back, and has nothing any more of what it goes back to.
fn lost_disk(numbers: &mut Numbers, scenario: &mut Scenario) {
    scenario.on_failure = OnFailure::TurnBack;
    let hosts = 3 + numbers.place(4);
    everywhere(scenario, hosts);
    let strike = Strike::Crash { keeps_disk: false };
    let verb = numbers.pick(&[Verb::Activate, Verb::Confirm]);
    let at = numbers.below(12_000);
    let after = numbers.between(100, 2_500);
    push(scenario, at, numbers.between(1_000, 9_000), FaultKind::Amid { verb, after, strike });
    if numbers.chance(60) {
        push(scenario, at + numbers.between(1_000, 8_000), 1_000, FaultKind::Asks(OperatorRequest::Abort));
    }
}

/// A migration fails, in passing or for good, on whichever host it runs.
fn failed_migration(numbers: &mut Numbers, scenario: &mut Scenario) {
    forward(scenario);
    everywhere(scenario, 2).migrates = true;
    let blame = numbers.pick(&[Blame::Release, Blame::Host, Blame::Passing]);
    for host in 0..scenario.hosts.min(4) {
        push(scenario, 0, 20_000, FaultKind::CommandFails { host, verb: Verb::Migrate, blame });
    }
    if numbers.chance(50) {
        let part = numbers.pick(&[Part::All, Part::Even, Part::Odd]);
        push(scenario, numbers.between(21_000, 40_000), 1_000, FaultKind::Deploys { release: 2, part });
    }
}
