//! `build`: a release from a commit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use greenlight_controller::clock;
use greenlight_depot::build::{BuildEvent, BuildRequest};
use greenlight_depot::depot::Depot;
use greenlight_model::fleet::Service;
use greenlight_model::id::ServiceName;
use greenlight_model::manifest::Release;
use greenlight_model::quantity::ByteSize;
use serde_json::json;

use crate::args::{Build, Global};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::Project;

pub(crate) fn run(global: &Global, build: &Build, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let service = service(&project, &build.service)?;
    let depot = project.depot()?;
    let release = build_one(&project, service, &depot, build.commit.clone(), build.label.clone(), printer)?;
    printer.result(format!(
        "{} {}  {} files, {}",
        release.service,
        release.title(),
        release.files,
        ByteSize(release.bytes)
    ));
    printer.json("build", json!({ "release": release }));
    Ok(Exit::Done)
}

/// The service of this name, or what there is instead.
pub(crate) fn service<'a>(project: &'a Project, name: &ServiceName) -> Result<&'a Service, Failure> {
    project.fleet.services.get(name).ok_or_else(|| {
        let known: Vec<&str> = project.fleet.services.keys().map(ServiceName::as_str).collect();
        Failure::usage(format!("there is no service `{name}`")).help(format!("there is {}", known.join(", ")))
    })
}

/// Builds one release, its output on standard error.
pub(crate) fn build_one(
    project: &Project,
    service: &Service,
    depot: &Depot,
    revision: Option<String>,
    label: Option<String>,
    printer: &Printer,
) -> Result<Release, Failure> {
    let cancelled = Arc::new(AtomicBool::new(false));
    let runtime = crate::project::runtime()?;
    let watched = Arc::clone(&cancelled);
    runtime.spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            watched.store(true, Ordering::SeqCst);
        }
    });
    let request = BuildRequest {
        service,
        project: &project.directory,
        revision,
        label,
        built_by: project.by.clone(),
        now: clock::now(),
        cancelled,
    };
    depot
        .build(&request, &mut |event| show(&service.name, &event, printer))
        .map_err(|error| Failure::from_error(Exit::Failed, &error))
}

fn show(service: &ServiceName, event: &BuildEvent, printer: &Printer) {
    match event {
        BuildEvent::Line { text, .. } => printer.progress(format!("{service} | {text}")),
        other => printer.progress(format!("{service}: {other}")),
    }
}
