//! A rollout whose controller and records are gone, or are on another machine: what is left is the fleet file and what the
//! hosts know.

use std::fs;

use rustix::process::Signal;

use crate::site::Site;

const V1: Option<&str> = Some("v1");
const V2: Option<&str> = Some("v2");

/// The least that a claim may last, so that a test need not wait longer.
fn ring() -> Site {
    let site = Site::ring();
    site.edit("strategy =", "timeouts = { claim = \"10s\" }\nstrategy =");
    site
}

#[test]
fn a_controller_without_records_goes_on_or_back() {
    for (command, code, says, release) in [("resume", 0, "DONE", V2), ("abort", 1, "TURNED BACK", V1)] {
        let site = ring();
        let deploying = site.stop_in_the_middle();
        deploying.signal(Signal::KILL);
        assert_eq!(deploying.end().code, None);
        site.go_on();
        // With the machine went its record log and its depot.
        fs::rename(site.path(".greenlight"), site.around().join("lost")).unwrap();
        site.run(&["status", "staging"]).says(&["begun elsewhere by tester@", "greenlight resume staging"]);
        site.run(&["hold", "staging"]).exits(2).says(&["no rollout of staging is open"]);
        let ran = site.run(&[command, "staging"]).exits(code);
        ran.says(&["its records are not here", "is taken over", says]);
        site.run(&["history", "staging"]).exits(0).says(&["staging-"]);
        let built = ["v1", "v2"].map(|label| site.run(&["build", "hello", "--commit", label]).exits(0));
        drop(built);
        site.runs("staging", &[("one/hello", release), ("two/hello", release)]);
        let status = site.run(&["status", "staging", "--json"]).exits(0).json();
        for instance in status["environments"][0]["instances"].as_array().unwrap() {
            assert!(instance["report"]["ledger"]["claim"].is_null(), "{instance}");
        }
        // The next rollout begins as if nothing had been.
        site.run(&["deploy", "staging", "v2"]).exits(0);
    }
}

#[test]
fn nothing_is_taken_over_from_a_controller_that_lives() {
    let site = ring();
    let deploying = site.stop_in_the_middle();
    let other = site.around().join("other");
    fs::create_dir(&other).unwrap();
    fs::copy(site.path("greenlight.toml"), other.join("greenlight.toml")).unwrap();
    let file = other.to_str().unwrap();
    site.run(&["--file", file, "resume", "staging"])
        .exits(3)
        .says(&["is driven elsewhere", "nothing was changed"]);
    site.run(&["--file", file, "status", "staging"]).says(&["begun elsewhere by tester@"]);
    site.go_on();
    deploying.end().exits(0);
    site.runs("staging", &[("one/hello", V2), ("two/hello", V2)]);
    site.run(&["--file", file, "resume", "staging"]).exits(2).says(&["no rollout of staging is open"]);
}
