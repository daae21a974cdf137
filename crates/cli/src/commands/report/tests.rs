//! One rollout with a migration's warning, an override, a wave that was turned back, an issue and actions of people: what is
//! written of it is kept beside this as a whole.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use greenlight_model::Timestamp;
use greenlight_model::action::{Action as Step, ActionDetail, ActionResult, Blame};
use greenlight_model::canary::{CanaryStep, Until};
use greenlight_model::decision::Outcome;
use greenlight_model::evidence::{Evidence, Fact};
use greenlight_model::history::History;
use greenlight_model::id::{Generation, Instance, ReleaseId, RolloutId};
use greenlight_model::journal::{Entry, Impact, Section};
use greenlight_model::quantity::Percent;
use greenlight_model::record::{Record, RecordBody};
use greenlight_model::rollout::{Direction, Note, Plan, Wave};

use super::{Report, compose, html, markdown, verdicts};

struct Log {
    history: History,
    records: Vec<Record>,
    now: Timestamp,
}

fn instance(text: &str) -> Instance {
    text.to_owned().try_into().unwrap()
}

fn release(number: u8) -> ReleaseId {
    ReleaseId::from_bytes([number; 32])
}

fn rollout() -> RolloutId {
    "production-1".parse().unwrap()
}

impl Log {
    fn write(&mut self, seconds: u64, by: &str, body: RecordBody) {
        self.now += Duration::from_secs(seconds);
        let seq = self.history.last_seq + 1;
        let record = Record { seq, at: self.now, by: format!("{by}@desk"), body };
        self.history.apply(&record).unwrap();
        self.records.push(record);
    }

    fn step(&mut self, seconds: u64, action: Step, failed: Option<&str>, output: &[&str]) {
        let (rollout, why) = (rollout(), "it is time".to_owned());
        self.write(
            0,
            "ann",
            RecordBody::ActionStarted { rollout: rollout.clone(), action: action.clone(), why },
        );
        let result = match failed {
            None => ActionResult::Succeeded,
            Some(why) => ActionResult::Failed { why: why.to_owned(), blame: Blame::Release },
        };
        let output = output.iter().map(|&line| line.to_owned()).collect();
        let detail = ActionDetail { took_ms: seconds * 1000, checks: Vec::new(), output };
        self.write(seconds, "ann", RecordBody::ActionFinished { rollout, action, result, detail });
    }

    fn report(&self) -> Report {
        let mut report =
            compose::compose(&self.history.rollouts[&rollout()], &self.history, &self.records, &[]);
        report.patches.insert("web".parse().unwrap(), vec!["0123456789 Send mail again (Ann)".to_owned()]);
        report
    }
}

fn told() -> Log {
    let now = "2026-11-21T16:00:00Z".parse().unwrap();
    let mut log = Log { history: History::default(), records: Vec::new(), now };
    let targets = BTreeMap::from([("web".parse().unwrap(), release(2))]);
    let fact = Fact::Tests {
        suite: "unit".parse().unwrap(),
        passed: 12,
        skipped: 1,
        failed: 0,
        failures: Vec::new(),
    };
    let evidence = Evidence { releases: targets.clone(), environment: None, digest: None, fact };
    log.write(0, "ci", RecordBody::EvidenceAdded { evidence });
    let fact = Fact::Override { gate: "freeze".to_owned(), why: "the site is down".to_owned() };
    let environment = Some("production".parse().unwrap());
    let evidence = Evidence { releases: targets.clone(), environment, digest: None, fact };
    log.write(10, "bob", RecordBody::EvidenceAdded { evidence });
    let [a, b] = ["a/web", "b/web"].map(instance);
    let plan = Plan {
        id: rollout(),
        environment: "production".parse().unwrap(),
        direction: Direction::Forward,
        targets,
        baseline: [&a, &b].map(|it| (it.clone(), Some(release(1)))).into(),
        waves: Vec::new(),
        generation: Generation(2),
        started_by: "ann@desk".to_owned(),
        digest: None,
        is_partial: false,
        overrides: BTreeMap::new(),
        losses: Vec::new(),
    };
    log.write(10, "ann", RecordBody::RolloutStarted { plan, services: BTreeMap::new() });
    let migrate = Step::Migrate { instance: a.clone(), release: release(2) };
    log.step(
        4,
        migrate,
        None,
        &["creating table users", "NOTICE: relation \"users\" already exists, skipping"],
    );
    log.step(3, Step::Drain { instance: a.clone() }, Some("the balancer does not answer"), &[]);
    log.step(2, Step::Drain { instance: a.clone() }, None, &[]);
    let activate = |release, generation| Step::Activate {
        instance: a.clone(),
        release,
        generation: Generation(generation),
    };
    log.step(
        30,
        activate(release(2), 2),
        Some("it answers as `<b>old</b>`"),
        &["<script>alert(1)</script>", "Traceback"],
    );
    let note = Note::TurnBack { why: "a/web: activate failed".to_owned(), bad: BTreeSet::from([release(2)]) };
    log.write(1, "ann", RecordBody::Noted { rollout: rollout(), note });
    log.step(5, activate(release(1), 3), None, &[]);
    let why = "a/web: activate failed".to_owned();
    let running = [a, b].map(|it| (it, Some(release(1)))).into();
    let outcome = Outcome::TurnedBack { why };
    log.write(2, "ann", RecordBody::RolloutEnded { rollout: rollout(), outcome, running });
    let journal = |entry| RecordBody::Journal { entry };
    let environment: greenlight_model::id::EnvironmentName = "production".parse().unwrap();
    let opened = Entry::IssueOpened {
        environment: environment.clone(),
        rollout: Some(rollout()),
        section: Section::Deployment,
        what: "mail was not sent".to_owned(),
        impact: Impact::Blocker,
    };
    log.write(60, "eve", journal(opened));
    let issue = log.history.last_seq;
    let added = Entry::ActionAdded {
        environment,
        what: "make the queues anew".to_owned(),
        owner: "database".to_owned(),
        waits_for: Some("operator".parse().unwrap()),
        condition: "the old ones are empty".to_owned(),
        issue: Some(issue),
    };
    log.write(1, "eve", journal(added));
    let how = "the queue was restarted".to_owned();
    log.write(60, "bob", journal(Entry::IssueResolved { issue, how }));
    log
}

/// Compares with what is kept; with `GREENLIGHT_WRITE_GOLDEN` set it is written anew, to be read before it is committed.
fn is_golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/commands/report/golden").join(name);
    if std::env::var_os("GREENLIGHT_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == text, "{} is another one now:\n{text}", path.display());
}

#[test]
fn what_is_written_is_what_is_kept() {
    let report = told().report();
    is_golden("turned-back.md", &markdown::render(&report));
    is_golden("turned-back.html", &html::render(&report));
}

#[test]
fn the_impact_follows_from_what_came_of_it() {
    let report = told().report();
    let impacts: Vec<Impact> = report.deployment_issues.iter().map(|issue| issue.impact).collect();
    // A drain that passed when it was tried again, a switch that did not, a migration's warning, what a person saw.
    assert_eq!(impacts, [Impact::Nil, Impact::Blocker, Impact::Nil, Impact::BlockerResolved]);
    assert_eq!(
        (report.time_to_detect.as_deref(), report.time_to_repair.as_deref()),
        (Some("31.0s"), Some("7.0s"))
    );
    assert_eq!(report.debt.len(), 1);
    assert_eq!(report.actions[0].state, "waits for the light of operator");
}

#[test]
fn what_is_said_never_becomes_part_of_the_page() {
    let page = html::render(&told().report());
    assert!(!page.contains("<script") && !page.contains("<b>old"), "{page}");
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"), "{page}");
    // Nothing is fetched.
    assert!(!page.contains("src=") && !page.contains("href=") && !page.contains("url("), "{page}");
}

#[test]
fn what_a_canary_was_judged_by_is_named_where_it_is_kept() {
    let mut rollout = told().history.rollouts[&rollout()].clone();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("production-1-web.jsonl");
    std::fs::write(&file, "").unwrap();
    assert!(verdicts(directory.path(), &rollout).is_empty(), "it has no canary");
    let share = Percent::try_from(10).unwrap();
    let instances = BTreeSet::from([instance("px1/web")]);
    let steps = vec![CanaryStep { share, until: Until::Pass }];
    rollout.plan.waves.push(Wave { instances, together: false, after: Duration::ZERO, steps });
    let found = verdicts(directory.path(), &rollout);
    assert_eq!(found.len(), 1);
    assert!(found[0].what.contains(&format!("greenlight verdict replay {}", file.display())), "{found:?}");
    std::fs::remove_file(&file).unwrap();
    assert!(verdicts(directory.path(), &rollout).is_empty(), "it is kept elsewhere");
}

/// An action that is open follows to the next report, and one that was done before it began does not.
#[test]
fn open_actions_follow() {
    let mut log = told();
    let task = *log.history.journal.tasks.keys().next().unwrap();
    let mut plan = log.history.rollouts[&rollout()].plan.clone();
    plan.id = "production-2".parse().unwrap();
    let id = plan.id.clone();
    log.write(60, "ann", RecordBody::RolloutStarted { plan: plan.clone(), services: BTreeMap::new() });
    let report = |log: &Log, id: &RolloutId| {
        compose::compose(&log.history.rollouts[id], &log.history, &log.records, &[])
    };
    assert_eq!(report(&log, &id).actions.len(), 1);
    let journal = |entry| RecordBody::Journal { entry };
    log.write(1, "ann", journal(Entry::ActionLit { action: task }));
    log.write(1, "ann", journal(Entry::ActionDone { action: task, note: String::new() }));
    assert!(report(&log, &id).actions[0].is_done);
    let outcome = Outcome::Done { left_out: BTreeMap::new() };
    log.write(1, "ann", RecordBody::RolloutEnded { rollout: id, outcome, running: BTreeMap::new() });
    plan.id = "production-3".parse().unwrap();
    let third = plan.id.clone();
    log.write(1, "ann", RecordBody::RolloutStarted { plan, services: BTreeMap::new() });
    assert!(report(&log, &third).actions.is_empty());
}
