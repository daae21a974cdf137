//! The language as a whole: the reader, its schema and its defaults against each other.

use std::time::Duration;

use greenlight_model::fleet::{
    BalancerKind, BatchSize, BecomeRoot, Floor, LinkKind, ManagerKind, OnFailure, SecretSource, Strategy,
    Timeouts,
};
use greenlight_model::gate::holds;
use greenlight_model::id::HostName;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::gates::{
    Approval, ChecklistTable, CommandTable, Coverage, FreezeTable, GateTable, Known, Lint, Probe, Tests,
    Traffic,
};
use crate::language::{
    After, Balancer, Environment, FleetFile, Health, Host, Migrate, Process, Profile, Secret, Service, Smoke,
    Source, Timeouts as TimeoutsTable,
};
use crate::problem::Problems;
use crate::read::{Example, Node, Table};
use crate::{parse, schema};

/// Every key of the language, used once.
const EVERYTHING: &str = include_str!("../tests/everything.toml");

fn validator(schema: &serde_json::Value) -> jsonschema::Validator {
    jsonschema::validator_for(schema).unwrap()
}

fn as_json(text: &str) -> serde_json::Value {
    serde_json::to_value(text.parse::<toml::Table>().unwrap()).unwrap()
}

/// Reads each example of a table through the table's own reader, and validates it with the table's own schema.
fn check_examples<T: Table>() {
    let validator = validator(&T::schema());
    let required: Vec<_> = T::FIELDS.iter().filter(|field| field.required).collect();
    for field in T::FIELDS {
        assert!(!field.description.trim().is_empty(), "{} {}", T::TITLE, field.key);
        let others = required.iter().filter(|other| other.key != field.key);
        let lines: Vec<_> =
            others.chain([&field]).map(|field| format!("{} = {}", field.key, field.example)).collect();
        let text = lines.join("\n");
        let table = DeTable::parse(&text).unwrap_or_else(|error| panic!("{}: {text}: {error}", T::TITLE));
        let value = Spanned::new(0..text.len(), DeValue::Table(table.into_inner()));
        let example = Example { key: "", value: "" };
        let node = Node { name: "table", key: &(0..0), value: &value, example, is_entry: false };
        let mut problems = Problems::default();
        assert!(T::read(node, &mut problems).is_some());
        assert_eq!(problems.errors, [], "{}: {text}", T::TITLE);
        let errors: Vec<_> = validator.iter_errors(&as_json(&text)).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{}: {text}: {errors:?}", T::TITLE);
    }
}

#[test]
fn every_key_is_accepted_with_its_own_example() {
    check_examples::<FleetFile>();
    check_examples::<Service>();
    check_examples::<Source>();
    check_examples::<Migrate>();
    check_examples::<crate::requires::Requires>();
    check_examples::<crate::requires::ReachTable>();
    check_examples::<Process>();
    check_examples::<Health>();
    check_examples::<Profile>();
    check_examples::<Smoke>();
    check_examples::<Secret>();
    check_examples::<Environment>();
    check_examples::<Host>();
    check_examples::<Balancer>();
    check_examples::<crate::language::Strategy>();
    check_examples::<After>();
    check_examples::<TimeoutsTable>();
    check_examples::<GateTable>();
    check_examples::<Tests>();
    check_examples::<Known>();
    check_examples::<Coverage>();
    check_examples::<Lint>();
    check_examples::<Approval>();
    check_examples::<ChecklistTable>();
    check_examples::<FreezeTable>();
    check_examples::<Traffic>();
    check_examples::<CommandTable>();
    check_examples::<Probe>();
}

#[test]
fn everything_is_read() {
    let parsed = parse(EVERYTHING).unwrap_or_else(|problems| panic!("{problems:#?}"));
    assert_eq!(parsed.warnings, []);
    assert!(validator(&schema()).is_valid(&as_json(EVERYTHING)));

    let fleet = parsed.fleet;
    let service = &fleet.services[&"web".parse().unwrap()];
    assert_eq!(service.source.directory.as_deref(), Some("sub"));
    assert_eq!(service.shared, ["var/uploads/", "config/local.ini"]);
    assert_eq!(service.requires.runtimes["python"], ">=3.11");
    assert_eq!(service.requires.disk.unwrap().0, 2 << 30);
    assert_eq!(service.migrate.as_ref().unwrap().argv, ["venv/bin/alembic", "upgrade", "head"]);
    let process = &service.processes[&"web".parse().unwrap()];
    assert_eq!(process.argv, ["venv/bin/gunicorn", "--bind", "0.0.0.0:{port}", "app:app"]);
    assert_eq!(process.profiles[&"debug".parse().unwrap()].argv.as_deref().unwrap(), ["bin/web", "--debug"]);
    assert_eq!(process.stop_argv.as_deref().unwrap(), ["bin/stop"]);
    assert_eq!(process.smoke.as_ref().unwrap().port, 17071);

    let environment = &fleet.environments[&"production".parse().unwrap()];
    let hosts: Vec<_> = environment.hosts[&"web".parse().unwrap()].iter().map(HostName::as_str).collect();
    assert_eq!(hosts, ["ol-web3", "ol-web4", "px07-ops", "px08-ops"]);
    assert_eq!(environment.host_settings.len(), 5, "the balancer's host has settings too");
    let special = &environment.host_settings[&"ol-web3".parse().unwrap()];
    assert_eq!(
        special.link,
        LinkKind::Ssh {
            destination: Some("ol-web3.example.org".to_owned()),
            user: Some("root".parse().unwrap())
        }
    );
    assert_eq!(special.root, "/opt");
    assert_eq!(special.ports[&"web".parse().unwrap()], 7072);
    assert_eq!((special.manager, special.become_root), (ManagerKind::Systemd, BecomeRoot::Never));
    let usual = &environment.host_settings[&"px07-ops".parse().unwrap()];
    assert_eq!(usual.link, LinkKind::Ssh { destination: None, user: Some("deploy".parse().unwrap()) });
    assert_eq!(
        (usual.root.as_str(), usual.manager),
        ("/srv/apps", ManagerKind::Supervisord),
        "set by a range"
    );
    assert_eq!(
        environment.strategy,
        Strategy::Rolling {
            batch: vec![BatchSize::Count(1), BatchSize::Count(2), BatchSize::Share("20%".parse().unwrap())]
        }
    );
    assert_eq!(environment.floor, Floor::Share("50%".parse().unwrap()));
    assert_eq!(environment.after.as_ref().unwrap().soak, Duration::from_secs(3 * 86_400));
    assert_eq!(environment.on_failure, OnFailure::Hold);
    assert_eq!(environment.timeouts.drain, Duration::ZERO);
    assert_eq!(environment.timeouts.claim, Duration::from_secs(90));
    assert_eq!(environment.timeouts.confirm, Duration::from_secs(20));
    let gates = &environment.gates;
    let tests = gates.tests.as_ref().unwrap();
    assert_eq!((tests.suites.len(), tests.known_failures[0].owner.as_str()), (1, "ann"));
    let coverage = gates.coverage.as_ref().unwrap();
    assert_eq!((coverage.floor.get(), coverage.may_fall), (80, true));
    assert_eq!(gates.lint.as_ref().unwrap().tools.len(), 1);
    assert_eq!((gates.approvals[0].count, gates.approvals[0].four_eyes), (2, true));
    assert!(holds(&fleet.roles, &gates.approvals[0].role, "bob@desk"));
    assert!(!holds(&fleet.roles, &gates.approvals[0].role, "bob@home"));
    assert!(holds(&fleet.roles, &gates.approvals[0].role, "ann@home"));
    assert_eq!(gates.checklist.as_ref().unwrap().optional, ["support told"]);
    assert_eq!((gates.windows.len(), gates.freezes[0].reason.as_str()), (1, "holidays"));
    assert_eq!(gates.traffic.as_ref().unwrap().sessions_below, 200);
    assert_eq!(gates.commands[&"backup".parse().unwrap()].argv, ["bin/backup-is-fresh"]);
    assert_eq!(gates.probes[&"vendor".parse().unwrap()].timeout, Duration::from_secs(5));
    assert!(gates.release_note);
    let [balancer, tcp, router] = &environment.balancers[..] else { panic!("{:?}", environment.balancers) };
    assert_eq!(balancer.title(), "haproxy ol-www1:/run/haproxy/admin.sock web-in");
    assert_eq!(balancer.server(&"ol-web3".parse().unwrap()), "web3");
    assert_eq!(tcp.kind, BalancerKind::HaproxyTcp { address: "10.0.0.1:9999".to_owned() });
    assert_eq!(router.backend, "web", "the service's name");

    assert_eq!(
        fleet.secrets[&"DATABASE_URL".parse().unwrap()],
        SecretSource::Age {
            file: "secrets.age".to_owned(),
            identity: "~/.config/greenlight/identity.txt".to_owned()
        }
    );
    assert_eq!(
        fleet.secrets[&"TOKEN".parse().unwrap()],
        SecretSource::Command { argv: vec!["pass".to_owned(), "show".to_owned(), "web/token".to_owned()] }
    );
}

#[test]
fn the_rest_has_defaults() {
    let fleet = parse(
        "[service.web.process.web]\nrun = \"bin/web\"\n[environment.production]\nhosts.web = [\"web1\"]\nstrategy = \"halves\"\n",
    )
    .unwrap()
    .fleet;
    let service = &fleet.services[&"web".parse().unwrap()];
    assert_eq!((service.source.git.as_str(), service.keep_releases), (".", 5));
    let process = &service.processes[&"web".parse().unwrap()];
    assert_eq!((process.stdout.as_str(), process.stderr.as_str()), ("logs/web.stdout", "logs/web.stderr"));
    assert_eq!(
        (process.start_timeout, process.stop_timeout),
        (Duration::from_secs(30), Duration::from_secs(10))
    );
    let environment = &fleet.environments[&"production".parse().unwrap()];
    let host = &environment.host_settings[&"web1".parse().unwrap()];
    assert_eq!(host.link, LinkKind::Ssh { destination: None, user: None });
    assert_eq!(
        (host.root.as_str(), host.manager, host.become_root),
        ("/srv", ManagerKind::Auto, BecomeRoot::Auto)
    );
    assert_eq!(environment.strategy, Strategy::Halves { keep_for: Duration::from_secs(600) });
    assert_eq!((environment.floor, environment.failure_budget, environment.retries), (Floor::Count(1), 0, 2));
    assert_eq!((environment.on_failure, environment.timeouts), (OnFailure::TurnBack, Timeouts::default()));
}

#[test]
fn the_schema_refuses_what_the_reader_refuses() {
    let schema = schema();
    let validator = validator(&schema);
    for text in [
        "",
        "[service.web]\nbild = []",
        "[service.web]\nbuild = \"make\"",
        "[service.web.process.web]\nport = 1",
        "[service.web.process.web]\nrun = \"x\"\nport = 0",
        "[service.web.process.web]\nrun = \"x\"\nstop_timeout = 10",
        "[service.web.process.web]\nrun = \"x\"\nstart_timeout = \"10\"",
        "[service.web]\nrequires = { disk = 2 }",
        "[service.\"a b\"]",
        "[service.web]\n[environment.production]",
        "[service.web]\n[environment.production]\nhosts.web = [\"a\"]\nstrategy = \"bluegreen\"",
        "[service.web]\n[environment.production]\nhosts.web = [\"a\"]\nstrategy = { kind = \"rolling\", batch = true }",
    ] {
        assert!(parse(text).is_err(), "{text}");
        assert!(!validator.is_valid(&as_json(text)), "{text}");
    }
}

#[test]
fn ten_thousand_hosts_are_read() {
    let text = "[service.web.process.web]\nrun = \"x {port}\"\nport = 80\n[environment.production]\n\
                hosts.web = [\"px[00001-10000]\"]\nhost.\"px[00001-10000]\" = { user = \"deploy\" }\n\
                standby = [\"px[09001-10000]\"]\nbalancer = { haproxy = \"tcp://10.0.0.1:9999\" }\n";
    let fleet = parse(text).unwrap().fleet;
    let environment = &fleet.environments[&"production".parse().unwrap()];
    assert_eq!(environment.host_settings.len(), 10_000);
    assert_eq!(environment.standby.len(), 1_000);

    // Each with settings and a server of its own.
    let mut text = text.replace("host.\"px[00001-10000]\" = { user = \"deploy\" }\n", "");
    text.push_str("balancer.servers = { ");
    text = text.replace(
        "balancer = { haproxy = \"tcp://10.0.0.1:9999\" }\n",
        "balancer.haproxy = \"tcp://10.0.0.1:9999\"\n",
    );
    for host in 1..=10_000 {
        text.push_str(&format!("px{host:05} = \"s{host}\", "));
    }
    text.push_str("}\n[environment.production.host]\n");
    for host in 1..=10_000 {
        text.push_str(&format!("px{host:05} = {{ ports = {{ web = {} }} }}\n", 1000 + host));
    }
    let fleet = parse(&text).unwrap().fleet;
    let environment = &fleet.environments[&"production".parse().unwrap()];
    let last = "px10000".parse().unwrap();
    assert_eq!(environment.host_settings[&last].ports[&"web".parse().unwrap()], 11_000);
    assert_eq!(environment.balancers[0].server(&last), "s10000");
}
