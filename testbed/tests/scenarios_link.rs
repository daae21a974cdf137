//! Scenarios of the way to a host: accounts, keys, links that are down, disks that are full.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs;

use greenlight_testbed::{Bed, Init, Sudo};
use support::{Ended, Site, fleet};

/// The line of `greenlight hosts` about a host.
#[track_caller]
fn check(hosts: &Ended, host: &str, reasons: &[&str]) {
    let line = hosts.line(&format!("{host} "));
    for reason in reasons {
        assert!(line.contains(reason), "{reason:?} is not in {line:?}");
    }
}

#[test]
fn each_way_to_fail_is_one_line_about_one_host() {
    let names = ["good", "strange", "changed", "keyless", "down", "mute", "full"];
    let bed = Bed::builder("link").hosts(names, Init::None).up().unwrap();
    let hosts = names.map(|name| format!("\"{name}\"")).join(", ");
    let environment = format!(
        "\n[environment.production]\nhosts.web = [{hosts}]\ntimeouts = {{ connect = \"15s\" }}\n\
         host.mute = {{ user = \"mute\" }}\n\n[environment.well]\nhosts.web = [\"good\"]\n"
    );
    let site = Site::new(&bed, &fleet("web", 8000, &environment));

    let known = fs::read_to_string(bed.known_hosts()).unwrap();
    let key_of = |host: &str| {
        let line = known.lines().find(|line| line.starts_with(&format!("{host},"))).unwrap();
        line.split_once(' ').unwrap().1.to_owned()
    };
    let (own, other) = (key_of("changed"), key_of("good"));
    let lines = known.lines().filter(|line| !line.starts_with("strange,"));
    let lines: Vec<_> = lines
        .map(|line| if line.starts_with("changed,") { line.replace(&own, &other) } else { line.into() })
        .collect();
    fs::write(bed.known_hosts(), lines.join("\n") + "\n").unwrap();
    bed.host("keyless").write("/root/.ssh/authorized_keys", 0o600, "").unwrap();
    bed.host("down").cut().unwrap();
    bed.host("mute").add_user("mute", Sudo::Nothing).unwrap();
    bed.host("mute").run("usermod", &["--shell", "/usr/sbin/nologin", "mute"]).unwrap();
    for place in ["/root/.cache", "/tmp"] {
        bed.host("full").run("mkdir", &["-p", place]).unwrap();
        bed.host("full").run("mount", &["-t", "tmpfs", "-o", "size=1m", "tmpfs", place]).unwrap();
    }

    let ended = site.greenlight(&["hosts", "production"]).exits(1);
    println!("{ended}");
    check(&ended, "good", &["Debian", "as root"]);
    check(&ended, "strange", &["its ssh host key is not known here"]);
    check(&ended, "changed", &["its ssh host key is not the one that is known"]);
    check(&ended, "keyless", &["ssh was refused", "Permission denied"]);
    check(&ended, "down", &["does not answer"]);
    check(&ended, "mute", &["no POSIX shell"]);
    check(&ended, "full", &["there is no room for the agent"]);

    // No host is changed when one cannot be looked at, and all are named.
    let ended = site.greenlight(&["deploy", "production"]).exits(1);
    println!("{ended}");
    ended.says(&["nothing was changed"]).says(&names[1..]);
    site.is_untouched("web", "good");
    // The good one is not kept from anything.
    site.greenlight(&["deploy", "well"]).exits(0).ends_with(&[("good", "v1")]);
}

#[test]
fn a_full_disk_is_found_before_anything_changes() {
    let bed = Bed::builder("full").hosts(["px1", "px2"], Init::None).up().unwrap();
    let site =
        Site::new(&bed, &fleet("web", 8000, "\n[environment.production]\nhosts.web = [\"px[1-2]\"]\n"));
    let px2 = bed.host("px2");
    px2.run("mount", &["-t", "tmpfs", "-o", "size=80m", "tmpfs", "/srv"]).unwrap();
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&[("px1", "v1"), ("px2", "v1")]);
    let pids = ["px1", "px2"].map(|host| site.pid(host, 8000));
    px2.run("dd", &["if=/dev/zero", "of=/srv/fill", "bs=1M", "count=78"]).unwrap();
    site.release("v2", &[]);
    let ended = site.greenlight(&["deploy", "production"]).exits(1);
    println!("{ended}");
    ended
        .says(&["nothing was changed", "px2: disk: expected", "free under /srv/web", "free some space"])
        .leaves_out(&["px1/web: preflight failed"])
        .ends_with(&[("px1", "v1"), ("px2", "v1")]);
    assert_eq!(["px1", "px2"].map(|host| site.pid(host, 8000)), pids);
    px2.run("rm", &["/srv/fill"]).unwrap();
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&[("px1", "v2"), ("px2", "v2")]);
}

#[test]
fn the_agent_is_sent_once_also_through_a_jump_host() {
    let bed = Bed::builder("jump").hosts(["door", "far"], Init::None).up().unwrap();
    let config = fs::read_to_string(bed.ssh_config()).unwrap();
    fs::write(bed.ssh_config(), format!("Host far\n    ProxyJump door\n{config}")).unwrap();
    let site = Site::new(&bed, &fleet("web", 8000, "\n[environment.production]\nhosts.web = [\"far\"]\n"));
    let received = || {
        let counters = bed.host("far").run("cat", &["/proc/net/dev"]).unwrap();
        let lines = counters.lines().skip(2).filter(|line| !line.trim_start().starts_with("lo:"));
        lines
            .filter_map(|line| line.split_once(':')?.1.split_whitespace().next()?.parse::<u64>().ok())
            .sum::<u64>()
    };
    // A program that is sent again is another file; one that is used is only marked as used.
    let program = || {
        let list = ["-c", "stat -c '%n %i' /root/.cache/greenlight/agent-*"];
        bed.host("far").run("sh", &list).unwrap()
    };
    let door = format!("{}:", bed.host("door").address());
    let ended =
        site.greenlight(&["exec", "production", "--", "ss", "-Htn", "state", "established", "sport = :22"]);
    println!("{ended}");
    ended.exits(0).says(&[&door]);
    let (first, sent) = (program(), received());
    assert_eq!(first.lines().count(), 1, "{first}");
    assert!(sent > 1_000_000, "{sent}");
    site.greenlight(&["deploy", "production"]).exits(0).ends_with(&[("far", "v1")]);
    let again = received() - sent;
    println!("{sent} bytes with the agent, {again} without");
    assert!(again < 1_000_000, "{again} bytes");
    assert_eq!(program(), first);
}

#[test]
fn root_is_asked_for_by_sudo_and_its_refusal_stops_before_any_change() {
    let bed = Bed::builder("sudo").hosts(["px1", "px2"], Init::Systemd).up().unwrap();
    bed.host("px1").add_user("deploy", Sudo::Everything).unwrap();
    bed.host("px2").add_user("deploy", Sudo::Nothing).unwrap();
    let environments = "\n[environment.allowed]\nhosts.web = [\"px1\"]\nuser = \"deploy\"\n\n\
                        [environment.both]\nhosts.web = [\"px[1-2]\"]\nuser = \"deploy\"\n";
    let site = Site::new(&bed, &fleet("web", 8000, environments));
    let ended = site.greenlight(&["hosts", "allowed"]).exits(0);
    println!("{ended}");
    check(&ended, "px1", &["as root by sudo from deploy", "systemd"]);
    site.greenlight(&["deploy", "allowed"]).exits(0).ends_with(&[("px1", "v1")]);
    let pid = site.pid("px1", 8000);

    let ended = site.greenlight(&["hosts", "both"]).exits(1);
    println!("{ended}");
    check(&ended, "px1", &["as root"]);
    check(&ended, "px2", &["`sudo -n` was refused", "a password is required"]);
    site.release("v2", &[]);
    let ended = site.greenlight(&["deploy", "both"]).exits(1);
    println!("{ended}");
    ended.says(&["px2", "`sudo -n` was refused", "nothing was changed"]);
    assert_eq!(site.pid("px1", 8000), pid);
    site.runs("web", 8000, &[("px1", "v1")]);
    site.is_untouched("web", "px2");
}
