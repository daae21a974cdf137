//! Gates as people meet them: evidence comes in, lights turn, a deployment waits or does not begin.

use greenlight_model::Timestamp;
use serde_json::Value;

use crate::site::{RING, Site};

/// Every gate there is, and none of them green; staging has none.
fn shut() -> String {
    let now = Timestamp::now();
    // Three days from now it opens; so it is shut today.
    let day = (now + std::time::Duration::from_secs(3 * 86_400)).strftime("%a").to_string();
    let gates = format!(
        r#"
after = {{ environment = "staging", soak = "3d" }}

[environment.production.gate]
tests = {{ suites = ["unit"], known_failures = [{{ test = "t.mail.push", owner = "ann", until = "2099-12-31" }}] }}
coverage = "80%"
lint = {{ tools = ["pylint"] }}
approval = {{ role = "operator", count = 2, four_eyes = true }}
checklist = {{ required = ["backup looked at"], optional = ["support told"] }}
window = "{day} 09:00-16:00 America/Los_Angeles"
freeze = {{ when = "2020-01-01..2099-12-31", reason = "the great freeze" }}
command.backup = "sh -c 'echo it is too old; test -e backup'"
probe.vendor = "tcp://127.0.0.1:PORT4"
release_note = true

[role]
operator = ["ann", "bob", "tester"]
"#
    );
    RING.replace("after = { environment = \"staging\" }\n", &gates)
}

const PASSED: &str = r#"<testsuite><testcase classname="t.web" name="get"/></testsuite>"#;
const COVERED: &str = r#"<coverage lines-covered="81" lines-valid="100"/>"#;

fn lights(site: &Site) -> Vec<(String, String)> {
    let document = site.run(&["gates", "production", "v2", "--json"]).json();
    let gates = document["gates"].as_array().unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    gates.iter().map(|gate| (text(&gate["name"]), text(&gate["light"]["is"]))).collect()
}

#[test]
fn every_gate_has_its_sentence_and_nothing_is_touched() {
    let site = Site::new(&shut());
    site.commit("v1");
    site.commit("v2");
    site.run(&["check"]).exits(0);
    site.run(&["build", "hello", "--commit", "v2"]).exits(0);
    site.run(&["gates", "production", "v2"]).exits(3).says(&[
        "gate after staging (hello): red",
        "v2 never went to staging; deploy it there first: greenlight deploy staging",
        "gate tests (hello): red, there is no result of the suite unit for v2; add it: greenlight evidence add hello=v2 --suite unit --junit FILE",
        "gate coverage (hello): red, no coverage is recorded for v2; add it: greenlight evidence add hello=v2 --cobertura FILE",
        "gate lint (hello): red, there is no report of pylint for v2; add it: greenlight evidence add hello=v2 --pylint FILE",
        "gate release_note (hello): red, v2 has no note; write one: greenlight evidence add hello=v2 --note FILE",
        "gate checklist: red, not ticked: \"backup looked at\"; tick what you saw to: greenlight tick production \"backup looked at\" hello=v2",
        "gate approval operator: red, 2 of role operator must approve this plan, and nobody has; another one approves it with: greenlight approve production hello=v2 --role operator",
        "gate command backup: red, it ended with exit code 1: it is too old",
        "gate probe vendor: red, vendor: tcp://127.0.0.1:",
        "Connection refused",
        "gate window: amber, shut; it opens",
        "09:00 America/Los_Angeles, in ",
        "gate freeze: amber, frozen until Fri 2100-01-01 00:00 UTC",
        "the great freeze",
    ]);
    assert!(lights(&site).iter().all(|(_, light)| light != "green"));
    site.run(&["plan", "production", "v2"]).exits(3);
    site.run(&["deploy", "production", "v2"])
        .exits(3)
        .says(&["11 gates are shut; nothing was changed", "`freeze` is not green: frozen until"]);
    // What must be seen to is not waited for.
    site.run(&["deploy", "production", "v2", "--wait"]).exits(3);
    assert!(!site.path("hosts/three/releases").exists());
    // The way back has no gates.
    site.run(&["rollback", "production", "v2", "--dry-run"]).exits(0);
}

#[test]
fn lights_turn_green_one_by_one_and_it_goes_out() {
    let fleet = shut();
    let site = Site::new(&fleet);
    site.commit("v1");
    site.commit("v2");
    site.run(&["deploy", "staging", "--yes"]).exits(0);
    site.edit("soak = \"3d\"", "soak = \"0s\"");
    let reports = site.around().join("tmp");
    let report = |name: &str, text: &str| {
        let path = reports.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    // One file that cannot be read, and nothing of the others is recorded.
    let (good, cut) = (report("good.xml", PASSED), report("cut.xml", "<coverage>"));
    let broken = ["evidence", "add", "v2", "--suite", "unit", "--junit", &good, "--cobertura", &cut];
    site.run(&broken).exits(2).says(&["cut.xml: it is not whole XML", "nothing was recorded"]);
    assert_eq!(site.run(&["evidence", "list", "--json"]).json()["evidence"], serde_json::json!([]));

    let failed =
        PASSED.replace("/></", "/><testcase classname=\"t.mail\" name=\"push\"><failure/></testcase></");
    let known = report("known.xml", &failed);
    site.run(&["evidence", "add", "v2", "--suite", "unit", "--junit", &known])
        .exits(0)
        .says(&["1 passed, 1 failed"]);
    site.run(&["gates", "production", "v2"]).exits(3).says(&["unit: 1 passed, 1 known to fail"]);
    let other = report("other.xml", &failed.replace("push", "pull"));
    site.run(&["evidence", "add", "v2", "--suite", "unit", "--junit", &known, "--junit", &other]).exits(0);
    site.run(&["gates", "production", "v2"])
        .exits(3)
        .says(&["1 test failed that are not known to: t.mail.pull"]);

    let coverage = report("coverage.xml", COVERED);
    let lint = report("pylint.json", "[]");
    let note = report("note.md", "Mail is sent again.\n");
    let all = [
        "evidence",
        "add",
        "v2",
        "--suite",
        "unit",
        "--junit",
        &good,
        "--cobertura",
        &coverage,
        "--pylint",
        &lint,
        "--note",
        &note,
    ];
    site.run(&all).exits(0).says(&["81.0%", "pylint: 0 findings", "note Mail is sent again."]);
    site.run(&["evidence", "list", "v2"]).exits(0).says(&["hello=v2", "tester@", "81.0% of lines"]);

    site.run(&["tick", "production", "backup"])
        .exits(2)
        .says(&["no item \"backup\"", "\"backup looked at\""]);
    site.run(&["tick", "production", "backup looked at", "v2", "--note", "from 03:00"]).exits(0);
    site.write("backup", "");
    // `tester` built it, `eve` is no operator.
    site.run(&["approve", "production", "v2"]).exits(3).says(&[
        "tester",
        "four eyes",
        "nothing was approved",
    ]);
    site.run_as("eve", &["approve", "production", "v2"])
        .exits(3)
        .says(&["does not hold the role operator", "ann, bob"]);
    let shown = site.run_as("ann", &["approve", "production", "v2", "--json"]).exits(0).json();
    let digest = shown["digest"].as_str().unwrap();
    assert_eq!(shown["gate"]["light"]["is"], "red");
    site.run_as("bob", &["approve", "production", "v2", "--digest", "0000"])
        .exits(3)
        .says(&["nothing was approved"]);
    site.run_as("bob", &["approve", "production", "v2", "--digest", &digest[..12]])
        .exits(0)
        .says(&["gate approval operator: green, ann, bob approved this plan"]);
    let expected = [("freeze", "amber"), ("probe vendor", "red"), ("window", "amber")];
    let mut left: Vec<_> = lights(&site).into_iter().filter(|(_, light)| light != "green").collect();
    left.sort();
    let left: Vec<_> = left.iter().map(|(name, light)| (name.as_str(), light.as_str())).collect();
    assert_eq!(left, expected);

    site.run(&["override", "production", "freez", "--reason", "x"])
        .exits(2)
        .says(&["no gate \"freez\"", "\"freeze\""]);
    site.run(&["override", "production", "checklist", "--reason", "x"]).exits(2).says(&["green already"]);
    site.run(&["override", "production", "freeze", "--reason", " "]).exits(2);
    for gate in ["freeze", "probe vendor", "window"] {
        site.run_as("bob", &["override", "production", gate, "v2", "--reason", "the site is down"]).exits(0);
    }
    site.run_as("ann", &["deploy", "production", "v2"])
        .exits(3)
        .says(&["1 of 2", "ann asks for the rollout"]);
    site.run(&["deploy", "production", "v2"]).exits(0).says(&[
        "gate freeze: green, overridden by bob@",
        "the site is down",
        "DONE",
    ]);
    site.runs("production", &[("three/hello", Some("v2"))]);
    // What was overridden and approved was that release: the next one begins at red.
    site.commit("v3");
    site.run(&["build", "hello", "--commit", "v3"]).exits(0);
    site.run(&["gates", "production", "v3"]).exits(3).says(&["gate freeze: amber", "approval operator: red"]);
}

#[test]
fn evidence_of_another_commit_is_refused() {
    let site = Site::ring();
    for release in ["v1", "v2"] {
        site.run(&["build", "hello", "--commit", release]).exits(0);
    }
    let report = site.around().join("tmp/junit.xml");
    let report = report.to_str().unwrap();
    std::fs::write(report, PASSED).unwrap();
    let (v1, v2) = (site.git(&["rev-parse", "v1"]), site.git(&["rev-parse", "v2"]));
    // v2 is checked out.
    site.run(&["evidence", "add", "v1", "--junit", report])
        .exits(2)
        .says(&["what is checked out here is about commit", &v2[..10]]);
    site.run(&["evidence", "add", "v1", "--junit", report, "--commit", &v2])
        .exits(2)
        .says(&["--commit is about commit"]);
    site.run(&["evidence", "add", "v1", "--junit", report, "--commit", "v1"]).exits(2);
    site.run(&["evidence", "add", "v2", "--junit", report]).exits(0);
    let stated = format!(
        "<testsuite><properties><property name=\"commit\" value=\"{v1}\"/></properties><testcase name=\"a\"/></testsuite>"
    );
    std::fs::write(report, stated).unwrap();
    site.run(&["evidence", "add", "v2", "--junit", report, "--commit", &v2])
        .exits(2)
        .says(&["junit.xml is about commit", &v1[..10]]);
    site.run(&["evidence", "add", "v1", "--junit", report]).exits(0);
    site.run(&["evidence", "add", "v1"]).exits(2).says(&["nothing to add", "--exit-code NAME=CODE"]);
    site.run(&["evidence", "add", "v9", "--junit", report]).exits(2);
    let list = site.run(&["evidence", "list", "--json"]).json();
    assert_eq!(list["evidence"].as_array().unwrap().len(), 2);
}

#[test]
fn an_approval_is_void_when_the_plan_is_another_one() {
    let gate =
        "\n[environment.staging.gate]\napproval = { role = \"operator\" }\n[role]\noperator = [\"ann\"]\n";
    let site = Site::new(&format!("{RING}{gate}"));
    site.commit("v1");
    site.run_as("ann", &["approve", "staging", "v1"]).exits(2);
    site.run(&["build", "hello"]).exits(0);
    site.run_as("ann", &["approve", "staging", "v1"]).exits(0).says(&["ann approved this plan"]);
    // The order of the hosts is another one now.
    site.edit("hosts.hello = [\"one\", \"two\"]", "hosts.hello = [\"two\", \"one\"]");
    site.run(&["deploy", "staging", "v1"]).exits(3).says(&[
        "the plan is not the one that ann approved",
        "`1 activate one/hello",
        "became `1 activate two/hello",
    ]);
    site.runs("staging", &[("two/hello", None), ("one/hello", None)]);
    site.run_as("ann", &["approve", "staging", "v1"]).exits(0);
    site.run(&["deploy", "staging", "v1"]).exits(0);
}

#[test]
fn a_deployment_waits_for_what_time_brings() {
    let gate = "\n[environment.staging.gate]\nfreeze = { when = \"2020-01-01..2099-12-31\", reason = \"holidays\" }\n";
    let site = Site::new(&format!("{RING}{gate}"));
    site.commit("v1");
    site.run(&["build", "hello"]).exits(0);
    let waiting = site.start(&["deploy", "staging", "v1", "--wait"]);
    // It holds the environment's lease while it waits, and has begun nothing.
    let lease = site.path(".greenlight/controller-staging");
    crate::site::wait_until("it waits", || lease.exists());
    site.run(&["override", "staging", "freeze", "v1", "--reason", "agreed"]).exits(0);
    waiting.end().exits(0).says(&["gate freeze: amber", "waiting for freeze", "DONE"]);
    site.runs("staging", &[("one/hello", Some("v1")), ("two/hello", Some("v1"))]);
}

/// An action that waits for one role's green light is refused to whoever applies it early.
#[test]
fn an_action_waits_for_its_light() {
    let roles = "\n[role]\noperator = [\"ann\"]\ndatabase = [\"bob\"]\n";
    let site = Site::new(&format!("{RING}{roles}"));
    site.commit("v1");
    site.run(&["deploy", "staging"]).exits(0);
    let noted =
        site.run(&["issue", "add", "staging", "no mail", "--impact", "blocker", "--json"]).exits(0).json();
    let issue = noted["issue"].to_string();
    let add = ["action", "add", "staging", "make the queues anew", "--owner", "database"];
    let unheld = [&add[..], &["--waits-for", "operater"]].concat();
    site.run(&unheld).exits(2).says(&["nobody holds the role operater", "database, operator"]);
    let add = [
        &add[..],
        &["--waits-for", "operator", "--condition", "they are empty", "--issue", &issue, "--json"],
    ]
    .concat();
    let number = site.run(&add).exits(0).json()["action"].to_string();

    site.run_as("bob", &["action", "done", &number])
        .exits(3)
        .says(&["waits for the green light of operator, and that is not given; nothing may be done yet"]);
    site.run_as("bob", &["action", "light", &number]).exits(3).says(&["for operator to give", "ann"]);
    site.run(&["action", "list"]).exits(0).says(&["waits for the light of operator", "make the queues anew"]);
    site.run_as("ann", &["action", "light", &number]).exits(0).says(&["database may do it"]);
    site.run_as("ann", &["action", "done", &number]).exits(3).says(&["for database to do"]);
    site.run_as("bob", &["action", "done", &number, "--note", "all three"]).exits(0);
    site.run_as("bob", &["action", "done", &number]).exits(2).says(&["done already"]);
    site.run(&["issue", "resolve", &issue, "--how", "queues made anew"]).exits(0);
    site.run(&["issue", "resolve", "4711", "--how", "x"]).exits(2).says(&["no issue 4711"]);
    site.run(&["report"]).exits(0).says(&[
        "impact blocker resolved: no mail (seen by tester@",
        "resolved: queues made anew (tester@",
        "[x] action",
        "when they are empty (done by bob@",
        "after ",
    ]);
    site.run(&["report", "--format", "html"]).exits(0).says(&["<svg", "one/hello", "</html>"]);
}

/// What a migration warns of is in the report and stops nothing.
#[test]
fn a_migration_that_warns_goes_on_and_is_reported() {
    let fleet = RING.replace(
        "\n[service.hello.process.web]",
        "migrate = \"sh migrate.sh\"\n\n[service.hello.process.web]",
    );
    let site = Site::new(&fleet);
    site.write("migrate.sh", "echo 'relation \"users\" already exists'; echo 'all done'\n");
    site.commit("v1");
    site.run(&["deploy", "staging"]).exits(0).says(&["DONE"]);
    let ran = site.run(&["report"]).exits(0);
    let ran = ran.says(&["- impact nil: one/hello: the migration says: relation \"users\" already exists"]);
    assert!(!ran.stdout.contains("all done"), "{}", ran.stdout);
}
