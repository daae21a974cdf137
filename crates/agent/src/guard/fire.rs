//! What happens when a guard fires: the instance goes back to what it ran.
//!
//! Guarantees: it is done under the change lock, so never in the middle of an activation; the ledger tells afterwards that the host went
//! back, or why it could not. The generation stays: the rollout may try again.

use std::io::{self, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::time::Duration;

use greenlight_link::message::AgentError;
use greenlight_model::Timestamp;
use greenlight_model::host::{Desired, Guard, Ledger, LedgerEvent};
use greenlight_model::id::Generation;
use greenlight_model::quantity::human_duration;
use rustix::fs::Mode;

use super::timer::WAITING;
use super::{RUN, Token, remove};
use crate::activate::Activation;
use crate::context::Context;
use crate::failure::{OrHost as _, Outcome, host};
use crate::layout::Layout;
use crate::ledger::{self, Change};
use crate::observe;
use crate::process;
use crate::run::Run;
use crate::supervise;

/// How long it waits for another change of the instance to end. Each step of one has its own time-out, so one that goes on for longer
/// has stopped to work.
const CHANGE_WAIT: Duration = Duration::from_secs(600);

/// The guard's own process: waits for `after` where it is its own timer, and then goes back, unless the activation was confirmed or
/// replaced meanwhile. This is what `greenlight agent guard` does.
///
/// `root` is the service's directory on the host; `generation` and `armed_at_ms` tell which guard it is.
///
/// # Errors
/// When the host could not go back. The ledger says so too, where it can be written.
pub fn guard(
    root: &Path,
    generation: Generation,
    armed_at_ms: u64,
    after: Option<Duration>,
) -> Result<(), AgentError> {
    let layout = Layout::new(root);
    let boot = process::boot_id().or_host(|| "read the boot id".to_owned())?;
    let token = Token { generation, armed_at_ms, boot };
    rustix::process::umask(Mode::from_raw_mode(0o022));
    if let Some(after) = after {
        detach()?;
        let (_never_used, never) = channel::<()>();
        // The monotonic clock, and nothing is ever sent.
        let _timeout = never.recv_timeout(after);
    }
    fire(&own_context()?, &layout, &token)
}

/// What the host's manager runs at a boot, `greenlight agent rearm`: a guard that was armed before gets its time again.
///
/// # Errors
/// When its timer cannot be started.
pub fn rearm(root: &Path) -> Result<(), AgentError> {
    super::rearm(&own_context()?, &Layout::new(root))
}

/// Nobody listens to it, and nobody takes it back.
fn own_context() -> Outcome<Context> {
    let program = std::env::current_exe().or_host(|| "find the agent's own program".to_owned())?;
    Ok(Context { events: Box::new(|_| {}), cancelled: Arc::new(AtomicBool::new(false)), program })
}

/// Leaves the agent that started it: a session of its own, and no pipe to anybody.
fn detach() -> Outcome<()> {
    supervise::begin_session()?;
    std::env::set_current_dir("/").or_host(|| "enter /".to_owned())?;
    let mut stdout = io::stdout().lock();
    // An agent that died meanwhile does not hear it; the ledger does not have the guard then, and nothing will happen.
    drop(writeln!(stdout, "{WAITING}").and_then(|()| stdout.flush()));
    drop(stdout);
    supervise::detach_outputs()
}

fn fire(context: &Context, layout: &Layout, token: &Token) -> Outcome<()> {
    // Before anything is created: the service may have been removed.
    if token.find(&ledger::load(layout)?).is_none() {
        return Ok(());
    }
    let change = match Change::begin_within(layout, "going back by itself", CHANGE_WAIT) {
        Ok(change) => change,
        Err(error) => return end(layout, token, Err(error)),
    };
    let ledger = ledger::load(layout)?;
    let Some(guard) = token.find(&ledger) else { return Ok(()) };
    let done = end(layout, token, go_back(context, layout, &ledger, guard));
    let removed = remove(layout);
    drop(change);
    done.and(removed)
}

/// Says in the ledger how it ended. It is not tried again: what failed once is for a person to see.
fn end(layout: &Layout, token: &Token, done: Outcome<()>) -> Outcome<()> {
    ledger::update(layout, |ledger| {
        let Some(guard) = token.find(ledger).cloned() else { return Ok(()) };
        ledger.guard = None;
        let mut why = format!("not confirmed within {}", human_duration(guard.limit));
        if let Some(rearmed) = &guard.rearmed {
            why.push_str(&format!(", which began anew when {rearmed}"));
        }
        let (event, detail) = match &done {
            Ok(()) => (LedgerEvent::TurnedBack, why),
            Err(error) => {
                (LedgerEvent::Failed, format!("{why}, and it could not go back by itself: {}", error.message))
            }
        };
        ledger::note(ledger, Timestamp::now(), event, guard.back_to, guard.generation, detail);
        Ok(())
    })?;
    done
}

/// How what the instance is switched to was started.
pub(super) fn running(layout: &Layout, ledger: &Ledger) -> Outcome<Option<Run>> {
    // An activation that was cut between the two has switched the link and not the ledger.
    match ledger.active.or(observe::linked(layout)?) {
        Some(release) => Run::load(layout, release),
        None => Ok(None),
    }
}

/// Runs what ran before the activation, as it ran.
fn go_back(context: &Context, layout: &Layout, ledger: &Ledger, guard: &Guard) -> Outcome<()> {
    let rollout =
        ledger.rollout.clone().ok_or_else(|| host("the ledger does not say which rollout it was"))?;
    let running = running(layout, ledger)?;
    let Some(release) = guard.back_to else {
        // It never came to run anything here.
        let Some(run) = &running else { return Ok(()) };
        let spec = run.desired.spec.clone();
        let desired = Desired { generation: guard.generation, rollout, release: None, spec };
        return Activation::new(context, layout.clone(), &desired, running.clone()).to_nothing();
    };
    let back = Run::load_from(&layout.guard().join(RUN))?
        .ok_or_else(|| host(format!("how release {} was run is not known any more", release.short())))?;
    let desired = Desired { generation: guard.generation, rollout, ..back.desired.clone() };
    Activation::new(context, layout.clone(), &desired, running).back(&back)
}
