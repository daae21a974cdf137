//! JUnit XML, as pytest, nose, Surefire, Gradle, Jest and others write it.

use greenlight_model::evidence::{FAILED_TESTS_MAX, Fact};
use greenlight_model::id::CheckName;
use roxmltree::Node;

use super::{ReadError, Report, xml};

/// Names of properties under which a report may state its commit.
const COMMIT_PROPERTIES: [&str; 5] = ["commit", "git.commit", "git_commit", "revision", "sha"];

/// Reads a report of one suite. Cases are counted one by one; what its attributes sum up is not looked at.
///
/// # Errors
/// When it is not whole, or is something else.
pub fn junit(text: &str, suite: &CheckName) -> Result<Report, ReadError> {
    let document = xml(text)?;
    let root = document.root_element();
    if !matches!(root.tag_name().name(), "testsuites" | "testsuite") {
        return Err(ReadError::new(format!(
            "it is no JUnit report: those begin with `testsuites` or `testsuite`, this one with `{}`",
            root.tag_name().name()
        )));
    }
    let (mut passed, mut skipped, mut failed) = (0_u32, 0_u32, 0_u32);
    let mut failures = Vec::new();
    for case in root.descendants().filter(|node| node.has_tag_name("testcase")) {
        let has = |name: &str| case.children().any(|child| child.has_tag_name(name));
        if has("failure") || has("error") {
            failed += 1;
            if failures.len() < FAILED_TESTS_MAX {
                failures.push(name(&case));
            }
        } else if has("skipped") {
            skipped += 1;
        } else {
            passed += 1;
        }
    }
    let commit = root
        .descendants()
        .filter(|node| node.has_tag_name("property"))
        .find(|node| node.attribute("name").is_some_and(|name| COMMIT_PROPERTIES.contains(&name)))
        .and_then(|node| node.attribute("value").or_else(|| node.text()))
        .map(|commit| commit.trim().to_owned());
    let suite = suite.clone();
    Ok(Report { facts: vec![Fact::Tests { suite, passed, skipped, failed, failures }], commit })
}

fn name(case: &Node<'_, '_>) -> String {
    let name = case.attribute("name").unwrap_or("(a test without a name)");
    match case.attribute("classname").filter(|class| !class.is_empty()) {
        Some(class) => format!("{class}.{name}"),
        None => name.to_owned(),
    }
}
