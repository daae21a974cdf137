//! The agent's own tests of the managers, run where they may change the machine: on hosts that are there for it.
//!
//! `GREENLIGHT_AGENT_TESTS` names the agent's compiled integration tests; `cargo xtask test` builds them and sets it.

use std::time::Duration;

use greenlight_testbed::{Bed, Init, Sudo, wait};

/// Where the tests lie on a host.
const TESTS: &str = "/usr/local/bin/agent-tests";

/// A bed with one host that has the tests on it.
fn bed_with_tests(name: &str, init: Init) -> Result<Bed, Box<dyn std::error::Error>> {
    let path = std::env::var("GREENLIGHT_AGENT_TESTS").map_err(
        |_| "GREENLIGHT_AGENT_TESTS is not set; run `cargo xtask test --only bed --filter systemd`",
    )?;
    let tests = std::fs::read(&path).map_err(|error| format!("{path}: {error}"))?;
    let bed = Bed::builder(name).host("host", init).up()?;
    bed.host("host").write(TESTS, 0o755, tests)?;
    Ok(bed)
}

/// A filter that fits no test would pass.
fn assert_ran_one(output: &str) {
    assert!(output.contains("test result: ok. 1 passed; 0 failed"), "{output}");
}

#[test]
fn systemd() {
    let bed = bed_with_tests("agent-systemd", Init::Systemd).unwrap();
    let output = bed.host("host").run(TESTS, &["--ignored", "--exact", "managers::systemd"]).unwrap();
    assert_ran_one(&output);
    bed.down().unwrap();
}

#[test]
fn supervisord() {
    let bed = bed_with_tests("agent-supervisord", Init::Supervisord).unwrap();
    let output = bed.host("host").run(TESTS, &["--ignored", "--exact", "managers::supervisord"]).unwrap();
    assert_ran_one(&output);
    bed.down().unwrap();
}

#[test]
fn systemd_of_a_user() {
    let bed = bed_with_tests("agent-systemd-user", Init::Systemd).unwrap();
    let host = bed.host("host");
    host.add_user("deploy", Sudo::Nothing).unwrap();
    host.run("loginctl", &["enable-linger", "deploy"]).unwrap();
    wait::until("the user's manager", Duration::from_secs(30), || {
        let state = bed.ssh("deploy@host", &["systemctl --user is-system-running"]);
        state.map_err(|error| error.to_string())
    })
    .unwrap();
    let output = bed.ssh("deploy@host", &[TESTS, "--ignored", "--exact", "managers::systemd_user"]).unwrap();
    assert_ran_one(&output);
    bed.down().unwrap();
}
