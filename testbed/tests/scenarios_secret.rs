//! A secret reaches the environment of its process, and nothing else.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use greenlight_testbed::{Bed, Init, run};
use support::{Site, fleet};

/// What is planted and searched for.
const VALUE: &str = "planted-7f3a91c2-value";

const SECRET: &str = r#"
[secret.DATABASE_URL]
command = "cat SOURCE"

[environment.production]
hosts.web = ["sysd", "super", "plain"]
strategy = { kind = "rolling", batch = 3 }
"#;

#[test]
fn a_planted_value_is_in_the_environment_of_its_process_only() {
    let bed = Bed::builder("secret")
        .host("sysd", Init::Systemd)
        .host("super", Init::Supervisord)
        .host("plain", Init::None)
        .up()
        .unwrap();
    let source = bed.home().join("database-url");
    std::fs::write(&source, VALUE).unwrap();
    let rest = SECRET.replace("SOURCE", source.to_str().unwrap());
    let toml =
        fleet("web", 8000, &rest).replace("[service.web]\n", "[service.web]\nsecrets = [\"DATABASE_URL\"]\n");
    let site = Site::new(&bed, &toml);
    // Hosts are processes of this machine, so one list has the arguments of all.
    let mut arguments = String::new();
    for files in [&[][..], &[("UNHEALTHY", "")]] {
        if !files.is_empty() {
            site.release("v2", files);
        }
        let mut deploy = site.begin(&["deploy", "production", "--verbose"]);
        while deploy.is_running() {
            arguments.push_str(&run(std::process::Command::new("ps").args(["-eo", "args"])).unwrap());
        }
        let ended = deploy.end();
        println!("{ended}");
        assert_eq!(ended.code, Some(i32::from(!files.is_empty())));
    }
    for command in [
        &["status"][..],
        &["history"],
        &["releases"],
        &["hosts"],
        &["plan", "production", "v1"],
        &["logs", "production"],
        &["exec", "production", "--", "ls", "/srv/web"],
        &["check"],
        &["rollback", "production", "v1"],
    ] {
        site.greenlight(command);
        site.greenlight(&[command, &["--json"]].concat());
    }
    site.records("production");
    assert!(arguments.contains("greenlight") && !arguments.contains(VALUE));
    assert!(!site.printed.borrow().contains(VALUE));
    let project = site.project.path().to_str().unwrap();
    let found = bed.machine_command("grep").args(["-r", "-a", "-l", VALUE, project]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");

    for host in bed.hosts() {
        let pid = site.pid(host.name(), 8000);
        let environment = host.read(&format!("/proc/{pid}/environ")).unwrap();
        assert!(
            environment.split('\0').any(|entry| entry == format!("DATABASE_URL={VALUE}")),
            "{environment}"
        );
        let search = "grep -rals -- \"$1\" /srv /root /home /etc /run /tmp /var /dev/shm /usr/local | xargs -r stat -c '%a %n'";
        let found = host.run("sh", &["-c", search, "search", VALUE]).unwrap();
        println!("{}: {found}", host.name());
        assert!(!found.is_empty(), "the search finds nothing on {}", host.name());
        for line in found.lines() {
            let (mode, path) = line.split_once(' ').unwrap();
            assert!(matches!(mode, "600" | "400"), "{path} on {} has mode {mode}", host.name());
            assert!(!path.contains("/logs/"), "{path} on {}", host.name());
        }
        let journal = host.run("sh", &["-c", "journalctl --no-pager 2>/dev/null || true"]).unwrap();
        assert!(!journal.contains(VALUE));
    }
}
