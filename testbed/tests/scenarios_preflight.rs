//! Scenarios of the preflight: what is wrong on a host is found before anything changes anywhere, named with host and versions,
//! and let through only by somebody who gives a reason.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use greenlight_testbed::{Bed, Host, Init, wait};
use support::{DEADLINE, Site, fleet};

const HOSTS: [&str; 4] = ["px1", "px2", "px3", "px4"];

const ENVIRONMENT: &str = r#"
[environment.production]
hosts.web = ["px[1-4]"]
strategy = { kind = "rolling", batch = 2 }
timeouts = { connect = "3s" }
"#;

fn all(version: &str) -> [(&str, &str); 4] {
    HOSTS.map(|host| (host, version))
}

/// Installs a package of this version, made on the host itself.
fn install(host: &Host, version: &str) {
    let control = format!(
        "Package: libwidget\nVersion: {version}\nArchitecture: all\nMaintainer: A tester <tester@localhost>\nDescription: test\n"
    );
    host.run("mkdir", &["-p", "/tmp/libwidget/DEBIAN"]).unwrap();
    host.write("/tmp/libwidget/DEBIAN/control", 0o644, control).unwrap();
    host.run("dpkg-deb", &["--build", "/tmp/libwidget"]).unwrap();
    host.run("dpkg", &["--install", "/tmp/libwidget.deb"]).unwrap();
}

/// Puts an interpreter on a host that says it has this version.
fn interpreter(host: &Host, version: &str) {
    host.write("/usr/local/bin/python2.7", 0o755, format!("#!/bin/sh\necho 'Python {version}' >&2\n"))
        .unwrap();
}

/// Asserts that a deployment was refused with these words, before anything but checks was begun anywhere.
#[track_caller]
fn is_refused(site: &Site<'_>, arguments: &[&str], words: &[&str], leaves_out: &[&str]) {
    let before = HOSTS.map(|host| site.pid(host, 8000));
    let ended = site.greenlight(&[&["deploy", "production"], arguments].concat()).exits(1);
    ended.says(&["REFUSED, nothing was changed"]).says(words).leaves_out(leaves_out).ends_with(&[]);
    let begun = site.begun("production");
    assert!(begun.iter().all(|begun| begun.starts_with("preflight")), "{begun:?}");
    assert_eq!(HOSTS.map(|host| site.pid(host, 8000)), before);
    assert_eq!(HOSTS.map(|host| site.linked(host, "web")), ["v1"; 4]);
}

#[test]
fn a5_a17_a18_what_is_wrong_on_one_host_stops_all_of_it() {
    let bed = Bed::builder("preflight").hosts(HOSTS, Init::None).up().unwrap();
    for host in HOSTS {
        interpreter(bed.host(host), "2.7.10");
        install(bed.host(host), "1.4-1");
    }
    let requires = r#"requires = { "python2.7" = ">=2.7.10, <3", packages = ["libwidget"], not_running = ["bin/nightly --all"] }"#;
    let toml = fleet("web", 8000, ENVIRONMENT).replacen(
        "[service.web]\n",
        &format!("[service.web]\n{requires}\n"),
        1,
    );
    let site = Site::new(&bed, &toml);
    let table = site.greenlight(&["preflight", "production"]).exits(0);
    println!("{table}");
    table.says(&["px3/web", "package libwidget", "version 1.4-1", "clock", "all passed"]);
    HOSTS.iter().for_each(|host| site.is_untouched("web", host));
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&all("v1"));
    site.release("v2", &[]);

    // A5: 2.7.6 where 2.7.10 is required.
    interpreter(bed.host("px2"), "2.7.6");
    is_refused(
        &site,
        &[],
        &["px2: runtime python2.7: expected >=2.7.10, <3, found 2.7.6"],
        &["px1: runtime", "px3: runtime"],
    );
    interpreter(bed.host("px2"), "2.7.10");

    // A17: missing on one of four; another version on one; one that cannot be read.
    bed.host("px3").run("dpkg", &["--purge", "libwidget"]).unwrap();
    is_refused(
        &site,
        &[],
        &["px3: package libwidget: expected installed, found not installed"],
        &["px4: package"],
    );
    install(bed.host("px3"), "1.3-7");
    is_refused(
        &site,
        &[],
        &["not the same version everywhere: package libwidget: 1.4-1 on px1, px2, px4; 1.3-7 on px3"],
        &[],
    );
    let checks = site.json(&["preflight", "production", "v2"])["checks"].clone();
    assert_eq!(checks["passed"], false);
    assert_eq!(checks["uneven"][0]["versions"][1]["hosts"][0], "px3", "{checks}");
    install(bed.host("px3"), "1.4-1");
    bed.host("px4").cut().unwrap();
    let silent = site.greenlight(&["preflight", "production", "v2"]).exits(1);
    println!("{silent}");
    silent.says(&["px4/web", "answers", "failed"]);
    let refused =
        site.greenlight(&["deploy", "production", "v2", "--override", "answers", "--reason", "in a hurry"]);
    refused.exits(1).says(&["REFUSED, nothing was changed", "px4"]);
    bed.host("px4").heal().unwrap();

    // A18: edits, too little disk, a critical job.
    let edited = "/srv/web/current/app.py";
    let original = bed.host("px1").read(edited).unwrap();
    bed.host("px1").write(edited, 0o644, format!("{original}# mended by hand\n")).unwrap();
    bed.host("px2").write("/srv/bin/nightly", 0o755, "#!/bin/sh\necho begun\nread line\n").unwrap();
    let mut job = bed.host("px2").command("/srv/bin/nightly").unwrap();
    job.arg("--all").stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut job = job.spawn().unwrap();
    let mut said = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(job.stdout.take().unwrap()), &mut said).unwrap();
    is_refused(
        &site,
        &[],
        &[
            "px1: local edits",
            "app.py differ from what was released",
            "px2: job bin/nightly --all",
            "expected not running",
        ],
        &["px3: job"],
    );
    drop(job.stdin.take());
    job.wait().unwrap();
    site.fleet(&toml.replace("requires = {", "requires = { disk = \"900TiB\","));
    is_refused(&site, &["v2"], &["px4: disk: expected 900.0 TiB free under /srv/web"], &["px2: job"]);

    // An override needs a reason, is for what it names alone, and stays.
    let named = ["--override", "disk", "--override", "px1:local edits"];
    site.greenlight(&[&["deploy", "production", "v2"], &named[..]].concat()).exits(2).says(&["--reason"]);
    is_refused(
        &site,
        &["v2", "--override", "disk", "--reason", "the array is resized"],
        &["px1: local edits"],
        &[],
    );
    let because = ["--reason", "the edit is in v2, the array is resized tonight"];
    site.greenlight(&[&["deploy", "production", "v2"], &named[..], &because[..]].concat())
        .exits(0)
        .ends_with(&all("v2"));
    let report = site.greenlight(&["report"]).exits(0);
    println!("{report}");
    report.says(&[
        "check disk was overridden by",
        "check px1:local edits was overridden by",
        "the edit is in v2, the array is resized tonight",
        "px1: expected the active release as it was staged, found app.py differ",
    ]);
}

#[test]
fn outside_services_must_let_every_host_in() {
    let bed = Bed::builder("reach").host("px1", Init::None).host("db", Init::Systemd).up().unwrap();
    let postgres = bed.postgres("db").unwrap();
    let right = postgres.url();
    let write = |url: &str| {
        let path = bed.home().join("database-url");
        fs::write(&path, url).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    };
    write(&right);
    let path = bed.home().join("database-url").to_str().unwrap().to_owned();
    let toml = format!(
        "[service.web]\nrequires.reach.database = {{ secret = \"DATABASE_URL\" }}\nrequires.reach.ssh = \"tcp://{}:22\"\n\n\
         [service.web.process.web]\nport = 8000\nrun = \"python3 app.py --port {{port}}\"\n\n\
         [secret.DATABASE_URL]\ncommand = \"cat {path}\"\n\n[environment.production]\nhosts.web = [\"px1\"]\n",
        bed.host("db").address()
    );
    let site = Site::new(&bed, &toml);
    let lets_in = "lets this host log in";
    site.greenlight(&["preflight", "production"]).exits(0).says(&[
        "reach database",
        lets_in,
        "reach ssh",
        "all passed",
    ]);
    write(&right.replace(postgres.password(), "wr0ng-password"));
    let refused = site.greenlight(&["deploy", "production"]).exits(1);
    println!("{refused}");
    refused.says(&["px1: reach database", "it refuses: password authentication failed for user"]);
    site.is_untouched("web", "px1");
    bed.host("db").run("systemctl", &["stop", "postgresql"]).unwrap();
    site.greenlight(&["plan", "production"]).exits(1).says(&["reach database", "1 failed"]);
    for secret in [postgres.password(), "wr0ng-password"] {
        assert!(!site.printed.borrow().contains(secret), "a password was printed");
        assert!(!format!("{:?}", site.records("production")).contains(secret), "a password was recorded");
    }
}

#[test]
fn drift_names_what_was_changed_on_a_host_and_between_hosts() {
    let bed = Bed::builder("drift").hosts(["px1", "px2"], Init::Systemd).up().unwrap();
    for host in ["px1", "px2"] {
        install(bed.host(host), "1.4-1");
    }
    let environment = "\n[environment.production]\nhosts.web = [\"px[1-2]\"]\n";
    let variables = "variables = { LOG_LEVEL = \"info\" }\n";
    let toml = fleet("web", 8000, &format!("{variables}{environment}"));
    let requires = "[service.web]\nrequires = { packages = [\"libwidget\"] }\n";
    let site = Site::new(&bed, &toml.replacen("[service.web]\n", requires, 1));
    site.greenlight(&["deploy", "production"]).exits(0);
    let well = site.greenlight(&["drift", "production", "--verbose"]).exits(0);
    println!("{well}");
    well.says(&["px2/web  unit web", "px2/web  environment web", "all passed"]);

    // Somebody works on px1 by hand: a file, the unit, a restart with another variable; px2 gets another package.
    let unit = "/etc/systemd/system/greenlight-web-web.service";
    let (host, other) = (bed.host("px1"), bed.host("px2"));
    let written = host.read(unit).unwrap();
    let changed = written.replace("LOG_LEVEL=info", "LOG_LEVEL=debug");
    assert_ne!(changed, written, "{written}");
    host.write(unit, 0o644, changed).unwrap();
    host.run("systemctl", &["daemon-reload"]).unwrap();
    host.run("systemctl", &["restart", "greenlight-web-web.service"]).unwrap();
    // Before its program has begun, it has another environment.
    wait::until("px1 to answer again", DEADLINE, || {
        bed.get(site.address("px1", 8000), "/health").map(drop).map_err(|error| error.to_string())
    })
    .unwrap();
    let file = "/srv/web/current/VERSION";
    host.write(file, 0o644, "v1 ").unwrap();
    install(other, "1.5-1");
    let drifted = site.greenlight(&["drift", "production"]).exits(3);
    println!("{drifted}");
    drifted
        .says(&["px1/web  unit web", "differs from line", "px1/web  environment web", "LOG_LEVEL"])
        .says(&["px1/web  local edits", "VERSION differ", "package libwidget: 1.4-1 on px1; 1.5-1 on px2"])
        .leaves_out(&["px2/web  unit", "debug"]);

    // Another release by hand is another release.
    other.run("ln", &["-sfn", "releases/nothing", "/srv/web/current"]).unwrap();
    site.greenlight(&["drift", "production"]).exits(3).says(&["px2/web  link", "found no release"]);
}
