//! `drift`: whether an environment still is what was released to it, and its hosts what each other is.

use serde_json::json;

use crate::args::{Drift, Global};
use crate::commands::preflight::{Findings, Rows, document, show, uneven_among};
use crate::failure::{Exit, Failure};
use crate::printer::{Printer, Verbosity};
use crate::project::{Connected, Project};

pub(crate) fn run(global: &Global, arguments: &Drift, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let environment = project.environment(&arguments.environment)?;
    let connected = Connected::new(&project, environment)?;
    let log = project.log()?;
    if let Some(open) = log.history().open_rollout(&environment.name) {
        let message = format!("{} is open, and changes what would be compared", open.plan.id);
        let help = format!("see `greenlight status {}`", environment.name);
        return Err(Failure::new(Exit::Held, message).help(help));
    }
    let releases = project.depot()?.releases().map_err(|error| Failure::from_error(Exit::Failed, &error))?;
    let instances = connected.block_on(async {
        let (gatherer, gathered) = connected.gather(&log).await;
        let traffic = &gathered.traffic;
        greenlight_controller::compare(&gatherer, environment, log.history(), &releases, traffic).await
    });
    let findings =
        Findings { uneven: uneven_among(&instances, |_, _| true), instances, objections: Vec::new() };
    let rows = if printer.verbosity == Verbosity::Verbose { Rows::All } else { Rows::Failing };
    show("drift", &findings, rows, printer);
    printer.json("drift", json!({ "environment": environment.name, "checks": document(&findings) }));
    Ok(if findings.is_well() { Exit::Done } else { Exit::Held })
}
