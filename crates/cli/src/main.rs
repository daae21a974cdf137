//! The binary: arguments to commands to printing. It decides nothing about a rollout.

mod args;
mod commands;
mod demo;
mod describe;
mod diagnose;
mod failure;
mod live;
mod printer;
mod project;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Arguments, Command};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let printer = Printer::new(&arguments.global);
    match run(arguments, &printer) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            printer.failure(&failure);
            failure.exit.into()
        }
    }
}

fn run(arguments: Arguments, printer: &Printer) -> Result<Exit, Failure> {
    let global = &arguments.global;
    match arguments.command {
        Command::Demo(demo) => demo::run(global, &demo, printer),
        Command::Init(init) => commands::init::run(global, &init, printer),
        Command::Check => commands::check::run(global, printer),
        Command::Schema => commands::check::schema(printer),
        Command::Build(build) => commands::build::run(global, &build, printer),
        Command::Releases(releases) => commands::releases::run(global, &releases, printer),
        Command::Preflight(preflight) => commands::preflight::run(global, &preflight, printer),
        Command::Plan(plan) => commands::deploy::plan(global, &plan, printer),
        Command::Deploy(deploy) => commands::deploy::deploy(global, &deploy, printer),
        Command::Rollback(rollback) => commands::deploy::rollback(global, &rollback, printer),
        Command::Evidence(evidence) => commands::evidence::run(global, &evidence, printer),
        Command::Gates(gates) => commands::gates::gates(global, &gates, printer),
        Command::Approve(approve) => commands::gates::approve(global, &approve, printer),
        Command::Confirm(confirm) => commands::gates::confirm(global, &confirm, printer),
        Command::Tick(tick) => commands::gates::tick(global, &tick, printer),
        Command::Override(named) => commands::gates::override_gate(global, &named, printer),
        Command::Status(status) => commands::status::run(global, &status, printer),
        Command::Hold(hold) => commands::operate::hold(global, &hold, printer),
        Command::Resume(resume) => commands::operate::resume(global, &resume, printer),
        Command::Abort(abort) => commands::operate::abort(global, &abort, printer),
        Command::History(history) => commands::history::run(global, &history, printer),
        Command::Report(report) => commands::report::run(global, &report, printer),
        Command::Issue(issue) => commands::journal::issue(global, &issue, printer),
        Command::Action(action) => commands::journal::action(global, &action, printer),
        Command::Drift(drift) => commands::drift::run(global, &drift, printer),
        Command::Hosts(hosts) => commands::hosts::run(global, &hosts, printer),
        Command::Logs(logs) => commands::logs::run(global, &logs, printer),
        Command::Exec(exec) => commands::exec::run(global, &exec, printer),
        Command::Verdict(verdict) => commands::verdict::run(&verdict, printer),
        Command::Router(router) => commands::router::run(&router, printer),
        Command::Agent(agent) => commands::agent::run(agent),
        Command::DemoApplication(application) => demo::application::run(&application),
        Command::Completions { shell } => commands::completions::run(shell, printer),
    }
}
