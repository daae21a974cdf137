//! The agent's own tests of the managers, run where they may change the machine: on hosts that are there for it.
//!
//! `GREENLIGHT_AGENT_TESTS` names the agent's compiled integration tests; `cargo xtask test` builds them and sets it.

use std::path::PathBuf;
use std::time::Duration;

use greenlight_testbed::{Bed, Host, Init, Sudo, wait};

/// Where the tests lie on a host.
const TESTS: &str = "/usr/local/bin/agent-tests";

fn agent_tests() -> Vec<u8> {
    let path: PathBuf = std::env::var_os("GREENLIGHT_AGENT_TESTS")
        .expect("GREENLIGHT_AGENT_TESTS is not set; run `cargo xtask test --only bed --filter managers`")
        .into();
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn with_tests(bed: &Bed) -> &Host {
    let host = bed.host("host");
    host.write(TESTS, 0o755, agent_tests()).unwrap();
    host
}

/// A filter that fits no test would pass.
fn assert_ran_one(output: &str) {
    assert!(output.contains("test result: ok. 1 passed; 0 failed"), "{output}");
}

#[test]
fn systemd() {
    let bed = Bed::builder("agent-systemd").host("host", Init::Systemd).up().unwrap();
    let output = with_tests(&bed).run(TESTS, &["--ignored", "--exact", "managers::systemd"]).unwrap();
    assert_ran_one(&output);
    bed.down().unwrap();
}

#[test]
fn supervisord() {
    let bed = Bed::builder("agent-supervisord").host("host", Init::Supervisord).up().unwrap();
    let output = with_tests(&bed).run(TESTS, &["--ignored", "--exact", "managers::supervisord"]).unwrap();
    assert_ran_one(&output);
    bed.down().unwrap();
}

#[test]
fn systemd_of_a_user() {
    let bed = Bed::builder("agent-systemd-user").host("host", Init::Systemd).up().unwrap();
    let host = with_tests(&bed);
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
