//! The e-process against values that were computed apart from it: the formulas of its header, written down once more in Python with 50
//! decimal digits (`decimal`), straight from q(ψ), over three strata of some 5,000 requests with a tenth of them the canary's.

use greenlight_verdict::process::{Process, STAKE_INTERVAL_MS, Stratum};
use proptest::prelude::*;

const STRATA: [Stratum; 3] = [
    Stratum { share: 500.0 / 5000.0, canary_bad: 9, stable_bad: 41 },
    Stratum { share: 480.0 / 5010.0, canary_bad: 12, stable_bad: 40 },
    Stratum { share: 510.0 / 4990.0, canary_bad: 11, stable_bad: 38 },
];

/// One stratum a minute.
fn after(mut process: Process, strata: &[Stratum], burst: f64) -> Process {
    for (minute, stratum) in (0u64..).zip(strata) {
        let start_ms = minute * STAKE_INTERVAL_MS;
        process.observe(start_ms, start_ms + STAKE_INTERVAL_MS, &[*stratum], burst);
    }
    process
}

fn close(found: f64, expected: f64) -> bool {
    (found - expected).abs() < 1e-9
}

#[test]
fn the_evidence_is_as_computed_apart() {
    let plain = |tolerate, limit, burst| after(Process::new(tolerate, limit, 0.0, 0), &STRATA, burst);
    for (what, found, expected) in [
        ("worse than 1", plain(1.0, 1.5, 1.0).ln_worse(), 7.082_238_374_907_905),
        ("worse than 1.2", plain(1.2, 1.5, 1.0).ln_worse(), 4.127_662_056_731_05),
        ("worse than 1, tempered by 2.5", plain(1.0, 1.5, 2.5).ln_worse(), 2.474_916_570_646_371),
        ("better than 1.5", plain(1.0, 1.5, 1.0).ln_better(), -4.670_298_341_949_471),
        ("better than 3", plain(1.0, 3.0, 1.0).ln_better(), -1.515_125_701_908_644),
    ] {
        assert!(close(found, expected), "{what}: {found}, expected {expected}");
    }
}

#[test]
fn a_stake_kept_for_later_is_as_computed_apart() {
    // Half at the beginning, a sixth at the second and third minute, a sixth not staked yet.
    let process = after(Process::new(1.0, 1.5, 0.5, 4 * STAKE_INTERVAL_MS), &STRATA, 1.0);
    assert!(close(process.ln_worse(), 6.503_964_372_096_407), "{}", process.ln_worse());
    let nothing = Process::new(1.0, 1.5, 0.5, 4 * STAKE_INTERVAL_MS);
    assert!(close(nothing.ln_worse(), 0.0), "the whole stake is 1");
}

#[test]
fn a_late_fault_is_found_sooner_with_a_stake_kept_for_it() {
    let healthy = Stratum { share: 0.1, canary_bad: 5, stable_bad: 45 };
    let broken = Stratum { canary_bad: 15, ..healthy };
    let minutes_until = |late_stake: f64| {
        let mut strata = vec![healthy; 40];
        (1..=20).find(|_| {
            strata.push(broken);
            let process = Process::new(1.0, 1.5, late_stake, 60 * STAKE_INTERVAL_MS);
            after(process, &strata, 1.0).ln_worse() >= 100f64.ln()
        })
    };
    let (with, without) = (minutes_until(0.5), minutes_until(0.0));
    assert!(with.is_some_and(|with| without.is_none_or(|without| with < without)), "{with:?} {without:?}");
}

#[test]
fn the_onset_is_where_the_evidence_turned() {
    let healthy = Stratum { share: 0.1, canary_bad: 5, stable_bad: 45 };
    let mut strata = vec![healthy; 12];
    strata.extend([Stratum { canary_bad: 20, ..healthy }; 4]);
    let process = after(Process::new(1.0, 1.5, 0.5, 3_600_000), &strata, 1.0);
    assert_eq!(process.onset_ms(), Some(12 * STAKE_INTERVAL_MS));
    let at_once = after(Process::new(1.0, 1.5, 0.5, 3_600_000), &strata[12..], 1.0);
    assert_eq!(at_once.onset_ms(), Some(0));
}

#[test]
fn the_confidence_sequence_is_where_the_evidence_crosses() {
    // Each bound is a ratio at which a process of its own, tested at that ratio, has just the evidence that is needed.
    let strata = vec![Stratum { share: 0.1, canary_bad: 20, stable_bad: 60 }; 6];
    let (at_least, at_most) = after(Process::new(1.0, 1.5, 0.0, 0), &strata, 1.0).bounds(0.01);
    let (at_least, at_most) = (at_least.unwrap(), at_most.unwrap());
    assert!(at_least < 3.0 && at_most > 3.0, "the ratio counted is 3: {at_least}..{at_most}");
    let needed = 100f64.ln();
    // Alternatives of a process at a ratio between two lattice points are not quite those of its neighbours.
    let slack = 0.5;
    let worse = after(Process::new(at_least, at_least * 1.5, 0.0, 0), &strata, 1.0).ln_worse();
    let better = after(Process::new(1.0, at_most, 0.0, 0), &strata, 1.0).ln_better();
    assert!((worse - needed).abs() < slack, "{worse} at {at_least}");
    assert!((better - needed).abs() < slack, "{better} at {at_most}");
    assert_eq!(Process::new(1.0, 1.5, 0.0, 0).bounds(0.01), (None, None), "nothing seen, nothing sure");
}

#[test]
fn the_requests_foretold_are_the_requests_that_it_takes() {
    let fresh = || Process::new(1.0, 1.5, 0.0, 0);
    // 1 % of 10,000 requests a minute, a tenth of them the canary's: the mean course, without chance.
    let minute = |bad| Stratum { share: 0.1, canary_bad: bad, stable_bad: 90 };
    let count = |bad, is_over: fn(&Process) -> bool| {
        let mut process = fresh();
        (1u64..1000).find(|number| {
            process.observe(number * 60_000, (number + 1) * 60_000, &[minute(bad)], 1.0);
            is_over(&process)
        })
    };
    let passes = count(10, |process| process.ln_better() >= 20f64.ln()).unwrap();
    let foretold = fresh().requests_to_pass(0.01, 0.1, 1.0, 20f64.ln()).unwrap();
    assert_eq!((foretold / 1000.0).ceil() as u64, passes, "{foretold}");
    let aborts = count(20, |process| process.ln_worse() >= 100f64.ln()).unwrap();
    let foretold = fresh().requests_to_abort(0.01, 2.0, 0.1, 1.0, 100f64.ln()).unwrap();
    assert_eq!((foretold / 1000.0).ceil() as u64, aborts, "{foretold}");
    assert_eq!(fresh().requests_to_pass(0.0, 0.1, 1.0, 20f64.ln()), None, "nothing bad says nothing");
    assert_eq!(
        fresh().requests_to_abort(0.01, 1.0, 0.1, 1.0, 100f64.ln()),
        None,
        "a healthy one is never found"
    );
}

#[test]
fn the_state_does_not_grow() {
    let size = |minutes: usize| {
        let strata = vec![Stratum { share: 0.1, canary_bad: 5, stable_bad: 45 }; minutes];
        serde_json::to_value(after(Process::new(1.0, 1.5, 0.5, 3_600_000), &strata, 1.0)).map(|state| {
            let lengths: Vec<usize> = state
                .as_object()
                .unwrap()
                .values()
                .map(|field| field.as_array().map_or(1, Vec::len))
                .collect();
            lengths
        })
    };
    assert_eq!(size(2).unwrap(), size(2000).unwrap());
}

fn strata() -> impl Strategy<Value = Vec<Stratum>> {
    let stratum = (0.01..0.99, 0u64..40, 0u64..200).prop_map(|(share, canary_bad, stable_bad)| Stratum {
        share,
        canary_bad,
        stable_bad,
    });
    prop::collection::vec(stratum, 1..30)
}

proptest! {
    /// The exact martingale property: the mean of E over all ways to assign the next bad request, weighed by their probability
    /// under the null hypothesis, is E itself. It holds before any look, so looks cost nothing.
    #[test]
    fn one_more_bad_request_changes_the_evidence_by_nothing_on_the_average(
        past in strata(), share in 0.01f64..0.99, late in prop::sample::select(vec![0.0, 0.5])
    ) {
        let process = after(Process::new(1.0, 1.5, late, 3_600_000), &past, 1.0);
        let at = past.len() as u64 * STAKE_INTERVAL_MS - 1;
        let with = |canary_bad, stable_bad| {
            let mut process = process.clone();
            process.observe(at, at + 1, &[Stratum { share, canary_bad, stable_bad }], 1.0);
            process
        };
        let before = process.ln_worse();
        let mean = share * (with(1, 0).ln_worse() - before).exp() + (1.0 - share) * (with(0, 1).ln_worse() - before).exp();
        prop_assert!((mean - 1.0).abs() < 1e-9, "{mean}");
        let q = 1.5 * share / (1.5 * share + 1.0 - share);
        let before = process.ln_better();
        let mean = q * (with(1, 0).ln_better() - before).exp() + (1.0 - q) * (with(0, 1).ln_better() - before).exp();
        prop_assert!((mean - 1.0).abs() < 1e-9, "{mean}");
    }

    /// Below the tolerated ratio the evidence can only shrink on the average.
    #[test]
    fn a_better_canary_never_gathers_evidence_on_the_average(
        past in strata(), share in 0.01f64..0.99, ratio in 0.05f64..1.2
    ) {
        let process = after(Process::new(1.2, 1.5, 0.5, 3_600_000), &past, 1.0);
        let at = past.len() as u64 * STAKE_INTERVAL_MS - 1;
        let with = |canary_bad, stable_bad| {
            let mut process = process.clone();
            process.observe(at, at + 1, &[Stratum { share, canary_bad, stable_bad }], 1.0);
            (process.ln_worse() - self::after(Process::new(1.2, 1.5, 0.5, 3_600_000), &past, 1.0).ln_worse()).exp()
        };
        let q = ratio * share / (ratio * share + 1.0 - share);
        prop_assert!(q * with(1, 0) + (1.0 - q) * with(0, 1) <= 1.0 + 1e-9);
    }

    /// A minute looked at in pieces says what it says looked at once.
    #[test]
    fn looking_more_often_changes_nothing(strata in strata()) {
        let mut once = Process::new(1.0, 1.5, 0.5, 3_600_000);
        once.observe(0, 59_000, &strata, 1.0);
        let mut often = Process::new(1.0, 1.5, 0.5, 3_600_000);
        for (index, stratum) in (0u64..).zip(&strata) {
            often.observe(index * 1000, (index + 1) * 1000, &[*stratum], 1.0);
        }
        prop_assert!((once.ln_worse() - often.ln_worse()).abs() < 1e-6);
        prop_assert!((once.ln_better() - often.ln_better()).abs() < 1e-6);
    }
}
