//! The evidence file: everything that a verdict was made of, so that anybody can make it again.
//!
//! JSON lines. The first is the settings with the version of the form, and then, in the order in which they came: `baseline`
//! (intervals before the rollout), `baseline_sample`, `step` (the canary gets another share), `interval`, `sample` (of hosts) and
//! at last the `conclusion`. Writing is the caller's; this is what a line is, and what reading them comes to.
//!
//! Guarantees: a file of this version gives the same verdict again for ever; numbers in it may differ in their last digits
//! between machines, whose logarithms do. A line that is not understood is an error with its number, never passed over.

use serde::{Deserialize, Serialize};

use crate::guard::{Alert, Sample, Watch};
use crate::interval::{Interval, IntervalError};
use crate::judge::Judge;
use crate::judgement::{Judgement, Verdict};
use crate::settings::{Settings, SettingsError};

pub use crate::again::{AgainstItself, AgainstItselfError, Run, against_itself};

/// The version that this build writes, and the newest that it reads.
pub const EVIDENCE_VERSION: u32 = 1;
/// Longest line: an interval with all the cells there can be.
pub const LINE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Line {
    /// The first line.
    Evidence {
        /// [`EVIDENCE_VERSION`] of who wrote it.
        version: u32,
        /// What the rollout is called, for people.
        #[serde(default)]
        title: String,
        /// What the judge was told.
        settings: Settings,
    },
    /// An interval before the rollout.
    Baseline(Interval),
    /// A host before the rollout.
    BaselineSample(Sample),
    /// The canary gets another share of the traffic.
    Step {
        /// When, in milliseconds since 1970.
        at_ms: u64,
        /// Its share from then on.
        canary_share: f64,
    },
    /// An interval of the rollout.
    Interval(Interval),
    /// A canary host during the rollout.
    Sample(Sample),
    /// What was decided.
    Conclusion(Conclusion),
}

impl Line {
    /// The first line of a file.
    #[must_use]
    pub fn first(title: &str, settings: &Settings) -> Self {
        Self::Evidence { version: EVIDENCE_VERSION, title: title.to_owned(), settings: settings.clone() }
    }

    /// The line as it is written, without its end.
    ///
    /// # Errors
    /// When a number is not finite.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self)
    }
}

/// What came out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conclusion {
    /// The answer. An alert is an abort too.
    pub verdict: Verdict,
    /// How long the canary had been observed.
    pub elapsed_ms: u64,
    /// The comparisons that an abort is due to.
    #[serde(default)]
    pub culprits: Vec<String>,
    /// The guards that were violated, as `metric on host`.
    #[serde(default)]
    pub alerts: Vec<String>,
}

/// Why a file cannot be replayed.
#[derive(Debug, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct EvidenceError {
    /// Which line, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The file has no lines.
    #[error("the file is empty; its first line is to be the settings")]
    Empty,
    /// It is not one of the lines above.
    #[error("not a line of evidence: {0}")]
    Malformed(#[source] serde_json::Error),
    /// It is longer than any that is written.
    #[error("longer than {LINE_BYTES_MAX} bytes")]
    TooLong,
    /// The first line is to be the settings, and no other.
    #[error("the settings are the first line, and only that")]
    Order,
    /// It was written by a newer program.
    #[error(
        "written by a newer greenlight (version {0} of the form; this one reads up to {EVIDENCE_VERSION})"
    )]
    Newer(u32),
    /// The settings cannot be.
    #[error("setting {0}")]
    Settings(#[from] SettingsError),
    /// The interval cannot be, or not here.
    #[error(transparent)]
    Interval(#[from] IntervalError),
    /// A line after the end.
    #[error("nothing follows the conclusion")]
    AfterConclusion,
}

/// Makes a judgement again, line by line.
#[derive(Debug, Clone)]
pub struct Replay {
    title: String,
    judge: Judge,
    watch: Watch,
    alerts: Vec<Alert>,
    recorded: Option<Conclusion>,
    steps: usize,
    intervals: usize,
}

impl Replay {
    /// Begins with the first line.
    ///
    /// # Errors
    /// When it is not the settings of a version that is known.
    pub fn begin(line: &str) -> Result<Self, EvidenceError> {
        let at_first = |problem| EvidenceError { line: 1, problem };
        match parse(line).map_err(at_first)? {
            Line::Evidence { version, .. } if version > EVIDENCE_VERSION => {
                Err(at_first(Problem::Newer(version)))
            }
            Line::Evidence { title, settings, .. } => {
                Self::new(title, settings).map_err(|error| at_first(error.into()))
            }
            _ => Err(at_first(Problem::Order)),
        }
    }

    /// A judgement of which nothing is known but the settings: what is judged for the first time goes the same way as what is
    /// judged again.
    ///
    /// # Errors
    /// When no judge can work with the settings.
    pub fn new(title: String, settings: Settings) -> Result<Self, SettingsError> {
        let watch = Watch::new(settings.guards.clone());
        let judge = Judge::new(settings)?;
        Ok(Self { title, judge, watch, alerts: Vec::new(), recorded: None, steps: 0, intervals: 0 })
    }

    /// Takes a further line in; `number` is for the error.
    ///
    /// # Errors
    /// When it is no line of evidence, or cannot come here.
    pub fn line(&mut self, number: usize, text: &str) -> Result<(), EvidenceError> {
        let line = parse(text).map_err(|problem| EvidenceError { line: number, problem })?;
        self.take(&line).map_err(|problem| EvidenceError { line: number, problem })
    }

    /// Takes a further line in, as it is written to the file or was read from there.
    ///
    /// # Errors
    /// When it cannot come here; nothing is changed then, and it does not belong into the file.
    pub fn take(&mut self, line: &Line) -> Result<(), Problem> {
        if self.recorded.is_some() {
            return Err(Problem::AfterConclusion);
        }
        match line {
            Line::Evidence { .. } => return Err(Problem::Order),
            Line::Baseline(interval) => self.judge.learn(interval)?,
            Line::BaselineSample(sample) => self.watch.learn(sample),
            Line::Step { .. } => {
                self.judge.begin_step();
                self.steps += 1;
            }
            Line::Interval(interval) => {
                self.judge.observe(interval)?;
                self.intervals += 1;
            }
            // The first alert ends the canary; what comes after it is not its own doing any more.
            Line::Sample(sample) if self.alerts.is_empty() => self.alerts = self.watch.observe(sample),
            Line::Sample(_) => {}
            Line::Conclusion(conclusion) => self.recorded = Some(conclusion.clone()),
        }
        Ok(())
    }

    /// What the rollout was called.
    #[must_use]
    pub fn title(&self) -> &str {
        &self.title
    }

    /// What the judge was told.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        self.judge.settings()
    }

    /// Shares that the canary has had so far.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The answer of the counts alone.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        self.judge.verdict()
    }

    /// The guards.
    #[must_use]
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// Intervals of the rollout so far.
    #[must_use]
    pub fn intervals(&self) -> usize {
        self.intervals
    }

    /// The judgement of the counts.
    #[must_use]
    pub fn judgement(&self) -> Judgement {
        self.judge.judgement()
    }

    /// The guards that were violated.
    #[must_use]
    pub fn alerts(&self) -> &[Alert] {
        &self.alerts
    }

    /// What the lines so far come to.
    #[must_use]
    pub fn conclusion(&self) -> Conclusion {
        conclude(&self.judge.judgement(), &self.alerts)
    }

    /// What the file says had been decided; none when it was cut off before.
    #[must_use]
    pub fn recorded(&self) -> Option<&Conclusion> {
        self.recorded.as_ref()
    }
}

/// What judgement and alerts come to together: the last line of a file.
#[must_use]
pub fn conclude(judgement: &Judgement, alerts: &[Alert]) -> Conclusion {
    let verdict = if alerts.is_empty() { judgement.verdict } else { Verdict::Abort };
    Conclusion {
        verdict,
        elapsed_ms: judgement.elapsed_ms,
        culprits: judgement.culprits().map(|finding| finding.comparison.title()).collect(),
        alerts: alerts.iter().map(|alert| format!("{} on {}", alert.guard.metric, alert.host)).collect(),
    }
}

/// Reads one line.
///
/// # Errors
/// When it is not one, or longer than [`LINE_BYTES_MAX`].
pub fn parse(text: &str) -> Result<Line, Problem> {
    if text.len() > LINE_BYTES_MAX {
        return Err(Problem::TooLong);
    }
    serde_json::from_str(text).map_err(Problem::Malformed)
}
