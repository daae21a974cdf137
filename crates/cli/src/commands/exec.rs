//! `exec`: one command on the hosts of an environment, all at once; no shell is involved.

use std::collections::BTreeSet;
use std::sync::Arc;

use greenlight_link::message::{Event, Reply, Request, Stream};
use greenlight_model::id::HostName;
use greenlight_model::quantity::parse_duration;
use owo_colors::OwoColorize;
use serde_json::json;
use tokio::task::JoinSet;

use crate::args::{Exec, Global};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::{Project, runtime};

pub(crate) fn run(global: &Global, exec: &Exec, printer: &Printer) -> Result<Exit, Failure> {
    let project = Project::open(global, printer)?;
    let environment = project.environment(&exec.environment)?;
    let timeout = parse_duration(&exec.timeout).map_err(|error| Failure::from_error(Exit::Usage, &error))?;
    let all: BTreeSet<HostName> = environment.host_settings.keys().cloned().collect();
    for host in &exec.hosts {
        if !all.contains(host) {
            let known: Vec<&str> = all.iter().map(HostName::as_str).collect();
            let failure = Failure::usage(format!("{} has no host `{host}`", environment.name));
            return Err(failure.help(format!("it has {}", known.join(", "))));
        }
    }
    let chosen: Vec<HostName> = if exec.hosts.is_empty() {
        environment.service_hosts().into_iter().collect()
    } else {
        exec.hosts.clone()
    };
    let hosts = project.hosts(environment)?;
    let mut results = runtime()?.block_on(async {
        let mut calls = JoinSet::new();
        for host in chosen {
            let request = Request::Exec { argv: exec.command.clone(), directory: None, timeout };
            let (hosts, printer) = (Arc::clone(&hosts), *printer);
            calls.spawn(async move {
                let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
                let on_event = |event| {
                    if let Event::Line { stream, text, .. } = event {
                        match stream {
                            Stream::Stdout => {
                                printer.result(format!("{host} | {text}"));
                                stdout.push(text);
                            }
                            Stream::Stderr => {
                                printer.progress(format!("{host} ! {text}"));
                                stderr.push(text);
                            }
                        }
                    }
                };
                // The agent keeps to the timeout itself; the link waits a little longer for it to say so.
                let result = hosts.call(&host, request, timeout + timeout / 2, on_event).await;
                (host, result, stdout, stderr)
            });
        }
        calls.join_all().await
    });
    results.sort_by(|a, b| a.0.cmp(&b.0));
    let mut exit = Exit::Done;
    let mut documents = Vec::new();
    for (host, result, stdout, stderr) in results {
        let (code, error) = match result {
            Ok(Reply::Exited { code }) => (code, None),
            Ok(other) => (None, Some(format!("unexpected answer {other:?}"))),
            Err(error) => (None, Some(error.to_string())),
        };
        if code != Some(0) {
            exit = Exit::Failed;
            let why = error.clone().unwrap_or_else(|| match code {
                Some(code) => format!("exit code {code}"),
                None => "ended by a signal".to_owned(),
            });
            printer.progress(format!("{host}: {}", why.red()));
        }
        documents
            .push(json!({ "host": host, "code": code, "error": error, "stdout": stdout, "stderr": stderr }));
    }
    printer.json("exec", json!({ "hosts": documents }));
    Ok(exit)
}
