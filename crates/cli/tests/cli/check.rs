//! `check` and `schema`.

use std::path::{Path, PathBuf};

use crate::site::{RING, Site};

/// One mistake on each of the lines 2, 8, 12, 15 and 17.
const FIVE_MISTAKES: &str = r#"[service.web]
bulid = ["make"]

[service.web.process.web]
run = "./serve --port {port}"
port = 7071
stdout = "web.log"
stderr = "web.log"

[service.web.process.admin]
run = "./admin"
port = 7071

[environment.production]
hosts.web = ["web[3-1]"]
user = "deploy"
strategy = { kind = "rolling", batch = "lots" }
"#;
const MISTAKES: [(u64, &str, &str); 5] = [
    (2, "unknown-key", "`bulid` is not a key"),
    (8, "shared-log", "process `web` writes stdout and stderr to the same file, `web.log`"),
    (12, "port-used-twice", "port 7071 is used twice"),
    (15, "bad-value", "runs backwards"),
    (17, "bad-value", "`lots`"),
];

fn examples() -> Vec<PathBuf> {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let mut files: Vec<PathBuf> = std::fs::read_dir(examples)
        .unwrap()
        .map(|entry| entry.unwrap().path().join("greenlight.toml"))
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    assert!(files.len() >= 5, "{files:?}");
    files
}

#[test]
fn five_mistakes_are_told_at_once_with_their_lines() {
    let site = Site::new(FIVE_MISTAKES);
    let ran = site.run(&["check"]).exits(2).says(&["greenlight.toml has 5 mistakes; nothing was done"]);
    let data = site.run(&["check", "--json"]).exits(2).json();
    assert_eq!(data["exit"], 2);
    let problems = data["problems"].as_array().unwrap();
    assert_eq!(problems.len(), MISTAKES.len(), "{problems:#?}");
    for ((line, code, message), problem) in MISTAKES.into_iter().zip(problems) {
        assert!(ran.stderr.contains(&format!("greenlight.toml:{line}:")), "line {line}: {}", ran.stderr);
        assert!(ran.stderr.contains(message), "{message}: {}", ran.stderr);
        assert_eq!(problem["file"], "greenlight.toml");
        assert_eq!(problem["line"], line);
        assert_eq!(problem["code"], code);
        assert!(problem["message"].as_str().unwrap().contains(message), "{problem}");
        assert!(problem["help"].is_string(), "{problem}");
    }
    // No other command goes by a file that has mistakes.
    site.run(&["deploy", "production"]).exits(2).says(&["5 mistakes"]);
    assert!(!site.path(".greenlight").exists());
}

#[test]
fn a_shared_log_is_refused_by_the_name_of_its_process() {
    let site = Site::new(&RING.replace("start_timeout", "stdout = \"log\"\nstderr = \"log\"\nstart_timeout"));
    site.run(&["check"]).exits(2).says(&["process `web` writes stdout and stderr to the same file, `log`"]);
}

#[test]
fn a_file_that_is_not_there_is_told_with_what_to_do() {
    let site = Site::empty();
    site.run(&["check"]).exits(2).says(&["no greenlight.toml in", "help: `greenlight init` writes one"]);
    site.run(&["check", "--file", "fleet.toml"]).exits(2).says(&["cannot read fleet.toml"]);
    assert_eq!(site.run(&["check", "--json"]).exits(2).json()["command"], "error");
}

#[test]
fn a_clean_file_and_every_example_pass() {
    let site = Site::new(RING);
    site.run(&["check"]).exits(0).says(&["no mistakes"]);
    let data = site.run(&["check", "--json"]).exits(0).json();
    assert_eq!(data["problems"], serde_json::json!([]));
    assert_eq!(data["environments"], serde_json::json!(["production", "staging"]));
    // It is found from a directory below, too.
    std::fs::create_dir(site.path("below")).unwrap();
    let below = site.greenlight(&["check"]).current_dir(site.path("below")).output().unwrap();
    assert!(below.status.success());
    for example in examples() {
        site.run(&["check", "--file", example.to_str().unwrap()]).exits(0);
    }
}

#[test]
fn the_schema_is_one_and_fits_every_example_and_no_mistake() {
    let site = Site::empty();
    let schema = serde_json::from_str(&site.run(&["schema"]).exits(0).stdout).unwrap();
    jsonschema::meta::validate(&schema).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let read = |text: &str| serde_json::to_value(text.parse::<toml::Table>().unwrap()).unwrap();
    for example in examples() {
        let value = read(&std::fs::read_to_string(&example).unwrap());
        let errors: Vec<String> = validator.iter_errors(&value).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{}: {errors:?}", example.display());
    }
    assert!(!validator.is_valid(&read(FIVE_MISTAKES)));
}
