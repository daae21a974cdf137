//! Fleets with a canary: how it is led on, how much a verdict takes, and what goes wrong about it.

use std::time::Duration;

use greenlight_model::action::Verb;
use greenlight_model::canary::{Canary, CanaryStep, Judging, OnInconclusive, Until};
use greenlight_model::fleet::{BatchSize, Floor, Strategy};
use greenlight_model::quantity::Percent;
use greenlight_model::rollout::{Direction, OperatorRequest};

use super::numbers::Numbers;
use super::scenario::{Badness, Fault, FaultKind, Ms, Scenario};

/// Scenarios that get a canary.
const CANARIES_PERCENT: u64 = 15;

/// Makes some scenarios one with a canary, which is changed to have what a canary needs.
pub(super) fn add(numbers: &mut Numbers, scenario: &mut Scenario) {
    if !numbers.chance(CANARIES_PERCENT) {
        return;
    }
    let hosts = scenario.hosts;
    scenario.strategy = Strategy::Canary(canary(numbers));
    scenario.lends = numbers.chance(60);
    scenario.requests_needed = numbers.pick(&[2, 4, 8]);
    let web = &mut scenario.services[0];
    web.hosts = (0..hosts).collect();
    if web.balancers == 0 {
        web.balancers = 1;
        // Balancers are counted over all services: what is about one is about this one then, or about nothing.
        let (services, balancers) = (scenario.services.len(), scenario.balancers());
        scenario.faults.retain(|fault| fault.kind.fits(hosts, services, balancers));
    }
    if numbers.chance(90) {
        scenario.direction = Direction::Forward;
    }
    if numbers.chance(60) {
        // With more to keep a canary often never begins.
        scenario.floor = Floor::Count(u32::try_from(numbers.below(2)).unwrap_or(0));
        scenario.standby.clear();
    }
    let mut fault = |at: Ms, lasts: Ms, kind: FaultKind| scenario.faults.push(Fault { at, lasts, kind });
    if numbers.chance(45) {
        let how = Badness::AnswersWrongly(numbers.pick(&[30, 60, 100]));
        let on = numbers.chance(20).then_some(0);
        fault(0, 0, FaultKind::BadRelease { service: 0, release: 2, how, on });
    }
    if numbers.chance(40) {
        let amid = Some(numbers.pick(&[Verb::Share, Verb::Share, Verb::Admit, Verb::Activate]));
        let then = numbers.pick(&[OperatorRequest::Resume, OperatorRequest::Resume, OperatorRequest::Abort]);
        let kill = FaultKind::KillController { amid, boundaries: numbers.boundaries(25), then };
        fault(numbers.below(12_000), numbers.between(1_000, 12_000), kill);
    }
    let balancer = 0;
    if numbers.chance(25) {
        let has_state = numbers.chance(50);
        fault(numbers.between(3_000, 30_000), 1_000, FaultKind::RestartBalancer { balancer, has_state });
    }
    if numbers.chance(15) {
        let lasts = numbers.between(1_000, 12_000);
        fault(numbers.between(3_000, 30_000), lasts, FaultKind::CutBalancer { balancer });
    }
}

fn canary(numbers: &mut Numbers) -> Canary {
    let shares: &[u8] = numbers.pick(&[&[50], &[20], &[20, 50], &[10, 30, 60]]);
    let step = |share: &u8, numbers: &mut Numbers| CanaryStep {
        #[expect(clippy::expect_used, reason = "only constants under 100 are given")]
        share: Percent::try_from(*share).expect("a share"),
        until: match numbers.chance(75) {
            true => Until::Pass,
            false => Until::Elapsed(Duration::from_millis(numbers.pick(&[1_500, 4_000]))),
        },
    };
    #[expect(clippy::expect_used, reason = "it is a constant under 100")]
    let third = Percent::try_from(34).expect("a share");
    Canary {
        hosts: numbers.pick(&[BatchSize::Count(1), BatchSize::Count(1), BatchSize::Share(third)]),
        batch: vec![numbers.pick(&[BatchSize::Count(1), BatchSize::Share(third)])],
        steps: shares.iter().map(|share| step(share, numbers)).collect(),
        judging: Judging {
            warmup: Duration::ZERO,
            max_time: Duration::from_millis(numbers.pick(&[4_000, 12_000, 30_000])),
            on_inconclusive: numbers.pick(&[
                OnInconclusive::Hold,
                OnInconclusive::TurnBack,
                OnInconclusive::Ask,
            ]),
            false_aborts_per_mille: 10,
            compare: Vec::new(),
            guards: Vec::new(),
        },
    }
}
