//! What a person or an accident does to a rollout that is under way.

use rustix::process::Signal;

use crate::site::{RING, Site};

const V1: Option<&str> = Some("v1");
const V2: Option<&str> = Some("v2");

#[test]
fn held_by_another_terminal_and_resumed() {
    let site = Site::ring();
    let deploying = site.stop_in_the_middle();
    site.run(&["deploy", "staging", "v1"])
        .exits(3)
        .says(&["another controller", "greenlight status staging"]);
    site.run(&["status", "staging"]).exits(3).says(&[
        "open: staging-",
        "one/hello",
        "driven by process",
        "one/hello: activating for",
    ]);
    site.run(&["hold", "staging", "--reason", "lunch"])
        .exits(0)
        .says(&["is held", "greenlight resume staging"]);
    site.go_on();
    deploying.end().exits(3).says(&["HELD: held by tester@", "lunch", "greenlight resume staging"]);
    site.runs("staging", &[("one/hello", V2), ("two/hello", V1)]);
    let status = site.run(&["status", "staging"]).exits(3).says(&["open: staging-", "lunch"]);
    assert!(status.stdout.contains("claimed by tester@"), "{}", status.stdout);
    // Nothing else begins while it is open.
    site.run(&["deploy", "staging", "v2"]).exits(3).says(&["has not ended", "greenlight abort staging"]);
    site.run(&["rollback", "staging", "v1"]).exits(3).says(&["has not ended"]);
    let data = site.run(&["resume", "staging", "--json"]).exits(0).json();
    assert_eq!(data["ended"]["outcome"]["is"], "done");
    site.runs("staging", &[("one/hello", V2), ("two/hello", V2)]);
    for command in ["hold", "resume", "abort"] {
        site.run(&[command, "staging"])
            .exits(2)
            .says(&["no rollout of staging is open", "greenlight history staging"]);
    }
}

#[test]
fn interrupted_once_it_holds() {
    let site = Site::ring();
    let deploying = site.stop_in_the_middle();
    deploying.signal(Signal::INT);
    // It says so only when it has been recorded; the host is let go on after that.
    crate::site::wait_until("the hold is recorded", || {
        site.run(&["status", "staging"]).stdout.contains("interrupted")
    });
    site.go_on();
    deploying.end().exits(3).says(&[
        "holding:",
        "the safe point is the end of activating one/hello",
        "HELD",
        "interrupted",
    ]);
    site.runs("staging", &[("one/hello", V2), ("two/hello", V1)]);
    site.run(&["abort", "staging", "--reason", "not today"]).exits(1).says(&[
        "TURNED BACK",
        "not today",
        "one/hello  v1",
    ]);
    site.runs("staging", &[("one/hello", V1), ("two/hello", V1)]);
}

#[test]
fn interrupted_twice_it_lets_go() {
    let site = Site::ring();
    let deploying = site.stop_in_the_middle();
    deploying.signal(Signal::INT);
    crate::site::wait_until("the hold is recorded", || {
        site.run(&["status", "staging"]).stdout.contains("interrupted")
    });
    deploying.signal(Signal::INT);
    deploying.end().exits(3).says(&[
        "letting go",
        "DETACHED",
        "left under way: activating one/hello",
        "greenlight resume staging",
    ]);
    site.go_on();
    site.run(&["resume", "staging"]).exits(0).says(&["DONE"]);
    site.runs("staging", &[("one/hello", V2), ("two/hello", V2)]);
}

#[test]
fn terminated_it_holds() {
    let site = Site::ring();
    let deploying = site.stop_in_the_middle();
    deploying.signal(Signal::TERM);
    crate::site::wait_until("the hold is recorded", || {
        site.run(&["status", "staging"]).stdout.contains("interrupted")
    });
    site.go_on();
    deploying.end().exits(3).says(&["the safe point is the end of activating one/hello", "HELD"]);
    // What was switched was confirmed: it stays while the rollout is held.
    let status = site.run(&["status", "staging", "--json"]).exits(3).json();
    let ledger = &status["environments"][0]["instances"][0]["report"]["ledger"];
    assert_eq!(ledger["last_good"], ledger["active"], "{ledger:#}");
    site.run(&["resume", "staging"]).exits(0).says(&["DONE"]);
    site.runs("staging", &[("one/hello", V2), ("two/hello", V2)]);
}

#[test]
fn a_closed_terminal_is_as_a_kill() {
    let site = Site::ring();
    let deploy = ["deploy", "staging", "v2", "--yes"];
    let mut terminal = site.stop_in_the_middle_of(|| site.start_in_terminal(&deploy));
    terminal.kill().unwrap();
    terminal.wait().unwrap();
    site.wait_until_nobody_drives();
    site.go_on();
    site.run(&["status", "staging"]).exits(3).says(&["open: staging-"]);
    site.run(&["resume", "staging"]).exits(0).says(&["DONE"]);
    site.runs("staging", &[("one/hello", V2), ("two/hello", V2)]);
}

#[test]
fn a_job_whose_output_nobody_reads_any_more_is_as_a_kill() {
    for json in [&[][..], &["--json"]] {
        let site = Site::ring();
        let deploy = [&["deploy", "staging", "v2"], json].concat();
        let mut deploying = site.stop_in_the_middle_of(|| site.start(&deploy));
        deploying.close_output();
        site.go_on();
        deploying.end().exits(3);
        // It stopped at the first line that it could not write; the host had finished its switch.
        let status = site.run(&["status", "staging"]).exits(3).says(&["open: staging-"]);
        assert!(!status.stdout.contains("held by"), "{}", status.stdout);
        site.runs("staging", &[("one/hello", V2), ("two/hello", V1)]);
        site.run(&["abort", "staging"]).exits(1).says(&["TURNED BACK"]);
        site.runs("staging", &[("one/hello", V1), ("two/hello", V1)]);
    }
}

#[test]
fn a_controller_that_was_killed_is_taken_over() {
    for (command, code, release) in [("resume", 0, V2), ("abort", 1, V1)] {
        let site = Site::ring();
        let deploying = site.stop_in_the_middle();
        deploying.signal(Signal::KILL);
        assert_eq!(deploying.end().code, None);
        site.go_on();
        site.run(&["status", "staging"]).exits(3).says(&[
            "open: staging-",
            "no controller of this machine drives it",
            "never recorded as ended: one/hello activate v2",
        ]);
        site.run(&[command, "staging"]).exits(code);
        site.runs("staging", &[("one/hello", release), ("two/hello", release)]);
        assert_eq!(
            site.run(&["status", "staging", "--json"]).exits(0).json()["environments"][0]["open"],
            serde_json::Value::Null
        );
    }
}

/// What began a migration and died does not know how it ended; a person can say.
#[test]
fn a_migration_whose_end_is_unknown_is_settled_by_a_person() {
    let site = Site::new(&RING.replace(
        "[service.hello.process.web]",
        "migrate = { run = \"sh migrate.sh\" }\n\n[service.hello.process.web]",
    ));
    let script = format!(
        "while [ -e '{0}/slow' ]; do : > '{0}/migrating'; sleep 0.05; done\n",
        site.directory.display()
    );
    site.write("migrate.sh", &script);
    site.commit("v1");
    site.run(&["deploy", "staging"]).exits(0);
    site.commit("v2");
    site.write("slow", "");
    let deploying = site.start(&["deploy", "staging"]);
    crate::site::wait_until("it migrates", || site.path("migrating").exists());
    deploying.signal(Signal::KILL);
    assert_eq!(deploying.end().code, None);
    // Its host goes down as well: an agent that lives would see the migration to its end, and its ledger would say so.
    for (pid, line) in site.processes() {
        if line.contains("agent serve") || line.contains("migrate.sh") {
            rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), Signal::KILL)
                .unwrap();
        }
    }
    std::fs::remove_file(site.path("slow")).unwrap();
    site.run(&["resume", "staging"]).exits(3).says(&[
        "how it ended is not known",
        "greenlight resume staging --migration-done hello",
        "greenlight abort staging",
    ]);
    site.runs("staging", &[("one/hello", V1), ("two/hello", V1)]);
    site.run(&["resume", "staging", "--migration-done", "helo"])
        .exits(2)
        .says(&["no migration of helo was begun"]);
    let resumed = ["resume", "staging", "--migration-done", "hello", "--reason", "version table says 2"];
    site.run(&resumed).exits(0).says(&["DONE"]);
    site.runs("staging", &[("one/hello", V2), ("two/hello", V2)]);
    let id = site.run(&["history", "staging", "--json"]).json()["rollouts"][0]["plan"]["id"].clone();
    site.run(&["history", "--rollout", id.as_str().unwrap()])
        .exits(0)
        .says(&["a person saw that the migration of hello is done: version table says 2"]);
}

#[test]
fn aborted_from_another_terminal_the_controller_turns_back() {
    let site = Site::ring();
    let deploying = site.stop_in_the_middle();
    site.run(&["abort", "staging", "--reason", "wrong day"])
        .exits(0)
        .says(&["turns back", "greenlight status staging"]);
    site.go_on();
    deploying.end().exits(1).says(&["TURNED BACK", "wrong day", "one/hello  v1", "two/hello  v1"]);
    site.runs("staging", &[("one/hello", V1), ("two/hello", V1)]);
}
