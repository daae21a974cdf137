//! A secret reaches the environment of its process and a file that only its owner reads, and nothing else.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use age::secrecy::ExposeSecret;

use crate::site::{RING, Site};

const PLANTED: &str = "planted-7c1e9b";
const COMMANDED: &str = "commanded-20ad55";

/// A ring whose service reads one secret from an encrypted file and one from a command.
fn with_secrets() -> Site {
    let fleet =
        RING.replace("[service.hello]\n", "[service.hello]\nsecrets = [\"DATABASE_URL\", \"SIGNING_KEY\"]\n");
    let sources = r#"
[secret.DATABASE_URL]
age = "secrets.age"
identity = "~/identity.txt"

[secret.SIGNING_KEY]
command = "cat ../home/signing-key"
"#;
    let site = Site::new(&format!("{fleet}{sources}"));
    let identity = age::x25519::Identity::generate();
    let home = site.around().join("home");
    fs::write(home.join("identity.txt"), identity.to_string().expose_secret()).unwrap();
    // In two parts, so that the file of the test itself is not what is found.
    fs::write(home.join("signing-key"), format!("{COMMANDED}\n")).unwrap();
    let encrypted =
        age::encrypt(&identity.to_public(), format!("# ours\nDATABASE_URL={PLANTED}\n").as_bytes());
    fs::write(site.path("secrets.age"), encrypted.unwrap()).unwrap();
    site.commit("v1");
    site
}

/// Every regular file in a directory and below.
pub(crate) fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            files.extend(files_below(&entry.path()));
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    files
}

pub(crate) fn contains(content: &[u8], needle: &[u8]) -> bool {
    content.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn it_is_in_the_process_and_in_a_file_of_mode_0600_only() {
    let site = with_secrets();
    let mut printed = Vec::new();
    let commands: [&[&str]; 8] = [
        &["plan", "staging", "--json"],
        &["deploy", "staging", "--verbose"],
        &["deploy", "staging", "--json", "--verbose"],
        &["status", "--json"],
        &["history", "staging", "--json"],
        &["hosts", "staging", "--json"],
        &["logs", "staging", "--json"],
        &["releases", "--json"],
    ];
    for arguments in commands {
        printed.push(site.run(arguments).exits(0));
    }
    let rollouts = printed[4].json();
    let rollout = rollouts["rollouts"][0]["plan"]["id"].as_str().unwrap().to_owned();
    printed.push(site.run(&["history", "--rollout", &rollout, "--json"]).exits(0));
    for ran in &printed {
        for value in [PLANTED, COMMANDED] {
            assert!(!ran.stdout.contains(value) && !ran.stderr.contains(value), "{} tells it", ran.what);
        }
    }
    // In the environment of the application, in the arguments of nothing.
    let processes = site.processes();
    let applications: Vec<_> =
        processes.iter().filter(|(_, line)| line.contains("demo-application")).collect();
    assert_eq!(
        applications.iter().filter(|(_, line)| !line.contains("supervise")).count(),
        2,
        "{processes:?}"
    );
    for (pid, line) in &processes {
        assert!(!line.contains(PLANTED) && !line.contains(COMMANDED));
        if line.contains("demo-application") {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
            assert!(contains(&environment, format!("DATABASE_URL={PLANTED}\0").as_bytes()), "{line}");
            assert!(contains(&environment, format!("SIGNING_KEY={COMMANDED}\0").as_bytes()), "{line}");
        }
    }
    let source = site.around().join("home/signing-key");
    let mut holders = 0;
    for path in files_below(site.around()).into_iter().filter(|path| *path != source) {
        let content = fs::read(&path).unwrap();
        if contains(&content, PLANTED.as_bytes()) || contains(&content, COMMANDED.as_bytes()) {
            let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{}", path.display());
            assert!(path.starts_with(site.path("hosts")), "{}", path.display());
            holders += 1;
        }
    }
    assert!(holders >= 2, "neither host has it");
}

#[test]
fn one_that_cannot_be_had_stops_everything_before_it_begins() {
    let cases: [(&str, &str, &[&str]); 4] = [
        ("age = \"secrets.age\"", "age = \"other.age\"", &["DATABASE_URL", "other.age"]),
        ("~/identity.txt", "~/nobody.txt", &["DATABASE_URL", "nobody.txt"]),
        ("cat ../home/signing-key", "cat ../home/no-such-key", &["SIGNING_KEY", "`cat`"]),
        ("cat ../home/signing-key", "no-such-program", &["SIGNING_KEY", "no-such-program"]),
    ];
    let site = with_secrets();
    site.run(&["build", "hello"]).exits(0);
    let fleet = site.read("greenlight.toml");
    for (from, to, texts) in cases {
        site.edit(from, to);
        site.run(&["deploy", "staging", "v1"]).exits(2).says(texts);
        site.run(&["history"]).exits(0).says(&["no rollouts yet"]);
        assert!(!site.path("hosts/one").join("releases").exists());
        site.write("greenlight.toml", &fleet);
    }
    // Going back needs none: the release that ran has them on its hosts.
    site.run(&["deploy", "staging", "v1"]).exits(0);
    site.commit("v2");
    site.run(&["deploy", "staging"]).exits(0);
    site.edit("cat ../home/signing-key", "no-such-program");
    site.run(&["rollback", "staging"])
        .exits(0)
        .says(&["warning: going back with the secrets that are on the hosts"]);
    site.runs("staging", &[("one/hello", Some("v1")), ("two/hello", Some("v1"))]);
    site.write("greenlight.toml", &fleet);
    // Another identity cannot open the file.
    let other = age::x25519::Identity::generate();
    fs::write(site.around().join("home/identity.txt"), other.to_string().expose_secret()).unwrap();
    site.run(&["deploy", "staging", "v2"]).exits(2).says(&["DATABASE_URL", "cannot decrypt", "secrets.age"]);
}
