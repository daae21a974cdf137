//! Judging a canary: counts of the balancers in, what the planner is told out, and the evidence kept in a file.
//!
//! Each service with a balancer has a judge of its own; the false-abort budget is shared among them. Before the canary's
//! first request the judges learn what is usual. A controller that takes over reads the evidence files, so that it judges
//! on where the last one stopped.
//!
//! Guarantees: an interval in which something was not counted (a balancer that did not answer, or began anew, or shared
//! the traffic out anew meanwhile) is left out, never guessed. Where guards are stated, nothing passes while one of them does
//! not see a host of the canary. Not in here: the statistics (`verdict`), what follows from
//! the answer (`planner`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use greenlight_drivers::canary::Counts;
use greenlight_model::Timestamp;
use greenlight_model::canary::{Answer, CanaryStep, GuardMetric, Judgement, Judging as Wanted, Metric};
use greenlight_model::fleet::{Environment, Strategy};
use greenlight_model::id::{HostName, RolloutId, ServiceName};
use greenlight_model::rollout::{Plan, Rollout};
use greenlight_model::sample::HostSample;
use greenlight_verdict::evidence::Replay;
use greenlight_verdict::{Comparison, Guard, Settings, Tally, Verdict};

use court::Court;

mod counts;
mod court;
#[cfg(test)]
pub(crate) mod tests;
mod watched;

/// A canary of which surely less than so many of its requests fail passes, however good the others are: without it, one
/// in front of which nothing ever fails could not pass.
const NEGLIGIBLE_ERRORS: f64 = 0.002;

/// Judges the canaries of one rollout.
pub(crate) struct Judging {
    rollout: RolloutId,
    wanted: Wanted,
    steps: usize,
    /// The hosts of every canary wave: none of them is compared with itself.
    canaries: BTreeSet<HostName>,
    courts: BTreeMap<ServiceName, Court>,
}

/// A reading of one balancer's counts.
pub(crate) struct Counted {
    /// Which balancer, by its place in the environment.
    pub(crate) index: usize,
    /// When it was read.
    pub(crate) at: Timestamp,
    /// What it said, or why it did not.
    pub(crate) counts: Result<Counts, String>,
}

/// What the canary is doing while counts are read.
pub(crate) enum Phase {
    /// It has not been admitted yet: what is counted is what is usual.
    Before,
    /// Its hosts get this share.
    Judged {
        /// The wave's index.
        wave: usize,
        /// The step's index.
        step: usize,
        /// The step.
        what: CanaryStep,
    },
    /// It is being changed, or over: nothing counts.
    Between,
}

/// Why evidence could not be kept or read.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct EvidenceFileError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    pub problem: String,
}

impl Judging {
    /// The judges of a rollout, where its plan has a canary and its environment says how to judge it. `directory` is where
    /// evidence is kept.
    pub(crate) fn new(plan: &Plan, environment: &Environment, directory: &Path) -> Option<Self> {
        let Strategy::Canary(canary) = &environment.strategy else { return None };
        let steps = plan.waves.iter().map(|wave| wave.steps.len()).max().filter(|steps| *steps > 0)?;
        let services: BTreeSet<&ServiceName> =
            environment.balancers.iter().map(|balancer| &balancer.service).collect();
        // One that is on no host of the canary has nothing to be judged by.
        let canaries = || plan.waves.iter().filter(|wave| !wave.steps.is_empty());
        let mut hosts: BTreeMap<&ServiceName, BTreeSet<HostName>> = BTreeMap::new();
        for instance in canaries().flat_map(|wave| &wave.instances) {
            hosts.entry(&instance.service).or_default().insert(instance.host.clone());
        }
        let courts = services.into_iter().filter_map(|service| {
            let path = evidence_file(directory, &plan.id, service);
            Some((service.clone(), Court::new(service.clone(), hosts.get(service)?.clone(), path)))
        });
        Some(Self {
            rollout: plan.id.clone(),
            wanted: canary.judging.clone(),
            steps,
            canaries: canaries().flat_map(|wave| wave.instances.iter().map(|one| one.host.clone())).collect(),
            courts: courts.collect(),
        })
    }

    /// The services that are judged.
    pub(crate) fn services(&self) -> impl Iterator<Item = &ServiceName> {
        self.courts.keys()
    }

    /// The hosts whose samples are wanted: the canary's, where there are guards.
    pub(crate) fn guarded(&self) -> &BTreeSet<HostName> {
        const NONE: &BTreeSet<HostName> = &BTreeSet::new();
        if self.wanted.guards.is_empty() { NONE } else { &self.canaries }
    }

    /// What a rollout is doing, as far as judging goes. `is_sharing` is whether traffic is being shared out right now.
    pub(crate) fn phase(&self, rollout: &Rollout, is_sharing: bool) -> Phase {
        let Some(wave) = rollout.open_canary().filter(|_| !is_sharing) else { return Phase::Between };
        let is_let_in = rollout.is_let_in(wave, |service| self.courts.contains_key(service));
        let mut members = rollout.plan.waves[wave].instances.iter();
        let is_changed =
            members.any(|one| rollout.touched.contains(one) || rollout.drained_at.contains_key(one));
        match rollout.canary_step(wave) {
            Some((step, what)) if is_let_in => Phase::Judged { wave, step, what },
            _ if is_changed => Phase::Between,
            _ => Phase::Before,
        }
    }

    /// Takes a reading of one of a service's balancers in. `balancers` are the indices of all of its service.
    ///
    /// # Errors
    /// When the evidence cannot be kept: what is judged is to be shown afterwards.
    pub(crate) fn take(
        &mut self,
        service: &ServiceName,
        balancers: &[usize],
        counted: Counted,
        phase: &Phase,
    ) -> Result<(), EvidenceFileError> {
        let services = self.courts.len();
        let Some(court) = self.courts.get_mut(service) else { return Ok(()) };
        let Counted { index, at, counts } = counted;
        let Ok(counts) = counts else {
            court.forget();
            return Ok(());
        };
        if !court.has_begun() {
            let settings = settings(&self.wanted, self.steps, services, &counts.bounds_us);
            court.begin(format!("{} {service}", self.rollout), settings)?;
        }
        if matches!(phase, Phase::Between) {
            court.forget();
            return if court.step() == self.steps.checked_sub(1) { court.pass() } else { Ok(()) };
        }
        let at_ms = milliseconds(at);
        court.read(index, balancers, at_ms, counts);
        if court.is_read(balancers.len()) { court.count(at_ms, phase, &self.canaries) } else { Ok(()) }
    }

    /// Takes what a host of the canary uses in, or why it does not say.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub(crate) fn sampled(
        &mut self,
        host: &HostName,
        at: Timestamp,
        sample: &Result<HostSample, String>,
        phase: &Phase,
    ) -> Result<(), EvidenceFileError> {
        for court in self.courts.values_mut() {
            court.sampled(host, milliseconds(at), sample.clone(), phase)?;
        }
        Ok(())
    }

    /// What judging has come to, for the planner.
    pub(crate) fn judgement(&self, phase: &Phase) -> Option<Judgement> {
        let Phase::Judged { wave, step, .. } = *phase else { return None };
        let replays =
            self.courts.iter().filter_map(|(service, court)| Some((service, court, court.replay()?)));
        let judged: Vec<Judged<'_>> = replays
            .map(|(service, court, replay)| Judged {
                service,
                court,
                verdict: replay.conclusion().verdict,
                replay,
            })
            // An alert may come before anything was counted in the step.
            .filter(|one| one.court.step() == Some(step) || one.verdict == Verdict::Abort)
            .collect();
        if judged.is_empty() {
            return None;
        }
        let is_all_judged = judged.len() == self.courts.len();
        let unwatched: Vec<String> = judged.iter().flat_map(|one| one.court.unwatched()).collect();
        let unlearnt = || judged.iter().flat_map(|one| one.court.unlearnt());
        let of = |verdict: Verdict| judged.iter().filter(move |one| one.verdict == verdict);
        let (answer, shown) = if of(Verdict::Abort).next().is_some() {
            (Answer::Abort, Verdict::Abort)
        } else if is_all_judged && of(Verdict::Pass).count() == judged.len() {
            let is_watched = unwatched.is_empty();
            let answer =
                if is_watched { Answer::Pass } else { Answer::Inconclusive { requests_needed: None } };
            (answer, Verdict::Pass)
        } else {
            let needed: Option<Vec<u64>> =
                of(Verdict::Inconclusive).map(|one| one.replay.judgement().requests_needed).collect();
            let requests_needed = needed.and_then(|needed| needed.into_iter().max());
            (Answer::Inconclusive { requests_needed }, Verdict::Inconclusive)
        };
        let services = of(shown).map(|one| one.service.clone()).collect();
        let mut why: Vec<String> = of(shown).map(|one| in_words(one.replay)).collect();
        if answer == Answer::Abort {
            return Some(Judgement { wave, step, services, answer, why: why.join("\n") });
        }
        why.extend(unwatched.into_iter().chain(unlearnt()));
        Some(Judgement { wave, step, services, answer, why: why.join("; ") })
    }
}

/// One service that is judged, and what that has come to.
struct Judged<'a> {
    service: &'a ServiceName,
    court: &'a Court,
    replay: &'a Replay,
    verdict: Verdict,
}

fn milliseconds(at: Timestamp) -> u64 {
    u64::try_from(at.as_millisecond()).unwrap_or_default()
}

/// Where in `directory` the counts are kept by which the canary of a service was judged in a rollout.
#[must_use]
pub fn evidence_file(directory: &Path, rollout: &RolloutId, service: &ServiceName) -> PathBuf {
    directory.join(format!("{rollout}-{service}.jsonl"))
}

/// What judging the canary of a rollout has come to, by the evidence that its controller has kept in `directory` so far; none
/// where none is kept here, or it cannot be read.
#[must_use]
pub fn kept_judgement(rollout: &Rollout, environment: &Environment, directory: &Path) -> Option<Judgement> {
    let mut judging = Judging::new(&rollout.plan, environment, directory)?;
    for court in judging.courts.values_mut() {
        court.read_file()?;
    }
    judging.judgement(&judging.phase(rollout, false))
}

/// What a judgement rests on. The answer itself is said by whoever acts on it.
fn in_words(replay: &Replay) -> String {
    if !replay.alerts().is_empty() {
        let alerts: Vec<String> = replay.alerts().iter().map(ToString::to_string).collect();
        return format!("by a guard: {}", alerts.join("; "));
    }
    let judgement = replay.judgement();
    let text = judgement.to_string();
    match judgement.verdict {
        Verdict::Abort => match text.strip_prefix("abort: the canary is worse, ") {
            Some(rest) => rest.trim_end().to_owned(),
            None => text,
        },
        Verdict::Pass => text.lines().map(str::trim).collect::<Vec<_>>().join("; "),
        Verdict::Inconclusive => {
            let counted = judgement.findings.iter().map(|finding| {
                let Tally { canary, canary_bad, stable, stable_bad } = finding.counts;
                match finding.comparison.metric {
                    greenlight_verdict::Metric::Traffic => {
                        format!("requests: {canary} of {}", canary.saturating_add(stable))
                    }
                    _ => format!(
                        "{}: canary {canary_bad} of {canary}, the others {stable_bad} of {stable}",
                        finding.comparison.title()
                    ),
                }
            });
            counted.collect::<Vec<_>>().join("; ")
        }
    }
}

/// What the judge of one of so many services is told.
pub(crate) fn settings(wanted: &Wanted, steps: usize, services: usize, bounds_us: &[u64]) -> Settings {
    let comparisons = wanted
        .compare
        .iter()
        .map(|stated| {
            let metric = match stated.metric {
                Metric::Errors => greenlight_verdict::Metric::Errors,
                Metric::LatencyP50 => greenlight_verdict::Metric::LatencyP50,
                Metric::LatencyP90 => greenlight_verdict::Metric::LatencyP90,
                Metric::LatencyP99 => greenlight_verdict::Metric::LatencyP99,
                Metric::Missing => greenlight_verdict::Metric::Traffic,
            };
            Comparison {
                tolerate: f64::from(stated.tolerate_percent) / 100.0,
                pass_if_below: f64::from(stated.pass_if_below_percent) / 100.0,
                negligible: (stated.metric == Metric::Errors).then_some(NEGLIGIBLE_ERRORS),
                ..Comparison::new(metric)
            }
        })
        .collect();
    let guards = wanted.guards.iter().map(|stated| Guard {
        metric: match stated.metric {
            GuardMetric::HostCpu => greenlight_verdict::GuardMetric::Cpu,
            GuardMetric::Memory => greenlight_verdict::GuardMetric::Memory,
            GuardMetric::CpuPerRequest => greenlight_verdict::GuardMetric::CpuPerRequest,
            GuardMetric::Restarts => greenlight_verdict::GuardMetric::Restarts,
        },
        above: f64::from(stated.above_hundredths) / 100.0,
        hold_ms: u64::try_from(stated.hold.as_millis()).unwrap_or(u64::MAX),
    });
    let ms = |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    Settings {
        false_abort_budget: f64::from(wanted.false_aborts_per_mille) / 1000.0 / services.max(1) as f64,
        warmup_ms: ms(wanted.warmup),
        max_time_ms: ms(wanted.max_time).saturating_mul(u64::try_from(steps).unwrap_or(u64::MAX)),
        guards: guards.collect(),
        ..Settings::new(bounds_us.to_vec(), comparisons)
    }
}
