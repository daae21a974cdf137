//! What a migration takes away: named before, agreed to, copied; and from then on no way back with the code alone.

use crate::site::{RING, Site};

/// `users` is a file with its columns; a release's SQL is not run, but says what the script does to it.
const MIGRATE: &str = r#"
[service.hello.migrate]
run = "sh migrate.sh"
contract = "sh contract.sh"
backup = "sh backup.sh"
files = ["expand/*.sql"]
contract_files = ["contract/*.sql"]

[service.hello.process.web]
"#;

fn site() -> Site {
    let site = Site::new(&RING.replace("\n[service.hello.process.web]\n", MIGRATE));
    let base = site.directory.to_str().unwrap().to_owned();
    let note = |what: &str| format!("echo {what} $(cat VERSION) >> '{base}/database'\n");
    site.write("migrate.sh", &note("expand"));
    site.write("contract.sh", &note("contract"));
    site.write("backup.sh", &note("backup"));
    site.write(".gitignore", ".greenlight/\nhosts/\nwait\nwaiting\ndatabase\n");
    site.write("expand/1.sql", "CREATE TABLE users (id int, name text);\n");
    site.commit("v1");
    site.run(&["deploy", "staging"]).exits(0).says(&["DONE"]);
    site
}

#[test]
fn what_old_code_needs_is_taken_away_last_and_agreed_to_before() {
    let site = site();
    site.write("expand/2.sql", "ALTER TABLE users ADD COLUMN title text;\n");
    site.write("contract/2.sql", "-- it was copied\nALTER TABLE users DROP COLUMN name;\n");
    site.commit("v2");
    let statement =
        "contract/2.sql:2: ALTER TABLE users DROP COLUMN name (takes away the column name of users)";
    site.run(&["plan", "staging"]).exits(3).says(&[
        &format!("contracting migration of hello takes away: {statement}"),
        "gate migration (hello): red, it takes away what older code may need",
        "agree to it with: greenlight confirm staging hello=v2 --reason WHY",
    ]);
    site.run(&["deploy", "staging"]).exits(3).says(&["gate `migration (hello)` is not green"]);
    site.run(&["confirm", "staging", "--reason", "nobody reads it"]).exits(0).says(&[statement]);
    site.run(&["deploy", "staging"]).exits(0).says(&["DONE"]);
    // v1 was migrated too; only what takes something away is preceded by a copy, and comes when everything runs it.
    let done = "expand v1\ncontract v1\nexpand v2\nbackup v2\ncontract v2\n";
    assert_eq!(site.read("database"), done);
    site.run(&["rollback", "staging"]).exits(2).says(&["cannot go back with the code alone", statement]);
    site.run(&["rollback", "staging", "v1"]).exits(2).says(&["cannot be gone back to", statement]);
    site.run(&["deploy", "staging", "v1"]).exits(2).says(&["cannot be gone back to", statement]);
    // The same release again runs nothing twice.
    site.run(&["deploy", "staging", "v2", "--host", "one"]).exits(0);
    assert_eq!(site.read("database"), done);
    site.run(&["rollback", "staging", "--database-restored", "from 03:00"]).exits(0);
    site.runs("staging", &[("one/hello", Some("v1")), ("two/hello", Some("v1"))]);
}

#[test]
fn what_only_adds_is_gone_back_from_and_a_copy_is_asked_for_otherwise() {
    let site = site();
    site.write("expand/2.sql", "ALTER TABLE users ADD COLUMN title text;\n");
    site.commit("v2");
    site.run(&["deploy", "staging"]).exits(0);
    site.run(&["rollback", "staging"]).exits(0);
    site.runs("staging", &[("one/hello", Some("v1")), ("two/hello", Some("v1"))]);
    assert!(!site.read("database").contains("backup"));
    site.edit("backup = \"sh backup.sh\"\n", "");
    site.write("expand/3.sql", "TRUNCATE users;\n");
    site.commit("v3");
    site.run(&["confirm", "staging", "--reason", "all of them are gone"]).exits(0);
    site.run(&["deploy", "staging"])
        .exits(3)
        .says(&["a copy must be kept first: state `backup` in [service.hello.migrate]"]);
}

#[test]
fn a_rollout_that_took_something_away_holds_where_it_would_turn_back() {
    let site = site();
    site.edit("start_timeout = \"90s\"", "start_timeout = \"5s\"");
    site.write("expand/2.sql", "DROP TABLE users;\n");
    site.commit_as("v2", "something else");
    site.run(&["confirm", "staging", "--reason", "it is empty"]).exits(0);
    site.run(&["deploy", "staging"]).exits(3).says(&[
        "HELD",
        "It cannot go back with the code alone",
        "expand/2.sql:1: DROP TABLE users",
    ]);
    // No host went back by itself, and none was sent back.
    site.run(&["abort", "staging"])
        .exits(3)
        .says(&["cannot go back with the code alone", "--database-restored"]);
    let restored = site.run(&["abort", "staging", "--database-restored", "from the copy"]);
    restored.exits(1).says(&["TURNED BACK"]);
    site.runs("staging", &[("one/hello", Some("v1")), ("two/hello", Some("v1"))]);
}

#[test]
fn a_contracting_migration_that_fails_is_run_again_when_a_person_resumes() {
    let site = site();
    let base = site.directory.to_str().unwrap().to_owned();
    let script = format!(
        "test -e '{base}/mended' || {{ echo 'ERROR: column is used' >&2; exit 1; }}\necho done >> '{base}/database'\n"
    );
    site.write("contract.sh", &script);
    site.commit("v2");
    site.run(&["deploy", "staging"]).exits(3).says(&[
        "HELD",
        "the contracting migration",
        "ERROR: column is used",
        "Everything runs",
    ]);
    site.runs("staging", &[("one/hello", Some("v2")), ("two/hello", Some("v2"))]);
    site.write("mended", "");
    site.run(&["resume", "staging", "--reason", "mended"]).exits(0).says(&["DONE"]);
    assert_eq!(site.read("database"), "expand v1\ncontract v1\nexpand v2\ndone\n");
}
