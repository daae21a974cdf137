//! The tests on beds of real hosts, several at a time: they mostly wait for hosts, not for processors.
//!
//! Each test is a process of its own, so that any two can run side by side, and those that take longest begin first. What
//! one printed is shown when it has ended.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use greenlight_testbed::{Base, cache_directory};
use serde::Deserialize;

use crate::test::{Counts, check, closing_line, target_directory};
use crate::{Error, cargo, workspace_root};

/// Tests at a time, each with its bed. One takes a third of a processor (the table of faults: 107 s in 370 s), machines have
/// two at least, and what is left over lets hosts answer in time while another installs packages.
const BEDS_AT_ONCE: usize = 3;

/// What begins first, for it takes longest.
const LONGEST: [&str; 4] = ["kinto", "kill_table", "faults", "guard"];

/// What the tests take from their environment.
const VARIABLES: &str = "PATH,GREENLIGHT_BIN,GREENLIGHT_AGENT_TESTS,GREENLIGHT_BED,GREENLIGHT_BED_KEEP,GREENLIGHT_KILL_POINTS,RUST_BACKTRACE";

/// One test: its file, the program that this was compiled to, and its name there.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Test {
    file: String,
    program: PathBuf,
    name: String,
}

/// Runs those whose name contains the filter.
pub(crate) fn run(filter: Option<&str>) -> Result<Counts, Error> {
    if !check(cargo().args(["build", "--package", "greenlight", "--locked"]))
        .is_ok_and(|counts| counts.failed == 0)
    {
        println!("the program under test does not build");
        return Ok(Counts::of(false));
    }
    let program = target_directory()?.join("debug/greenlight");
    let agent_tests = built("greenlight-agent", "agent")?
        .pop()
        .ok_or_else(|| Error::Refused("the agent's tests do not build".into()))?;
    let mut tests = Vec::new();
    for (file, program) in built("greenlight-testbed", "*")? {
        let listed = Command::new(&program)
            .args(["--list", "--format", "terse"])
            .output()
            .map_err(Error::system("list the tests on beds"))?;
        let names = String::from_utf8_lossy(&listed.stdout).into_owned();
        let names = names.lines().filter_map(|line| line.strip_suffix(": test"));
        let wanted = names.filter(|name| filter.is_none_or(|filter| name.contains(filter)));
        let test = |name: &str| Test { file: file.clone(), program: program.clone(), name: name.to_owned() };
        tests.extend(wanted.map(test));
    }
    if !Base::is_ready()? {
        println!(
            "building the base root of all hosts, once: about a minute, in {}",
            cache_directory().display()
        );
    }
    let queue = Mutex::new(VecDeque::from(in_order(tests)));
    let counts = Mutex::new(Counts::default());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    std::thread::scope(|scope| {
        for _ in 0..BEDS_AT_ONCE {
            scope.spawn(|| {
                while let Some(test) = next() {
                    let mut command = command(&test);
                    command
                        .env("GREENLIGHT_BIN", &program)
                        .env("GREENLIGHT_AGENT_TESTS", &agent_tests.1)
                        .env("GREENLIGHT_BED", cache_directory());
                    let ended = one(&test, &mut command);
                    counts.lock().unwrap_or_else(PoisonError::into_inner).add(ended);
                }
            });
        }
    });
    Ok(counts.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// The longest first, and what a file begins with before what it ends with.
fn in_order(mut tests: Vec<Test>) -> Vec<Test> {
    tests.sort_by_key(|test| LONGEST.iter().position(|file| *file == test.file).unwrap_or(LONGEST.len()));
    tests
}

/// The command of a test. Only the tests themselves run as root, not the compiler.
fn command(test: &Test) -> Command {
    let arguments = ["--exact", &test.name];
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new(&test.program)
    } else {
        let mut command = Command::new("sudo");
        command.args(["-n", &format!("--preserve-env={VARIABLES}"), "--"]).arg(&test.program);
        command
    };
    // Where cargo would start it.
    command.args(arguments).current_dir(workspace_root().join("testbed")).stdin(Stdio::null());
    command
}

/// Runs a test, and shows how it ended and what it printed.
fn one(test: &Test, command: &mut Command) -> Counts {
    let began = Instant::now();
    let ended = command.output();
    let title = format!("{}::{}", test.file, test.name);
    let took = began.elapsed().as_secs_f64();
    let (text, counts) = match ended {
        Err(error) => (format!("test {title} could not be started: {error}"), Counts::of(false)),
        Ok(output) => {
            let (stdout, stderr) =
                (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            let counts = judged(&stdout, output.status.success());
            let word = if counts.failed == 0 { "ok" } else { "FAILED" };
            (format!("test {title} ... {word} in {took:.0} s\n{}{stderr}", shown(&stdout)), counts)
        }
    };
    println!("{}", text.trim_end());
    counts
}

/// What a process that was to run one test came to. One that ended without a test was not the test that was asked for.
fn judged(stdout: &str, is_success: bool) -> Counts {
    let counts = stdout.lines().find_map(closing_line).unwrap_or_default();
    let has_run = counts.passed + counts.ignored == 1 && counts.failed == 0;
    if is_success && has_run { counts } else { Counts::of(false) }
}

/// What a test printed, without the frame that is the same around each.
fn shown(stdout: &str) -> String {
    let is_frame = |line: &str| {
        line.is_empty()
            || line == "running 1 test"
            || line.starts_with("test result: ok")
            || line.starts_with("test ") && (line.ends_with(" ... ok") || line.ends_with(" over 60 seconds"))
    };
    stdout.lines().filter(|line| !is_frame(line)).map(|line| format!("{line}\n")).collect()
}

/// The compiled integration tests of a package, by the names of their files.
fn built(package: &str, tests: &str) -> Result<Vec<(String, PathBuf)>, Error> {
    #[derive(Deserialize)]
    struct Built {
        executable: Option<PathBuf>,
        target: Target,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
        kind: Vec<String>,
    }
    let output = cargo()
        .args(["test", "--package", package, "--test", tests, "--no-run", "--locked"])
        .args(["--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .map_err(Error::system("start cargo test"))?;
    if !output.status.success() {
        return Err(Error::Refused(format!("the tests of {package} do not build")));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let built = text.lines().filter_map(|line| serde_json::from_str::<Built>(line).ok());
    let tests = built.filter(|built| built.target.kind.iter().any(|kind| kind == "test"));
    Ok(tests.filter_map(|built| Some((built.target.name, built.executable?))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_counts_as_the_one_test_that_it_ran() {
        let closing = |passed, ignored| {
            format!(
                "\nrunning 1 test\ntest a ... ok\n\ntest result: ok. {passed} passed; 0 failed; {ignored} ignored; 0 measured; 4 filtered out; finished in 0.1s\n"
            )
        };
        assert_eq!(judged(&closing(1, 0), true), Counts::of(true));
        assert_eq!(judged(&closing(0, 1), true).ignored, 1);
        for (stdout, is_success) in [(closing(0, 0), true), (closing(1, 0), false), (String::new(), true)] {
            assert_eq!(judged(&stdout, is_success), Counts::of(false), "{stdout}");
        }
        assert_eq!(shown(&format!("{}point  killed at\n", closing(1, 0))), "point  killed at\n");
    }

    #[test]
    fn what_takes_longest_begins_first() {
        let test =
            |file: &str, name: &str| Test { file: file.into(), program: "x".into(), name: name.into() };
        let tests = vec![test("bed", "a"), test("guard", "a"), test("kinto", "a"), test("kinto", "b")];
        let files: Vec<_> = in_order(tests).into_iter().map(|test| (test.file, test.name)).collect();
        let files: Vec<_> = files.iter().map(|(file, name)| (file.as_str(), name.as_str())).collect();
        assert_eq!(files, [("kinto", "a"), ("kinto", "b"), ("guard", "a"), ("bed", "a")]);
    }
}
