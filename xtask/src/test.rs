//! `cargo xtask test`: everything that is checked, in the order in which it tells the most.
//!
//! Each step says what it is and how long it took; a failed one does not keep the others from running. A check
//! that is not made of tests counts as one, so the last line is red exactly when anything is.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use greenlight_testbed::required_packages;
use serde::Deserialize;

use crate::workbench::Tool;
use crate::{Error, FAILED, MISSING, bed, bed_tests, cargo, dependencies, layers};

/// New hostile inputs for each target: some seconds in all. What was found before is in the corpus, which is fed first.
const FUZZ_RUNS: &str = "300";
/// The seeds that every run goes through, from 0. They are always the same for as long as new ones still find something, about
/// one in 200,000: a run that fails by chance says nothing about what was changed. `cargo xtask simulate --from` looks for more.
const SIMULATION_SEEDS: u64 = 100_000;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Only a part of it.
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// Only tests whose name contains this.
    #[arg(long)]
    filter: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Tests without a bed.
    Unit,
    /// Hostile inputs, and simulated fleets in which things die: new ones in every run.
    Simulation,
    /// Formatting, lints, the layer rule, dependencies.
    Lint,
    /// Tests on a bed of real hosts.
    Bed,
}

impl Options {
    fn includes(&self, part: Part) -> bool {
        self.only.is_none_or(|only| only == part)
    }
}

/// What came of a step.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) ignored: u64,
}

impl Counts {
    pub(crate) fn of(passed: bool) -> Self {
        Self { passed: u64::from(passed), failed: u64::from(!passed), ignored: 0 }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

/// The steps done, for the table at the end.
struct Run {
    steps: Vec<(&'static str, Counts, Duration)>,
}

impl Run {
    fn step(&mut self, title: &'static str, act: impl FnOnce() -> Result<Counts, Error>) {
        println!("\n== {title}");
        let start = Instant::now();
        let counts = act().unwrap_or_else(|error| {
            println!("error: {error}");
            Counts::of(false)
        });
        println!("-- {title}: {:.1} s", start.elapsed().as_secs_f64());
        self.steps.push((title, counts, start.elapsed()));
    }

    fn finish(&self) -> ExitCode {
        println!("\n{:<24} {:>7} {:>7} {:>8} {:>8}", "step", "passed", "failed", "ignored", "seconds");
        let mut total = Counts::default();
        for (title, counts, took) in &self.steps {
            let Counts { passed, failed, ignored } = counts;
            println!("{title:<24} {passed:>7} {failed:>7} {ignored:>8} {:>8.1}", took.as_secs_f64());
            total.add(*counts);
        }
        println!("\n{} passed, {} failed", total.passed, total.failed);
        if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(FAILED) }
    }
}

pub(crate) fn run(options: &Options) -> Result<ExitCode, Error> {
    if let Some(missing) = prepare(options)? {
        println!("{missing}");
        return Ok(ExitCode::from(MISSING));
    }
    let mut run = Run { steps: Vec::new() };
    if options.includes(Part::Lint) {
        run.step("formatting", || check(cargo().args(["fmt", "--all", "--check"])));
        run.step("lints", || {
            check(cargo().args([
                "clippy",
                "--workspace",
                "--all-targets",
                "--keep-going",
                "--locked",
                "--",
                "-D",
                "warnings",
            ]))
        });
        run.step("layer rule", || Ok(list(&layers::check()?)));
        run.step("dependencies", || Ok(list(&dependencies::check()?)));
    }
    if options.includes(Part::Unit) {
        run.step("tests", || {
            let everything =
                ["test", "--workspace", "--exclude", "greenlight-testbed", "--locked", "--no-fail-fast"];
            let mut counts = tests(cargo().args(everything), options)?;
            // The tests in testbed/tests need a bed; its own units do not.
            let units = ["test", "--package", "greenlight-testbed", "--lib", "--locked", "--no-fail-fast"];
            counts.add(tests(cargo().args(units), options)?);
            Ok(counts)
        });
    }
    if options.includes(Part::Simulation) {
        run.step("hostile inputs", || check(Tool::Fuzz.command().args(["--runs", FUZZ_RUNS])));
        run.step("simulated fleets", || {
            let seeds = SIMULATION_SEEDS.to_string();
            check(Tool::Simulate.command().args(["--from", "0", "--seeds", &seeds]))
        });
    }
    if options.includes(Part::Bed) {
        run.step("tests on a bed", || bed_tests::run(options.filter.as_deref()));
    }
    Ok(run.finish())
}

/// Installs what is missing. Some text when that cannot be done here: what to do instead.
fn prepare(options: &Options) -> Result<Option<String>, Error> {
    for (tool, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        let present = cargo().args([tool, "--version"]).output().is_ok_and(|output| output.status.success());
        if !present && options.includes(Part::Lint) {
            return Ok(Some(format!(
                "cargo {tool} is missing; install it with: rustup component add {component}"
            )));
        }
    }
    let is_root = rustix::process::geteuid().is_root();
    let may_be_root = is_root || bed::sudo_works();
    if options.includes(Part::Bed) && !may_be_root {
        let advice = "the bed of hosts needs root, and there is no sudo that works without a password; allow that, or run as root:\n  cargo xtask test\nor leave those tests out with:\n  cargo xtask test --only lint && cargo xtask test --only unit && cargo xtask test --only simulation";
        return Ok(Some(advice.into()));
    }
    let missing = missing_packages(options);
    if missing.is_empty() {
        return Ok(None);
    }
    let install = [&["install", "--yes", "--no-install-recommends"], &missing[..]].concat();
    let advice =
        format!("the tests need what is not installed; install it with:\n  apt-get {}", install.join(" "));
    if !may_be_root {
        return Ok(Some(advice));
    }
    println!("installing {}", missing.join(" "));
    let apt = |arguments: &[&str]| {
        let mut command = if is_root { Command::new("env") } else { Command::new("sudo") };
        if !is_root {
            command.args(["-n", "env"]);
        }
        command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "--quiet"]).args(arguments);
        command.status().is_ok_and(|status| status.success())
    };
    let is_done = apt(&["update"]) && apt(&install) && missing_packages(options).is_empty();
    Ok((!is_done).then_some(advice))
}

/// Programs that tests without a bed start for real, and the packages that have them.
const UNIT_TOOLS: [(&str, &str); 5] = [
    ("git", "git"),
    ("haproxy", "haproxy"),
    ("python3", "python3"),
    ("ssh", "openssh-client"),
    ("sshd", "openssh-server"),
];

fn missing_packages(options: &Options) -> Vec<&'static str> {
    let mut packages = Vec::new();
    if options.includes(Part::Unit) {
        packages.extend(UNIT_TOOLS.iter().filter(|(tool, _)| !is_there(tool)).map(|(_, package)| *package));
    }
    if options.includes(Part::Bed) {
        packages.extend(required_packages());
    }
    packages.sort_unstable();
    packages.dedup();
    packages
}

/// Whether a program is on the path, or where Debian has those of administrators.
fn is_there(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .any(|directory| directory.join(tool).is_file())
}

/// Runs a command that is a check by itself.
pub(crate) fn check(command: &mut Command) -> Result<Counts, Error> {
    let status = command.status().map_err(Error::system("start cargo"))?;
    Ok(Counts::of(status.success()))
}

/// Prints what a check of our own has found.
fn list<T: std::fmt::Display>(problems: &[T]) -> Counts {
    problems.iter().for_each(|problem| println!("{problem}"));
    if problems.is_empty() {
        println!("in order");
    }
    Counts::of(problems.is_empty())
}

/// Runs cargo test, shows what it prints, and counts by its closing lines.
fn tests(command: &mut Command, options: &Options) -> Result<Counts, Error> {
    command.args(options.filter.iter());
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(Error::system("start cargo test"))?;
    let mut counts = Counts::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n') {
            let line = line.map_err(Error::system("read from cargo test"))?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            if let Some(closing) = closing_line(&line) {
                counts.add(closing);
            }
        }
    }
    let status = child.wait().map_err(Error::system("wait for cargo test"))?;
    if !status.success() && counts.failed == 0 {
        // It did not compile, or a test took the whole process with it.
        counts.failed = 1;
    }
    Ok(counts)
}

/// Counts of a line such as `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
pub(crate) fn closing_line(line: &str) -> Option<Counts> {
    let (_, rest) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |name: &str| {
        rest.split("; ").find_map(|part| part.strip_suffix(name)?.trim_end().parse::<u64>().ok())
    };
    Some(Counts { passed: count("passed")?, failed: count("failed")?, ignored: count("ignored")? })
}

/// Where cargo builds.
pub(crate) fn target_directory() -> Result<PathBuf, Error> {
    #[derive(Deserialize)]
    struct Metadata {
        target_directory: PathBuf,
    }
    let output = cargo()
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .output()
        .map_err(Error::system("start cargo metadata"))?;
    let metadata: Metadata = serde_json::from_slice(&output.stdout)
        .map_err(|error| Error::system("read what cargo metadata says")(error.into()))?;
    Ok(metadata.target_directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_closing_lines() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.1s";
        assert_eq!(closing_line(line), Some(Counts { passed: 12, failed: 3, ignored: 1 }));
        assert_eq!(closing_line("test result: ok. many passed"), None);
        assert_eq!(closing_line("test a ... ok"), None);
    }
}
