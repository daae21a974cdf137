//! `logs`: the last lines of the logs of a service's processes, from every host at once.

use std::sync::Arc;
use std::time::Duration;

use greenlight_link::message::{Event, Request, Stream};
use greenlight_model::fleet::Environment;
use greenlight_model::id::{Instance, ProcessName, ServiceName};
use owo_colors::OwoColorize;
use serde_json::json;
use tokio::sync::mpsc;

use crate::args::{Global, Logs};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::{Project, runtime};

/// Lines on their way to the terminal; hosts wait when it is slow.
const LINES_MAX: usize = 1_000;
/// Following ends with ^C; a request needs some end.
const FOLLOW: Duration = Duration::from_secs(30 * 24 * 3600);
/// Reading the ends of some files.
const READ: Duration = Duration::from_secs(60);

pub(crate) fn run(global: &Global, logs: &Logs, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let environment = project.environment(&logs.environment)?;
    let instances = chosen(&project, environment, logs)?;
    let log = project.log()?;
    runtime()?.block_on(async {
        let (gatherer, gathered) = project.gather(environment, &log).await?;
        let (sender, mut receiver) = mpsc::channel(LINES_MAX);
        let mut exit = Exit::Done;
        for instance in instances {
            let release = gathered.report(&instance).and_then(|report| report.linked);
            let Some(spec) = gatherer.spec(&instance, release) else { continue };
            let request = Request::Logs {
                spec,
                process: logs.process.clone(),
                stream: logs.errors.then_some(Stream::Stderr),
                lines: logs.lines,
                follow: logs.follow,
            };
            let (hosts, sender) = (Arc::clone(gatherer.hosts()), sender.clone());
            let timeout = if logs.follow { FOLLOW } else { READ };
            tokio::spawn(async move {
                let lines = sender.clone();
                let named = instance.clone();
                let on_event = move |event| {
                    if let Event::Line { process, stream, text } = event {
                        // When the terminal is slower than the logs, what does not fit is lost, not the host's memory.
                        let _ = lines.try_send((named.clone(), Ok((process, stream, text))));
                    }
                };
                if let Err(error) = hosts.call(&instance.host, request, timeout, on_event).await {
                    let _ = sender.send((instance, Err(error.to_string()))).await;
                }
            });
        }
        drop(sender);
        while let Some((instance, line)) = receiver.recv().await {
            match line {
                Ok((process, stream, text)) => {
                    let named = process.as_ref().map(|process| format!(" {process}")).unwrap_or_default();
                    let mark = if stream == Stream::Stderr { "!" } else { "|" };
                    printer.result(format!("{}{named} {mark} {text}", instance.host));
                    printer.json_line(
                        "logs",
                        json!({
                            "host": instance.host,
                            "service": instance.service,
                            "process": process,
                            "stream": stream,
                            "text": text,
                        }),
                    );
                }
                Err(why) => {
                    exit = Exit::Failed;
                    printer.progress(format!("{}: {why}", instance.host).red().to_string());
                    let (host, service) = (&instance.host, &instance.service);
                    printer.json_line("logs", json!({ "host": host, "service": service, "error": why }));
                }
            }
        }
        Ok(exit)
    })
}

/// The instances whose logs are meant. A name that means nothing is a mistake, not an empty log.
fn chosen(project: &Project, environment: &Environment, logs: &Logs) -> Result<Vec<Instance>, Failure> {
    let is_service = |service: &ServiceName| logs.service.as_ref().is_none_or(|only| service == only);
    let has_process = |service: &ServiceName| {
        let defined = project.fleet.services.get(service);
        logs.process
            .as_ref()
            .is_none_or(|process| defined.is_some_and(|service| service.processes.contains_key(process)))
    };
    for host in &logs.hosts {
        if !environment.service_hosts().contains(host) {
            let known: Vec<String> = environment.service_hosts().iter().map(ToString::to_string).collect();
            return Err(Failure::usage(format!("{} has no host `{host}`", environment.name))
                .help(format!("it has {}", known.join(", "))));
        }
    }
    if let Some(service) = &logs.service
        && !environment.hosts.contains_key(service)
    {
        let known: Vec<&str> = environment.hosts.keys().map(ServiceName::as_str).collect();
        return Err(Failure::usage(format!("{} has no hosts for `{service}`", environment.name))
            .help(format!("it has hosts for {}", known.join(", "))));
    }
    let chosen: Vec<Instance> = environment
        .instances()
        .filter(|instance| is_service(&instance.service) && has_process(&instance.service))
        .filter(|instance| logs.hosts.is_empty() || logs.hosts.contains(&instance.host))
        .collect();
    match (&logs.process, chosen.is_empty()) {
        (_, false) => Ok(chosen),
        (Some(process), true) => {
            let services = environment.hosts.keys().filter(|service| is_service(service));
            let known: Vec<&str> = services
                .filter_map(|service| project.fleet.services.get(service))
                .flat_map(|service| service.processes.keys().map(ProcessName::as_str))
                .collect();
            Err(Failure::usage(format!("there is no process `{process}` there"))
                .help(format!("there is {}", known.join(", "))))
        }
        (None, true) => Err(Failure::usage(format!("nothing in {} matches", environment.name))),
    }
}
