//! `logs`: the last lines of the logs of a service's processes, from every host at once.

use std::sync::Arc;
use std::time::Duration;

use greenlight_link::message::{Event, Request, Stream};
use greenlight_model::id::Instance;
use owo_colors::OwoColorize;
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
    let instances: Vec<Instance> = environment
        .instances()
        .filter(|instance| logs.service.as_ref().is_none_or(|service| instance.service == *service))
        .filter(|instance| logs.hosts.is_empty() || logs.hosts.contains(&instance.host))
        .collect();
    if instances.is_empty() {
        return Err(Failure::usage(format!("nothing in {} matches", environment.name)));
    }
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
                        let process = process.map(|process| format!(" {process}")).unwrap_or_default();
                        let mark = if stream == Stream::Stderr { "!" } else { "|" };
                        // When the terminal is slower than the logs, what does not fit is lost, not the host's memory.
                        let _ = lines.try_send(Ok(format!("{}{process} {mark} {text}", named.host)));
                    }
                };
                if let Err(error) = hosts.call(&instance.host, request, timeout, on_event).await {
                    let _ = sender.send(Err(format!("{}: {error}", instance.host))).await;
                }
            });
        }
        drop(sender);
        while let Some(line) = receiver.recv().await {
            match line {
                Ok(line) => printer.raw(&format!("{line}\n")),
                Err(why) => {
                    exit = Exit::Failed;
                    printer.progress(why.red().to_string());
                }
            }
        }
        Ok(exit)
    })
}
