//! Scenarios of people, and of the loss of a controller: hold, `^C`, resume, abort, `kill -9`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use greenlight_testbed::{Bed, Init};
use support::{Ended, Site, fleet};

const HOSTS: &str = "\n[environment.production]\nhosts.web = [\"px[1-3]\"]\n";

fn all(version: &str) -> [(&str, &str); 3] {
    ["px1", "px2", "px3"].map(|host| (host, version))
}

/// A rollout that has changed the first host, and does to it what `act` does. How it ended.
fn interrupted(site: &Site<'_>, version: &str, act: impl FnOnce(&mut support::Begun<'_>)) -> Ended {
    // Slow enough for the second host to be under way when the first has been seen.
    site.release(version, &[("SLOW_START", "1500")]);
    let mut deploy = site.begin(&["deploy", "production"]);
    deploy.wait_for("px1/web  ok activate");
    act(&mut deploy);
    deploy.end()
}

#[test]
fn hold_interrupt_resume_and_abort() {
    let bed = Bed::builder("hold").hosts(["px1", "px2", "px3"], Init::None).up().unwrap();
    let site = Site::new(&bed, &fleet("web", 8000, HOSTS));
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&all("v1"));
    site.greenlight(&["hold", "production"]).exits(2).says(&["no rollout of production is open"]);

    // Held by somebody else, and gone on with.
    let ended = interrupted(&site, "v2", |_| {
        site.greenlight(&["hold", "production", "--reason", "the fair begins"]).exits(0).says(&["is held"]);
    });
    ended.exits(3).says(&["HELD", "the fair begins", "greenlight resume production"]);
    site.runs("web", 8000, &[("px1", "v2"), ("px3", "v1")]);
    let status = site.greenlight(&["status", "production"]).exits(3);
    println!("{status}");
    status.says(&["waits: held by", "the fair begins"]);
    site.greenlight(&["deploy", "production", "v1"]).exits(3).says(&["has not ended", "greenlight resume"]);
    site.greenlight(&["resume", "production"]).exits(0).ends_with(&all("v2"));
    site.runs("web", 8000, &all("v2"));

    // `^C`, and turned back by whoever comes next.
    let ended = interrupted(&site, "v3", |deploy| deploy.signal("INT"));
    ended.exits(3).says(&["HELD", "interrupted"]);
    site.greenlight(&["status", "production"]).exits(3).says(&["waits: held by", "interrupted"]);
    site.greenlight(&["abort", "production", "--reason", "not today"])
        .exits(1)
        .says(&["TURNED BACK", "not today"])
        .ends_with(&all("v2"));
    site.runs("web", 8000, &all("v2"));

    // Aborted by somebody else while it runs.
    let ended = interrupted(&site, "v4", |_| {
        site.greenlight(&["abort", "production"]).exits(0).says(&["turns back"]);
    });
    ended.exits(1).says(&["TURNED BACK", "aborted by"]).ends_with(&all("v2"));
    site.runs("web", 8000, &all("v2"));
    site.greenlight(&["status", "production"]).exits(0);
}

#[test]
fn a_killed_controller_is_followed_by_another() {
    let bed = Bed::builder("killed").hosts(["px1", "px2", "px3"], Init::None).up().unwrap();
    let site = Site::new(&bed, &fleet("web", 8000, HOSTS));
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&all("v1"));

    let ended = interrupted(&site, "v2", |deploy| deploy.signal("KILL"));
    assert_eq!(ended.code, None, "{ended}");
    let status = site.greenlight(&["status", "production"]).exits(3);
    println!("{status}");
    status.says(&["open:", "next:"]);
    site.greenlight(&["resume", "production"]).exits(0).ends_with(&all("v2"));
    site.runs("web", 8000, &all("v2"));

    interrupted(&site, "v3", |deploy| deploy.signal("KILL"));
    let ended = site.greenlight(&["abort", "production"]).exits(1);
    println!("{ended}");
    ended.says(&["TURNED BACK"]).ends_with(&all("v2"));
    site.runs("web", 8000, &all("v2"));
}
