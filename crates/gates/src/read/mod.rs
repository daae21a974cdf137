//! From the reports of tests and analyses to evidence. Text in, facts out: whose release they are about is for the caller,
//! who also compares the commit that a report states.
//!
//! Guarantees: a report that is cut off, of another kind, or without anything that could be counted is refused; nothing of
//! it is guessed.

mod cobertura;
mod junit;
mod pylint;
mod sarif;

use greenlight_model::evidence::{FINDINGS_MAX, Fact};
use greenlight_model::id::CheckName;

pub use cobertura::cobertura;
pub use junit::junit;
pub use pylint::pylint;
pub use sarif::sarif;

/// Most nodes of an XML report: more than any suite has, and less than would fill the memory.
const XML_NODES_MAX: u32 = 4_000_000;

/// What a report holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The facts.
    pub facts: Vec<Fact>,
    /// The commit that the report says it is about, when it does.
    pub commit: Option<String>,
}

/// Why a report is no evidence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct ReadError {
    /// What is wrong with it.
    pub why: String,
}

impl ReadError {
    fn new(why: impl Into<String>) -> Self {
        Self { why: why.into() }
    }
}

/// A tool's name as a check's: in lower case, with dashes for what cannot stand in a name.
fn check_name(text: &str) -> Result<CheckName, ReadError> {
    let name: String = text
        .trim()
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '.' || c == '_' { c } else { '-' })
        .collect();
    name.parse().map_err(|_| ReadError::new(format!("the tool's name, `{text}`, cannot be used as a name")))
}

fn xml(text: &str) -> Result<roxmltree::Document<'_>, ReadError> {
    // Cobertura's reports name their document type; nothing is fetched for it, and entities are limited by the reader.
    let options =
        roxmltree::ParsingOptions { allow_dtd: true, nodes_limit: XML_NODES_MAX, ..Default::default() };
    roxmltree::Document::parse_with_options(text, options)
        .map_err(|error| ReadError::new(format!("it is not whole XML: {error}")))
}

fn check_count(findings: usize) -> Result<(), ReadError> {
    if findings > FINDINGS_MAX {
        return Err(ReadError::new(format!(
            "it has more than {FINDINGS_MAX} different findings, which nobody can compare; narrow what is analysed"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn only(report: Result<Report, ReadError>) -> Fact {
        let mut facts = report.unwrap().facts;
        assert_eq!(facts.len(), 1);
        facts.remove(0)
    }

    #[test]
    fn junit_reports_are_counted_by_their_cases() {
        let text = r#"<?xml version="1.0"?><testsuites><testsuite name="pytest" tests="5">
            <properties><property name="commit" value="0123456789abcdef0123456789abcdef01234567"/></properties>
            <testcase classname="tests.a" name="one"/><testcase classname="tests.a" name="two"><skipped/></testcase>
            <testcase classname="tests.b" name="three"><failure message="x"/><error/></testcase>
            <testcase name="four"><error/></testcase>
            <testsuite name="inner"><testcase classname="tests.c" name="five"><system-out>failure</system-out></testcase></testsuite>
            </testsuite></testsuites>"#;
        let suite: CheckName = "unit".parse().unwrap();
        let report = junit(text, &suite).unwrap();
        assert_eq!(report.commit.as_deref(), Some("0123456789abcdef0123456789abcdef01234567"));
        let failures = vec!["tests.b.three".to_owned(), "four".to_owned()];
        let expected = Fact::Tests { suite: suite.clone(), passed: 2, skipped: 1, failed: 2, failures };
        assert_eq!(report.facts, [expected]);
        let cut = &text[..text.len() - 20];
        assert!(junit(cut, &suite).unwrap_err().why.contains("not whole XML"));
        let other = junit("<coverage/>", &suite).unwrap_err();
        assert!(other.why.contains("`coverage`"), "{other}");
    }

    #[test]
    fn cobertura_reports_are_counted_by_lines() {
        let stated = r#"<?xml version="1.0" ?><!DOCTYPE coverage SYSTEM "http://cobertura.sourceforge.net/xml/coverage-04.dtd">
            <coverage lines-covered="81" lines-valid="100" line-rate="0.81"><packages/></coverage>"#;
        assert_eq!(only(cobertura(stated)), Fact::Coverage { covered: 81, lines: 100 });
        let counted = r#"<coverage line-rate="0.5"><packages><package><classes><class><methods><method><lines>
            <line number="1" hits="3"/></lines></method></methods><lines><line number="1" hits="3"/><line number="2" hits="0"/>
            </lines></class></classes></package></packages></coverage>"#;
        assert_eq!(only(cobertura(counted)), Fact::Coverage { covered: 1, lines: 2 });
        for (bad, why) in [
            ("<testsuite/>", "`testsuite`"),
            ("<coverage line-rate=\"1\"/>", "no line"),
            ("<coverage lines-covered=\"9\" lines-valid=\"8\"/>", "more lines"),
            ("<coverage lines-covered=\"-1\" lines-valid=\"8\"/>", "`-1`"),
        ] {
            let error = cobertura(bad).unwrap_err();
            assert!(error.why.contains(why), "{error}");
        }
    }

    #[test]
    fn sarif_reports_keep_what_is_found_and_not_settled() {
        let text = r#"{"version":"2.1.0","runs":[{"tool":{"driver":{"name":"Semgrep OSS"}},
            "versionControlProvenance":[{"revisionId":"abc123"}],"results":[
            {"ruleId":"r1","level":"error","message":{"text":"bad  call\nhere"},"locations":[{"physicalLocation":{"artifactLocation":{"uri":"a.py"},"region":{"startLine":3}}}]},
            {"ruleId":"r1","level":"error","message":{"text":"bad call here"},"locations":[{"physicalLocation":{"artifactLocation":{"uri":"a.py"},"region":{"startLine":9}}}]},
            {"ruleId":"r2","message":{"text":"x"},"suppressions":[{"kind":"inSource"}]},
            {"ruleId":"r3","message":{"text":"x"},"suppressions":[{"kind":"external","status":"rejected"}]},
            {"ruleId":"r4","kind":"pass","message":{"text":"x"}},
            {"ruleId":"r5","baselineState":"absent","message":{"text":"x"}}]}]}"#;
        let report = sarif(text).unwrap();
        assert_eq!(report.commit.as_deref(), Some("abc123"));
        let findings = BTreeMap::from([("a.py: r1: bad call here".to_owned(), 2), ("r3: x".to_owned(), 1)]);
        let tool = "semgrep-oss".parse().unwrap();
        assert_eq!(report.facts, [Fact::Lint { tool, findings }]);
        for bad in ["{}", "[]", "{\"version\":\"2.1.0\",\"runs\":[]}", "{\"runs\":[{}]}", "{\"version\""] {
            assert!(sarif(bad).is_err(), "{bad}");
        }
        // A run without `results` broke off before it could find anything.
        let broken = r#"{"version":"2.1.0","runs":[{"tool":{"driver":{"name":"x"}}}]}"#;
        assert!(sarif(broken).unwrap_err().why.contains("no results"));
    }

    #[test]
    fn pylint_reports_are_read_as_text_and_as_json() {
        let text = "************* Module app\napp.py:1:0: C0114: Missing module docstring (missing-module-docstring)\n\
                    app.py:7:4: W0612: Unused variable 'x' (unused-variable)\n\n\
                    ------------------------------------\nYour code has been rated at 8.00/10\n";
        let findings = BTreeMap::from([
            ("app.py: missing-module-docstring: Missing module docstring".to_owned(), 1),
            ("app.py: unused-variable: Unused variable 'x'".to_owned(), 1),
        ]);
        let tool: CheckName = "pylint".parse().unwrap();
        let expected = Fact::Lint { tool: tool.clone(), findings };
        assert_eq!(only(pylint(text)), expected);
        let json = r#"[{"path":"app.py","symbol":"missing-module-docstring","message":"Missing module docstring","line":1},
            {"path":"app.py","symbol":"unused-variable","message":"Unused variable 'x'","line":7}]"#;
        assert_eq!(only(pylint(json)), expected);
        let clean = Fact::Lint { tool, findings: BTreeMap::new() };
        assert_eq!(only(pylint("Your code has been rated at 10.00/10\n")), clean);
        assert_eq!(only(pylint("[]")), clean);
        assert!(pylint("bash: pylint: command not found\n").is_err());
        assert!(pylint("").is_err());
    }
}
