//! What is shown while a rollout runs: one moving line per instance on a terminal, plain lines elsewhere.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use greenlight_controller::{Progress, ProgressSink, clock};
use greenlight_link::message::Event;
use greenlight_model::action::{Action, ActionResult, Verb};
use greenlight_model::decision::Wait;
use greenlight_model::id::{Instance, ReleaseId};
use greenlight_model::manifest::Release;
use greenlight_model::quantity::{ByteSize, Percent, human_duration};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use owo_colors::OwoColorize;

use crate::describe;
use crate::printer::{Printer, Verbosity};

/// How often moving lines are redrawn.
const REDRAW: Duration = Duration::from_millis(120);
/// How long nothing new is said of a canary that is being judged.
const JUDGED_AGAIN: Duration = Duration::from_secs(10);

/// Shows progress; cloned handles draw on the same place.
#[derive(Clone)]
pub(crate) struct Live(Arc<Mutex<Inner>>);

struct Inner {
    printer: Printer,
    began: Instant,
    titles: BTreeMap<ReleaseId, String>,
    width: usize,
    /// Waits that were told already; each names a host, a balancer or a time, so there are few.
    told: Vec<Wait>,
    /// The share at which a canary was last said to be judged, and when.
    judged: Option<(Percent, Instant)>,
    bars: Option<(MultiProgress, BTreeMap<Instance, ProgressBar>)>,
    /// What to do once nobody can read this any more.
    when_unheard: Option<Box<dyn FnOnce() + Send>>,
}

impl Live {
    pub(crate) fn new(printer: &Printer, releases: &[Release], instances: &[Instance]) -> Self {
        let width = instances.iter().map(|instance| instance.to_string().len()).max().unwrap_or_default();
        Self(Arc::new(Mutex::new(Inner {
            printer: *printer,
            began: Instant::now(),
            titles: releases.iter().map(|release| (release.id, release.title())).collect(),
            width,
            told: Vec::new(),
            judged: None,
            bars: printer.is_live().then(|| (MultiProgress::new(), BTreeMap::new())),
            when_unheard: None,
        })))
    }

    /// Does this, once, when a line cannot be written because its reader has gone.
    pub(crate) fn when_unheard(&self, act: impl FnOnce() + Send + 'static) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).when_unheard = Some(Box::new(act));
    }

    /// Where the controller reports to.
    pub(crate) fn sink(&self) -> ProgressSink {
        let live = self.clone();
        Arc::new(move |progress| live.0.lock().unwrap_or_else(PoisonError::into_inner).show(progress))
    }

    /// A line of its own between the moving ones.
    pub(crate) fn say(&self, line: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).say(line);
    }

    /// Takes the moving lines away; what follows is the result.
    pub(crate) fn finish(&self) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((all, bars)) = inner.bars.take() {
            for bar in bars.values() {
                bar.finish_and_clear();
            }
            // A terminal that went away is not an error of the rollout.
            let _ = all.clear();
        }
    }
}

impl Inner {
    fn show(&mut self, progress: Progress) {
        match progress {
            Progress::Started { action, why } => self.started(&action, &why),
            Progress::Finished { action, result, took_ms, output } => {
                self.finished(&action, &result, Duration::from_millis(took_ms), &output);
            }
            Progress::Inside { instance, event } => self.inside(&instance, event),
            Progress::Sent { instance, objects, objects_total, bytes, bytes_total } => {
                let (sent, total) = (ByteSize(bytes), ByteSize(bytes_total));
                let text = format!("staging: {objects} of {objects_total} objects, {sent} of about {total}");
                self.message(&instance, &text);
            }
            Progress::Waits(waits) => {
                let now = clock::now();
                for wait in waits {
                    let text = describe::wait(&wait, now);
                    if self.printer.verbosity == Verbosity::Verbose {
                        self.say(&format!("{} waiting: {text}", self.time().dimmed()));
                    } else if let Wait::Sessions { instance, .. } = &wait {
                        self.message(instance, &text);
                    } else if let Wait::Verdict { share, .. } = &wait {
                        self.judged(*share, &text);
                    } else if is_news(&wait) && !self.told.contains(&wait) {
                        self.say(&format!("{} {}: {text}", self.time().dimmed(), "waiting".yellow()));
                        self.told.push(wait);
                    }
                }
            }
            Progress::Holding(under_way) => {
                let line = match describe::all_under_way(&under_way) {
                    None => "nothing is under way: it is held here".to_owned(),
                    Some(under_way) => format!("the safe point is the end of {under_way}"),
                };
                self.say(&format!("{} {}: {line}", self.time().dimmed(), "holding".yellow()));
            }
            Progress::Host { host, unreachable: Some(why) } => {
                self.say(&format!("{} {host} {}: {why}", self.time().dimmed(), "does not answer".yellow()));
            }
            Progress::NotRenewed { instance, why } => {
                let failed = "its claim could not be renewed yet".yellow();
                self.say(&format!("{} {instance}: {failed}: {why}", self.time().dimmed()));
            }
            Progress::Host { host, unreachable: None } => {
                self.say(&format!("{} {host} answers again", self.time().dimmed()));
            }
            Progress::Note(note) => {
                self.say(&format!("{} {}", self.time().dimmed(), describe::note(&note).bold()));
            }
            Progress::Interlock { action, sentence } => {
                let line =
                    format!("interlock: refused to {} {}: {sentence}", action.verb(), action.instance());
                self.say(&line.red().to_string());
            }
            // The command that runs the rollout says how it ended.
            Progress::Ended(_) => {}
        }
    }

    /// What judging a canary has come to: it changes each second, and is told now and then.
    fn judged(&mut self, share: Percent, text: &str) {
        let is_told = self.judged.is_some_and(|(told, at)| told == share && at.elapsed() < JUDGED_AGAIN);
        if !is_told {
            self.say(&format!("{} {text}", self.time().dimmed()));
            self.judged = Some((share, Instant::now()));
        }
    }

    fn started(&mut self, action: &Action, why: &str) {
        let titles = &self.titles;
        let title = |id: ReleaseId| titles.get(&id).cloned().unwrap_or_else(|| id.short());
        let what = describe::action(action, title);
        if self.bars.is_some() {
            self.message(action.instance(), &format!("{what}: {why}"));
        } else if self.printer.verbosity == Verbosity::Verbose {
            let (instance, width) = (action.instance().to_string(), self.width);
            self.say(&format!("{} {instance:<width$}  {what}: {why}", self.time().dimmed()));
        }
    }

    fn finished(&mut self, action: &Action, result: &ActionResult, took: Duration, output: &[String]) {
        let took = human_duration(took);
        let (time, verb, width) = (self.time(), action.verb(), self.width);
        let instance = action.instance().to_string();
        match result {
            ActionResult::Succeeded => {
                self.message(action.instance(), "");
                // Leases and looks are bookkeeping; what changes a host or its traffic is news.
                let is_news = !matches!(verb, Verb::Claim | Verb::Unclaim | Verb::Prune | Verb::Preflight);
                if is_news || self.printer.verbosity == Verbosity::Verbose {
                    let titles = &self.titles;
                    let title = |id: ReleaseId| titles.get(&id).cloned().unwrap_or_else(|| id.short());
                    let what = describe::action(action, title);
                    let line =
                        format!("{} {instance:<width$}  {} {what} ({took})", time.dimmed(), "ok".green());
                    self.say(&line);
                }
            }
            // It costs nothing: the claim runs out, and the next rollout knows that it is nobody's. The records have it.
            ActionResult::Failed { .. }
                if verb == Verb::Unclaim && self.printer.verbosity != Verbosity::Verbose => {}
            ActionResult::Failed { why, .. } => {
                self.message(action.instance(), "failed");
                let failed = format!("{verb} failed").red().bold().to_string();
                self.say(&format!("{} {instance:<width$}  {failed} ({took}): {why}", time.dimmed()));
                for line in output {
                    self.say(&format!("         {instance:<width$}  | {line}"));
                }
            }
        }
    }

    fn inside(&mut self, instance: &Instance, event: Event) {
        match event {
            Event::Phase { name } => self.message(instance, &name),
            Event::Line { text, .. } => {
                if self.printer.verbosity == Verbosity::Verbose {
                    let (instance, width) = (instance.to_string(), self.width);
                    self.say(&format!("         {instance:<width$}  | {text}"));
                } else {
                    self.message(instance, &text);
                }
            }
            // What is missing is told as it is sent; no step of a rollout asks for samples.
            Event::Missing { .. } | Event::Sampled(_) => {}
        }
    }

    /// What the instance's own line says; nothing where there are no moving lines.
    fn message(&mut self, instance: &Instance, text: &str) {
        let Some((all, bars)) = &mut self.bars else { return };
        let bar = bars.entry(instance.clone()).or_insert_with(|| {
            let bar = all.add(ProgressBar::new_spinner());
            if let Ok(style) = ProgressStyle::with_template("  {spinner:.green} {prefix:.bold}  {wide_msg}") {
                bar.set_style(style);
            }
            bar.set_prefix(instance.to_string());
            bar.enable_steady_tick(REDRAW);
            bar
        });
        bar.set_message(text.to_owned());
    }

    fn say(&mut self, line: &str) {
        let told = match &self.bars {
            Some((all, _)) => all.println(line),
            None => self.printer.tell(line),
        };
        if told.is_err()
            && let Some(act) = self.when_unheard.take()
        {
            act();
        }
    }

    fn time(&self) -> String {
        format!("{:>7.1}s", self.began.elapsed().as_secs_f64())
    }
}

/// Whether a wait is more than the ordinary course of things: what somebody may have to do something about.
fn is_news(wait: &Wait) -> bool {
    matches!(
        wait,
        Wait::Balancer { .. }
            | Wait::Claim { .. }
            | Wait::Fallback { .. }
            | Wait::Gate { .. }
            | Wait::Learning { .. }
            | Wait::Unreachable { .. }
    )
}
