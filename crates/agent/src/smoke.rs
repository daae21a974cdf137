//! A start of the staged release on another port, outside every manager. The live process is looked at before and after, and never
//! touched: only the children that are started here are ever signalled.

use std::fs::{self, File};
use std::path::Path;
use std::process::Child;
use std::time::Instant;

use greenlight_link::message::Stream;
use greenlight_model::fleet::{Process, Smoke};
use greenlight_model::host::{InstanceSpec, ReleaseMark};

use crate::command::{self, Outputs};
use crate::context::Context;
use crate::failure::{OrHost as _, Outcome, host, release};
use crate::files;
use crate::layout::Layout;
use crate::ledger::Change;
use crate::logs::Position;
use crate::manager::{self, Live, Manager};
use crate::observe;
use crate::plan::{Place, Plan};
use crate::ports;
use crate::probe::{self, Start, Target};
use crate::process::{self, Identity};
use crate::run::Run;
use crate::strays;
use crate::supervise;

/// Starts each process that has a smoke port, proves it there, and stops it.
pub(crate) fn smoke(context: &Context, spec: &InstanceSpec, mark: &ReleaseMark) -> Outcome<()> {
    let layout = Layout::new(&spec.root);
    let _change = Change::begin(&layout, &format!("trying {} out", mark.label))?;
    let depot = observe::depot(&layout)?;
    let staged = match &depot {
        Some(depot) => depot.mark(mark.id).or_host(|| "read the release's mark".to_owned())?,
        None => None,
    };
    if staged.is_none() {
        return Err(host(format!("release {} is not staged on this host: stage it first", mark.label)));
    }
    let active = crate::ledger::load(&layout)?.active;
    let kind = match active.map(|active| Run::load(&layout, active)).transpose()?.flatten() {
        Some(run) => run.manager,
        None => spec.manager,
    };
    let manager = manager::of(kind, context.site(spec));
    for process in spec.processes.values() {
        let Some(smoke) = &process.smoke else { continue };
        context.phase(format!("trying {} out on port {}", process.name, smoke.port));
        let before = live(&*manager, process)?;
        let tried = try_out(context, &layout, spec, mark, process, smoke);
        let after = live(&*manager, process)?;
        if before != after {
            return Err(host(format!(
                "the live process {} changed during the smoke start: {} before, {} after. The smoke start did not touch it",
                process.name,
                shown(before),
                shown(after)
            )));
        }
        tried?;
        context.line(
            Some(&process.name),
            Stream::Stdout,
            format!("the live process is unchanged: {}", shown(after)),
        );
    }
    Ok(())
}

fn live(manager: &dyn Manager, process: &Process) -> Outcome<Option<Identity>> {
    Ok(match manager.state(&process.name)? {
        Live::Running(identity) => Some(identity),
        Live::Starting | Live::Stopped | Live::Ended { .. } => None,
    })
}

fn shown(identity: Option<Identity>) -> String {
    identity.map_or("none".to_owned(), |identity| format!("process {}", identity.pid))
}

fn try_out(
    context: &Context,
    layout: &Layout,
    spec: &InstanceSpec,
    mark: &ReleaseMark,
    process: &Process,
    smoke: &Smoke,
) -> Outcome<()> {
    // An agent that was killed during an earlier smoke start has left it behind.
    for stray in strays::find(layout, &spec.service, &process.name, Some(smoke.port))? {
        supervise::end(stray, process.stop_timeout)
            .or_host(|| format!("end an earlier smoke start of process {} ({})", process.name, stray.pid))?;
    }
    if let Some(listener) = ports::listener(smoke.port)? {
        let (port, who) = (smoke.port, listener.who());
        return Err(host(format!("the smoke port {port} of process {} is held by {who}", process.name)));
    }
    let directory = layout.smoke();
    files::create_directory(&directory, 0o700).or_host(|| format!("create {}", directory.display()))?;
    let output = |kind: &str| directory.join(format!("{}.{kind}", process.name));
    let place = Place { port: Some(smoke.port), stdout: output("stdout"), stderr: output("stderr") };
    let plan = Plan::resolve_at(layout, spec, mark, process, place)?;
    let create = |path: &Path| File::create(path).or_host(|| format!("create {}", path.display()));
    let outputs = Outputs::files(create(&plan.stdout)?, create(&plan.stderr)?);
    let environment = plan.environment()?;
    let (at, ticks) = (Instant::now(), process::ticks_now());
    let mut child =
        command::spawn(&plan.argv, Some(&plan.directory), &environment, plan.account.as_ref(), outputs)
            .map_err(|error| release(format!("process {} could not be started: {error}", process.name)))?;

    let releases = layout.releases();
    let target = Target { port: Some(smoke.port), ..Target::new(process, &releases, mark, &[]) };
    let start = Start { at, ticks, timeout: plan.start_timeout, stderr: (&plan.stderr, Position::default()) };
    let proven = probe::prove_by(&mut || state_of(context, &mut child), &target, &start);
    let stopped = stop(&mut child, &plan);
    fs::remove_dir_all(&directory).or_host(|| format!("remove {}", directory.display()))?;
    proven?;
    stopped
}

fn state_of(context: &Context, child: &mut Child) -> Outcome<Live> {
    if context.is_cancelled() {
        return Ok(Live::Ended { why: "the controller's connection ended".to_owned() });
    }
    Ok(match Identity::of(child.id()) {
        Some(identity) => Live::Running(identity),
        None => Live::Ended { why: "it ended".to_owned() },
    })
}

/// Stops the smoke process with all that it started, and waits until it is gone.
fn stop(child: &mut Child, plan: &Plan) -> Outcome<()> {
    let stopping = || format!("stop the smoke start of process {} ({})", plan.process, child.id());
    match Identity::of(child.id()) {
        Some(identity) => supervise::end(identity, plan.stop_timeout).or_host(stopping)?,
        // It is not collected yet, so its group is still its own.
        None => supervise::end_rest_of_group(child.id(), plan.stop_timeout).or_host(stopping)?,
    }
    child.wait().map(|_| ()).or_host(|| "collect the smoke start".to_owned())
}
