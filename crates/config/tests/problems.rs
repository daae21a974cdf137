//! What is wrong with a fleet file is reported: everything at once, each once, with its line.

use greenlight_config::{Problem, line_column, parse};

/// A fleet that is fine, for cases that add one thing.
const BASE: &str = r#"
[service.web.process.web]
run = "bin/web {port}"
port = 7071
[environment.production]
hosts.web = ["web[1-3]"]
"#;

fn shown(text: &str, problems: &[Problem]) -> String {
    let lines: Vec<String> = problems
        .iter()
        .map(|problem| {
            let (line, _) = line_column(text, problem.span.start);
            format!("{line} {}: {}", problem.code, problem.message)
        })
        .collect();
    lines.join("\n")
}

/// Each expected problem is `LINE CODE: MESSAGE`.
fn check(text: &str, expected: &[&str]) {
    let found = match parse(text) {
        Ok(_) => String::new(),
        Err(problems) => {
            for problem in &problems {
                assert!(text.get(problem.span.clone()).is_some(), "{problem:?}");
            }
            shown(text, &problems)
        }
    };
    assert_eq!(found, expected.join("\n"), "in\n{text}");
}

/// Cases that stand behind [`BASE`]; line 1 is the first line of the case.
fn check_after_base(case: &str, expected: &[&str]) {
    let offset = BASE.lines().count();
    let moved = |problem: &&str| {
        let digits = problem.bytes().take_while(u8::is_ascii_digit).count();
        let line: usize = problem[..digits].parse().unwrap_or_else(|_| panic!("no line in {problem:?}"));
        format!("{}{}", line + offset, &problem[digits..])
    };
    let expected: Vec<String> = expected.iter().map(moved).collect();
    check(&format!("{BASE}{case}"), &expected.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn five_mistakes_are_reported_at_once() {
    let text = r#"
[service.web]
bild = ["make"]
[service.web.process.web]
run = "bin/web {port}"
port = "7071"
stdout = "logs/web.log"
stderr = "./logs//web.log"
[environment.production]
hosts.wbe = ["ol-web1"]
hosts.web = ["ol-web[4-3]"]
"#;
    check(
        text,
        &[
            "3 unknown-key: `bild` is not a key of a service",
            "6 wrong-type: `port` must be a port number, not a string",
            "8 shared-log: process `web` writes stdout and stderr to the same file, `logs/web.log`",
            "10 unknown-service: there is no service `wbe`",
            "11 bad-value: `ol-web[4-3]`: the range `4-3` runs backwards",
        ],
    );
    let help: Vec<_> = parse(text).unwrap_err().into_iter().map(|problem| problem.help.unwrap()).collect();
    assert_eq!(
        help,
        [
            "did you mean `build`?",
            "for example: `port = 7071`",
            "keep them apart: `logs/web.stdout` and `logs/web.stderr`",
            "did you mean `web`?",
            "write `3-4`",
        ]
    );
}

#[test]
fn toml_itself() {
    check("[service.web\n", &["1 syntax: this is not TOML: unclosed table, expected `]`"]);
    check("", &["1 missing-key: the fleet file needs `service`"]);
    check("[service]\n", &["1 no-service: there is nothing to release"]);
    check_after_base(
        "branch = \"a\"\nbranch = \"b\"\nbrunch = 1\n",
        &[
            "2 duplicate-key: `branch` is stated twice",
            "3 unknown-key: `brunch` is not a key of an environment",
        ],
    );
    check_after_base("[service.web]\n[service.web]\n", &["2 duplicate-key: `web` is stated twice"]);
}

#[test]
fn keys_and_types() {
    check_after_base("port = 1\n", &["1 unknown-key: `port` is not a key of an environment"]);
    check_after_base("[service.api.process.api]\nport = 8080\n", &["1 missing-key: a process needs `run`"]);
    check_after_base(
        "[service.api]\nbuild = \"make\"\n",
        &["2 wrong-type: `build` must be an array, not a string"],
    );
    check_after_base(
        "[service.api]\nbuild = [\"make\", 1]\n",
        &["2 wrong-type: each entry of `build` must be a script in one string, not an integer"],
    );
    check_after_base(
        "[service.\"a b\"]\nbild = 1\n",
        &[
            "1 bad-name: `a b` is not the name of a service: ` ` is not allowed in it",
            "2 unknown-key: `bild` is not a key of a service",
        ],
    );
    check_after_base(
        "[service.api]\nrequires = { pakages = [\"x\"], node = \"latest\", disk = 2 }\n",
        &[
            "2 unknown-key: `pakages` is not a key of the requirements",
            "2 bad-value: `latest` is not a version requirement",
            "2 wrong-type: `disk` must be a size, not an integer",
        ],
    );
    check_after_base(
        "retries = -1\nfailure_budget = 1.5\non_failure = \"turnback\"\n",
        &[
            "1 bad-value: `retries` must be a whole number from 0 to 10000, not -1",
            "2 wrong-type: `failure_budget` must be a whole number, not a float",
            "3 bad-value: `turnback` is not a reaction to failure",
        ],
    );
    check_after_base(
        "timeouts = { connect = \"0s\", drain = \"30\", stage = \"9999d\" }\n",
        &[
            "1 bad-value: `0s` leaves no time at all: this would always fail",
            "1 bad-value: `30` is not a duration such as 500ms, 30s, 10m, 2h or 3d",
            "1 bad-value: `9999d` is longer than a year",
        ],
    );
}

#[test]
fn processes() {
    let process = |keys: &str| format!("[service.api.process.api]\nrun = \"bin/api\"\n{keys}");
    for (keys, expected) in [
        ("port = 70000", "3 bad-value: `port` must be a whole number from 1 to 65535, not 70000"),
        ("port = 0", "3 bad-value: `port` must be a whole number from 1 to 65535, not 0"),
        ("health = \"/health\"", "3 health-without-port: there is a health check and no port to ask at"),
        ("port = 1\nhealth = {}", "4 empty-health: this health check asks nothing"),
        (
            "smoke = { port = 9 }",
            "3 smoke-without-port: there is a smoke start on another port, and the process has no port",
        ),
        (
            "stop = \"bin/stop {port}\"",
            "3 unknown-placeholder: `{port}` stands for a port, and the process has none",
        ),
        ("stop = \"bin/stop {prot}\"", "3 unknown-placeholder: `{prot}` stands for nothing"),
        ("stop = \"bin/stop 'x\"", "3 bad-value: a quote in this command is not closed"),
        ("stdout = \"/var/log/x\"", "3 bad-value: `/var/log/x` is an absolute path"),
        ("stdout = \"logs/../../x\"", "3 bad-value: `logs/../../x` leaves its directory by `..`"),
        (
            "stdout = \"current/log\"",
            "3 bad-value: `current/log` lies in `current`, which releases are kept and switched in",
        ),
        (
            "stdout = \"logs/api.stderr\"",
            "3 shared-log: process `api` writes stdout and stderr to the same file, `logs/api.stderr`",
        ),
        (
            "stderr = \"logs/api.stdout\"",
            "3 shared-log: process `api` writes stdout and stderr to the same file, `logs/api.stdout`",
        ),
        (
            "variables = { GREENLIGHT_RELEASE = \"x\" }",
            "3 reserved-variable: `GREENLIGHT_RELEASE` begins with `GREENLIGHT_`: such variables are set by Greenlight itself",
        ),
        ("variables = { PORT = 80 }", "3 wrong-type: `PORT` must be a string, not an integer"),
        (
            "port = 80\nsmoke = { port = 80 }",
            "4 port-used-twice: port 80 is used twice: by `api/api` and the smoke start of `api/api`",
        ),
    ] {
        check_after_base(&process(keys), &[expected]);
    }
    check_after_base(
        "[service.api.process]\na = { run = \"a\", port = 80 }\nb = { run = \"b\", port = 80, stderr = \"logs/a.stdout\" }\n",
        &[
            "3 port-used-twice: port 80 is used twice: by `api/a` and `api/b`",
            "3 shared-log: process `b` writes stderr to `logs/a.stdout`, which is stdout of process `a`",
        ],
    );
}

#[test]
fn services() {
    for (keys, expected) in [
        ("shared = [\"/etc\"]", "2 bad-value: `/etc` is an absolute path"),
        ("shared = [\"a/../../b\"]", "2 bad-value: `a/../../b` leaves its directory by `..`"),
        ("shared = [\"a\", \"./a/\"]", "2 shared-twice: `a` is shared twice"),
        (
            "shared = [\"var/x/\", \"var/\"]",
            "2 shared-twice: `var/x` lies inside `var`, which is shared as a whole",
        ),
        (
            "include = [\"a[\"]",
            "2 bad-value: `a[` is not a pattern of paths: unclosed character class; missing ']'",
        ),
        ("exclude = [\"../x\"]", "2 bad-value: `../x` leaves its directory by `..`"),
        (
            "source = { git = \"--upload-pack=x\" }",
            "2 bad-value: `--upload-pack=x` begins with `-` and would be taken for an option",
        ),
        ("migrate = \"\"", "2 bad-value: this command is empty"),
        ("migrate = { timeout = \"1m\" }", "2 missing-key: a migration needs `run`"),
        (
            "migrate = \"alembic {port}\"",
            "2 unknown-placeholder: `{port}` means something in a process's commands only",
        ),
        ("secrets = [\"TOKEN\"]", "2 unknown-secret: no source is stated for the secret `TOKEN`"),
    ] {
        check_after_base(&format!("[service.api]\n{keys}"), &[expected]);
    }
}

#[test]
fn secrets() {
    for (text, expected) in [
        ("[secret.TOKEN]", &["1 secret-without-source: the secret `TOKEN` has no source"][..]),
        (
            "[secret.TOKEN]\nage = \"a\"\ncommand = \"b\"",
            &["3 secret-with-two-sources: the secret `TOKEN` has two sources, `age` and `command`"],
        ),
        (
            "[secret.TOKEN]\ncommand = \"b\"\nidentity = \"i\"",
            &["3 identity-without-age: `identity` opens an age file, and this secret comes from a command"],
        ),
        (
            "variables = { TOKEN = \"x\" }\n[secret.TOKEN]\nage = \"a\"\n[service.web]\nsecrets = [\"TOKEN\", \"TOKEN\"]\n\
             [service.web.process.job]\nrun = \"x\"\nvariables = { TOKEN = \"x\" }",
            &[
                "1 variable-and-secret: `TOKEN` is a variable here and a secret of the same service",
                "5 secret-twice: `TOKEN` is listed twice",
                "8 variable-and-secret: `TOKEN` is a variable here and a secret of the same service",
            ],
        ),
    ] {
        check_after_base(text, expected);
    }
}

#[test]
fn hosts() {
    for (text, expected) in [
        ("hosts.api = [\"px[1-2\"]", "1 bad-value: `px[1-2` has a `[` without its `]`"),
        ("host.web4 = { user = \"root\" }", "1 unknown-host: `web4` runs no service and no balancer here"),
        ("standby = [\"web4\"]", "1 unknown-host: `web4` runs no service here"),
        (
            "host.web1 = { link = \"local\", user = \"root\" }",
            "1 local-and-ssh: `user` is for ssh, and this host is reached as `local`",
        ),
        (
            "host.web1 = { destination = \"-oProxyCommand=x\" }",
            "1 bad-value: `-oProxyCommand=x` begins with `-` and would be taken for an option",
        ),
        ("host.web1 = { root = \"srv\" }", "1 bad-value: `srv` is not an absolute path"),
        ("host.web1 = { ports = { wep = 1 } }", "1 unknown-process: no process `wep` runs on `web1`"),
        (
            "host.web1 = { root = \"/a\" }\nhost.\"web[1-3]\" = { root = \"/b\" }",
            "2 host-set-twice: `root` is already stated for a host of this range",
        ),
        (
            "[environment.b]\nhosts.web = [\"web[1-3]\", \"web3\"]",
            "2 host-twice: `web3` is named twice among the hosts of `web`",
        ),
        ("[environment.b]\nhosts.web = []", "2 no-hosts: `web` has no hosts here"),
        ("[environment.b]\nhosts = {}", "2 no-hosts: this environment has no hosts"),
        ("[environment.b]", "1 missing-key: an environment needs `hosts`"),
        (
            "[environment.b]\nhosts.web = [\"a[1-9999]\", \"b[1-2]\"]",
            "2 too-many-hosts: this environment has 10001 hosts; 10000 is the most",
        ),
    ] {
        // `hosts.api` stands for a service that has no problem of its own.
        let text =
            if text.contains("hosts.api") { format!("{text}\n[service.api]") } else { text.to_owned() };
        check_after_base(&text, &[expected]);
    }
}

#[test]
fn ports_on_a_host() {
    let api = "[service.api.process.api]\nrun = \"x\"\nport = 7071\nsmoke = { port = 7072 }\n";
    check_after_base(
        &format!("hosts.api = [\"web[2-3]\"]\n{api}"),
        &["4 port-used-twice: port 7071 is used twice on host `web2`: by `web/web` and `api/api`"],
    );
    check_after_base(&format!("hosts.api = [\"api1\"]\n{api}"), &[]);
    check_after_base(
        &format!("hosts.api = [\"web3\"]\nhost.web3.ports = {{ web = 7072 }}\n{api}"),
        &[
            "6 port-used-twice: port 7072 is used twice on host `web3`: by `web/web` and the smoke start of `api/api`",
        ],
    );
    check_after_base(&format!("hosts.api = [\"web3\"]\nhost.web3.ports = {{ web = 7073 }}\n{api}"), &[]);
}

#[test]
fn strategies() {
    for (strategy, expected) in [
        ("\"bluegreen\"", "1 bad-value: `bluegreen` is not a strategy"),
        ("{ batch = 1 }", "1 missing-key: a strategy needs `kind`"),
        ("{ kind = \"rolling\", batch = 0 }", "1 empty-batch: a batch of no hosts would never end"),
        ("{ kind = \"rolling\", batch = [1, \"0%\"] }", "1 empty-batch: a batch of no hosts would never end"),
        ("{ kind = \"rolling\", batch = [] }", "1 empty-batch: no size of a batch is stated"),
        ("{ kind = \"rolling\", batch = \"120%\" }", "1 bad-value: `120` is not a share between 0% and 100%"),
        (
            "{ kind = \"rolling\", batch = true }",
            "1 wrong-type: `batch` must be a number such as 1 or a share such as \"25%\", not a boolean",
        ),
        (
            "{ kind = \"rolling\", floor = 3 }",
            "1 floor-too-high: `web` has 3 hosts and 3 must keep serving: none could ever be changed",
        ),
        (
            "{ kind = \"rolling\", floor = \"67%\" }",
            "1 floor-too-high: `web` has 3 hosts and 3 must keep serving: none could ever be changed",
        ),
        (
            "{ kind = \"blue-green\", batch = 1 }",
            "1 not-of-this-strategy: `batch` goes with `kind = \"rolling\"`; this strategy has two waves",
        ),
        (
            "{ kind = \"rolling\", keep_for = \"1m\" }",
            "1 not-of-this-strategy: `keep_for` goes with `kind = \"halves\"`, which keeps the old half for a while",
        ),
    ] {
        check_after_base(&format!("strategy = {strategy}\n"), &[expected]);
    }
}

#[test]
fn order_of_environments() {
    let environment = |name: &str, after: &str| {
        format!("[environment.{name}]\nhosts.web = [\"{name}1\"]\nafter = {{ environment = \"{after}\" }}\n")
    };
    check_after_base(&environment("b", "b"), &["3 after-itself: `b` waits for itself"]);
    check_after_base(&environment("b", "prod"), &["3 unknown-environment: there is no environment `prod`"]);
    check_after_base(&environment("b", "production"), &[]);
    check_after_base(
        &format!("{}{}{}", environment("b", "c"), environment("c", "d"), environment("d", "c")),
        &["9 after-circle: these wait for each other: `c`, `d`"],
    );
}

#[test]
fn balancers() {
    for (balancer, expected) in [
        (
            "{ backend = \"web\" }",
            "1 balancer-without-place: this balancer is neither `haproxy` nor `router`",
        ),
        (
            "{ haproxy = \"a:/x\", router = \"a:/y\" }",
            "1 balancer-with-two-places: this balancer is both `haproxy` and `router`",
        ),
        ("{ haproxy = \"/run/x\" }", "1 bad-value: `/run/x` is not a socket on a host, written `HOST:/path`"),
        (
            "{ haproxy = \"a:/x\", service = \"wbe\" }",
            "1 unknown-service: the service `wbe` has no hosts in this environment",
        ),
        (
            "{ haproxy = \"a:/x\", servers = { web9 = \"s\" } }",
            "1 unknown-host: `web9` does not run `web` here",
        ),
        (
            "{ haproxy = \"a:/x\", servers = { web1 = \"s\", web2 = \"s\" } }",
            "1 server-twice: `web1` and `web2` have the same server, `s`",
        ),
        (
            "{ haproxy = \"a:/x\", servers = { web1 = \"web2\" } }",
            "1 server-twice: `web2` and `web1` have the same server, `web2`",
        ),
        (
            "[{ haproxy = \"a:/x\" }, { haproxy = \"a:/x\" }]",
            "1 balancer-twice: the backend `web` of this balancer is stated twice",
        ),
        (
            "{ haproxy = \"a:/x\" }\nhosts.api = [\"api1\"]\n[service.api.process.p]\nrun = \"x\"\nport = 1",
            "1 balancer-without-service: it is not clear which service is behind this balancer",
        ),
        (
            "{ haproxy = \"a:/x\", service = \"job\" }\nhosts.job = [\"job1\"]\n[service.job.process.p]\nrun = \"x\"",
            "1 balancer-without-port: no process of `job` has a port to send requests to",
        ),
    ] {
        check_after_base(&format!("balancer = {balancer}\n"), &[expected]);
    }
}

/// What follows from a mistake is not reported as a second one.
#[test]
fn one_mistake_is_one_report() {
    for (text, expected) in [
        (
            "[service.api.process.api]\nrun = \"x {port}\"\nport = \"80\"\nhealth = \"/\"\nsmoke = { port = 81 }\n\
             [environment.b]\nhosts.api = [\"b1\"]\nhost.b1.ports = { api = 82 }\nbalancer = { haproxy = \"b1:/x\" }",
            "3 wrong-type: `port` must be a port number, not a string",
        ),
        (
            "[service.\"a b\".process.x]\nrun = \"x\"\n[environment.b]\nhosts.ab = [\"b1\"]\n",
            "1 bad-name: `a b` is not the name of a service: ` ` is not allowed in it",
        ),
        (
            "[environment.b]\nhosts.web = [\"b[1-\"]\nhost.b1 = { user = \"x\" }\nstandby = [\"b1\"]\n\
             balancer = { haproxy = \"b1:/x\", servers = { b1 = \"s\" } }\nstrategy = { kind = \"rolling\", floor = 9 }",
            "2 bad-value: `b[1-` has a `[` without its `]`",
        ),
        (
            "[secret]\nTOKEN = \"x\"\n[service.api]\nsecrets = [\"TOKEN\"]",
            "2 wrong-type: `TOKEN` must be a table, not a string",
        ),
        (
            "[environment.b]\nhosts.web = [\"b1\"]\nbalancer = { haproxy = \"nowhere\" }\nhost.lb1 = { user = \"x\" }",
            "3 bad-value: `nowhere` is not a socket on a host, written `HOST:/path`",
        ),
        (
            "[environment.\"b c\"]\nhosts.web = [\"b1\"]\n[environment.d]\nhosts.web = [\"d1\"]\nafter = { environment = \"bc\" }",
            "1 bad-name: `b c` is not the name of an environment: ` ` is not allowed in it",
        ),
        (
            "[service.api.process.api]\nrun = 1\nstdout = \"/x\"\n",
            "2 wrong-type: `run` must be a command in one string, not an integer\n3 bad-value: `/x` is an absolute path",
        ),
    ] {
        check_after_base(text, &expected.lines().collect::<Vec<_>>());
    }
}

#[test]
fn canaries() {
    let with = |table: &str| {
        format!(
            "balancer = {{ haproxy = \"lb:/run/haproxy.sock\" }}\nstrategy = \"canary\"\n[environment.production.canary]\n{table}"
        )
    };
    check_after_base(&with(""), &[]);
    check_after_base(
        &with("steps = [\"5% until pass\", \"50% for 10m\"]\ncompare = [{ metric = \"missing\" }]"),
        &[],
    );
    check_after_base(
        &with("steps = [\"5%\", \"100% until pass\", \"5% for ever\"]"),
        &[
            "4 bad-value: `5%` is not a step such as \"5% until pass\" or \"25% for 10m\"",
            "4 bad-value: a canary gets 1% to 99% of the traffic, not 100%",
            "4 bad-value: `ever` is not a duration such as 500ms, 30s, 10m, 2h or 3d",
        ],
    );
    check_after_base(
        &with("steps = [\"25% until pass\", \"5% until pass\"]\nfalse_abort_budget = 1"),
        &[
            "4 falling-steps: the step to 5% comes after the one to 25%",
            "5 bad-value: `false_abort_budget` must be from 0.001 to 0.2",
        ],
    );
    check_after_base(
        &with(
            "compare = [{ metric = \"latency_p99\" }, { metric = \"errors\", tolerate = 2.0, pass_if_below = 1.5 }]",
        ),
        &[
            "4 not-counted: HAProxy keeps only averages of how long requests took, and those hide the slow ones",
            "4 never-passes: a canary that is as bad as is tolerated would never pass",
        ],
    );
    check_after_base(
        &with(
            "guard = [{ metric = \"cpu_per_request\", above = 1.5 }, { metric = \"restarts\", above = 0 }]",
        ),
        &[],
    );
    check_after_base(
        &with(
            "guard = [\n{ metric = \"memory\", above = 100 },\n{ metric = \"cpu_per_request\", above = 1 },\n{ metric = \"restarts\", above = 0.5 },\n{ metric = \"load\", above = 2 }]",
        ),
        &[
            "5 bad-guard: no canary is to be judged by this limit",
            "6 bad-guard: no canary is to be judged by this limit",
            "7 bad-guard: no canary is to be judged by this limit",
            "8 bad-value: `load` is not something that a guard watches",
        ],
    );
    check_after_base(
        "strategy = \"canary\"\n",
        &[
            "1 canary-without-balancer: a canary takes a share of the traffic, and this environment has no `balancer` to share it out",
        ],
    );
    check_after_base(
        "canary = { hosts = 1 }\n",
        &["1 not-of-this-strategy: `canary` goes with the strategy of that name"],
    );
    check(
        &BASE.replace("web[1-3]", "web1").replace(
            "hosts.web",
            "balancer = { router = \"web1:/r.sock\" }\nstrategy = \"canary\"\nhosts.web",
        ),
        &["7 canary-without-others: `web` has one host: there are no others to compare it with"],
    );
}

#[test]
fn a_text_has_a_longest() {
    let text = "#".repeat(greenlight_config::TEXT_BYTES_MAX + 1);
    let problems = parse(&text).unwrap_err();
    assert_eq!(problems.iter().map(|problem| problem.code).collect::<Vec<_>>(), ["too-long"]);
}

#[test]
fn warnings_do_not_refuse() {
    let text = format!(
        "{BASE}[secret.TOKEN]\nage = \"a\"\n[service.idle]\n[service.idle.process.x]\nrun = \"a && b\"\n"
    );
    let parsed = parse(&text).unwrap();
    assert_eq!(
        shown(&text, &parsed.warnings),
        "7 unused-secret: no service reads the secret `TOKEN`\n\
         9 unused-service: the service `idle` has no hosts in any environment\n\
         11 no-shell: no shell runs here: `&&` is passed to the program as it stands"
    );
    let text = BASE.replace(
        "hosts.web",
        "balancer = { haproxy = \"tcp://10.0.0.1:9999\" }\nstrategy = \"canary\"\nhosts.web",
    );
    let parsed = parse(&text).unwrap();
    let warned: Vec<_> = parsed.warnings.iter().map(|warning| warning.code).collect();
    assert_eq!(warned, ["canary-without-lease"]);
    assert!(parse(BASE).unwrap().warnings.is_empty());
    let text = "[service.web]\n";
    let warnings = parse(text).unwrap().warnings;
    assert_eq!(shown(text, &warnings), "1 no-environment: there is no environment to release to");
}
