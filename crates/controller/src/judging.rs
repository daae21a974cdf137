//! Judging a canary: counts of the balancers in, what the planner is told out, and the evidence kept in a file.
//!
//! Each service with a balancer has a judge of its own; the false-abort budget is shared among them. Before the canary's
//! first request the judges learn what is usual. A controller that takes over reads the evidence files, so that it judges
//! on where the last one stopped.
//!
//! Guarantees: an interval in which something was not counted (a balancer that did not answer, or began anew, or shared
//! the traffic out anew meanwhile) is left out, never guessed. Not in here: the statistics (`verdict`), what follows from
//! the answer (`planner`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use greenlight_drivers::canary::{CountRow, Counts};
use greenlight_model::Timestamp;
use greenlight_model::canary::{Answer, CanaryStep, Judgement, Judging as Wanted, Metric};
use greenlight_model::fleet::{Environment, Strategy};
use greenlight_model::id::{HostName, RolloutId, ServiceName};
use greenlight_model::rollout::{Plan, Rollout};
use greenlight_verdict::evidence::{Conclusion, LINE_BYTES_MAX, Line, parse};
use greenlight_verdict::{Arm, Cell, Comparison, Histogram, Interval, Judge, Settings, Tally, Verdict};

#[cfg(test)]
mod tests;

/// A canary of which surely less than so many of its requests fail passes, however good the others are: without it, one
/// in front of which nothing ever fails could not pass.
const NEGLIGIBLE_ERRORS: f64 = 0.002;

/// Judges the canaries of one rollout.
pub(crate) struct Judging {
    rollout: RolloutId,
    directory: PathBuf,
    wanted: Wanted,
    steps: usize,
    courts: BTreeMap<ServiceName, Court>,
}

/// The judgement of one service.
struct Court {
    /// None until the first counts tell which latencies are kept.
    judge: Option<Judge>,
    file: Option<File>,
    /// The last reading of each balancer, by its index.
    last: BTreeMap<usize, Reading>,
    /// Differences of the present interval, by balancer, until all have been read.
    open: BTreeMap<usize, Cells>,
    since_ms: u64,
    step: Option<usize>,
    has_concluded: bool,
}

struct Reading {
    at_ms: u64,
    counts: Counts,
}

type Cells = BTreeMap<(HostName, String), Count>;

/// What was counted for one host and route in an interval.
#[derive(Default)]
struct Count {
    requests: u64,
    errors: u64,
    latency: Vec<(usize, u64)>,
    /// How old what is in flight is; a state, not a sum.
    in_flight: Vec<(usize, u64)>,
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
        let canaries = plan.waves.iter().filter(|wave| !wave.steps.is_empty());
        let of_canaries: BTreeSet<&ServiceName> =
            canaries.flat_map(|wave| &wave.instances).map(|instance| &instance.service).collect();
        let judged = services.into_iter().filter(|service| of_canaries.contains(service));
        let court = || Court {
            judge: None,
            file: None,
            last: BTreeMap::new(),
            open: BTreeMap::new(),
            since_ms: 0,
            step: None,
            has_concluded: false,
        };
        Some(Self {
            rollout: plan.id.clone(),
            directory: directory.to_owned(),
            wanted: canary.judging.clone(),
            steps,
            courts: judged.map(|service| (service.clone(), court())).collect(),
        })
    }

    fn path(&self, service: &ServiceName) -> PathBuf {
        self.directory.join(format!("{}-{service}.jsonl", self.rollout))
    }

    /// The services that are judged.
    pub(crate) fn services(&self) -> impl Iterator<Item = &ServiceName> {
        self.courts.keys()
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
        canaries: &BTreeSet<HostName>,
    ) -> Result<(), EvidenceFileError> {
        let budget = f64::from(self.wanted.false_aborts_per_mille) / 1000.0 / self.courts.len().max(1) as f64;
        let path = self.path(service);
        let Some(court) = self.courts.get_mut(service) else { return Ok(()) };
        let Counted { index, at, counts } = counted;
        let Ok(counts) = counts else {
            court.forget();
            return Ok(());
        };
        if court.judge.is_none() {
            let settings = settings(&self.wanted, self.steps, budget, &counts.bounds_us);
            court.begin(&path, &format!("{} {service}", self.rollout), &settings)?;
        }
        if matches!(phase, Phase::Between) {
            court.forget();
            return if court.step == self.steps.checked_sub(1) { court.pass(&path) } else { Ok(()) };
        }
        let at_ms = u64::try_from(at.as_millisecond()).unwrap_or_default();
        court.read(index, balancers, at_ms, counts);
        if court.open.len() < balancers.len() {
            return Ok(());
        }
        court.count(&path, at_ms, phase, canaries)
    }

    /// What judging has come to, for the planner.
    pub(crate) fn judgement(&self, phase: &Phase) -> Option<Judgement> {
        let Phase::Judged { wave, step, .. } = *phase else { return None };
        let judged: Vec<(&ServiceName, greenlight_verdict::Judgement)> = self
            .courts
            .iter()
            .filter(|(_, court)| court.step == Some(step))
            .filter_map(|(service, court)| Some((service, court.judge.as_ref()?.judgement())))
            .collect();
        if judged.is_empty() {
            return None;
        }
        let of = |verdict: Verdict| {
            let found = judged.iter().filter(move |(_, judgement)| judgement.verdict == verdict);
            found.map(|(service, judgement)| ((*service).clone(), judgement)).collect::<Vec<_>>()
        };
        let is_all_judged = judged.len() == self.courts.len();
        let (aborted, passed) = (of(Verdict::Abort), of(Verdict::Pass));
        let (answer, shown) = if !aborted.is_empty() {
            (Answer::Abort, aborted)
        } else if is_all_judged && passed.len() == judged.len() {
            (Answer::Pass, passed)
        } else {
            let open = of(Verdict::Inconclusive);
            let needed: Option<Vec<u64>> =
                open.iter().map(|(_, judgement)| judgement.requests_needed).collect();
            let requests_needed = needed.and_then(|needed| needed.into_iter().max());
            (Answer::Inconclusive { requests_needed }, open)
        };
        let separator = if answer == Answer::Abort { "\n" } else { "; " };
        let why: Vec<String> = shown.iter().map(|(_, judgement)| in_words(judgement)).collect();
        let services = shown.into_iter().map(|(service, _)| service).collect();
        Some(Judgement { wave, step, services, answer, why: why.join(separator) })
    }
}

/// What judging the canary of a rollout has come to, by the evidence that its controller has kept in `directory` so far; none
/// where none is kept here, or it cannot be read.
#[must_use]
pub fn kept_judgement(rollout: &Rollout, environment: &Environment, directory: &Path) -> Option<Judgement> {
    let mut judging = Judging::new(&rollout.plan, environment, directory)?;
    let paths: Vec<(ServiceName, PathBuf)> =
        judging.courts.keys().map(|service| (service.clone(), judging.path(service))).collect();
    for (service, path) in paths {
        let file = File::open(path).ok()?;
        judging.courts.get_mut(&service)?.read_again(&file).ok()?;
    }
    judging.judgement(&judging.phase(rollout, false))
}

/// What a judgement rests on. The answer itself is said by whoever acts on it.
fn in_words(judgement: &greenlight_verdict::Judgement) -> String {
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

impl Court {
    /// Nothing that was read so far begins an interval.
    fn forget(&mut self) {
        self.last.clear();
        self.open.clear();
    }

    /// Begins with what the file has, when it has anything.
    fn begin(&mut self, path: &Path, title: &str, settings: &Settings) -> Result<(), EvidenceFileError> {
        let failed = |problem: String| EvidenceFileError { path: path.to_owned(), problem };
        let io = |error: std::io::Error| failed(error.to_string());
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory).map_err(io)?;
        }
        let mut file =
            OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(path).map_err(io)?;
        let whole_bytes = self.read_again(&file).map_err(failed)?;
        file.set_len(whole_bytes).map_err(io)?;
        if self.judge.is_none() {
            self.judge = Some(Judge::new(settings.clone()).map_err(|error| failed(error.to_string()))?);
            write(&mut file, &Line::first(title, settings)).map_err(io)?;
        }
        self.file = Some(file);
        Ok(())
    }

    /// Judges again what a file has. The bytes of its whole lines are returned: the last one of a controller that was killed
    /// may be cut short.
    fn read_again(&mut self, file: &File) -> Result<u64, String> {
        let mut whole_bytes = 0;
        let mut reader = BufReader::new(file);
        let mut text = String::new();
        let mut judge = None;
        loop {
            let limited = &mut reader.by_ref().take(LINE_BYTES_MAX as u64);
            let read = limited.read_line(&mut text).map_err(|error| error.to_string())?;
            if read == 0 || !text.ends_with('\n') {
                break;
            }
            whole_bytes += text.len() as u64;
            let line = parse(text.trim_end()).map_err(|problem| problem.to_string())?;
            self.again(&mut judge, &line);
            text.clear();
        }
        self.judge = judge;
        Ok(whole_bytes)
    }

    fn again(&mut self, judge: &mut Option<Judge>, line: &Line) {
        match (line, judge) {
            (Line::Evidence { settings, .. }, judge @ None) => *judge = Judge::new(settings.clone()).ok(),
            // What was refused then is refused again.
            (Line::Baseline(interval), Some(judge)) => drop(judge.learn(interval)),
            (Line::Interval(interval), Some(judge)) => drop(judge.observe(interval)),
            (Line::Step { .. }, Some(judge)) => {
                judge.begin_step();
                self.step = Some(self.step.map_or(0, |step| step + 1));
            }
            (Line::Conclusion(_), _) => self.has_concluded = true,
            _ => {}
        }
    }

    /// Takes a reading of one balancer in.
    fn read(&mut self, index: usize, balancers: &[usize], at_ms: u64, counts: Counts) {
        let before = self.last.insert(index, Reading { at_ms, counts });
        let (Some(before), Some(now)) = (before, self.last.get(&index)) else { return };
        match difference(&before.counts, &now.counts) {
            Some(cells) => {
                if self.open.is_empty() {
                    self.since_ms = before.at_ms;
                }
                let open = self.open.entry(index).or_default();
                // What is in flight is a state: only the last one counts.
                open.values_mut().for_each(|count| count.in_flight.clear());
                add(open, cells);
            }
            // It began anew: what happened in between is not known.
            None => self.open.clear(),
        }
        self.open.retain(|index, _| balancers.contains(index));
    }

    /// Its last step is over: where the verdict was that it is good enough, the file ends with that.
    fn pass(&mut self, path: &Path) -> Result<(), EvidenceFileError> {
        let (Some(judge), Some(file)) = (&self.judge, &mut self.file) else { return Ok(()) };
        let judgement = judge.judgement();
        if self.has_concluded || judgement.verdict != Verdict::Pass {
            return Ok(());
        }
        self.has_concluded = true;
        write(file, &conclusion(&judgement))
            .map_err(|error| EvidenceFileError { path: path.to_owned(), problem: error.to_string() })
    }

    /// Puts the interval that is complete to the judge, and into the file.
    fn count(
        &mut self,
        path: &Path,
        at_ms: u64,
        phase: &Phase,
        canaries: &BTreeSet<HostName>,
    ) -> Result<(), EvidenceFileError> {
        let mut all = Cells::new();
        for cells in std::mem::take(&mut self.open).into_values() {
            add(&mut all, cells);
        }
        let (Some(judge), Some(file)) = (&mut self.judge, &mut self.file) else { return Ok(()) };
        // What comes after an abort is not the canary's doing any more, and nothing follows the conclusion in the file.
        if at_ms <= self.since_ms || self.has_concluded {
            return Ok(());
        }
        let share = match phase {
            Phase::Judged { what, .. } => Some(f64::from(what.share.get()) / 100.0),
            Phase::Before | Phase::Between => None,
        };
        let interval = Interval {
            start_ms: self.since_ms,
            length_ms: at_ms - self.since_ms,
            canary_share: share,
            cells: all
                .into_iter()
                .map(|((host, route), count)| cell(canaries, &host, route, &count))
                .collect(),
        };
        let mut lines = Vec::new();
        if let Phase::Judged { step, what, .. } = phase {
            if self.step != Some(*step) {
                self.step = Some(*step);
                judge.begin_step();
                let canary_share = f64::from(what.share.get()) / 100.0;
                lines.push(Line::Step { at_ms: self.since_ms, canary_share });
            }
            // One that a clock that was set back brings before the last is left out.
            if judge.observe(&interval).is_ok() {
                lines.push(Line::Interval(interval));
            }
            let judgement = judge.judgement();
            if judgement.verdict == Verdict::Abort {
                self.has_concluded = true;
                lines.push(conclusion(&judgement));
            }
        } else if judge.learn(&interval).is_ok() {
            lines.push(Line::Baseline(interval));
        }
        for line in &lines {
            write(file, line)
                .map_err(|error| EvidenceFileError { path: path.to_owned(), problem: error.to_string() })?;
        }
        Ok(())
    }
}

fn conclusion(judgement: &greenlight_verdict::Judgement) -> Line {
    Line::Conclusion(Conclusion {
        verdict: judgement.verdict,
        elapsed_ms: judgement.elapsed_ms,
        culprits: judgement.culprits().map(|finding| finding.comparison.title()).collect(),
        alerts: Vec::new(),
    })
}

fn cell(canaries: &BTreeSet<HostName>, host: &HostName, route: String, count: &Count) -> Cell {
    Cell {
        arm: if canaries.contains(host) { Arm::Canary } else { Arm::Stable },
        host: host.to_string(),
        route,
        requests: count.requests,
        errors: count.errors.min(count.requests),
        latency: histogram(&count.latency),
        in_flight: histogram(&count.in_flight),
    }
}

fn histogram(buckets: &[(usize, u64)]) -> Histogram {
    let length = buckets.iter().map(|(bucket, _)| bucket + 1).max().unwrap_or(0);
    let mut counts = vec![0; length];
    for (bucket, count) in buckets {
        counts[*bucket] += count;
    }
    Histogram::from_counts(&counts)
}

/// What came in between two readings; none when the balancer began anew.
fn difference(before: &Counts, now: &Counts) -> Option<Cells> {
    if before.instance != now.instance || before.bounds_us != now.bounds_us {
        return None;
    }
    let key = |row: &CountRow| (row.host.clone(), row.route.clone(), row.since);
    let earlier: BTreeMap<_, &CountRow> = before.rows.iter().map(|row| (key(row), row)).collect();
    let mut cells = Cells::new();
    for row in &now.rows {
        // A row that was not there began in between.
        let before = earlier.get(&key(row)).copied();
        let past = |of: fn(&CountRow) -> u64| before.map_or(0, of);
        let buckets: BTreeMap<usize, u64> =
            before.into_iter().flat_map(|row| row.latency.iter().copied()).collect();
        let latency = row.latency.iter().map(|(bucket, count)| {
            Some((*bucket, count.checked_sub(buckets.get(bucket).copied().unwrap_or(0))?))
        });
        // What could not be delivered there is the host's failure as much as an error is.
        let undelivered = row.undelivered.checked_sub(past(|row| row.undelivered))?;
        let grown = Count {
            requests: row.requests.checked_sub(past(|row| row.requests))? + undelivered,
            errors: row.errors.checked_sub(past(|row| row.errors))? + undelivered,
            latency: latency.collect::<Option<Vec<_>>>()?,
            in_flight: row.in_flight.clone(),
        };
        add(&mut cells, BTreeMap::from([((row.host.clone(), row.route.clone()), grown)]));
    }
    Some(cells)
}

fn add(sum: &mut Cells, more: Cells) {
    for (key, count) in more {
        let cell = sum.entry(key).or_default();
        cell.requests += count.requests;
        cell.errors += count.errors;
        cell.latency.extend(count.latency);
        cell.in_flight.extend(count.in_flight);
    }
}

fn write(file: &mut File, line: &Line) -> std::io::Result<()> {
    let mut text = line.to_json().map_err(std::io::Error::other)?;
    text.push('\n');
    file.write_all(text.as_bytes())
}

fn settings(wanted: &Wanted, steps: usize, budget: f64, bounds_us: &[u64]) -> Settings {
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
    let ms = |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    Settings {
        false_abort_budget: budget,
        warmup_ms: ms(wanted.warmup),
        max_time_ms: ms(wanted.max_time).saturating_mul(u64::try_from(steps).unwrap_or(u64::MAX)),
        ..Settings::new(bounds_us.to_vec(), comparisons)
    }
}
