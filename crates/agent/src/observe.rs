//! What an instance is now: read from the host, nothing remembered, nothing changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;

use greenlight_depot::host::HostDepot;
use greenlight_model::host::{
    Answer, HostReport, InstanceReport, InstanceSpec, ProcessReport, ProcessState, ReleaseMark,
};
use greenlight_model::id::ReleaseId;

use crate::context::Context;
use crate::facts;
use crate::failure::{OrHost as _, Outcome};
use crate::guard;
use crate::layout::Layout;
use crate::ledger;
use crate::logs::{self, Position};
use crate::manager::{self, Live};
use crate::probe::{self, Target};
use crate::process::Identity;
use crate::run::Run;

/// How many lines of its standard error tell why a process ended.
const WHY_LINES_MAX: usize = 3;

/// Looks at every instance.
pub(crate) fn observe(context: &Context, specs: &[InstanceSpec]) -> Outcome<HostReport> {
    let facts = facts::gather()?;
    let mut instances = BTreeMap::new();
    for spec in specs {
        instances.insert(spec.service.clone(), instance(context, spec)?);
    }
    Ok(HostReport { facts, instances })
}

/// Looks at one instance: its processes as they were started, not as the fleet file would have them by now.
pub(crate) fn instance(context: &Context, spec: &InstanceSpec) -> Outcome<InstanceReport> {
    let layout = Layout::new(&spec.root);
    let mut ledger = ledger::load(&layout)?;
    if let Some(guard) = &mut ledger.guard {
        guard.lost = guard::lost(&layout, guard).unwrap_or_else(|error| Some(error.message));
    }
    let linked = linked(&layout)?;
    let marks = staged_marks(&layout)?;
    let run = match ledger.active {
        Some(active) => Run::load(&layout, active)?,
        None => None,
    };
    let (running, kind) = match &run {
        Some(run) => (&run.desired.spec, run.manager),
        None => (spec, spec.manager),
    };
    let manager = manager::of(kind, context.site(spec));
    let others: Vec<ReleaseMark> = marks.values().cloned().collect();
    let mark =
        run.as_ref().and_then(|run| run.desired.release.clone()).or_else(|| marks.get(&linked?).cloned());
    let releases = layout.releases();
    let mut processes = BTreeMap::new();
    for (name, process) in &running.processes {
        let live = manager.state(name).unwrap_or_else(|error| Live::Ended { why: error.message });
        let state = state_of(live, &layout.under_root(&process.stderr));
        let answer = match (&state, &mark) {
            (ProcessState::Running { pid, .. }, Some(mark)) => {
                let target = Target::new(process, &releases, mark, &others);
                match Identity::of(*pid) {
                    Some(identity) => probe::look_past_hiccups(&target, identity),
                    None => Answer::None { why: "it has just ended".to_owned() },
                }
            }
            (ProcessState::Running { .. }, None) => {
                Answer::None { why: "it runs, but no release was activated here".to_owned() }
            }
            _ => Answer::None { why: "it does not run".to_owned() },
        };
        let profile = running.profiles.get(name).cloned();
        processes.insert(name.clone(), ProcessReport { state, answer, profile });
    }
    let disk_free_bytes = free_bytes(layout.root())?;
    Ok(InstanceReport { ledger, linked, staged: marks.into_keys().collect(), processes, disk_free_bytes })
}

fn state_of(live: Live, stderr: &Path) -> ProcessState {
    match live {
        Live::Running(identity) => match identity.started_at() {
            Ok(started_at) => ProcessState::Running { pid: identity.pid, started_at },
            Err(error) => ProcessState::Failed { why: format!("its start time cannot be read: {error}") },
        },
        Live::Starting => ProcessState::Failed { why: "it is being started".to_owned() },
        Live::Stopped => ProcessState::Stopped,
        Live::Ended { mut why } => {
            let lines = logs::last_lines_since(stderr, Position::default(), WHY_LINES_MAX);
            match lines {
                Ok(lines) if lines.is_empty() => {}
                Ok(lines) => why.push_str(&format!("; it last said: {}", lines.join(" | "))),
                Err(error) => why.push_str(&format!("; its log cannot be read: {error}")),
            }
            ProcessState::Failed { why }
        }
    }
}

/// The release that the `current` link points to; none when there is no link, or it points elsewhere.
pub(crate) fn linked(layout: &Layout) -> Outcome<Option<ReleaseId>> {
    let link = layout.current();
    match fs::read_link(&link) {
        Ok(target) => Ok(target.file_name().and_then(|name| name.to_str()?.parse().ok())),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => {
            Ok(None)
        }
        Err(error) => Err(error).or_host(|| format!("read the link {}", link.display())),
    }
}

/// Opens the depot of a service that has one. Looking must not create anything.
pub(crate) fn depot(layout: &Layout) -> Outcome<Option<HostDepot>> {
    if !layout.state().join("staged").exists() {
        return Ok(None);
    }
    HostDepot::open(layout.root()).map(Some).or_host(|| format!("open {}", layout.root().display()))
}

fn staged_marks(layout: &Layout) -> Outcome<BTreeMap<ReleaseId, ReleaseMark>> {
    let Some(depot) = depot(layout)? else { return Ok(BTreeMap::new()) };
    let staged: BTreeSet<ReleaseId> =
        depot.staged().or_host(|| "read which releases are staged".to_owned())?;
    let mut marks = BTreeMap::new();
    for id in staged {
        if let Some(mark) = depot.mark(id).or_host(|| format!("read the mark of release {}", id.short()))? {
            marks.insert(id, mark);
        }
    }
    Ok(marks)
}

/// What the file system has left for us where `path` is, or will be.
pub(crate) fn free_bytes(path: &Path) -> Outcome<u64> {
    let existing = existing_ancestor(path);
    let stat =
        rustix::fs::statvfs(existing).or_host(|| format!("look at the disk under {}", existing.display()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The directory itself, or the nearest one above it that is there.
pub(crate) fn existing_ancestor(path: &Path) -> &Path {
    path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"))
}
