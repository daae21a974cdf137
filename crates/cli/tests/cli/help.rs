//! Help, completions and wrong usage.

use crate::site::Site;

/// Each command with a word of what it does.
const COMMANDS: [(&str, &str); 31] = [
    ("demo", "See it work"),
    ("init", "write a commented greenlight.toml"),
    ("check", "every mistake at once"),
    ("schema", "JSON Schema"),
    ("build", "from a commit"),
    ("releases", "where each runs"),
    ("preflight", "as one table"),
    ("plan", "Changes nothing"),
    ("deploy", "wave by wave"),
    ("rollback", "last release that was healthy"),
    ("evidence", "for the gates"),
    ("gates", "turn it green"),
    ("approve", "exactly the plan that is shown"),
    ("confirm", "take away"),
    ("tick", "checklist"),
    ("override", "with the reason"),
    ("status", "why a rollout is not moving"),
    ("hold", "begin nothing new"),
    ("resume", "lost its controller"),
    ("abort", "Turn the open rollout back"),
    ("history", "the steps of one"),
    ("report", "report"),
    ("issue", "what you saw"),
    ("action", "green light of a role"),
    ("drift", "with what was released"),
    ("hosts", "whether it answers"),
    ("logs", "last lines"),
    ("exec", "Run a command on the hosts"),
    ("verdict", "evidence file"),
    ("router", "built-in router"),
    ("completions", "completion script"),
];

#[test]
fn every_command_says_what_it_does_and_is_documented() {
    let site = Site::empty();
    let all = site.run(&["--help"]).exits(0).stdout;
    assert!(all.contains("Exit codes: 0 done"), "{all}");
    let listed: Vec<&str> = all
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next().filter(|name| !name.is_empty()))
        .filter(|name| *name != "help")
        .collect();
    assert_eq!(listed, COMMANDS.map(|(name, _)| name));
    for (name, does) in COMMANDS {
        site.run(&[name, "--help"]).exits(0).says(&[does, "Usage: greenlight", "--json"]);
    }
}

#[test]
fn a_router_whose_certificate_cannot_be_used_does_not_start() {
    let site = Site::empty();
    let router = ["router", "--listen", "127.0.0.1:0", "--control", "control"];
    let with = |more: &[&str]| site.run(&[&router[..], more].concat());
    with(&["--tls-certificate", "c.pem"]).exits(2).says(&["--tls-key"]);
    with(&["--tls-certificate", "c.pem", "--tls-key", "k.pem"]).exits(2).says(&["cannot read c.pem"]);
    assert!(!site.path("control").exists());
}

#[test]
fn wrong_usage_is_told_and_ends_with_2() {
    let site = Site::empty();
    site.run(&[]).exits(2).says(&["Usage: greenlight"]);
    site.run(&["deply"]).exits(2).says(&["deploy"]);
    for (name, _) in COMMANDS {
        site.run(&[name, "--no-such-flag"]).exits(2).says(&["--no-such-flag"]);
    }
    site.run(&["deploy"]).exits(2).says(&["<ENVIRONMENT>"]);
    site.run(&["check", "--quiet", "--verbose"]).exits(2).says(&["cannot be used with"]);
}

#[test]
fn completions_name_the_commands() {
    let site = Site::empty();
    for shell in ["bash", "zsh", "fish"] {
        let script = site.run(&["completions", shell]).exits(0).stdout;
        for word in ["rollback", "dry-run"] {
            assert!(script.contains(word), "{shell} has no {word}");
        }
    }
}
