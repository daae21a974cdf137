//! `build`: a release from a commit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use greenlight_controller::clock;
use greenlight_depot::Depot;
use greenlight_depot::build::{BuildError, BuildEvent, BuildRequest};
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
    let release =
        build_one(&project, service, &depot, build.commit.as_deref(), build.label.as_deref(), printer)?;
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
    revision: Option<&str>,
    label: Option<&str>,
    printer: &Printer,
) -> Result<Release, Failure> {
    let cancel = Arc::new(AtomicBool::new(false));
    let runtime = crate::project::runtime()?;
    let watched = Arc::clone(&cancel);
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
        built_by: &project.by,
        now: clock::now(),
        cancel: &cancel,
    };
    greenlight_depot::build::build(depot, &request, &mut |event| show(&service.name, &event, printer))
        .map_err(|error| Failure::from_error(exit(&error), &error))
}

/// What was asked for cannot be had (usage), or it could and failed.
pub(crate) fn exit(error: &BuildError) -> Exit {
    match error {
        BuildError::Git(_) | BuildError::Label { .. } => Exit::Usage,
        _ => Exit::Failed,
    }
}

fn show(service: &ServiceName, event: &BuildEvent, printer: &Printer) {
    match event {
        BuildEvent::Opening { repository } => printer.detail(format!("{service}: reading {repository}")),
        BuildEvent::Commit { commit, subject, branch } => {
            let on = branch.as_ref().map(|branch| format!(" on {branch}")).unwrap_or_default();
            let commit: String = commit.chars().take(10).collect();
            printer.progress(format!("{service}: building {commit}{on}: {subject}"));
        }
        BuildEvent::Uncommitted { files } => {
            printer.warning(format!(
                "{service}: {files} files have changes that are in no commit, so not in the release"
            ));
        }
        BuildEvent::Step { number, of, script } => {
            printer.progress(format!("{service}: step {number} of {of}: {script}"));
        }
        BuildEvent::Line { text } => printer.progress(format!("{service} | {text}")),
        BuildEvent::Packing => printer.detail(format!("{service}: reading and keeping the tree")),
    }
}
