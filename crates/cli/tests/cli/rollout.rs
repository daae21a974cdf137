//! Whole rollouts on hosts of this machine: forward, back, refused, failed and turned back.

use serde_json::Value;

use crate::site::{RING, Site};

const V1: Option<&str> = Some("v1");
const V2: Option<&str> = Some("v2");

#[test]
fn it_goes_out_and_back_and_says_where_what_runs() {
    let site = Site::ring();
    site.run(&["build", "hello", "--commit", "v1"]).exits(0);
    site.run(&["status", "staging"]).exits(0).says(&["one/hello", "nothing"]);

    site.run(&["deploy", "staging", "v1"]).exits(0).says(&["DONE", "one/hello  v1", "two/hello  v1"]);
    site.runs("staging", &[("one/hello", V1), ("two/hello", V1)]);
    // Without a release, the head of the branch is built and goes out.
    let planned = site.run(&["plan", "staging", "--json"]).exits(0).json();
    let deployed = site.run(&["deploy", "staging", "--json"]).exits(0).json();
    assert_eq!(deployed["exit"], 0);
    assert_eq!(deployed["ended"]["outcome"]["is"], "done");
    site.runs("staging", &[("one/hello", V2), ("two/hello", V2)]);
    site.run(&["status", "staging"]).exits(0).says(&["v2", "proven", "last: staging-", "DONE"]);

    // What was shown is what was done.
    let rollout = deployed["rollout"].as_str().unwrap();
    let history = site.run(&["history", "--rollout", rollout, "--json"]).exits(0).json();
    let started = history["records"].as_array().unwrap().iter();
    let started: Vec<&Value> =
        started.filter(|record| record["body"]["record"] == "action_started").collect();
    let planned: Vec<String> =
        planned["steps"].as_array().unwrap().iter().map(|step| subject(&step["action"])).collect();
    let mut done: Vec<String> = started.iter().map(|record| subject(&record["body"]["action"])).collect();
    assert_eq!(planned.len(), done.len(), "{planned:#?}\n{done:#?}");
    let mut planned = planned;
    // Steps of the same moment begin in any order.
    planned.sort();
    done.sort();
    assert_eq!(planned, done);
    site.run(&["history", "--rollout", rollout]).exits(0).says(&[
        "started by tester@",
        "one/hello  activate v2",
        "wave 2 is proven",
        "DONE",
    ]);
    site.run(&["history", "staging"]).exits(0).says(&["ROLLOUT", rollout, "hello v2", "hello v1"]);

    // The same again changes nothing on any host.
    let before = site.run(&["status", "staging", "--json"]).json();
    site.run(&["deploy", "staging", "v2"]).exits(0).says(&["DONE"]);
    let after = site.run(&["status", "staging", "--json"]).json();
    for index in 0..2 {
        let process = |status: &Value| {
            status["environments"][0]["instances"][index]["report"]["processes"]["web"]["state"].clone()
        };
        assert_eq!(process(&before), process(&after));
    }

    // Nor do other settings, which a release brings; it is said, as often as it is so.
    site.edit("start_timeout = \"90s\"", "start_timeout = \"80s\"");
    for _ in 0..2 {
        let told = "not applied: the settings of hello in greenlight.toml have changed";
        site.run(&["deploy", "staging", "v2"]).exits(0).says(&[told, "DONE"]);
    }
    let planned = site.run(&["plan", "staging", "v2", "--json"]).exits(0).json();
    assert_eq!(planned["unapplied_settings"], serde_json::json!(["hello"]));

    site.run(&["rollback", "staging"]).exits(0).says(&["v2", "-> v1", "DONE"]);
    site.runs("staging", &[("one/hello", V1), ("two/hello", V1)]);
    site.run(&["releases"]).exits(0).says(&["staging"]);
}

fn subject(action: &Value) -> String {
    format!("{} {} {}", action["do"], action["instance"], action["release"])
}

#[test]
fn what_has_reached_every_host_is_tagged_and_nothing_else_is() {
    let site = Site::ring();
    let copy = site.around().join("copy.git");
    site.git(&["init", "--quiet", "--bare", copy.to_str().unwrap()]);
    site.git(&["remote", "add", "copy", copy.to_str().unwrap()]);
    let tag = "tag = { moving = \"staged\", push = \"copy\" }";
    site.edit("strategy = {", &format!("{tag}\nstrategy = {{"));
    let tags = || {
        let format = "--format=%(refname:short) %(objectname)";
        let text = site.git(&["for-each-ref", format, "refs/tags/deploy-*", "refs/tags/staged"]);
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let commit = |name: &str| site.git(&["rev-parse", name]).trim().to_owned();
    let (v1, v2) = (commit("v1"), commit("v2"));
    site.run(&["build", "hello", "--commit", "v1"]).exits(0);
    site.run(&["deploy", "staging", "v1", "--host", "one"]).exits(0);
    assert_eq!(tags(), [""; 0], "one host is not all of them");

    site.run(&["deploy", "staging", "v1"]).exits(0).says(&[
        "hello: tagged deploy-",
        "and staged",
        "pushed to",
    ]);
    let first = tags();
    let day = first[0].strip_suffix(&format!(" {v1}")).unwrap().to_owned();
    assert_eq!(first, [format!("{day} {v1}"), format!("staged {v1}")]);
    assert_eq!(day.len(), "deploy-2000-01-01".len(), "{day}");

    // The same again has its tag; another one of the day gets a name of its own. No release is called by these.
    site.run(&["deploy", "staging", "v1"]).exits(0).says(&[&format!("tagged {day}")]);
    assert_eq!(tags(), first);
    let out = site.run(&["deploy", "staging"]).exits(0);
    out.says(&["one/hello  v2", "hello: tagged deploy-"]);
    let second = tags();
    assert_eq!(second.len(), 3);
    assert!(
        second.contains(&format!("{day} {v1}")) && second.contains(&format!("staged {v2}")),
        "{second:?}"
    );
    let pushed = site.git(&["ls-remote", "--tags", "copy"]);
    for line in &second {
        let (name, commit) = line.split_once(' ').unwrap();
        assert!(pushed.contains(&format!("{commit}\trefs/tags/{name}")), "{pushed}");
    }

    // What turned back is not tagged, and nor is the way back.
    site.edit("start_timeout = \"90s\"", "start_timeout = \"2s\"");
    site.commit_as("v3", "something else");
    site.run(&["deploy", "staging"]).exits(1).says(&["TURNED BACK"]);
    site.edit("start_timeout = \"2s\"", "start_timeout = \"90s\"");
    site.run(&["rollback", "staging"]).exits(0);
    assert_eq!(tags(), second);

    // A tag that cannot be pushed undoes nothing.
    std::fs::remove_dir_all(&copy).unwrap();
    site.run(&["deploy", "staging", "v2"]).exits(0).says(&["DONE", "could not be tagged: git push failed"]);
}

#[test]
fn a_dry_run_changes_nothing() {
    let site = Site::ring();
    site.run(&["deploy", "staging", "v1"]).exits(2).says(&["no release of hello is called `v1`"]);
    site.run(&["build", "hello", "--commit", "v1"]).exits(0);
    let shown = site.run(&["deploy", "staging", "v1", "--dry-run"]).exits(0);
    assert_eq!(shown.stdout, site.run(&["plan", "staging", "v1"]).exits(0).stdout);
    assert!(shown.stdout.contains("activate v1"), "{}", shown.stdout);
    assert_eq!(
        site.run(&["deploy", "staging", "v1", "--dry-run", "--json"]).exits(0).json()["command"],
        "plan"
    );
    site.runs("staging", &[("one/hello", None), ("two/hello", None)]);
    site.run(&["history"]).exits(0).says(&["no rollouts yet"]);
    assert!(!site.path("hosts/one/releases").exists());
}

#[test]
fn a_gate_that_is_red_holds_and_nothing_is_touched() {
    let site = Site::ring();
    site.run(&["build", "hello"]).exits(0);
    site.run(&["deploy", "production", "v2"])
        .exits(3)
        .says(&["never went to staging", "greenlight deploy staging"]);
    site.run(&["plan", "production", "v2"]).exits(3).says(&["gate after staging (hello): red"]);
    let error = site.run(&["deploy", "production", "v2", "--json"]).exits(3).json();
    assert_eq!((error["command"].as_str(), &error["exit"]), (Some("error"), &Value::from(3)));
    assert!(!site.path("hosts/three/releases").exists());
    site.run(&["deploy", "staging", "v2"]).exits(0);
    site.run(&["deploy", "production", "v2"]).exits(0).says(&["gate after staging (hello): green", "DONE"]);
    site.runs("production", &[("three/hello", V2)]);
}

#[test]
fn a_release_that_answers_wrongly_is_turned_back_before_the_second_host() {
    let site = Site::ring();
    site.run(&["deploy", "staging"]).exits(0);
    site.commit_as("v3", "something else");
    site.edit("start_timeout = \"90s\"", "start_timeout = \"2s\"");
    let turned_back = site.run(&["deploy", "staging"]).exits(1);
    let turned_back =
        turned_back.says(&["TURNED BACK", "answers as `something else`", "one/hello  v2", "two/hello  v2"]);
    assert!(!turned_back.stderr.contains("two/hello  activate"), "{}", turned_back.stderr);
    site.runs("staging", &[("one/hello", V2), ("two/hello", V2)]);
    // It is bad from then on, here and behind the gate, until somebody says otherwise.
    site.run(&["releases"]).exits(0).says(&["bad: one/hello: activate failed"]);
    site.run(&["deploy", "staging", "v3"]).exits(2).says(&["is marked bad", "--good"]);
    site.run(&["rollback", "staging", "v3"]).exits(2).says(&["is marked bad"]);
    site.run(&["deploy", "production", "v3"]).exits(2).says(&["is marked bad"]);
    site.run(&["releases", "mark", "v3", "--good"]).exits(0);
    site.run(&["deploy", "production", "v3"]).exits(3).says(&["it was turned back in staging"]);
    assert!(!site.path("hosts/three/releases").exists());
    site.run(&["history", "staging"]).exits(0).says(&["TURNED BACK"]);
}

#[test]
fn a_first_deployment_that_fails_leaves_nothing_running() {
    let site = Site::new(&RING.replace("90s", "2s"));
    site.commit_as("v1", "wrong");
    let ran = site.run(&["deploy", "staging", "--json"]).exits(1);
    assert_eq!(ran.json()["ended"]["outcome"]["is"], "turned_back");
    site.ends_quietly();
    site.runs("staging", &[("one/hello", None), ("two/hello", None)]);
    site.run(&["rollback", "staging"]).exits(2).says(&["no earlier release was healthy"]);
}

#[test]
fn a_way_back_by_name_and_by_itself() {
    let site = Site::ring();
    site.run(&["rollback", "staging"])
        .exits(2)
        .says(&["no earlier release", "greenlight rollback staging RELEASE"]);
    site.run(&["deploy", "staging", "v1"]).exits(2);
    for release in ["v1", "v2"] {
        site.run(&["build", "hello", "--commit", release]).exits(0);
        site.run(&["deploy", "staging", release]).exits(0);
    }
    site.run(&["rollback", "staging", "--dry-run"]).exits(0).says(&["v2", "-> v1"]);
    site.runs("staging", &[("one/hello", V2), ("two/hello", V2)]);
    site.run(&["releases", "mark", "v1", "--bad", "loses orders"]).exits(0);
    site.run(&["rollback", "staging", "v1"]).exits(2).says(&["marked bad: loses orders"]);
    // The way back by itself does not lead to a bad one either.
    site.run(&["rollback", "staging"]).exits(2).says(&["no earlier release"]);
    site.run(&["releases", "mark", "v1", "--good"]).exits(0);
    site.run(&["rollback", "staging", "v1"]).exits(0).says(&["DONE"]);
    site.runs("staging", &[("one/hello", V1), ("two/hello", V1)]);
}

#[test]
fn two_services_go_out_together_and_alone() {
    let worker = r#"
[service.worker]

[service.worker.process.work]
run = "sh work.sh"
"#;
    let fleet = format!("{RING}{worker}")
        .replace("[environment.staging]\n", "[environment.staging]\nhosts.worker = [\"two\"]\n");
    let site = Site::new(&fleet);
    site.write("work.sh", "echo works; exec sleep 1000\n");
    site.commit("v1");
    site.run(&["deploy", "staging"]).exits(0).says(&["one/hello   v1", "two/worker  v1", "DONE"]);
    site.runs("staging", &[("one/hello", V1), ("two/hello", V1), ("two/worker", V1)]);
    site.commit("v2");
    site.run(&["deploy", "staging", "--service", "worker"]).exits(0);
    site.runs("staging", &[("one/hello", V1), ("two/hello", V1), ("two/worker", V2)]);
    site.run(&["deploy", "staging", "v2"]).exits(2).says(&["hello=v2 or worker=v2"]);
    site.run(&["deploy", "staging", "worker=v1"]).exits(0);
    site.runs("staging", &[("one/hello", V1), ("two/hello", V1), ("two/worker", V1)]);
    site.run(&["deploy", "staging", "--service", "mailer"]).exits(2).says(&["no hosts for `mailer`"]);
    site.run(&["logs", "staging", "--service", "worker"]).exits(0).says(&["two work | works"]);
    let lines = site.run(&["logs", "staging", "--service", "worker", "--json"]).exits(0);
    for line in lines.stdout.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!((&line["host"], &line["text"]), (&Value::from("two"), &Value::from("works")));
    }
    assert!(!lines.stdout.is_empty());
}

#[test]
fn a_command_arrives_as_it_was_typed() {
    let site = Site::new(RING);
    let hard = ["a b", "c\"d", "e'f", "$HOME", "*", ";", "--json", "\\n", ""];
    let mut arguments = vec!["exec", "staging", "--json", "--", "printf", "<%s>\n"];
    arguments.extend(hard);
    let data = site.run(&arguments).exits(0).json();
    let expected: Vec<String> = hard.iter().map(|word| format!("<{word}>")).collect();
    for (host, index) in [("one", 0), ("two", 1)] {
        assert_eq!(data["hosts"][index]["host"], host);
        assert_eq!(data["hosts"][index]["stdout"], serde_json::json!(expected));
    }
    site.run(&["exec", "staging", "--host", "two", "--", "echo", "here"]).exits(0).says(&["two | here"]);
    let failed =
        site.run(&["exec", "staging", "--json", "--", "sh", "-c", "echo why >&2; exit 7"]).exits(1).json();
    assert_eq!(failed["hosts"][1]["code"], 7);
    assert_eq!(failed["hosts"][1]["stderr"], serde_json::json!(["why"]));
    site.run(&["exec", "staging", "--", "no-such-program"])
        .exits(1)
        .says(&["one: `no-such-program` could not be started"]);
    site.run(&["exec", "staging", "--timeout", "1s", "--", "sleep", "60"]).exits(1).says(&["1.0s"]);
    site.ends_quietly();
}

#[test]
fn hosts_tells_what_each_is() {
    let site = Site::new(RING);
    site.run(&["hosts"]).exits(0).says(&["production", "staging", "three", "agent"]);
    let data = site.run(&["hosts", "staging", "--json"]).exits(0).json();
    assert!(data["environments"][0]["hosts"]["one"]["facts"]["os"].is_string(), "{data:#}");
    // One that cannot be reached is told; the other is looked at all the same.
    site.edit(
        "one = { link = \"local\", address = \"127.0.0.1\"",
        "one = { link = \"ssh\", address = \"127.0.0.1\", destination = \"nowhere.invalid\"",
    );
    site.run(&["hosts", "staging"]).exits(1).says(&["one", "two", "agent", "nowhere.invalid"]);
    site.run(&["status", "staging"]).exits(1).says(&["does not answer"]);
    // What a host runs that does not answer is not known, and nothing goes out without it.
    site.commit("v1");
    let refused = site.run(&["deploy", "staging"]).exits(1);
    refused.says(&["REFUSED, nothing was changed", "one/hello  unknown", "two/hello  nothing"]);
}

#[test]
fn what_there_is_not_is_told_with_what_there_is() {
    let site = Site::ring();
    let unknown: [(&[&str], &[&str]); 8] = [
        (&["deploy", "stagin"], &["there is no environment `stagin`", "production, staging"]),
        (&["plan", "stagin"], &["production, staging"]),
        (&["status", "stagin"], &["production, staging"]),
        (&["hosts", "stagin"], &["production, staging"]),
        (&["exec", "staging", "--host", "zwei", "--", "true"], &["staging has no host `zwei`", "one, two"]),
        (&["logs", "staging", "--host", "zwei"], &["zwei", "one, two"]),
        (&["logs", "staging", "--service", "helo"], &["helo", "hello"]),
        (&["history", "--rollout", "staging-0"], &["there is no rollout staging-0", "greenlight history"]),
    ];
    for (arguments, texts) in unknown {
        site.run(arguments).exits(2).says(texts);
    }
}
