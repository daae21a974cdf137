//! Being what is desired: stop what ran, switch, start, and prove it; or be nothing.
//!
//! Guarantees: nothing is stopped before every process of the new release is resolved; a stop is believed only when the process is
//! gone, and nothing goes on before; a start is believed only when it is proven. Doing it again when it is done restarts nothing.
//! On failure the switch stays as it is and the ledger says so: going back is another activation, or the guard's.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use greenlight_depot::host::HostDepot;
use greenlight_model::Timestamp;
use greenlight_model::fleet::{ManagerKind, Process};
use greenlight_model::host::{Desired, InstanceReport, InstanceSpec, LedgerEvent, ReleaseMark};
use greenlight_model::id::{Generation, ReleaseId, RolloutId};
use greenlight_model::quantity::human_duration;

use crate::command::{self, Step};
use crate::context::Context;
use crate::failure::{OrHost as _, Outcome, host, passing};
use crate::files;
use crate::guard;
use crate::layout::Layout;
use crate::ledger::{self, CHANGE_WAIT, Change};
use crate::logs;
use crate::manager::{self, Live, Manager};
use crate::observe;
use crate::plan::Plan;
use crate::poll;
use crate::ports;
use crate::probe::{self, Start, Target};
use crate::process::{self, Identity};
use crate::room;
use crate::run::{self, Run};
use crate::supervise;

/// Becomes what is desired, and says what the instance is then. With `guard`, the host goes back by itself unless that is confirmed in
/// this time.
pub(crate) fn activate(
    context: &Context,
    desired: &Desired,
    guard: Option<Duration>,
) -> Outcome<InstanceReport> {
    let layout = Layout::new(&desired.spec.root);
    let doing = match &desired.release {
        Some(mark) => format!("activating {}", mark.label),
        None => "taking the service off the host".to_owned(),
    };
    // An activation whose controller is gone, or a guard that goes back, ends by itself within such a time.
    let switching = desired.spec.processes.values().map(Process::switching).sum::<Duration>();
    let _change = Change::begin_within(&layout, &doing, switching + CHANGE_WAIT)?;
    let content = ledger::content_of(desired)?;
    let ledger = ledger::update(&layout, |ledger| {
        ledger::check_claim(ledger, &desired.rollout, Timestamp::now())?;
        ledger::accept(ledger, desired, content)?;
        Ok(ledger.clone())
    })?;
    if ledger.guard.is_none() {
        guard::clear(context, &layout);
    }
    let active = ledger.active;
    // What was confirmed under this generation is not on trial again.
    let guard = guard.filter(|_| ledger.confirmed != Some(desired.generation));
    let running = match active {
        Some(active) => Run::load(&layout, active)?,
        None => None,
    };
    let activation = Activation::new(context, layout, desired, running);
    let done = match &desired.release {
        Some(mark) => activation.to(mark, guard),
        None => activation.to_nothing(),
    };
    match done {
        Ok(()) => observe::instance(context, &desired.spec),
        Err(error) => {
            activation.note(LedgerEvent::Failed, &error.message)?;
            Err(error)
        }
    }
}

/// One change of what an instance runs, under its change lock.
pub(crate) struct Activation<'a> {
    context: &'a Context,
    layout: Layout,
    desired: &'a Desired,
    /// How the active release was started.
    running: Option<Run>,
}

/// A release that can be started: every name in it was resolved.
struct Ready<'a> {
    plans: Vec<(&'a Process, Plan)>,
    manager: Box<dyn Manager>,
}

impl<'a> Activation<'a> {
    pub(crate) fn new(
        context: &'a Context,
        layout: Layout,
        desired: &'a Desired,
        running: Option<Run>,
    ) -> Self {
        Self { context, layout, desired, running }
    }

    fn to(&self, mark: &ReleaseMark, guard: Option<Duration>) -> Outcome<()> {
        self.check_staged(mark)?;
        let kind = manager::resolve(self.desired.spec.manager);
        let run = Run::new(self.desired.clone(), kind, run::secrets_hash(&self.layout, mark.id)?);
        // What runs needs nothing from the host any more, so nothing that is missing there may keep it from being told.
        if self.is_already(mark, &run)? {
            run.store(&self.layout, mark.id)?;
            return self.note(LedgerEvent::Proven, "it was active already");
        }
        let ready = self.resolve(mark, kind)?;
        if let Some(limit) = guard {
            guard::arm(self.context, &self.layout, self.desired, self.running.as_ref(), kind, limit)?;
        }
        self.change(mark, &run, &ready)?;
        self.note(LedgerEvent::Proven, &format!("{} processes", ready.plans.len()))
    }

    /// Runs a release as it was run before, unless it still does.
    pub(crate) fn back(&self, run: &Run) -> Outcome<()> {
        let mark =
            self.desired.release.as_ref().ok_or_else(|| host("what is to be gone back to has no release"))?;
        self.check_staged(mark)?;
        if self.is_already(mark, run)? {
            return Ok(());
        }
        let ready = self.resolve(mark, run.manager)?;
        self.change(mark, run, &ready)
    }

    fn check_staged(&self, mark: &ReleaseMark) -> Outcome<()> {
        let root = &self.desired.spec.root;
        let depot = HostDepot::open(self.layout.root()).or_host(|| format!("open {root}"))?;
        match depot.mark(mark.id).or_host(|| "read the release's mark".to_owned())? {
            Some(_) => Ok(()),
            None => Err(host(format!("release {} is not staged on this host: stage it first", mark.label))),
        }
    }

    /// Finds everything that the new processes need, while the old ones still run.
    fn resolve(&self, mark: &ReleaseMark, kind: ManagerKind) -> Outcome<Ready<'a>> {
        let spec = &self.desired.spec;
        let plans = spec
            .processes
            .values()
            .map(|process| Ok((process, Plan::resolve(&self.layout, spec, mark, process)?)))
            .collect::<Outcome<Vec<_>>>()?;
        for (_, plan) in &plans {
            // A secret that is missing is found here, while everything still runs.
            plan.secret_variables()?;
        }
        let manager = manager::of(kind, self.context.site(spec));
        manager.check(&spec.processes.keys().collect::<Vec<_>>())?;
        Ok(Ready { plans, manager })
    }

    /// Stops what runs, switches, starts and proves.
    fn change(&self, mark: &ReleaseMark, run: &Run, ready: &Ready<'_>) -> Outcome<()> {
        let manager = &*ready.manager;
        self.check_room()?;
        self.stop_all(manager, run.manager)?;
        run.store(&self.layout, mark.id)?;
        self.switch(mark)?;
        let ticks = process::ticks_now();
        let starts = ready
            .plans
            .iter()
            .map(|(process, plan)| Ok((*process, plan, self.start(manager, plan)?)))
            .collect::<Outcome<Vec<_>>>()?;
        for (process, plan, (at, position)) in &starts {
            self.context.phase(format!("probing {}", process.name));
            let releases = self.layout.releases();
            let target = Target::new(process, &releases, mark, &[]);
            let start =
                Start { at: *at, ticks, timeout: plan.start_timeout, stderr: (&plan.stderr, *position) };
            probe::prove(manager, &target, &start)?;
        }
        Ok(())
    }

    /// A full disk is found while everything still runs: what is stopped could not be started again, for that has to be written down.
    fn check_room(&self) -> Outcome<()> {
        let free = observe::free_bytes(self.layout.root())?;
        if free >= room::FREE_BYTES_MIN {
            return Ok(());
        }
        Err(host("nothing was stopped, since a switch could not be written down"))
    }

    /// Whether nothing would change: the same release, run the same way, and proven.
    fn is_already(&self, mark: &ReleaseMark, run: &Run) -> Outcome<bool> {
        let is_same = self.running.as_ref().is_some_and(|running| running.is_same_as(run));
        if !is_same || observe::linked(&self.layout)? != Some(mark.id) {
            return Ok(false);
        }
        Ok(observe::instance(self.context, &self.desired.spec)?.proven() == Some(mark.id))
    }

    pub(crate) fn to_nothing(&self) -> Outcome<()> {
        let spec = &self.desired.spec;
        let kind = manager::resolve(spec.manager);
        let manager = manager::of(kind, self.context.site(spec));
        self.stop_all(&*manager, kind)?;
        manager.at_boot(None)?;
        for name in spec.processes.keys() {
            manager.remove(name)?;
        }
        let link = self.layout.current();
        files::remove_if_there(&link)
            .and_then(|()| files::sync_parent(&link))
            .or_host(|| format!("remove the link {}", link.display()))?;
        ledger::update(&self.layout, |ledger| {
            let was = ledger.active.take();
            ledger.previous = was.or(ledger.previous);
            ledger::note(
                ledger,
                Timestamp::now(),
                LedgerEvent::Deactivated,
                was,
                self.desired.generation,
                "",
            );
            Ok(())
        })
    }

    /// Stops what the active release runs, as it was started, and whatever of the new one's names may run. What the new one does not
    /// have is removed.
    fn stop_all(&self, manager: &dyn Manager, kind: ManagerKind) -> Outcome<()> {
        let mut stopped = BTreeSet::new();
        if let Some(run) = &self.running {
            let (old_spec, old_mark) = (&run.desired.spec, run.desired.release.as_ref());
            let old_manager = manager::of(run.manager, self.context.site(old_spec));
            for (name, process) in old_spec.processes.iter().rev() {
                self.stop(&*old_manager, old_spec, old_mark, process)?;
                let goes_on = run.manager == kind && self.desired.spec.processes.contains_key(name);
                if !goes_on || self.desired.release.is_none() {
                    old_manager.remove(name)?;
                }
                if run.manager == kind {
                    stopped.insert(name);
                }
            }
        }
        let rest = self.desired.spec.processes.iter().rev().filter(|(name, _)| !stopped.contains(name));
        for (_, process) in rest {
            self.stop(manager, &self.desired.spec, None, process)?;
        }
        Ok(())
    }

    fn stop(
        &self,
        manager: &dyn Manager,
        spec: &InstanceSpec,
        mark: Option<&ReleaseMark>,
        process: &Process,
    ) -> Outcome<()> {
        let before = match manager.state(&process.name)? {
            Live::Running(identity) => Some(identity),
            Live::Starting | Live::Stopped | Live::Ended { .. } => None,
        };
        self.context.phase(format!("stopping {}", process.name));
        let leads_group = before.is_some_and(|identity| {
            process::Stat::of(identity.pid).is_some_and(|stat| stat.group == identity.pid)
        });
        if let (Some(identity), Some(mark), Some(_)) = (before, mark, &process.stop_argv) {
            self.stop_by_command(spec, mark, process, identity)?;
        }
        manager.stop(&process.name, process.stop_timeout)?;
        let Some(identity) = before else { return Ok(()) };
        if identity.is_alive() {
            return Err(host(format!(
                "process {} was stopped and is still alive: process {} ({}). Nothing else is done on this host",
                process.name,
                identity.pid,
                process::command_line(identity.pid)
            )));
        }
        if leads_group {
            supervise::end_rest_of_group(identity.pid, process.stop_timeout)
                .or_host(|| format!("end what process {} left behind", process.name))?;
        }
        Ok(())
    }

    /// Runs the process's own stop command, and believes it only when the process is gone.
    fn stop_by_command(
        &self,
        spec: &InstanceSpec,
        mark: &ReleaseMark,
        process: &Process,
        identity: Identity,
    ) -> Outcome<()> {
        let plan = Plan::resolve(&self.layout, spec, mark, process)?;
        let Some(argv) = &plan.stop_argv else { return Ok(()) };
        let shown = argv.join(" ");
        let environment = plan.environment()?;
        let step = Step {
            argv,
            directory: Some(&plan.directory),
            environment: &environment,
            account: plan.account.as_ref(),
            timeout: process.stop_timeout,
        };
        // A stop that was begun is finished, also when the controller has gone.
        let ended = command::run(&step, &AtomicBool::new(false), &mut |stream, line| {
            self.context.line(Some(&process.name), stream, line);
        });
        let deadline = Instant::now() + process.stop_timeout;
        let gone =
            poll::until(poll::PROCESS_INTERVAL, deadline, || Ok((!identity.is_alive()).then_some(())))?;
        if gone.is_some() {
            return Ok(());
        }
        let (how, output) = match ended {
            Ok(ended) => (command::ended_how(ended.status), ended.last_lines),
            Err(error) => (format!("failed: {error}"), error.into_last_lines()),
        };
        let mut error = host(format!(
            "the stop command of process {} (`{shown}`) {how}, and the process is still alive after {}: process {} ({}). Nothing else \
             is done on this host; mend the stop command, or stop the process by hand",
            process.name,
            human_duration(process.stop_timeout),
            identity.pid,
            process::command_line(identity.pid)
        ));
        error.output = output;
        Err(error)
    }

    /// Points `current` to the release, and remembers it.
    fn switch(&self, mark: &ReleaseMark) -> Outcome<()> {
        self.context.phase("switching");
        let link = self.layout.current();
        let is_link = fs::symlink_metadata(&link).map_or(true, |metadata| metadata.is_symlink());
        if !is_link {
            return Err(host(format!(
                "{} is not a link, so it is not greenlight's: move it away, or give the service another root",
                link.display()
            )));
        }
        let target = Path::new("releases").join(mark.id.to_string());
        files::link_atomically(&link, &target).or_host(|| format!("switch {}", link.display()))?;
        ledger::update(&self.layout, |ledger| {
            if ledger.active != Some(mark.id) {
                ledger.previous = ledger.active.or(ledger.previous);
                ledger.active = Some(mark.id);
            }
            let (id, generation) = (Some(mark.id), self.desired.generation);
            ledger::note(ledger, Timestamp::now(), LedgerEvent::Switched, id, generation, mark.label.clone());
            Ok(())
        })
    }

    /// Starts a process; when that was, and where its standard error was then.
    fn start(&self, manager: &dyn Manager, plan: &Plan) -> Outcome<(Instant, logs::Position)> {
        if let Some(port) = plan.port
            && let Some(listener) = ports::listener(port)?
        {
            return Err(host(format!(
                "process {} cannot be started: its port {port} is held by {}",
                plan.process,
                listener.who()
            )));
        }
        self.context.phase(format!("starting {}", plan.process));
        let position =
            logs::end_of(&plan.stderr).or_host(|| format!("look at the log {}", plan.stderr.display()))?;
        let at = Instant::now();
        manager.start(plan)?;
        Ok((at, position))
    }

    fn note(&self, event: LedgerEvent, detail: &str) -> Outcome<()> {
        let release = self.desired.release.as_ref().map(|mark| mark.id);
        ledger::update(&self.layout, |ledger| {
            ledger::note(ledger, Timestamp::now(), event, release, self.desired.generation, detail);
            Ok(())
        })
    }
}

/// Takes a proven release as the last good one.
pub(crate) fn confirm(
    context: &Context,
    spec: &InstanceSpec,
    release: ReleaseId,
    generation: Generation,
    rollout: &RolloutId,
) -> Outcome<InstanceReport> {
    let layout = Layout::new(&spec.root);
    let _change = Change::begin(&layout, "confirming")?;
    let report = observe::instance(context, spec)?;
    ledger::check_claim(&report.ledger, rollout, Timestamp::now())?;
    if report.ledger.generation != generation {
        return Err(host(format!(
            "generation {generation} cannot be confirmed: the host is at generation {}",
            report.ledger.generation
        )));
    }
    if let Some(entry) = report.ledger.went_back() {
        // The release did nothing wrong: it may be activated again.
        return Err(passing(format!("the host went back by itself: {}", entry.detail)));
    }
    if let Some(why) = report.why_not_proven(release) {
        return Err(crate::failure::release(format!(
            "release {} cannot be confirmed: {why}",
            release.short()
        )));
    }
    ledger::update(&layout, |ledger| {
        if ledger.confirmed != Some(generation) {
            ledger.last_good = Some(release);
            ledger.confirmed = Some(generation);
            ledger::note(ledger, Timestamp::now(), LedgerEvent::Confirmed, Some(release), generation, "");
        }
        ledger.guard = None;
        Ok(())
    })?;
    guard::clear(context, &layout);
    observe::instance(context, spec)
}
