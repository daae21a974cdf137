//! `[environment.NAME.gate]` and `[role]`: their tables, how they hold together, and what they become.

use std::collections::BTreeSet;
use std::time::Duration;

use greenlight_model::calendar::{Period, Window};
use greenlight_model::gate::{
    ApprovalGate, Checklist, CommandGate, CoverageGate, Freeze, Gates, KnownFailure, LintGate, ProbeGate,
    TestsGate, TrafficGate,
};
use greenlight_model::id::{CheckName, RoleName};
use greenlight_model::quantity::{InvalidQuantity, Percent};
use jiff::civil::Date;
use serde_json::{Value, json};
use toml::de::DeValue;

use crate::language::{Count, FleetFile};
use crate::problem::{Problems, suggest};
use crate::read::{At, Key, List, Map, Node, OneOrMany, Read, Refusal, Short, Shorthand, Text, table};
use crate::text::{Command, Limit, Line};

/// How long a command or a probe may take, unless stated.
const LOOK_TIMEOUT: Duration = Duration::from_secs(30);
/// The suite of tests that is asked for, unless stated.
const SUITE: &str = "tests";

table! {
    /// What must be green before anything changes in the environment. Going back passes no gate.
    GateTable, "the gates", {
        /// Suites of tests that must have passed for exactly the release. Their results come by `greenlight evidence add`.
        tests: Tests = "{ suites = [\"unit\"] }",
        /// How much of the code the tests must reach.
        coverage: Short<Coverage> = "{ floor = \"80%\" }",
        /// Tools whose reports must hold no finding that the release running now did not have.
        lint: Lint = "{ tools = [\"pylint\"] }",
        /// Who must agree to the plan.
        approval: OneOrMany<Approval> = "{ role = \"operator\", count = 2, four_eyes = true }",
        /// What people must have seen to, ticked one by one.
        checklist: ChecklistTable = "{ required = [\"backup looked at\"], optional = [\"support told\"] }",
        /// Hours in which deployments begin; hours that end before they begin go on past midnight. Zone: UTC unless named.
        window: OneOrMany<Window> = "\"Mon-Thu 09:00-16:00 Europe/Zurich\"",
        /// Times in which they do not.
        freeze: OneOrMany<FreezeTable> = "{ when = \"12-20..01-03 Europe/Zurich\", reason = \"holidays\" }",
        /// Traffic below which a deployment begins.
        traffic: Traffic = "{ sessions_below = 200 }",
        /// Commands that must succeed, run where the controller is, by name.
        command: Map<CheckName, Short<CommandTable>> = "{ backup = \"bin/backup-is-fresh\" }",
        /// Places that must answer, seen from the controller, by name.
        probe: Map<CheckName, Short<Probe>> = "{ vendor = \"tcp://payments.example.org:443\" }",
        /// Whether the release must have a note. Default: false.
        release_note: bool = "true",
    }
}

table! {
    /// Suites of tests.
    Tests, "the tests", {
        /// Their names, as `--suite` gives them. Default: `tests`.
        suites: List<CheckName> = "[\"unit\", \"end-to-end\"]",
        /// Tests that may fail for a while: any other failure is red, and one of these too when its date has passed.
        known_failures: List<Known> = "[{ test = \"tests.mail.test_push\", owner = \"ann\", until = \"2026-12-31\" }]",
    }
}

table! {
    /// A test that is known to fail.
    Known, "a known failure", {
        /// Its name, `CLASS.NAME`, as the report gives it.
        test [required]: Line = "\"tests.mail.test_push\"",
        /// Who mends it.
        owner [required]: Line = "\"ann\"",
        /// The last day on which it may fail (UTC).
        until [required]: Date = "\"2026-12-31\"",
    }
}

table! {
    /// How much of the code the tests must reach.
    Coverage, "the coverage", {
        /// At least this share of all lines.
        floor [required]: Percent = "\"80%\"",
        /// Whether it may be less than that of the release that runs now. Default: false.
        may_fall: bool = "false",
    }
}

impl Shorthand for Coverage {
    type Short = Percent;
    fn from_short(short: At<Percent>) -> Self {
        Self { floor: Key::Is(short), ..Self::default() }
    }
}

table! {
    /// Reports of analyses.
    Lint, "the analyses", {
        /// The tools: `pylint`, or the name of a SARIF report's tool in lower case, with dashes.
        tools [required]: List<CheckName> = "[\"pylint\"]",
    }
}

table! {
    /// People of a role who must agree to the plan that is shown to them. When the plan is another one later, they are asked
    /// again.
    Approval, "an approval", {
        /// Which role, of `[role]`.
        role [required]: RoleName = "\"operator\"",
        /// How many different people. Default: 1.
        count: Count = "1",
        /// Whether whoever built the release or asks for the rollout does not count. Default: false.
        four_eyes: bool = "true",
    }
}

table! {
    /// What people must have seen to.
    ChecklistTable, "the checklist", {
        /// Without these it does not go on.
        required: List<Line> = "[\"backup looked at\"]",
        /// These are shown.
        optional: List<Line> = "[\"support told\"]",
    }
}

table! {
    /// A time in which nothing begins.
    FreezeTable, "a freeze", {
        /// Days, days of each year, or hours of days of the week; the zone is UTC unless named.
        when [required]: Period = "\"2026-12-20..2027-01-03\"",
        /// Why.
        reason [required]: Line = "\"holidays\"",
    }
}

table! {
    /// Traffic below which a deployment begins.
    Traffic, "the traffic", {
        /// Fewer sessions than this, over all balancers of the environment.
        sessions_below [required]: Count = "200",
    }
}

table! {
    /// A command that must succeed.
    CommandTable, "a gate's command", {
        /// Program and arguments; no shell. It runs in the fleet file's directory.
        run [required]: Command = "\"bin/backup-is-fresh\"",
        /// How long it may take. Default: 30s.
        timeout: Limit = "\"30s\"",
    }
}

impl Shorthand for CommandTable {
    type Short = Command;
    fn from_short(short: At<Command>) -> Self {
        Self { run: Key::Is(short), ..Self::default() }
    }
}

table! {
    /// A place that must answer.
    Probe, "a gate's probe", {
        /// `http://…`, which must answer 2xx, or `tcp://ADDRESS:PORT`, which must take a connection.
        address [required]: ProbeAddress = "\"http://vendor.example.org/status\"",
        /// How long it may take. Default: 30s.
        timeout: Limit = "\"5s\"",
    }
}

impl Shorthand for Probe {
    type Short = ProbeAddress;
    fn from_short(short: At<ProbeAddress>) -> Self {
        Self { address: Key::Is(short), ..Self::default() }
    }
}

/// What a probe goes to.
#[derive(Debug, Clone)]
pub(crate) struct ProbeAddress(pub(crate) String);

impl Text for ProbeAddress {
    const EXPECTED: &'static str = "an address such as \"tcp://HOST:443\" or \"http://HOST/status\"";
    const PATTERN: Option<&'static str> = Some("^(http|tcp)://[!-~]+$");
    fn from_text(text: &str) -> Result<Self, Refusal> {
        if text.starts_with("https://") {
            return Err(Refusal::help(
                format!("`{text}` needs TLS, which probes do not speak"),
                "use a command: `command = { vendor = \"curl --fail --silent https://…\" }`",
            ));
        }
        let is_valid = match (text.strip_prefix("http://"), text.strip_prefix("tcp://")) {
            (Some(rest), _) => !rest.is_empty() && !rest.starts_with('/'),
            (None, Some(rest)) => rest.rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
            }),
            (None, None) => false,
        };
        if !is_valid || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Refusal::new(format!(
                "`{text}` is not written `tcp://HOST:PORT` or `http://HOST/…`"
            )));
        }
        Ok(Self(text.to_owned()))
    }
}

/// A member of a role: `ann`, or `ann@desk` for her at that machine alone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Member(pub(crate) String);

impl Text for Member {
    const EXPECTED: &'static str = "a user, or user@machine";
    const PATTERN: Option<&'static str> = Some(r"^[^@\s]+(@[^@\s]+)?$");
    fn from_text(text: &str) -> Result<Self, Refusal> {
        let parts: Vec<&str> = text.split('@').collect();
        let is_valid = parts.len() <= 2
            && parts
                .iter()
                .all(|part| !part.is_empty() && !part.chars().any(|c| c.is_whitespace() || c.is_control()));
        if !is_valid {
            return Err(Refusal::new(format!(
                "`{}` is neither a user nor user@machine",
                text.escape_debug()
            )));
        }
        Ok(Self(text.to_owned()))
    }
}

macro_rules! quantities {
    ($($type:ty, $expected:literal, $pattern:expr;)*) => { $(
        impl Text for $type {
            const EXPECTED: &'static str = $expected;
            const PATTERN: Option<&'static str> = $pattern;
            fn from_text(text: &str) -> Result<Self, Refusal> {
                text.parse().map_err(|error: InvalidQuantity| Refusal::new(error.to_string()))
            }
        }
    )* };
}

quantities! {
    Window, "hours of days of the week", None;
    Period, "a period", None;
    Percent, "a share such as \"80%\"", Some("^[0-9]{1,3} *%$");
}

impl Text for Date {
    const EXPECTED: &'static str = "a date such as \"2026-12-31\"";
    const PATTERN: Option<&'static str> = Some("^[0-9]{4}-[0-9]{2}-[0-9]{2}$");
    fn from_text(text: &str) -> Result<Self, Refusal> {
        let is_plain = text.len() == "2026-12-31".len();
        text.parse()
            .ok()
            .filter(|_| is_plain)
            .ok_or_else(|| Refusal::new(format!("`{text}` is not a date such as 2026-12-31")))
    }
}

impl Read for bool {
    const EXPECTED: &'static str = "true or false";
    fn read(node: Node<'_>, problems: &mut Problems) -> Option<Self> {
        let DeValue::Boolean(value) = node.value.get_ref() else {
            node.wrong_type(Self::EXPECTED, problems);
            return None;
        };
        Some(*value)
    }
    fn schema() -> Value {
        json!({ "type": "boolean" })
    }
}

/// Notes what does not hold together.
pub(crate) fn check(file: &FleetFile, problems: &mut Problems) {
    for (_, environment) in file.environment.good() {
        let Some(gates) = environment.gate.value() else { continue };
        for approval in gates.approval.value().into_iter().flat_map(|approvals| &approvals.0.items) {
            check_approval(file, approval, problems);
        }
        if let Some(traffic) = gates.traffic.get()
            && environment.balancer.is_absent()
        {
            problems.error(
                "traffic-without-balancer",
                &traffic.span,
                "there is no balancer that could say how much traffic there is",
                "state the environment's `balancer`, or leave `traffic` out".to_owned(),
            );
        }
        if let Some(tests) = gates.tests.value() {
            empty(&tests.suites, "no suite is named, so nothing would be asked for", problems);
        }
        if let Some(lint) = gates.lint.value() {
            empty(&lint.tools, "no tool is named, so nothing would be asked for", problems);
        }
    }
}

fn empty(list: &Key<List<CheckName>>, message: &str, problems: &mut Problems) {
    if let Some(list) = list.get()
        && list.items.is_empty()
        && list.complete
    {
        problems.error("empty-gate", &list.span, message, "name one, or leave the gate out".to_owned());
    }
}

fn check_approval(file: &FleetFile, approval: &Approval, problems: &mut Problems) {
    let Some(role) = approval.role.get() else { return };
    if file.role.value().is_some_and(|roles| !roles.complete) || file.role.is_bad() {
        return;
    }
    let found = file.role.entries().find(|(name, _)| name.value == role.value);
    let Some((_, members)) = found else {
        let known: Vec<&str> = file.role.entries().map(|(name, _)| name.as_str()).collect();
        let help = suggest(role.as_str(), "the roles are", known.iter().copied())
            .unwrap_or_else(|| format!("say who holds it: `[role]` with `{} = [\"ann\", \"bob\"]`", **role));
        problems.error("unknown-role", &role.span, format!("nobody holds the role `{}`", **role), help);
        return;
    };
    let Some(members) = members.get().filter(|members| members.complete) else { return };
    let count = approval.count.get();
    let people: BTreeSet<&str> =
        members.items.iter().map(|member| member.0.split('@').next().unwrap_or_default()).collect();
    let wanted = count.map_or(1, |count| count.0);
    let (have, span) = (people.len(), count.map_or(&role.span, |count| &count.span));
    if wanted == 0 {
        let help = "a count is 1 or more; leave the approval out where none is needed".to_owned();
        problems.error("empty-gate", span, "an approval by nobody is none", help);
    } else if usize::try_from(wanted).unwrap_or(usize::MAX) > have {
        problems.error(
            "approval-too-many",
            span,
            format!("{wanted} people of role `{}` must approve, and {have} hold it", **role),
            "ask for fewer, or add people to the role".to_owned(),
        );
    }
}

/// The gates; none when a required key is missing, which the reader has noted.
pub(crate) fn build(table: &GateTable) -> Option<Gates> {
    let mut gates = Gates { release_note: flag(&table.release_note), ..Gates::default() };
    if let Some(tests) = table.tests.value() {
        gates.tests = Some(build_tests(tests)?);
    }
    if let Some(coverage) = table.coverage.value() {
        let floor = *coverage.0.floor.value()?;
        gates.coverage = Some(CoverageGate { floor, may_fall: flag(&coverage.0.may_fall) });
    }
    if let Some(lint) = table.lint.value() {
        gates.lint = Some(LintGate { tools: lint.tools.items().map(|tool| tool.value.clone()).collect() });
    }
    for approval in items(&table.approval) {
        gates.approvals.push(ApprovalGate {
            role: approval.role.value()?.clone(),
            count: approval.count.value().map_or(1, |count| count.0),
            four_eyes: flag(&approval.four_eyes),
        });
    }
    if let Some(list) = table.checklist.value() {
        let lines = |list: &Key<List<Line>>| list.items().map(|item| item.0.clone()).collect();
        gates.checklist =
            Some(Checklist { required: lines(&list.required), optional: lines(&list.optional) });
    }
    gates.windows = items(&table.window).map(|window| window.value.clone()).collect();
    for freeze in items(&table.freeze) {
        let (when, reason) = (freeze.when.value()?.clone(), freeze.reason.value()?.0.clone());
        gates.freezes.push(Freeze { when, reason });
    }
    if let Some(traffic) = table.traffic.value() {
        let sessions_below = u64::from(traffic.sessions_below.value()?.0);
        gates.traffic = Some(TrafficGate { sessions_below });
    }
    for (name, command) in table.command.good() {
        let gate =
            CommandGate { argv: command.0.run.value()?.0.clone(), timeout: timeout(&command.0.timeout) };
        gates.commands.insert(name.value.clone(), gate);
    }
    for (name, probe) in table.probe.good() {
        let gate =
            ProbeGate { address: probe.0.address.value()?.0.clone(), timeout: timeout(&probe.0.timeout) };
        gates.probes.insert(name.value.clone(), gate);
    }
    Some(gates)
}

fn build_tests(tests: &Tests) -> Option<TestsGate> {
    let mut suites: BTreeSet<CheckName> = tests.suites.items().map(|suite| suite.value.clone()).collect();
    if tests.suites.is_absent() {
        suites.insert(SUITE.parse().ok()?);
    }
    let mut known_failures = Vec::new();
    for known in tests.known_failures.items() {
        known_failures.push(KnownFailure {
            test: known.test.value()?.0.clone(),
            owner: known.owner.value()?.0.clone(),
            until: *known.until.value()?,
        });
    }
    Some(TestsGate { suites, known_failures })
}

fn items<T>(list: &Key<OneOrMany<T>>) -> impl Iterator<Item = &At<T>> {
    list.value().into_iter().flat_map(|list| &list.0.items)
}

fn flag(key: &Key<bool>) -> bool {
    key.value().copied().unwrap_or_default()
}

fn timeout(key: &Key<Limit>) -> Duration {
    key.value().map_or(LOOK_TIMEOUT, |limit| limit.0)
}
