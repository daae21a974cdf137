//! `build` and `releases`.

use crate::site::{RING, Site};

#[test]
fn the_same_commit_gives_the_same_release() {
    let site = Site::ring();
    let first = site.run(&["build", "hello", "--json"]).exits(0).json();
    let again = site.run(&["build", "hello", "--json"]).exits(0).json();
    assert_eq!(first["release"]["id"], again["release"]["id"]);
    assert_eq!(first["release"]["label"], "v2");
    assert_eq!(first["release"]["commit"], site.git(&["rev-parse", "HEAD"]));
    let other = site.run(&["build", "hello", "--commit", "v1", "--json"]).exits(0).json();
    assert_ne!(first["release"]["id"], other["release"]["id"]);
    let listed = site.run(&["releases", "--json"]).exits(0).json();
    assert_eq!(listed["releases"].as_array().unwrap().len(), 2);
    site.run(&["releases", "--service", "hello"]).exits(0).says(&["SERVICE", "v1", "v2"]);
}

#[test]
fn what_is_in_no_commit_is_in_no_release_and_is_told() {
    let site = Site::ring();
    site.write("page.txt", "not committed\n");
    site.run(&["build", "hello"]).exits(0).says(&["have changes that are in no commit"]);
}

#[test]
fn a_release_is_found_by_label_commit_and_id() {
    let site = Site::ring();
    let built = site.run(&["build", "hello", "--json"]).exits(0).json();
    site.run(&["build", "hello", "--commit", "v1", "--label", "first"]).exits(0);
    let text = |key: &str| built["release"][key].as_str().unwrap().to_owned();
    let (id, commit) = (text("id"), text("commit"));
    for name in ["v2", &id, &id[..12], &commit, &commit[..10], "hello=v2"] {
        site.run(&["releases", "mark", name, "--bad", "loses orders"])
            .exits(0)
            .says(&["hello v2", "marked bad"]);
        site.run(&["releases", "mark", name, "--good"]).exits(0).says(&["marked good"]);
    }
    site.run(&["releases", "mark", "v9", "--good"]).exits(2).says(&[
        "no release of hello is called `v9`; the newest are",
        "first",
        "v2",
    ]);
    site.run(&["releases", "mark", "helo=v2", "--good"]).exits(2).says(&["there is hello"]);
    site.run(&["releases", "mark", "v2"]).exits(2).says(&["--bad"]);
    // Two commits under one label: neither is meant more than the other.
    site.commit("v3");
    site.run(&["build", "hello", "--label", "first"]).exits(0);
    site.run(&["releases", "mark", "first", "--good"]).exits(2).says(&["first", &id[..0]]);
    site.run(&["deploy", "staging", "first"]).exits(2).says(&["first"]);
}

#[test]
fn a_label_that_two_services_have_needs_its_service() {
    let two = format!("{RING}\n[service.other]\n[service.other.process.work]\nrun = \"sleep 1000\"\n");
    let site = Site::new(&two);
    site.commit("v1");
    site.run(&["build", "hello"]).exits(0);
    site.run(&["build", "other"]).exits(0);
    site.run(&["releases", "mark", "v1", "--good"]).exits(2).says(&["hello=v1 or other=v1"]);
    site.run(&["releases", "mark", "other=v1", "--bad", "slow"]).exits(0);
    site.run(&["releases"]).exits(0).says(&["bad: slow"]);
}

#[test]
fn a_step_that_fails_shows_its_last_lines() {
    let site =
        Site::new(&RING.replace("sed -i", "echo compiling; echo 'no such symbol: oops' >&2; exit 7; sed"));
    site.commit("v1");
    site.run(&["build", "hello"]).exits(1).says(&["compiling", "no such symbol: oops", "7"]);
    site.run(&["deploy", "staging"]).exits(1).says(&["no such symbol: oops"]);
    assert_eq!(site.run(&["build", "hello", "--json"]).exits(1).json()["exit"], 1);
    site.run(&["releases"]).exits(0).says(&["no releases yet"]);
}

#[test]
fn what_cannot_be_built_is_a_mistake_of_whoever_asked() {
    let site = Site::ring();
    site.run(&["build", "helo"]).exits(2).says(&["there is no service `helo`", "hello"]);
    site.run(&["build", "hello", "--commit", "v9"]).exits(2).says(&["v9"]);
    std::fs::remove_dir_all(site.path(".git")).unwrap();
    site.run(&["build", "hello"]).exits(2).says(&["git"]);
}

#[test]
fn the_environment_of_the_caller_reaches_neither_the_build_nor_its_log() {
    let site = Site::new(&RING.replace("sed -i", "env; sed -i"));
    site.commit("v1");
    let built = site.greenlight(&["build", "hello"]).env("DEPLOY_TOKEN", "planted-3f81").output().unwrap();
    assert!(built.status.success(), "{built:?}");
    let shown = String::from_utf8_lossy(&built.stderr);
    assert!(shown.contains("GREENLIGHT_COMMIT="), "the step was not shown: {shown}");
    for path in crate::secret::files_below(site.around()) {
        let content = std::fs::read(&path).unwrap();
        assert!(!crate::secret::contains(&content, b"planted-3f81"), "{}", path.display());
    }
    assert!(!shown.contains("planted-3f81"));
}
