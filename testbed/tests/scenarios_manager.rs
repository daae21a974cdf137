//! Scenarios of what runs processes on a host: systemd, its manager of a user, supervisord, and Greenlight's own.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use greenlight_testbed::{Bed, Host, Init, Sudo, wait};
use support::{DEADLINE, Site, fleet, kill};

/// Deploys, loses a process, deploys again and goes back, on the one host of an environment.
fn life(site: &Site<'_>, host: &Host, root: &str, manager: &str) {
    let name = host.name();
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&[(name, "v1")]);
    site.greenlight(&["hosts", "production"]).exits(0).says(&[manager]);

    // Its manager starts it again.
    let pid = site.pid(name, 8000);
    kill(host, &pid);
    wait::until("the killed process to answer again", DEADLINE, || {
        match site.bed.get(site.address(name, 8000), "/version") {
            Ok(response) if response.status == 200 && !response.text().contains(&format!(": {pid}}}")) => {
                Ok(())
            }
            Ok(response) => Err(response.text()),
            Err(error) => Err(error.to_string()),
        }
    })
    .unwrap();
    assert_eq!(site.answer(name, 8000), "v1");
    site.greenlight(&["status", "production"]).exits(0).says(&["proven"]);

    site.release("v2", &[]);
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&[(name, "v2")]);
    assert_eq!(site.answer(name, 8000), "v2");
    let read = |path: &str| host.read(&format!("{root}/web/{path}")).unwrap();
    let (stdout, stderr) = (read("logs/web.stdout"), read("logs/web.stderr"));
    assert!(stdout.contains("\"GET /version") && !stdout.contains("listens on port"), "{stdout}");
    assert!(stderr.contains("version v2 listens on port 8000") && !stderr.contains("\"GET"), "{stderr}");
    site.greenlight(&["logs", "production", "--errors"]).exits(0).says(&["version v2 listens on port 8000"]);

    site.greenlight(&["rollback", "production"]).exits(0).ends_with(&[(name, "v1")]);
    assert_eq!(site.answer(name, 8000), "v1");
    assert_eq!(read("current/VERSION"), "v1");
}

fn environment(manager: &str, rest: &str) -> String {
    let text = format!("\n[environment.production]\nhosts.web = [\"px1\"]\nmanager = \"{manager}\"\n{rest}");
    fleet("web", 8000, &text)
}

#[test]
fn systemd_keeps_the_service_over_a_reboot() {
    let bed = Bed::builder("systemd").host("px1", Init::Systemd).up().unwrap();
    let site = Site::new(&bed, &environment("auto", ""));
    let host = bed.host("px1");
    life(&site, host, "/srv", "systemd");
    let unit = format!("/proc/{}/cgroup", site.pid("px1", 8000));
    assert!(host.read(&unit).unwrap().contains("greenlight-web-web.service"));

    host.crash().unwrap();
    host.heal().unwrap();
    host.boot().unwrap();
    wait::until("the service after the boot", DEADLINE, || {
        bed.get(site.address("px1", 8000), "/version").map(drop).map_err(|error| error.to_string())
    })
    .unwrap();
    assert_eq!(site.answer("px1", 8000), "v1");
    site.greenlight(&["status", "production"]).exits(0).says(&["proven"]);
}

#[test]
fn systemd_of_a_user_needs_no_root() {
    let bed = Bed::builder("user").host("px1", Init::Systemd).up().unwrap();
    let host = bed.host("px1");
    host.add_user("deploy", Sudo::Nothing).unwrap();
    host.run("loginctl", &["enable-linger", "deploy"]).unwrap();
    let rest = "user = \"deploy\"\nroot = \"/home/deploy/srv\"\n";
    let site = Site::new(&bed, &environment("systemd-user", rest));
    life(&site, host, "/home/deploy/srv", "systemd-user");
    let owner = format!("/proc/{}", site.pid("px1", 8000));
    assert_eq!(host.run("stat", &["-c", "%U", &owner]).unwrap(), "deploy\n");
    site.greenlight(&["hosts", "production"]).exits(0).says(&["as deploy"]);
    assert!(!host.exists("/srv/web").unwrap());
}

#[test]
fn supervisord_runs_it() {
    let bed = Bed::builder("super").host("px1", Init::Supervisord).up().unwrap();
    let site = Site::new(&bed, &environment("auto", ""));
    life(&site, bed.host("px1"), "/srv", "supervisord");
    let status = bed.ssh("px1", &["supervisorctl", "status"]).unwrap();
    assert!(status.contains("greenlight-web-web") && status.contains("sshd"), "{status}");
}

#[test]
fn greenlight_runs_it_where_there_is_nothing_else() {
    let bed = Bed::builder("own").host("px1", Init::None).up().unwrap();
    let site = Site::new(&bed, &environment("agent", ""));
    life(&site, bed.host("px1"), "/srv", "agent");
}

#[test]
fn a_worker_without_a_port_is_proven_by_where_it_runs() {
    let bed = Bed::builder("worker").host("px1", Init::Systemd).host("px2", Init::None).up().unwrap();
    let site = Site::new(
        &bed,
        "[service.mail]\n\n[service.mail.process.worker]\nrun = \"python3 worker.py\"\n\n\
         [environment.production]\nhosts.mail = [\"px[1-2]\"]\n",
    );
    site.project.write("worker.py", "import signal\nprint('at work', flush=True)\nsignal.pause()\n").unwrap();
    for version in ["v2", "v3"] {
        site.release(version, &[]);
        site.greenlight(&["deploy", "production"]).exits(0).ends_with(&[("px1", version), ("px2", version)]);
        let status = site.greenlight(&["status", "production"]).exits(0);
        println!("{status}");
        status.says(&["proven"]);
        for host in bed.hosts() {
            let release = host.run("readlink", &["-f", "/srv/mail/current"]).unwrap();
            let pid = host.run("pgrep", &["-f", "python3 worker.py$"]).unwrap();
            let pid = pid.trim();
            assert_eq!(host.run("readlink", &[&format!("/proc/{pid}/cwd")]).unwrap(), release);
            assert_eq!(host.read("/srv/mail/current/VERSION").unwrap(), version);
        }
    }
    // One that ends at once is not believed.
    site.project.write("worker.py", "raise SystemExit('no queue')\n").unwrap();
    site.release("v4", &[]);
    site.greenlight(&["deploy", "production"])
        .exits(1)
        .says(&["no queue"])
        .ends_with(&[("px1", "v3"), ("px2", "v3")]);
}
