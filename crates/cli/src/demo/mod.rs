//! The main job on one machine: three hosts (each a directory with an agent of its own), a router in front with a
//! load of its own, and six rollouts, two of which have to fail.
//!
//! Everything is in one directory below the system's temporary one, on ports that were free; nothing is left unless
//! asked for with `--keep`.

pub(crate) mod application;
mod load;
mod site;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use owo_colors::OwoColorize;
use serde::Serialize;
use serde_json::json;

use crate::args::{self, Consent, Deploy, Global, Overrides, Rollback, Targets};
use crate::commands::deploy;
use crate::demo::load::{Counts, Load};
use crate::demo::site::Site;
use crate::failure::{Exit, Failure};
use crate::printer::Printer;

/// One rollout of the demo and how it came out.
#[derive(Debug, Serialize)]
struct Phase {
    name: &'static str,
    seconds: f64,
    exit: u8,
    expected_exit: u8,
    requests: u64,
    failed: u64,
    canary_errors: u64,
}

pub(crate) fn run(global: &Global, demo: &args::Demo, printer: &Printer) -> Result<Exit, Failure> {
    if let Some(directory) = &demo.stop {
        Site::reopen(directory)?.remove()?;
        printer.result(format!("stopped and removed {}", directory.display()));
        printer.json("demo", json!({ "stopped": directory }));
        return Ok(Exit::Done);
    }
    let story = Printer { narrates: true, ..*printer };
    let began = Instant::now();
    let site = Site::build(&story)?;
    let played = play(global, &site, &story);
    let kept = demo.keep && played.is_ok();
    if !kept {
        // What the demo did is told even when tidying up fails, and the other way round.
        let removed = site.remove();
        let (phases, counts) = played?;
        removed?;
        return Ok(tell(&phases, &counts, began, printer));
    }
    let (phases, counts) = played?;
    let exit = tell(&phases, &counts, began, printer);
    printer.progress(format!(
        "\nkept running; the router answers on http://{}/. To play:\n  cd {}\n  {} status\n  {} demo --stop {}",
        site.router_address,
        site.directory.display(),
        site.program.display(),
        site.program.display(),
        site.directory.display()
    ));
    Ok(exit)
}

/// The six rollouts, with the load on them from the second on.
fn play(global: &Global, site: &Site, story: &Printer) -> Result<(Vec<Phase>, Counts), Failure> {
    let interrupted = watch_for_interrupt()?;
    let global =
        Global { file: Some(site.directory.join(crate::project::FLEET_FILE)), json: false, ..global.clone() };
    let mut phases = Vec::new();
    let mut phase =
        |name: &'static str, load: Option<&Load>, expected: Exit, back: bool| -> Result<(), Failure> {
            if interrupted.load(Ordering::SeqCst) {
                return Err(Failure::new(Exit::Held, "interrupted; the demo was taken down again"));
            }
            let before = load.map(Load::counts).unwrap_or_default();
            let began = Instant::now();
            let exit = roll(&global, back, story)?;
            let after = load.map(Load::counts).unwrap_or_default();
            phases.push(Phase {
                name,
                seconds: began.elapsed().as_secs_f64(),
                exit: exit.code(),
                expected_exit: expected.code(),
                requests: after.requests - before.requests,
                failed: after.failed - before.failed,
                canary_errors: after.canary_errors - before.canary_errors,
            });
            Ok(())
        };
    heading(story, "1. v1 goes out to three hosts that run nothing yet");
    site.commit("v1", "v1", "the first page")?;
    phase("deploy v1", None, Exit::Done, false)?;

    let cannot =
        |error: std::io::Error| Failure::new(Exit::Failed, format!("cannot start the load: {error}"));
    let load = Load::start(site.router_address).map_err(cannot)?;
    heading(story, "2. v2 goes out wave by wave, while a load counts every request");
    site.commit("v2", "v2", "the second page")?;
    phase("deploy v2", Some(&load), Exit::Done, false)?;
    heading(
        story,
        "3. v3 starts, but answers as something else: its probe finds that before a request reaches it",
    );
    site.commit("v3", "v2-and-a-half", "the third page")?;
    phase("deploy v3, which is broken", Some(&load), Exit::Failed, false)?;
    heading(story, "4. one command goes back to the last release before v2 that was healthy everywhere");
    phase("rollback to v1", Some(&load), Exit::Done, true)?;
    heading(story, "5. v4 is tried by some of the traffic first, and judged by what is counted there");
    site.use_canary()?;
    site.commit("v4", "v4", "the fourth page")?;
    phase("deploy v4 as a canary", Some(&load), Exit::Done, false)?;
    heading(story, "6. v5 passes its probes and fails one request in twenty: its traffic shows it");
    site.plant_fault(20)?;
    site.commit("v5", "v5", "the fifth page")?;
    load.tries("v5");
    phase("deploy v5, a bad canary", Some(&load), Exit::Failed, false)?;
    let counts = load.stop();
    Ok((phases, counts))
}

fn roll(global: &Global, back: bool, story: &Printer) -> Result<Exit, Failure> {
    #[expect(clippy::expect_used, reason = "`demo` is an environment's name")]
    let environment = "demo".parse().expect("a name");
    let targets = Targets {
        environment,
        releases: Vec::new(),
        services: Vec::new(),
        hosts: Vec::new(),
        overrides: Overrides::default(),
    };
    let consent = Consent { yes: true, dry_run: false };
    if back {
        deploy::rollback(global, &Rollback { targets, consent, database_restored: None }, story)
    } else {
        deploy::deploy(global, &Deploy { targets, consent, wait: false }, story)
    }
}

/// How it went, and whether that is how it should.
fn tell(phases: &[Phase], counts: &Counts, began: Instant, printer: &Printer) -> Exit {
    let is_as_expected = phases.iter().all(|phase| phase.exit == phase.expected_exit);
    let exit = if is_as_expected && counts.failed == 0 { Exit::Done } else { Exit::Failed };
    printer.result("");
    for phase in phases {
        let verdict = if phase.exit == phase.expected_exit {
            "as expected".to_owned()
        } else {
            format!("expected exit {}, got {}", phase.expected_exit, phase.exit)
        };
        printer.result(format!(
            "{:<28} {:>5.1} s  {:>6} requests, {} failed  {verdict}{}",
            phase.name,
            phase.seconds,
            phase.requests,
            phase.failed,
            match phase.canary_errors {
                0 => String::new(),
                count => format!("; {count} answered wrongly by the canary"),
            }
        ));
    }
    let by_release: Vec<String> =
        counts.by_release.iter().map(|(release, answers)| format!("{release} {answers}")).collect();
    let line = format!(
        "{} requests, {} failed, {} answered wrongly by a canary; the rest by {}",
        counts.requests,
        counts.failed,
        counts.canary_errors,
        by_release.join(", ")
    );
    printer.result(if exit == Exit::Done { line.green().to_string() } else { line.red().to_string() });
    for reason in &counts.reasons {
        printer.result(format!("  failed: {reason}"));
    }
    printer.json(
        "demo",
        json!({
            "requests": counts.requests,
            "failed": counts.failed,
            "canary_errors": counts.canary_errors,
            "by_release": counts.by_release,
            "reasons": counts.reasons,
            "phases": phases,
            "seconds": began.elapsed().as_secs_f64(),
            "exit": exit.code(),
        }),
    );
    exit
}

fn heading(story: &Printer, text: &str) {
    story.progress(format!("\n{}", text.bold()));
}

/// Set by ^C for the whole demo, so that it never dies without tidying up.
fn watch_for_interrupt() -> Result<Arc<AtomicBool>, Failure> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let cannot =
        |error: std::io::Error| Failure::new(Exit::Failed, format!("cannot listen for signals: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
    let flag = Arc::clone(&interrupted);
    std::thread::Builder::new()
        .name("interrupt".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                while tokio::signal::ctrl_c().await.is_ok() {
                    flag.store(true, Ordering::SeqCst);
                }
            });
        })
        .map_err(cannot)?;
    Ok(interrupted)
}
