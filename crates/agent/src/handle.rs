//! Which part answers which request.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use greenlight_depot::host::HostDepot;
use greenlight_link::message::{Reply, Request};
use greenlight_model::Timestamp;
use greenlight_model::host::{HostReport, InstanceSpec, LedgerEvent};
use greenlight_model::id::{ReleaseId, RolloutId};

use crate::account::Account;
use crate::activate;
use crate::charter;
use crate::command::{self, RunError, Step};
use crate::context::Context;
use crate::drift;
use crate::failure::{OrHost as _, Outcome, host, passing};
use crate::files;
use crate::guard;
use crate::layout::Layout;
use crate::lease;
use crate::ledger::{self, Change};
use crate::logs;
use crate::migrate;
use crate::observe;
use crate::preflight;
use crate::sample;
use crate::smoke;
use crate::socket;
use crate::stage::{Piece, Stage};

/// Does what is asked.
pub(crate) fn handle(context: &Context, request: &Request, pieces: &Receiver<Piece>) -> Outcome<Reply> {
    match request {
        Request::Observe { specs } => {
            let mut report = Box::new(observe::observe(context, specs)?);
            rearm(context, specs, &mut report)?;
            Ok(Reply::Observed { at: Timestamp::now(), report })
        }
        Request::Preflight { spec, requires, release_bytes, release, identity, secrets } => {
            let (release_bytes, release) = (*release_bytes, *release);
            let asked = preflight::Asked { spec, requires, release_bytes, release, identity, secrets };
            let checks = preflight::check(context, &asked);
            Ok(Reply::Checked { at: Timestamp::now(), checks })
        }
        Request::Compare { spec, release, requires } => {
            let checks = drift::check(context, spec, release.as_ref(), requires);
            Ok(Reply::Checked { at: Timestamp::now(), checks })
        }
        Request::Claim { spec, claim, charter } => {
            let layout = Layout::new(&spec.root);
            let granted = ledger::update(&layout, |ledger| ledger::grant(ledger, claim, Timestamp::now()))?;
            if let Some(charter) = charter {
                charter::keep(&layout, charter)?;
            }
            Ok(Reply::Claimed(granted))
        }
        Request::Charter { spec } => charter::load(&Layout::new(&spec.root)).map(Reply::Charter),
        Request::Unclaim { spec, rollout } => {
            let layout = Layout::new(&spec.root);
            ledger::update(&layout, |ledger| {
                ledger::release(ledger, rollout);
                Ok(Reply::Done)
            })
        }
        Request::Stage { spec, release, rollout, secrets } => {
            let stage = Stage { spec, mark: release, rollout, secrets };
            stage.run(context, pieces).map(|()| Reply::Done)
        }
        Request::Smoke { spec, release } => smoke::smoke(context, spec, release).map(|()| Reply::Done),
        Request::Migrate { spec, release, migration, phase, is_lossy, rollout } => {
            let wanted = migrate::Wanted { migration, phase: *phase, is_lossy: *is_lossy, rollout };
            migrate::migrate(context, spec, release, &wanted).map(|()| Reply::Done)
        }
        Request::Activate { desired, guard } => {
            activate::activate(context, desired, *guard).map(|report| Reply::Instance(Box::new(report)))
        }
        Request::Confirm { spec, release, generation, rollout } => {
            let report = activate::confirm(context, spec, *release, *generation, rollout)?;
            Ok(Reply::Instance(Box::new(report)))
        }
        Request::Prune { spec, keep, keep_releases, rollout } => prune(spec, keep, *keep_releases, rollout),
        Request::Socket { path, input, timeout } => socket::ask(path, input, *timeout).map(Reply::Output),
        Request::Lease { path, what, lease } => lease::set(path, what, lease).map(|()| Reply::Done),
        Request::Logs { spec, process, stream, lines, follow } => {
            logs::show(context, spec, process.as_ref(), *stream, *lines, *follow).map(|()| Reply::Done)
        }
        Request::Sample { specs, every, during } => {
            sample::sample(context, specs, *every, *during).map(|()| Reply::Done)
        }
        Request::Exec { argv, directory, timeout } => exec(context, argv, directory.as_deref(), *timeout),
    }
}

/// A look at a guard whose timer is gone starts it again, and says what has become of it.
fn rearm(context: &Context, specs: &[InstanceSpec], report: &mut HostReport) -> Outcome<()> {
    for spec in specs {
        let Some(seen) = report.instances.get_mut(&spec.service) else { continue };
        let Some(lost) = seen.ledger.guard.as_mut().and_then(|guard| guard.lost.as_mut()) else { continue };
        match guard::rearm(context, &Layout::new(&spec.root)) {
            Ok(()) => *seen = observe::instance(context, spec)?,
            Err(error) => lost.push_str(&format!(", and it cannot be started again: {}", error.message)),
        }
    }
    Ok(())
}

fn prune(
    spec: &InstanceSpec,
    keep: &std::collections::BTreeSet<ReleaseId>,
    keep_releases: u32,
    rollout: &RolloutId,
) -> Outcome<Reply> {
    let layout = Layout::new(&spec.root);
    let _change = Change::begin(&layout, "pruning")?;
    let ledger = ledger::load(&layout)?;
    ledger::check_claim(&ledger, rollout, Timestamp::now())?;
    let depot = HostDepot::open(layout.root()).or_host(|| format!("open {}", spec.root))?;
    let mut kept = keep.clone();
    kept.extend(
        [ledger.active, ledger.previous, ledger.last_good, observe::linked(&layout)?].into_iter().flatten(),
    );
    kept.extend(ledger.guard.and_then(|guard| guard.back_to));
    let newest = usize::try_from(keep_releases).unwrap_or(usize::MAX);
    let removed = depot.prune(&kept, newest).or_host(|| "prune releases".to_owned())?;
    for id in &removed {
        for path in [layout.secrets(*id), layout.run(*id)] {
            files::remove_if_there(&path).or_host(|| format!("remove {}", path.display()))?;
        }
    }
    if !removed.is_empty() {
        ledger::update(&layout, |ledger| {
            let names: Vec<String> = removed.iter().map(|id| id.short()).collect();
            let generation = ledger.generation;
            ledger::note(ledger, Timestamp::now(), LedgerEvent::Pruned, None, generation, names.join(" "));
            Ok(())
        })?;
    }
    Ok(Reply::Pruned(removed))
}

fn exec(context: &Context, argv: &[String], directory: Option<&str>, timeout: Duration) -> Outcome<Reply> {
    let account = Account::own()?;
    let environment: BTreeMap<String, String> = [
        ("PATH", command::PATH),
        ("HOME", &account.home),
        ("USER", &account.name),
        ("LOGNAME", &account.name),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    let step =
        Step { argv, directory: directory.map(Path::new), environment: &environment, account: None, timeout };
    match command::run(&step, &context.cancelled, &mut |stream, line| context.line(None, stream, line)) {
        Ok(ended) => Ok(Reply::Exited { code: ended.status.code() }),
        Err(error @ RunError::Disconnected { .. }) => Err(passing(error.to_string())),
        Err(error) => Err(host(error.to_string())),
    }
}
