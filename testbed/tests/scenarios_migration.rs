//! Migrations of a real PostgreSQL: what warns, what only adds, what takes something away, what fails, and who else migrates.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::Stdio;

use greenlight_testbed::{Bed, Init};
use support::{Site, fleet};

const PORT: u16 = 8000;
const REST: &str = r#"
[service.web.migrate]
run = "sh migrate.sh expand"
contract = "sh migrate.sh contract"
backup = "sh backup.sh"
files = ["expand/*.sql"]
contract_files = ["contract/*.sql"]
lock = "DATABASE_URL"
lock_timeout = "7s"

[secret.DATABASE_URL]
command = "cat SOURCE"

[environment.production]
hosts.web = ["px1", "px2"]
"#;
/// Runs the release's own file, where it has one.
const MIGRATE: &str = "psql -Atc 'show lock_timeout' \"$DATABASE_URL\"
file=$1/$(cat VERSION).sql
test ! -e \"$file\" || psql -v ON_ERROR_STOP=1 -f \"$file\" \"$DATABASE_URL\"
";
const BACKUP: &str = "pg_dump --table users --file /root/backup.sql \"$DATABASE_URL\"\n";
/// The number of the advisory lock that every migration takes.
const LOCK: i64 = 0x6772_6e6c_6967_6874;

/// A4 and A24.
#[test]
fn a_database_is_migrated_once_and_what_is_taken_away_is_agreed_to() {
    let bed = Bed::builder("migration")
        .host("px1", Init::None)
        .host("px2", Init::None)
        .host("db", Init::None)
        .up()
        .unwrap();
    let postgres = bed.postgres("db").unwrap();
    let source = bed.home().join("database-url");
    std::fs::write(&source, postgres.url()).unwrap();
    let toml = fleet("web", PORT, &REST.replace("SOURCE", source.to_str().unwrap()))
        .replace("[service.web]\n", "[service.web]\nsecrets = [\"DATABASE_URL\"]\n");
    let site = Site::new(&bed, &toml);
    let columns = || {
        let sql = "select column_name from information_schema.columns where table_name = 'users' order by 1";
        postgres.query(sql).unwrap().lines().collect::<Vec<_>>().join(" ")
    };

    // A4: what exists already is a warning, and in the report.
    let create = "CREATE TABLE IF NOT EXISTS users (id int, name text);\n";
    postgres.query(create).unwrap();
    site.release("v2", &[("migrate.sh", MIGRATE), ("backup.sh", BACKUP), ("expand/v2.sql", create)]);
    site.greenlight(&["deploy", "production"]).exits(0);
    site.greenlight(&["report"])
        .exits(0)
        .says(&["impact nil: px1/web: the migration says: ", "relation \"users\" already exists, skipping"]);
    let printed = site.json(&[
        "history",
        "--rollout",
        site.json(&["history", "production"])["rollouts"][0]["plan"]["id"].as_str().unwrap(),
    ]);
    assert!(printed.to_string().contains("7s"), "the limits reach the tool: {printed:#}");

    // A compatible one rolls, both ways, and runs once.
    site.release("v3", &[("expand/v3.sql", "ALTER TABLE users ADD COLUMN title text;\n")]);
    site.greenlight(&["deploy", "production"]).exits(0);
    site.greenlight(&["rollback", "production"]).exits(0);
    site.runs("web", PORT, &[("px1", "v2"), ("px2", "v2")]);
    site.greenlight(&["deploy", "production", "v3"]).exits(0);
    assert_eq!(columns(), "id name title");

    // A24: named in the plan, shut until somebody agrees, copied before, and no way back with the code alone after.
    let dropping = "ALTER TABLE users DROP COLUMN name;\n";
    site.release("v4", &[("contract/v4.sql", dropping)]);
    let named = "contract/v4.sql:1: ALTER TABLE users DROP COLUMN name (takes away the column name of users)";
    site.greenlight(&["plan", "production"]).exits(3).says(&[named, "gate migration (web): red"]);
    site.greenlight(&["deploy", "production"]).exits(3).says(&["gate `migration (web)` is not green"]);
    assert_eq!(columns(), "id name title");
    site.greenlight(&["confirm", "production", "--reason", "title has it"]).exits(0);
    site.greenlight(&["deploy", "production"]).exits(0);
    assert_eq!(columns(), "id title");
    assert!(
        bed.host("px1").read("/root/backup.sql").unwrap().contains("name text"),
        "the copy was made before"
    );
    site.greenlight(&["rollback", "production"]).exits(2).says(&["with the code alone", named]);
    site.runs("web", PORT, &[("px1", "v4"), ("px2", "v4")]);

    // Somebody else migrates: refused before anything is changed, and the release is not to blame.
    let mut holder = bed.host("db").command("psql").unwrap();
    let mut holder = holder
        .args(["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", &postgres.url()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = holder.stdin.take().unwrap();
    writeln!(input, "select 'held', pg_advisory_lock({LOCK});").unwrap();
    let mut line = String::new();
    BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("held"), "{line}");
    site.release("v5", &[("expand/v5.sql", "SELECT 1;\nALTER TABLE nowhere ADD COLUMN a int;\n")]);
    site.greenlight(&["deploy", "production"])
        .exits(1)
        .says(&["another migration holds the advisory lock", "TURNED BACK"]);
    // Its session ends with its input.
    drop(input);
    holder.wait().unwrap();

    // What fails stops with its statement, and nothing was switched.
    site.greenlight(&["deploy", "production"])
        .exits(1)
        .says(&["expand/v5.sql:2: ERROR:  relation \"nowhere\" does not exist", "TURNED BACK"]);
    site.runs("web", PORT, &[("px1", "v4"), ("px2", "v4")]);
    assert!(!site.printed.borrow().contains(postgres.password()));
}
