//! The reference in `docs/` names every key of the fleet file, every command, and the shape of every document.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::site::{RING, Ran, Site};
use crate::verdict::evidence;

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn every_key_of_the_fleet_file_is_documented() {
    let schema: Value = serde_json::from_str(&Site::empty().run(&["schema"]).exits(0).stdout).unwrap();
    let mut keys = BTreeSet::new();
    collect_keys(&schema, &mut keys);
    assert!(keys.len() > 40, "{keys:?}");
    let text = document("reference/fleet-file.md");
    let missing: Vec<&String> = keys.iter().filter(|key| !text.contains(&format!("`{key}`"))).collect();
    assert!(missing.is_empty(), "docs/reference/fleet-file.md does not mention {missing:?}");
}

fn collect_keys(schema: &Value, keys: &mut BTreeSet<String>) {
    match schema {
        Value::Object(members) => {
            if let Some(Value::Object(properties)) = members.get("properties") {
                keys.extend(properties.keys().cloned());
            }
            members.values().for_each(|member| collect_keys(member, keys));
        }
        Value::Array(items) => items.iter().for_each(|item| collect_keys(item, keys)),
        _ => {}
    }
}

/// The keys that `json.md` lists under each heading, in tables whose rows begin with the key.
fn documented_shapes() -> BTreeMap<String, BTreeSet<String>> {
    let mut shapes: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut heading = String::new();
    for line in document("reference/json.md").lines() {
        if let Some(name) = line.strip_prefix("## ") {
            heading = name.trim_matches('`').to_owned();
        } else if let Some(row) = line.strip_prefix("| `")
            && let Some((key, _)) = row.split_once('`')
        {
            shapes.entry(heading.clone()).or_default().insert(key.to_owned());
        }
    }
    shapes
}

#[test]
fn every_document_has_the_keys_that_are_documented() {
    let site = Site::ring();
    let empty = Site::empty();
    let mut real: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let mut shape = |heading: &'static str, ran: &Ran| {
        let document = ran.json();
        let expected = heading.split(" --").next().unwrap();
        assert_eq!(document["command"], expected, "{}", ran.what);
        let keys = document.as_object().unwrap().keys();
        let keys = keys.filter(|key| !["version", "command"].contains(&key.as_str()));
        real.insert(heading, keys.cloned().collect());
        document
    };
    shape("init", &empty.run(&["init", "--json"]).exits(0));
    shape("check", &site.run(&["check", "--json"]).exits(0));
    shape("error", &site.run(&["build", "helo", "--json"]).exits(2));
    shape("build", &site.run(&["build", "hello", "--commit", "v1", "--json"]).exits(0));
    shape("preflight", &site.run(&["preflight", "staging", "v1", "--json"]).exits(0));
    shape("plan", &site.run(&["plan", "staging", "v1", "--json"]).exits(0));
    let rollout = shape("rollout", &site.run(&["deploy", "staging", "v1", "--json"]).exits(0));
    shape("releases", &site.run(&["releases", "--json"]).exits(0));
    shape("releases mark", &site.run(&["releases", "mark", "v1", "--good", "--json"]).exits(0));
    shape("status", &site.run(&["status", "--json"]).exits(0));
    shape("history", &site.run(&["history", "--json"]).exits(0));
    let id = rollout["rollout"].as_str().unwrap();
    shape("history --rollout", &site.run(&["history", "--rollout", id, "--json"]).exits(0));
    shape("report", &site.run(&["report", "--json"]).exits(0));
    shape("hosts", &site.run(&["hosts", "--json"]).exits(0));
    shape("drift", &site.run(&["drift", "staging", "--json"]).exits(0));
    shape("exec", &site.run(&["exec", "staging", "--json", "--", "true"]).exits(0));

    let gated = "\n[environment.staging.gate]\nchecklist = { required = [\"a\"] }\nwindow = \"daily 00:00-24:00\"\n\
        approval = { role = \"operator\" }\nfreeze = { when = \"2020-01-01..2099-12-31\", reason = \"b\" }\n\
        [role]\noperator = [\"tester\"]\n\
        [service.hello.migrate]\nrun = \"true\"\nbackup = \"true\"\nfiles = [\"1.sql\"]\n";
    let gated = Site::new(&format!("{RING}{gated}"));
    gated.write("1.sql", "DROP TABLE users;\n");
    gated.commit("v1");
    gated.run(&["build", "hello"]).exits(0);
    shape("evidence add", &gated.run(&["evidence", "add", "v1", "--exit-code", "unit=0", "--json"]).exits(0));
    shape("evidence list", &gated.run(&["evidence", "list", "--json"]).exits(0));
    shape("gates", &gated.run(&["gates", "staging", "--json"]).exits(3));
    shape("approve", &gated.run(&["approve", "staging", "--json"]).exits(0));
    shape("issue", &gated.run(&["issue", "add", "staging", "a", "--json"]).exits(0));
    shape("action", &gated.run(&["action", "add", "staging", "a", "--owner", "ann", "--json"]).exits(0));
    shape("action list", &gated.run(&["action", "list", "--json"]).exits(0));
    shape("confirm", &gated.run(&["confirm", "staging", "--reason", "c", "--json"]).exits(0));
    shape("tick", &gated.run(&["tick", "staging", "a", "--json"]).exits(0));
    shape("override", &gated.run(&["override", "staging", "freeze", "--reason", "c", "--json"]).exits(0));

    let deploying = site.stop_in_the_middle();
    shape("hold", &site.run(&["hold", "staging", "--json"]).exits(0));
    shape("operate", &site.run(&["resume", "staging", "--json"]).exits(0));
    site.go_on();
    deploying.end().exits(0);

    let talking = Site::new(&RING.replace("sh start.sh", "sh talk.sh"));
    talking.write("talk.sh", "echo talks\n. ./start.sh\n");
    talking.commit("v1");
    talking.run(&["deploy", "staging"]).exits(0);
    let lines = talking.run(&["logs", "staging", "-n", "1", "--host", "one", "--json"]).exits(0);
    assert_eq!(lines.stdout.lines().count(), 1, "{}", lines.stdout);
    shape("logs", &lines);

    empty.write("evidence.jsonl", &evidence(5, false, None));
    let replay = ["verdict", "replay", "evidence.jsonl", "--json"];
    shape("verdict replay", &empty.run(&replay).exits(0));
    let a_a = [&replay[..], &["--a-a", "--stretch", "10m"]].concat();
    shape("verdict replay --a-a", &empty.run(&a_a).exits(0));

    let mut documented = documented_shapes();
    // What the demo prints is compared in a test of its own; it takes a while.
    assert!(documented.remove("demo").is_some());
    assert_eq!(documented.keys().collect::<Vec<_>>(), real.keys().collect::<Vec<_>>());
    for (heading, keys) in real {
        assert_eq!(documented[heading], keys, "docs/reference/json.md, {heading}");
    }
}

/// The keys that `json.md` lists for the demo.
pub(crate) fn documented_demo() -> BTreeSet<String> {
    documented_shapes().remove("demo").unwrap()
}

#[test]
fn every_command_is_documented() {
    let text = document("reference/commands.md");
    let help = Site::empty().run(&["--help"]).exits(0).stdout;
    let commands =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names = commands
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next().filter(|name| !name.is_empty()));
    let mut count = 0;
    for name in names.filter(|name| *name != "help") {
        assert!(
            text.contains(&format!("## {name}\n")),
            "docs/reference/commands.md has no heading for {name}"
        );
        count += 1;
    }
    assert!(count >= 19, "{help}");
}

#[test]
fn every_link_in_the_documents_leads_somewhere() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let mut links = 0;
    for file in crate::secret::files_below(&docs)
        .into_iter()
        .filter(|file| file.extension().is_some_and(|end| end == "md"))
    {
        let text = std::fs::read_to_string(&file).unwrap();
        for rest in text.split("](").skip(1) {
            let target = rest.split(')').next().unwrap().split('#').next().unwrap();
            if target.is_empty() || target.starts_with("http") {
                continue;
            }
            assert!(file.parent().unwrap().join(target).exists(), "{} links to {target}", file.display());
            links += 1;
        }
    }
    assert!(links > 5, "only {links} links");
}
