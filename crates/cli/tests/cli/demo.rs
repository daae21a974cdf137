//! The demo as somebody meets it who has nothing but this program.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::documents::documented_demo;
use crate::site::{Site, processes_of};

#[test]
fn it_fails_no_request_and_leaves_nothing_behind() {
    let site = Site::empty();
    let data = site.run(&["demo", "--json"]).exits(0).json();
    assert_eq!(data["command"], "demo");
    assert_eq!(data["failed"], 0, "{data:#}");
    assert!(data["requests"].as_u64().unwrap() > 100, "{data:#}");
    let phases = data["phases"].as_array().unwrap();
    let exits: Vec<u64> = phases.iter().map(|phase| phase["exit"].as_u64().unwrap()).collect();
    assert_eq!(exits, [0, 0, 1, 0, 0, 1], "{data:#}");
    // The bad canary was found by its own errors, and they are nobody else's.
    let errors: Vec<u64> = phases.iter().map(|phase| phase["canary_errors"].as_u64().unwrap()).collect();
    assert!(errors[5] > 0 && errors[..5] == [0; 5], "{data:#}");
    assert!(phases.iter().all(|phase| phase["failed"] == 0 && phase["seconds"].as_f64().unwrap() > 0.0));
    let releases = data["by_release"].as_object().unwrap();
    assert_eq!(releases.keys().collect::<Vec<_>>(), ["v1", "v2", "v4", "v5"], "{data:#}");
    let mut keys: BTreeSet<String> = data.as_object().unwrap().keys().cloned().collect();
    keys.retain(|key| key != "version" && key != "command");
    assert_eq!(documented_demo(), keys);
    assert_eq!(fs::read_dir(site.around().join("tmp")).unwrap().count(), 0);
    site.ends_quietly();
}

#[test]
fn it_is_kept_to_play_with_and_stopped_again() {
    let site = Site::empty();
    site.run(&["demo", "--keep"]).exits(0).says(&["kept running", "demo --stop"]);
    let kept = fs::read_dir(site.around().join("tmp")).unwrap().next().unwrap().unwrap().path();
    assert!(!processes_of(&kept).is_empty());
    let at = |arguments: &[&str]| site.greenlight(arguments).current_dir(&kept).output().unwrap();
    let status = at(&["status"]);
    assert!(status.status.success(), "{status:?}");
    assert!(String::from_utf8_lossy(&status.stdout).contains("in traffic"), "{status:?}");
    site.run(&["demo", "--stop", kept.to_str().unwrap()]).exits(0).says(&["stopped and removed"]);
    assert!(!kept.exists());
    assert_eq!(processes_of(&kept), []);
    site.run(&["demo", "--stop", kept.to_str().unwrap()]).exits(2).says(&["is not a demo's directory"]);
    refuses_what_is_not_a_demo(&site);
}

/// A directory that is somebody's work is not removed.
fn refuses_what_is_not_a_demo(site: &Site) {
    site.write("precious/file", "mine");
    site.run(&["demo", "--stop", "precious"]).exits(2).says(&["is not a demo's directory"]);
    assert!(Path::new(&site.path("precious/file")).exists());
}
