//! `check` and `schema`: the fleet file and its form.

use serde_json::json;

use crate::args::Global;
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::Project;

pub(crate) fn run(global: &Global, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let fleet = &project.fleet;
    for (name, service) in &fleet.services {
        let processes: Vec<&str> = service.processes.keys().map(|process| process.as_str()).collect();
        let runs = if processes.is_empty() { "no process".to_owned() } else { processes.join(", ") };
        printer.result(format!("service {name}: {runs}"));
    }
    for (name, environment) in &fleet.environments {
        let hosts = match environment.service_hosts().len() {
            1 => "1 host".to_owned(),
            several => format!("{several} hosts"),
        };
        let balancers: Vec<String> = environment.balancers.iter().map(|balancer| balancer.title()).collect();
        let behind =
            if balancers.is_empty() { String::new() } else { format!(" behind {}", balancers.join(", ")) };
        printer.result(format!("environment {name}: {hosts}{behind}"));
    }
    printer.result("no mistakes");
    printer.json(
        "check",
        json!({
            "services": fleet.services.keys().collect::<Vec<_>>(),
            "environments": fleet.environments.keys().collect::<Vec<_>>(),
            "problems": [],
        }),
    );
    Ok(Exit::Done)
}

pub(crate) fn schema(printer: &Printer) -> Result<Exit, Failure> {
    printer.raw(&format!("{:#}\n", greenlight_config::schema()));
    Ok(Exit::Done)
}
