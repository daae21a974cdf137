//! A service of three hosts over ssh behind HAProxy, under a load that never pauses and whose requests are never tried
//! again: what the tables of kills and faults are made on.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::time::Duration;

use greenlight_testbed::{Bed, HaProxy, Init, Load, LoadHandle, LoadReport};
use serde_json::Value;

use super::{DEADLINE, Site};

pub(crate) const HOSTS: [&str; 3] = ["web1", "web2", "web3"];
pub(crate) const PORT: u16 = 8000;

/// Answers under load that are waited for after a rollout, long enough to see what comes of its end, too.
const REQUESTS_AFTERWARDS: u64 = 20;

/// Boots the hosts, and one for the balancer.
pub(crate) fn bed(name: &str, init: Init) -> Bed {
    Bed::builder(name).hosts(HOSTS, init).host("lb", Init::None).up().unwrap()
}

/// Starts HAProxy. Nothing may hide a failure from the client: a request goes to one server once. `backend` is what the
/// servers' backend has beside that.
pub(crate) fn haproxy(bed: &Bed, global: &str, backend: &str) -> HaProxy {
    let servers: String =
        HOSTS.iter().map(|name| format!("    server {name} {}:{PORT}\n", bed.host(name).address())).collect();
    let configuration = format!(
        "{global}\
frontend web-in
    bind :80
    option idle-close-on-response
    default_backend web

backend web
    balance roundrobin
    retries 0
    option httpchk GET /health
    timeout check 5s
    default-server check inter 200ms fall 3 rise 1
{backend}{servers}"
    );
    bed.haproxy("lb", &configuration).unwrap()
}

/// The fleet file of a blue-green service on these hosts: what it has beside its process, and the process.
pub(crate) fn fleet(service: &str, process: &str, timeouts: &str) -> String {
    format!(
        r#"
[service.web]
{service}
[service.web.process.web]
port = {PORT}{process}
[environment.production]
hosts.web = ["web[1-3]"]
balancer = {{ haproxy = "lb:/run/haproxy/admin.sock", backend = "web" }}
strategy = {{ kind = "blue-green", floor = 1 }}
timeouts = {{ {timeouts} }}
"#
    )
}

/// The service, deployed and under load.
pub(crate) struct Served<'a> {
    pub(crate) site: Site<'a>,
    pub(crate) haproxy: &'a HaProxy,
    pub(crate) load: LoadHandle,
    /// Releases so far, the first included.
    releases: usize,
}

impl<'a> Served<'a> {
    /// Deploys the site's release, and begins the load.
    pub(crate) fn begin(site: Site<'a>, haproxy: &'a HaProxy, requests_per_second: u32) -> Self {
        site.greenlight(&["deploy", "production"]).exits(0);
        haproxy.wait_until_up("web", DEADLINE).unwrap();
        let load = Load::to((haproxy.host().address(), 80).into())
            .connections(4)
            .per_second(requests_per_second)
            .timeout(Duration::from_secs(30))
            .start(site.bed);
        load.wait_for(50, DEADLINE).unwrap();
        Self { site, haproxy, load, releases: 1 }
    }

    /// Commits the next release.
    pub(crate) fn release(&mut self) -> String {
        self.releases += 1;
        let version = format!("r{}", self.releases);
        self.site.release(&version, &[]);
        version
    }

    /// What a host answers.
    pub(crate) fn version(&self, host: &str) -> String {
        self.site.answer(host, PORT)
    }

    /// Asserts that every host is on this release, proven, in traffic and nobody's.
    #[track_caller]
    pub(crate) fn are_on(&self, version: &str) {
        let ended = self.site.greenlight(&["status", "production", "--json"]);
        let status: Value = serde_json::from_str(&ended.stdout).unwrap();
        let environment = &status["environments"][0];
        assert_eq!(environment["open"], Value::Null, "{ended}");
        let instances = environment["instances"].as_array().unwrap();
        assert_eq!(instances.len(), HOSTS.len(), "{ended}");
        for instance in instances {
            assert_eq!(instance["proven"], instance["release"], "{ended}");
            assert_eq!(instance["report"]["ledger"]["claim"], Value::Null, "{ended}");
            assert_eq!(instance["traffic"]["admitted"], true, "{ended}");
            assert_eq!(instance["traffic"]["up"], true, "{ended}");
        }
        let releases: BTreeSet<_> = instances.iter().map(|instance| instance["release"].as_str()).collect();
        assert_eq!(releases.len(), 1, "{ended}");
        for host in HOSTS {
            assert_eq!(self.version(host), version, "the answer of {host}:\n{ended}");
        }
        ended.exits(0);
    }

    /// The counts of the load, some requests later.
    pub(crate) fn settled(&self) -> LoadReport {
        self.load.wait_for(REQUESTS_AFTERWARDS, DEADLINE).unwrap();
        self.load.report()
    }
}

/// Prints a table. Not by `print!`, which a test that passes keeps to itself: the table is what it is for.
pub(crate) fn show(table: &str) {
    std::io::stdout().lock().write_all(table.as_bytes()).unwrap();
}
