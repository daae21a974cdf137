//! The guard: the host's own way back from an activation that nobody confirms.
//!
//! Before an activation stops anything, what runs is written down and a timer is started; a confirmation, or an activation of another
//! generation, stops it again. When it fires, a process of its own takes the instance's change lock and runs what ran before.
//!
//! Guarantees: the ledger says what is armed, and a timer that does not find itself there does nothing; so one that could not be stopped
//! does no harm, and one that was started and not written down neither. Nothing of a guard that was disarmed or has fired is left. The
//! timer runs on the monotonic clock: setting the clock neither hastens nor stops it. A timer that is gone (the machine was booted anew,
//! somebody ended it) is started again with its whole time: at the boot by systemd and supervisord, else by the next look.
//! What it does not do: go back while a host of our own supervision is up and nobody looks, since nothing of ours runs there then.

pub(crate) mod fire;
mod timer;

use std::fs;
use std::io;
use std::time::Duration;

use greenlight_link::message::{AgentError, Stream};
use greenlight_model::Timestamp;
use greenlight_model::fleet::ManagerKind;
use greenlight_model::host::{Desired, Guard, InstanceSpec, Ledger};
use greenlight_model::id::{Generation, ReleaseId, ServiceName};

use self::timer::Timer;
use crate::context::Context;
use crate::failure::{OrHost as _, Outcome, host};
use crate::files;
use crate::layout::Layout;
use crate::ledger::{self, Change};
use crate::manager;
use crate::observe;
use crate::process;
use crate::run::{self, Run};

/// Longest that a guard waits for its confirmation: a day is more than any rollout asks for, and can be added to any clock.
const LIMIT_MAX: Duration = Duration::from_secs(24 * 3600);

/// What stands before the command of a guard that is started at a boot (`greenlight agent rearm`).
const REARM: &str = "rearm";
/// How the instance ran before the activation that is guarded.
const RUN: &str = "run.json";
/// The timer that was started last.
const TIMER: &str = "timer.json";

/// What an armed guard is known by, to its timer and in the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) generation: Generation,
    pub(crate) armed_at_ms: u64,
    pub(crate) boot: String,
}

/// Where a guard's timer is started: beside what runs the service.
struct Keeper {
    service: ServiceName,
    kind: ManagerKind,
}

impl Token {
    /// The token of a guard that is armed now.
    fn now(generation: Generation) -> Outcome<Self> {
        let armed_at_ms = u64::try_from(process::since_boot().as_millis()).unwrap_or(u64::MAX);
        let boot = process::boot_id().or_host(|| "read the boot id".to_owned())?;
        Ok(Self { generation, armed_at_ms, boot })
    }

    /// The guard in the ledger that this stands for.
    fn find<'a>(&self, ledger: &'a Ledger) -> Option<&'a Guard> {
        ledger.guard.as_ref().filter(|guard| {
            guard.generation == self.generation
                && guard.armed_at_ms == self.armed_at_ms
                && guard.boot == self.boot
                && ledger.generation == self.generation
                && ledger.confirmed != Some(self.generation)
        })
    }
}

/// Arms the guard of an activation, before anything is stopped. `running` is how the active release was started, and `kind` what will run
/// the new one. The caller holds the change lock.
pub(crate) fn arm(
    context: &Context,
    layout: &Layout,
    desired: &Desired,
    running: Option<&Run>,
    kind: ManagerKind,
    limit: Duration,
) -> Outcome<()> {
    context.phase("arming the guard");
    let limit = limit.min(LIMIT_MAX);
    let before = ledger::load(layout)?;
    create_directory(layout)?;
    let (back_to, run) = match before.guard.filter(|guard| guard.generation == desired.generation) {
        // Another try goes back to where the first would have.
        Some(guard) => (guard.back_to, Run::load_from(&layout.guard().join(RUN))?),
        None => keep_run(layout, desired, before.active, before.previous, running, kind)?,
    };
    // What will be started has to outlive the timer's own process, so what runs that also runs the timer.
    let keeper = Keeper { service: desired.spec.service.clone(), kind: run.map_or(kind, |run| run.manager) };
    let started = at_boot(context, layout, &keeper, &desired.spec)
        .and_then(|()| start(context, layout, &keeper, desired.generation, back_to, limit, None));
    started.map_err(|error| {
        let why = format!(
            "the guard cannot be armed, so nothing was changed: without it, the host could not go back by itself: {}",
            error.message
        );
        AgentError { message: why, ..error }
    })
}

/// Has the manager look after the guard at each boot from now on.
fn at_boot(context: &Context, layout: &Layout, keeper: &Keeper, spec: &InstanceSpec) -> Outcome<()> {
    let argv = timer::agent_argv(context, layout, REARM)?;
    manager::of(keeper.kind, context.site(spec)).at_boot(Some(&argv))
}

/// Starts a timer and writes into the ledger what it is for. The one before it is stopped.
fn start(
    context: &Context,
    layout: &Layout,
    keeper: &Keeper,
    generation: Generation,
    back_to: Option<ReleaseId>,
    limit: Duration,
    rearmed: Option<String>,
) -> Outcome<()> {
    let fires_at = Timestamp::now()
        .checked_add(limit)
        .or_host(|| "add the guard's limit to the host's clock".to_owned())?;
    let old_timer = Timer::load(layout)?;
    let token = Token::now(generation)?;
    let timer = Timer::start(context, layout, keeper, &token, limit)?;
    let Token { generation, armed_at_ms, boot } = token;
    let noted = timer.store(layout).and_then(|()| {
        ledger::update(layout, |ledger| {
            ledger.guard =
                Some(Guard { generation, back_to, limit, fires_at, boot, armed_at_ms, rearmed, lost: None });
            Ok(())
        })
    });
    if let Err(error) = noted {
        // It would find that it is not in the ledger; but nothing may be left of what was not armed.
        return match timer.stop() {
            Ok(()) => Err(error),
            Err(also) => {
                Err(host(format!("{}; and its timer could not be stopped: {}", error.message, also.message)))
            }
        };
    }
    if let Some(old) = old_timer {
        report(context, old.stop());
    }
    Ok(())
}

/// Starts the timer of an armed guard again, with its whole time, when it is gone. Nothing to do where none is armed, where its timer
/// waits, or while a change is under way, which has its own.
pub(crate) fn rearm(context: &Context, layout: &Layout) -> Outcome<()> {
    let is_lost = |guard: &Option<Guard>| guard.as_ref().map_or(Ok(None), |guard| lost(layout, guard));
    if is_lost(&ledger::load(layout)?.guard)?.is_none() {
        return Ok(());
    }
    let Some(_change) = Change::try_begin(layout, "starting the guard's timer again")? else { return Ok(()) };
    let ledger = ledger::load(layout)?;
    let (Some(guard), Some(why)) = (&ledger.guard, is_lost(&ledger.guard)?) else { return Ok(()) };
    let run = match Run::load_from(&layout.guard().join(RUN))? {
        Some(run) => Some(run),
        None => fire::running(layout, &ledger)?,
    };
    // Without either nothing ran, and nothing was switched to: there is no way back to go.
    let Some(run) = run else { return Ok(()) };
    let keeper = Keeper { service: run.desired.spec.service, kind: run.manager };
    start(context, layout, &keeper, guard.generation, guard.back_to, guard.limit, Some(why))
}

/// Writes down how the instance runs now. Where what is active was brought by this very generation (its guard has fired and could not go
/// back), it is what ran before that.
fn keep_run(
    layout: &Layout,
    desired: &Desired,
    active: Option<ReleaseId>,
    previous: Option<ReleaseId>,
    running: Option<&Run>,
    kind: ManagerKind,
) -> Outcome<(Option<ReleaseId>, Option<Run>)> {
    let is_own = running.is_some_and(|run| run.desired.generation == desired.generation);
    let (back_to, run) = match (active, previous) {
        (Some(_), Some(previous)) if is_own => (Some(previous), Run::load(layout, previous)?),
        (Some(_), None) if is_own => (None, None),
        _ => (active, running.cloned()),
    };
    let run = match (back_to, run) {
        (Some(release), None) => run_of_unknown(layout, desired, release, kind)?,
        (_, run) => run,
    };
    let path = layout.guard().join(RUN);
    match &run {
        Some(run) => run.store_at(&path)?,
        None => files::remove_if_there(&path).or_host(|| format!("remove {}", path.display()))?,
    }
    Ok((back_to, run))
}

/// A release of which nothing tells any more how it was run is run as the new one is to be; none when its tree is gone too, and the guard
/// will say that it cannot go back.
fn run_of_unknown(
    layout: &Layout,
    desired: &Desired,
    release: ReleaseId,
    kind: ManagerKind,
) -> Outcome<Option<Run>> {
    let Some(depot) = observe::depot(layout)? else { return Ok(None) };
    let mark = depot.mark(release).or_host(|| "read the release's mark".to_owned())?;
    let Some(mark) = mark else { return Ok(None) };
    let secrets = run::secrets_hash(layout, release)?;
    Ok(Some(Run::new(Desired { release: Some(mark), ..desired.clone() }, kind, secrets)))
}

/// Stops the timer of a guard that the ledger does not have any more, and removes what belonged to it. That this fails is told and no
/// more: such a timer does nothing. The caller holds the change lock.
pub(crate) fn clear(context: &Context, layout: &Layout) {
    if !layout.guard().exists() {
        return;
    }
    let stopped = Timer::load(layout).and_then(|timer| timer.map_or(Ok(()), |timer| timer.stop()));
    report(context, stopped.and_then(|()| remove(layout)));
}

/// Why what is armed will not fire, when that is so.
pub(crate) fn lost(layout: &Layout, guard: &Guard) -> Outcome<Option<String>> {
    if guard.boot != process::boot_id().or_host(|| "read the boot id".to_owned())? {
        return Ok(Some("the machine was started anew".to_owned()));
    }
    let is_alive = Timer::load(layout)?.map_or(Ok(false), |timer| timer.is_alive())?;
    if is_alive {
        return Ok(None);
    }
    // It may have fired between the two looks.
    let is_still_armed = ledger::load(layout)?.guard.is_some_and(|now| now.armed_at_ms == guard.armed_at_ms);
    Ok(is_still_armed.then(|| "its timer was ended".to_owned()))
}

/// Removes what a guard leaves on the disk.
fn remove(layout: &Layout) -> Outcome<()> {
    let directory = layout.guard();
    match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed
            .and_then(|()| files::sync_parent(&directory))
            .or_host(|| format!("remove {}", directory.display())),
    }
}

fn create_directory(layout: &Layout) -> Outcome<()> {
    let directory = layout.guard();
    files::create_directory(&directory, 0o700).or_host(|| format!("create {}", directory.display()))
}

fn report(context: &Context, result: Outcome<()>) {
    if let Err(error) = result {
        let text = format!("an old guard could not be removed, and will do nothing: {}", error.message);
        context.line(None, Stream::Stderr, text);
    }
}
