//! The judgement of one service: every line goes to the judge as it goes into the evidence file, so that both say the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use greenlight_drivers::canary::Counts;
use greenlight_model::id::{HostName, Instance, ServiceName};
use greenlight_model::sample::HostSample;
use greenlight_verdict::evidence::{LINE_BYTES_MAX, Line, Replay, parse};
use greenlight_verdict::guard::{BASELINE_SAMPLES_MIN, SAMPLE_GAP_MAX_MS};
use greenlight_verdict::{GuardMetric, Interval, Settings, Verdict};

use super::counts::{Cells, add, cell, difference};
use super::watched::Watched;
use super::{EvidenceFileError, Phase};

/// The judgement of one service.
pub(super) struct Court {
    service: ServiceName,
    /// The canary's hosts that it is on.
    hosts: BTreeSet<HostName>,
    path: PathBuf,
    /// None until the first counts tell which latencies are kept.
    replay: Option<Replay>,
    file: Option<File>,
    /// The last reading of each balancer, by its index.
    last: BTreeMap<usize, Reading>,
    /// Differences of the present interval, by balancer, until all have been read.
    open: BTreeMap<usize, Cells>,
    since_ms: u64,
    /// The canary's hosts, where there are guards.
    watched: BTreeMap<HostName, Watched>,
    /// When the last interval ended.
    judged_ms: u64,
}

struct Reading {
    at_ms: u64,
    counts: Counts,
}

impl Court {
    pub(super) fn new(service: ServiceName, hosts: BTreeSet<HostName>, path: PathBuf) -> Self {
        Self {
            service,
            hosts,
            path,
            replay: None,
            file: None,
            last: BTreeMap::new(),
            open: BTreeMap::new(),
            since_ms: 0,
            watched: BTreeMap::new(),
            judged_ms: 0,
        }
    }

    /// Whether it knows what it is to judge.
    pub(super) fn has_begun(&self) -> bool {
        self.replay.is_some()
    }

    /// What it has come to; none before it has begun.
    pub(super) fn replay(&self) -> Option<&Replay> {
        self.replay.as_ref()
    }

    /// The step that is judged, by its index; none before the first.
    pub(super) fn step(&self) -> Option<usize> {
        self.replay.as_ref()?.steps().checked_sub(1)
    }

    /// Nothing that was read so far begins an interval.
    pub(super) fn forget(&mut self) {
        self.last.clear();
        self.open.clear();
        self.watched.values_mut().for_each(Watched::miss_counts);
    }

    /// Begins with what the file has, when it has anything.
    pub(super) fn begin(&mut self, title: String, settings: Settings) -> Result<(), EvidenceFileError> {
        if let Some(directory) = self.path.parent() {
            std::fs::create_dir_all(directory).map_err(|error| self.failed(&error))?;
        }
        let mut options = OpenOptions::new();
        let options = options.create(true).read(true).append(true).mode(0o600);
        let file = options.open(&self.path).map_err(|error| self.failed(&error))?;
        let whole_bytes = self.read_again(&file).map_err(|problem| self.failed(&problem))?;
        file.set_len(whole_bytes).map_err(|error| self.failed(&error))?;
        self.file = Some(file);
        if self.replay.is_none() {
            let first = Line::first(&title, &settings);
            let replay = Replay::new(title, settings).map_err(|error| self.failed(&error))?;
            self.replay = Some(replay);
            self.write(&first)?;
        }
        Ok(())
    }

    /// Judges again what the file has; nothing when there is none.
    pub(super) fn read_file(&mut self) -> Option<()> {
        self.read_again(&File::open(&self.path).ok()?).ok().map(|_| ())
    }

    /// Judges again what a file has. The bytes of its whole lines are returned: the last one of a controller that was killed
    /// may be cut short.
    fn read_again(&mut self, file: &File) -> Result<u64, String> {
        let mut whole_bytes = 0;
        let mut reader = BufReader::new(file);
        let mut text = String::new();
        let mut replay: Option<Replay> = None;
        for number in 1.. {
            let limited = &mut reader.by_ref().take(LINE_BYTES_MAX as u64);
            let read = limited.read_line(&mut text).map_err(|error| error.to_string())?;
            if read == 0 || !text.ends_with('\n') {
                break;
            }
            whole_bytes += text.len() as u64;
            match &mut replay {
                None => replay = Some(Replay::begin(text.trim_end()).map_err(|error| error.to_string())?),
                Some(replay) => {
                    let at = |problem| format!("line {number}: {problem}");
                    let line = parse(text.trim_end()).map_err(at)?;
                    replay.take(&line).map_err(at)?;
                    self.remember(&line);
                }
            }
            text.clear();
        }
        self.replay = replay;
        Ok(whole_bytes)
    }

    fn remember(&mut self, line: &Line) {
        match line {
            Line::Sample(sample) => {
                if let Ok(host) = sample.host.parse() {
                    self.watched.entry(host).or_default().resume(sample);
                }
            }
            Line::Interval(interval) => self.judged_ms = interval.start_ms.saturating_add(interval.length_ms),
            _ => {}
        }
    }

    /// Takes a reading of one balancer in.
    pub(super) fn read(&mut self, index: usize, balancers: &[usize], at_ms: u64, counts: Counts) {
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
            None => {
                self.open.clear();
                self.watched.values_mut().for_each(Watched::miss_counts);
            }
        }
        self.open.retain(|index, _| balancers.contains(index));
    }

    /// Whether all of so many balancers have been read for the present interval.
    pub(super) fn is_read(&self, balancers: usize) -> bool {
        self.open.len() >= balancers
    }

    /// Its last step is over: where the verdict was that it is good enough, the file ends with that.
    pub(super) fn pass(&mut self) -> Result<(), EvidenceFileError> {
        let is_passed = self.replay.as_ref().is_some_and(|replay| replay.verdict() == Verdict::Pass);
        if is_passed { self.conclude() } else { Ok(()) }
    }

    /// Puts the interval that is complete to the judge, and into the file.
    pub(super) fn count(
        &mut self,
        at_ms: u64,
        phase: &Phase,
        canaries: &BTreeSet<HostName>,
    ) -> Result<(), EvidenceFileError> {
        let mut all = Cells::new();
        for cells in std::mem::take(&mut self.open).into_values() {
            add(&mut all, cells);
        }
        for ((host, _), count) in &all {
            if let Some(watched) = self.watched.get_mut(host) {
                watched.requested(count.requests);
            }
        }
        if at_ms <= self.since_ms {
            return Ok(());
        }
        self.judged_ms = at_ms;
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
        let Phase::Judged { step, what, .. } = phase else { return self.put(&Line::Baseline(interval)) };
        if self.step() != Some(*step) {
            let canary_share = f64::from(what.share.get()) / 100.0;
            self.put(&Line::Step { at_ms: self.since_ms, canary_share })?;
        }
        self.put(&Line::Interval(interval))
    }

    /// Puts what a host of the canary uses to the guards, and into the file.
    pub(super) fn sampled(
        &mut self,
        host: &HostName,
        at_ms: u64,
        sample: Result<HostSample, String>,
        phase: &Phase,
    ) -> Result<(), EvidenceFileError> {
        if !self.hosts.contains(host) {
            return Ok(());
        }
        let instance = Instance::new(host.clone(), self.service.clone());
        let watched = self.watched.entry(host.clone()).or_default();
        let sample = match sample {
            Ok(sample) if self.replay.is_some() => sample,
            Ok(_) => return Ok(()),
            Err(why) => {
                watched.failed = Some(why);
                return Ok(());
            }
        };
        match phase {
            Phase::Between => {
                watched.pause();
                Ok(())
            }
            Phase::Before => {
                let sample = watched.take(&instance, sample, at_ms, false);
                self.put(&Line::BaselineSample(sample))
            }
            Phase::Judged { .. } => {
                let sample = watched.take(&instance, sample, at_ms, true);
                self.put(&Line::Sample(sample))
            }
        }
    }

    /// Guards that do not watch a host of the canary now, and why.
    pub(super) fn unwatched(&self) -> Vec<String> {
        if !self.has_guards() {
            return Vec::new();
        }
        let unseen = |host: &HostName| {
            let watched = self.watched.get(host);
            let sampled_ms = watched.and_then(|watched| watched.sampled_ms);
            let gap_ms = sampled_ms.map(|at_ms| self.judged_ms.saturating_sub(at_ms));
            if gap_ms.is_some_and(|gap_ms| gap_ms <= SAMPLE_GAP_MAX_MS) {
                return None;
            }
            let why = watched.and_then(|watched| watched.failed.as_deref());
            Some(format!(
                "guards: no sample from {host} now{}",
                why.map_or(String::new(), |why| format!(" ({why})"))
            ))
        };
        self.hosts.iter().filter_map(unseen).collect()
    }

    /// Hosts of the canary for which too little was seen before the rollout to hold CPU per request against it.
    pub(super) fn unlearnt(&self) -> Vec<String> {
        let Some(watch) = self.replay.as_ref().map(Replay::watch) else { return Vec::new() };
        if !watch.guards().iter().any(|guard| guard.metric == GuardMetric::CpuPerRequest) {
            return Vec::new();
        }
        let learnt = self.hosts.iter().map(|host| (host, watch.learnt(host.as_str())));
        learnt
            .filter(|(_, learnt)| *learnt < BASELINE_SAMPLES_MIN)
            .map(|(host, learnt)| {
                format!(
                    "CPU per request of {host} is not guarded: before the rollout it had {learnt} samples with requests, \
                     {BASELINE_SAMPLES_MIN} are needed"
                )
            })
            .collect()
    }

    fn has_guards(&self) -> bool {
        self.replay.as_ref().is_some_and(|replay| !replay.watch().guards().is_empty())
    }

    /// Judges by a line, and keeps it; the conclusion follows where it is one. What comes after that is not the canary's doing
    /// any more, and a line that a clock that was set back brings before the last is left out.
    fn put(&mut self, line: &Line) -> Result<(), EvidenceFileError> {
        let Some(replay) = &mut self.replay else { return Ok(()) };
        if replay.take(line).is_err() {
            return Ok(());
        }
        let is_aborted = replay.verdict() == Verdict::Abort || !replay.alerts().is_empty();
        self.write(line)?;
        if is_aborted { self.conclude() } else { Ok(()) }
    }

    /// Ends the file with what the lines have come to, unless it has ended.
    fn conclude(&mut self) -> Result<(), EvidenceFileError> {
        let Some(replay) = &mut self.replay else { return Ok(()) };
        let line = Line::Conclusion(replay.conclusion());
        if replay.take(&line).is_err() {
            return Ok(());
        }
        self.write(&line)
    }

    fn write(&mut self, line: &Line) -> Result<(), EvidenceFileError> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let written = line.to_json().map_err(std::io::Error::other).and_then(|mut text| {
            text.push('\n');
            file.write_all(text.as_bytes())
        });
        written.map_err(|error| self.failed(&error))
    }

    fn failed(&self, problem: &impl ToString) -> EvidenceFileError {
        EvidenceFileError { path: self.path.clone(), problem: problem.to_string() }
    }
}
