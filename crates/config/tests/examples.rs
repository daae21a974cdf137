//! The example fleets are right: each is read without a warning, and its schema agrees.

use std::path::Path;

use greenlight_config::{parse, schema};

#[test]
fn every_example_is_read_and_valid() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let validator = jsonschema::validator_for(&schema()).unwrap();
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&examples).unwrap() {
        let directory = entry.unwrap().path();
        if !directory.is_dir() {
            continue;
        }
        let name = directory.file_name().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(directory.join("greenlight.toml")).unwrap();
        let parsed = parse(&text).unwrap_or_else(|problems| panic!("{name}: {problems:#?}"));
        assert_eq!(parsed.warnings, [], "{name}");
        let json = serde_json::to_value(text.parse::<toml::Table>().unwrap()).unwrap();
        let errors: Vec<_> = validator.iter_errors(&json).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{name}: {errors:?}");
        names.push(name);
    }
    for expected in ["one-host", "rings", "secrets", "three-hosts-haproxy", "workers"] {
        assert!(names.iter().any(|name| name == expected), "{expected} is missing from {names:?}");
    }
}
