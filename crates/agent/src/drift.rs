//! Whether an instance still is what was released: its link, files, units, processes and their environment. Looks at everything,
//! changes nothing. What cannot be read has drifted.

use std::collections::BTreeMap;
use std::fs;

use greenlight_model::check::Check;
use greenlight_model::host::{Answer, InstanceSpec, ReleaseMark};
use greenlight_model::requirements::Requirements;

use crate::context::Context;
use crate::facts;
use crate::failure::{OrHost as _, Outcome, host};
use crate::layout::Layout;
use crate::manager::{self, Live, Manager};
use crate::observe;
use crate::plan::Plan;
use crate::preflight::{Found, changes, conclude, software, wrong};
use crate::probe::{self, Target};
use crate::process::Identity;
use crate::run::Run;

/// What an operator does about nearly all of it.
const REDEPLOY: &str = "deploy the release again, or find out who changed it";
/// How many variables a message names.
const VARIABLES_SHOWN_MAX: usize = 5;

/// Compares the instance with the release that it should run; none where it should run nothing.
pub(crate) fn check(
    context: &Context,
    spec: &InstanceSpec,
    release: Option<&ReleaseMark>,
    requires: &Requirements,
) -> Vec<Check> {
    let layout = Layout::new(&spec.root);
    let mut checks = vec![conclude("system", system()), conclude("link", link(&layout, release))];
    let Some(release) = release else { return checks };
    checks.extend(changes::local_changes(&layout));
    checks.extend(software::check(spec, requires, &layout, release.id));
    match how_it_runs(&layout, release) {
        Ok(run) => {
            let manager = manager::of(run.manager, context.site(&run.desired.spec));
            for process in run.desired.spec.processes.values() {
                let name = &process.name;
                let plan = Plan::resolve(&layout, &run.desired.spec, release, process);
                checks.push(conclude(
                    format!("unit {name}"),
                    plan.clone().and_then(|plan| unit(&*manager, &plan)),
                ));
                let identity = match manager.state(name) {
                    Ok(Live::Running(identity)) => Ok(identity),
                    Ok(_) => Err(host("it does not run")),
                    Err(error) => Err(error),
                };
                let profile = run.desired.spec.profiles.get(name).map(ToString::to_string);
                let running = identity.clone().and_then(|identity| {
                    let releases = layout.releases();
                    runs(&Target::new(process, &releases, release, &[]), identity, profile.as_deref())
                });
                checks.push(conclude(format!("process {name}"), running));
                let environment = identity.and_then(|identity| environment(&plan?, identity));
                checks.push(conclude(format!("environment {name}"), environment));
            }
        }
        Err(error) => checks.push(conclude("processes", Err(error))),
    }
    checks
}

/// What every host of a service should have in common.
fn system() -> Outcome<Found> {
    let facts = facts::gather()?;
    let found = format!("{} {}", facts.os, facts.architecture);
    Ok(Found::same_everywhere("the same on every host", Ok(found.clone()), found))
}

fn link(layout: &Layout, release: Option<&ReleaseMark>) -> Outcome<Found> {
    let shown = |id: greenlight_model::id::ReleaseId| id.short();
    let expected = release
        .map_or_else(|| "no release".to_owned(), |mark| format!("{} ({})", mark.label, shown(mark.id)));
    let linked = observe::linked(layout)?;
    let found = linked.map_or_else(|| "no release".to_owned(), shown);
    let result = if linked == release.map(|mark| mark.id) { Ok(found) } else { Err(wrong(found, REDEPLOY)) };
    Ok(Found::new(expected, result))
}

fn how_it_runs(layout: &Layout, release: &ReleaseMark) -> Outcome<Run> {
    let run = Run::load(layout, release.id)?;
    run.ok_or_else(|| host(format!("{} was never run here, as far as this host knows", release.label)))
}

/// What the manager of processes goes by, against what the release's definition comes to.
fn unit(manager: &dyn Manager, plan: &Plan) -> Outcome<Found> {
    let expected = "as it was written";
    for (path, text) in manager.written(plan)? {
        let shown = path.display();
        let found = match fs::read_to_string(&path) {
            Ok(found) if found == text => continue,
            Ok(found) => {
                let same = found.lines().zip(text.lines()).take_while(|(one, other)| one == other).count();
                // The line itself may be a secret.
                format!("{shown} differs from line {} on", same + 1)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => format!("{shown} is gone"),
            Err(error) => return Err(error).or_host(|| format!("read {shown}")),
        };
        return Ok(Found::new(expected, Err(wrong(found, REDEPLOY))));
    }
    Ok(Found::new(expected, Ok("it is".to_owned())))
}

fn runs(target: &Target<'_>, identity: Identity, profile: Option<&str>) -> Outcome<Found> {
    let expected = format!("it runs as {}", target.mark.label);
    let under = profile.map(|profile| format!(", under the profile {profile}")).unwrap_or_default();
    let program = identity.program().or_host(|| format!("see the program of process {}", identity.pid))?;
    if program.to_string_lossy().ends_with(" (deleted)") {
        let found =
            format!("process {} runs a program that was replaced since: {}", identity.pid, program.display());
        return Ok(Found::new(expected, Err(wrong(found, "restart it, by deploying the release again"))));
    }
    let result = match probe::look_past_hiccups(target, identity) {
        Answer::Release { release, .. } if release == target.mark.id => {
            Ok(format!("process {}{under}", identity.pid))
        }
        Answer::Release { release, .. } => Err(wrong(format!("it answers as {}", release.short()), REDEPLOY)),
        Answer::Other { said } => Err(wrong(format!("it answers as `{said}`"), REDEPLOY)),
        Answer::None { why } => Err(wrong(why, "see its logs: greenlight logs")),
    };
    Ok(Found::new(expected, result))
}

/// The variables that a process was started with, against those that its release states. Values are never shown.
fn environment(plan: &Plan, identity: Identity) -> Outcome<Found> {
    let expected = "the variables that the fleet file states";
    let bytes = fs::read(format!("/proc/{}/environ", identity.pid))
        .or_host(|| format!("read the environment of process {}", identity.pid))?;
    let found: BTreeMap<&[u8], &[u8]> = bytes
        .split(|byte| *byte == 0)
        .filter_map(|pair| {
            let at = pair.iter().position(|byte| *byte == b'=')?;
            Some((&pair[..at], &pair[at + 1..]))
        })
        .collect();
    if !found.contains_key(b"GREENLIGHT_RELEASE".as_slice()) {
        // Servers that show what they do in the list of processes write over this memory.
        let why = "the process has written over what the kernel shows of it; its unit is what counts";
        return Ok(Found::new(expected, Ok(why.to_owned())));
    }
    // Home and user are the manager's to set, each in its own way.
    let mut all = plan.variables.clone();
    all.extend(plan.secret_variables()?);
    let differing: Vec<&str> = all
        .iter()
        .filter(|(name, value)| found.get(name.as_bytes()) != Some(&value.as_bytes()))
        .map(|(name, _)| name.as_str())
        .collect();
    let result = match differing.len() {
        0 => Ok(format!("all {}", all.len())),
        more => {
            let shown = differing[..more.min(VARIABLES_SHOWN_MAX)].join(", ");
            Err(wrong(
                format!("{more} missing or of another value: {shown}"),
                "restart it, by deploying the release again",
            ))
        }
    };
    Ok(Found::new(expected, result))
}
