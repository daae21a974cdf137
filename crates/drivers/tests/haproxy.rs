//! The driver against a real HAProxy with sockets of its own, in front of two real servers.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "these are tests")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use greenlight_drivers::balancer::{BalancerDriver, DriverProblem};
use greenlight_drivers::canary::Share;
use greenlight_drivers::transport::{BoxFuture, TcpTransport, Transport, TransportError};
use greenlight_model::fleet::{Balancer, BalancerKind};
use greenlight_model::traffic::{Admission, ServerHealth};
use support::{Application, Client, PATIENCE, SocketFile, host, until};

struct Haproxy {
    child: Child,
    directory: tempfile::TempDir,
    frontend: SocketAddr,
    control: SocketAddr,
    first: Application,
    _second: Application,
    _ports: [(socket2::Socket, SocketAddr); 3],
}

impl Haproxy {
    /// Starts it and waits until both servers are up.
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (first, second) = (Application::start("first"), Application::start("second"));
        let ports = [reserve(), reserve(), reserve()];
        let [frontend, control, nobody] = ports.each_ref().map(|(_, address)| *address);
        let configuration = format!(
            "global\n\
             stats socket {at}/admin.sock mode 600 level admin\n\
             stats socket {at}/user.sock mode 600 level user\n\
             stats socket ipv4@{control} level admin\n\
             defaults\nmode http\ntimeout connect 5s\ntimeout client 60s\ntimeout server 60s\n\
             default-server inter 50ms rise 2 fall 2\n\
             frontend front\nbind {frontend}\ndefault_backend web\n\
             backend web\nbalance roundrobin\n\
             server web1 {} check weight 10\n\
             server second {} check slowstart 100ms weight 20\n\
             backend odd\n\
             server web1 {nobody} check\n\
             server web2 {nobody} check disabled\n\
             server web3 {nobody}\n\
             server web4 {nobody} track odd/web2\n",
            first.address,
            second.address,
            at = directory.path().display(),
        );
        let file = directory.path().join("haproxy.cfg");
        std::fs::write(&file, configuration).unwrap();
        let program = ["/usr/sbin/haproxy", "/usr/local/sbin/haproxy", "/usr/bin/haproxy"]
            .into_iter()
            .find(|path| std::path::Path::new(path).exists())
            .expect("this test needs HAProxy: apt-get install haproxy");
        let checked = Command::new(program).args(["-c", "-f"]).arg(&file).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
        let child =
            Command::new(program).args(["-db", "-q", "-f"]).arg(&file).stdin(Stdio::null()).spawn().unwrap();
        let haproxy = Self { child, directory, frontend, control, first, _second: second, _ports: ports };
        until(&haproxy.driver("web", "admin.sock"), "both servers are up", |servers| {
            servers.values().all(|server| server.health == ServerHealth::Up)
        })
        .await;
        haproxy
    }

    fn socket(&self, name: &str) -> SocketFile {
        SocketFile(self.directory.path().join(name))
    }

    fn driver(&self, backend: &str, socket: &str) -> BalancerDriver {
        driver(backend, &["web1", "web2"], Arc::new(self.socket(socket)))
    }

    async fn by_hand(&self, command: &str) {
        assert_eq!(self.socket("admin.sock").exchange(&format!("{command}\n")).await.unwrap().trim(), "");
    }
}

impl Drop for Haproxy {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A driver for a backend in which web2's server is called `second`.
fn driver(backend: &str, hosts: &[&str], transport: Arc<dyn Transport>) -> BalancerDriver {
    let servers = match backend {
        "web" => BTreeMap::from([(host("web2"), "second".to_owned())]),
        _ => BTreeMap::new(),
    };
    let balancer = Balancer {
        service: "web".parse().unwrap(),
        kind: BalancerKind::HaproxySocket { host: host("lb"), path: "/run/haproxy/admin.sock".to_owned() },
        backend: backend.to_owned(),
        servers,
    };
    let hosts: Vec<_> = hosts.iter().map(|name| host(name)).collect();
    BalancerDriver::new(&balancer, &hosts, transport)
}

/// A port of the test's own: bound, so that nobody else gets it, and not listening. HAProxy may listen on it beside it,
/// as it too asks to share its ports.
fn reserve() -> (socket2::Socket, SocketAddr) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    (socket, address)
}

/// The scenario of every balancer: 70 to 30, an alert, nothing after it, and back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_canary_is_lent_its_share_and_loses_it_by_an_alert() {
    let haproxy = Haproxy::start().await;
    let driver = haproxy.driver("web", "admin.sock");
    let canary = BTreeSet::from([host("web2")]);
    let share = |percent: u8| Share {
        release: "v2",
        hosts: &canary,
        share: percent.try_into().unwrap(),
        lease: std::time::Duration::from_secs(600),
    };
    driver.lend(&share(30)).await.unwrap();
    let servers = driver.read().await.unwrap();
    let (one, two) = (servers[&host("web1")].weight, servers[&host("web2")].weight);
    assert!((295..=300).contains(&(1000 * two / (one + two))), "{one} and {two}");
    driver.renew("v2", std::time::Duration::from_secs(600)).await.unwrap();
    let before = driver.counts().await.unwrap();
    let seen = support::ask(Client::connect(haproxy.frontend), 1000);
    assert!((250..=350).contains(&seen["second"]), "{seen:?}");
    let counts = driver.counts().await.unwrap();
    assert_eq!(counts.instance, before.instance);
    let requests = |name: &str| {
        let of = |counts: &greenlight_drivers::canary::Counts| {
            counts.rows.iter().find(|row| row.host == host(name)).map_or(0, |row| row.requests)
        };
        of(&counts) - of(&before)
    };
    assert_eq!((requests("web1"), requests("web2")), (seen["first"], seen["second"]));
    assert!(counts.rows.iter().all(|row| row.errors == 0), "{counts:?}");

    driver.alert(&canary, "5 % errors", "verdict").await.unwrap();
    assert_eq!(support::ask(Client::connect(haproxy.frontend), 1000).get("second"), None);
    driver.enable("ada").await.unwrap();
    driver.conclude().await.unwrap();
    let servers = driver.read().await.unwrap();
    assert_eq!((servers[&host("web1")].weight, servers[&host("web2")].weight), (10, 20), "as configured");
    let error = haproxy.driver("web", "user.sock").lend(&share(1)).await.unwrap_err();
    assert!(matches!(error.problem, DriverProblem::NotAdmin), "{error}");
}

#[tokio::test]
async fn servers_are_read_as_they_are() {
    let haproxy = Haproxy::start().await;
    let servers = haproxy.driver("web", "admin.sock").read().await.unwrap();
    assert_eq!(servers.len(), 2);
    for (name, weight) in [("web1", 10), ("web2", 20)] {
        let server = servers[&host(name)];
        assert!(server.serves(), "{name}: {server:?}");
        assert_eq!((server.weight, server.sessions), (weight, 0), "{name}");
    }
    let odd = driver("odd", &["web1", "web2", "web3", "web4"], Arc::new(haproxy.socket("admin.sock")));
    let servers =
        until(&odd, "the dead server is down", |servers| servers[&host("web1")].health == ServerHealth::Down)
            .await;
    assert_eq!(servers[&host("web1")].admission, Admission::Ready);
    assert_eq!(servers[&host("web2")].admission, Admission::Maintenance, "disabled in the configuration");
    assert!(servers[&host("web3")].serves(), "one that is not checked is taken to be up");
    assert_eq!(servers[&host("web4")].admission, Admission::Maintenance, "it tracks a disabled one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_server_finishes_what_it_has_and_is_admitted_again() {
    let haproxy = Haproxy::start().await;
    let driver = haproxy.driver("web", "admin.sock");
    let (web1, web2) = (host("web1"), host("web2"));
    // web1 is to get the slow request.
    haproxy.by_hand("set server web/second state drain").await;
    let frontend = haproxy.frontend;
    let slow = std::thread::spawn(move || Client::connect(frontend).get("/slow"));
    haproxy.first.wait_for_a_slow_request();
    haproxy.by_hand("set server web/second state ready").await;
    assert_eq!(driver.read().await.unwrap()[&web1].sessions, 1);

    driver.drain(&web1).await.unwrap();
    let servers = driver.read().await.unwrap();
    assert_eq!((servers[&web1].admission, servers[&web1].sessions), (Admission::Drain, 1));
    assert_eq!(servers[&web1].health, ServerHealth::Up, "it is still checked");
    let mut clients: Vec<Client> = (0..10).map(|_| Client::connect(haproxy.frontend)).collect();
    for client in &mut clients {
        assert_eq!(client.get("/"), "second");
    }

    haproxy.first.go.send(()).unwrap();
    assert_eq!(slow.join().unwrap(), "first");
    until(&driver, "the slow request is over", |servers| servers[&web1].sessions == 0).await;
    // The connections that the clients keep open are nobody's sessions.
    assert_eq!(
        until(&driver, "all is quiet", |servers| servers[&web2].sessions == 0).await[&web1].sessions,
        0
    );

    driver.drain(&web1).await.unwrap();
    driver.admit(&web1, None).await.unwrap();
    let servers = until(&driver, "web1 serves", |servers| servers[&web1].serves()).await;
    assert_eq!(servers[&web1].admission, Admission::Ready);
    let answers: Vec<String> = clients.iter_mut().map(|client| client.get("/")).collect();
    assert!(answers.contains(&"first".to_owned()), "{answers:?}");
}

#[tokio::test]
async fn maintenance_by_hand_is_seen_and_not_overruled() {
    let haproxy = Haproxy::start().await;
    let driver = haproxy.driver("web", "admin.sock");
    let web1 = host("web1");
    haproxy.by_hand("set server web/web1 state maint").await;
    assert_eq!(driver.read().await.unwrap()[&web1].admission, Admission::Maintenance);
    driver.drain(&web1).await.unwrap();
    assert_eq!(driver.read().await.unwrap()[&web1].admission, Admission::Maintenance, "it was overruled");
    let error = driver.admit(&web1, None).await.unwrap_err();
    assert!(matches!(error.problem, DriverProblem::InMaintenance { .. }), "{error}");
    assert!(
        error
            .to_string()
            .starts_with("haproxy lb:/run/haproxy/admin.sock web: server `web1` is in maintenance"),
        "{error}"
    );

    // HAProxy takes a server that leaves maintenance to be up until its checks say otherwise; we do not.
    haproxy.by_hand("set server web/web1 state ready").await;
    until(&driver, "web1 serves", |servers| servers[&web1].serves()).await;
}

#[tokio::test]
async fn somebody_else_at_the_same_server_is_noticed() {
    /// Somebody who does not want web1 to be drained.
    struct Meddler(SocketFile);
    impl Transport for Meddler {
        fn exchange<'a>(&'a self, input: &'a str) -> BoxFuture<'a, Result<String, TransportError>> {
            Box::pin(async move {
                let answer = self.0.exchange(input).await;
                if input.starts_with("set server") {
                    self.0.exchange("set server web/web1 state ready\n").await?;
                }
                answer
            })
        }
    }
    let haproxy = Haproxy::start().await;
    let meddled = driver("web", &["web1", "web2"], Arc::new(Meddler(haproxy.socket("admin.sock"))));
    let error = meddled.drain(&host("web1")).await.unwrap_err();
    assert!(
        error.to_string().contains("server `web1` was set to drain and is ready; somebody or something else"),
        "{error}"
    );
}

#[tokio::test]
async fn what_is_not_there_is_named_with_what_is() {
    let haproxy = Haproxy::start().await;
    let error = haproxy.driver("wbe", "admin.sock").read().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "haproxy lb:/run/haproxy/admin.sock wbe: it has no backend `wbe`; it has odd, web"
    );
    let stray = driver("web", &["web1", "web9"], Arc::new(haproxy.socket("admin.sock")));
    for error in [stray.read().await.unwrap_err(), stray.drain(&host("web9")).await.unwrap_err()] {
        assert!(
            error.to_string().contains("it has no server `web9` for host web9; it has second, web1"),
            "{error}"
        );
    }
    let error = haproxy.driver("web", "admin.sock").drain(&host("elsewhere")).await.unwrap_err();
    assert!(error.to_string().ends_with("host elsewhere is not behind it"), "{error}");
    let error =
        haproxy.driver("web;shutdown sessions server web/web1", "admin.sock").read().await.unwrap_err();
    assert!(matches!(error.problem, DriverProblem::BadName { .. }), "{error}");
}

#[tokio::test]
async fn a_socket_for_reading_only_is_named() {
    let haproxy = Haproxy::start().await;
    let driver = haproxy.driver("web", "user.sock");
    assert!(driver.read().await.unwrap()[&host("web1")].serves());
    let error = driver.drain(&host("web1")).await.unwrap_err();
    assert!(
        error.to_string().contains("its socket does not allow changes; give it `level admin`"),
        "{error}"
    );
}

#[tokio::test]
async fn it_is_reached_over_tcp_and_its_end_is_noticed() {
    let mut haproxy = Haproxy::start().await;
    let over_tcp = TcpTransport::new(haproxy.control.to_string(), PATIENCE);
    let driver = driver("web", &["web1", "web2"], Arc::new(over_tcp));
    driver.drain(&host("web2")).await.unwrap();
    assert_eq!(driver.read().await.unwrap()[&host("web2")].admission, Admission::Drain);
    driver.admit(&host("web2"), None).await.unwrap();
    haproxy.child.kill().unwrap();
    haproxy.child.wait().unwrap();
    for error in
        [driver.read().await.unwrap_err(), haproxy.driver("web", "admin.sock").read().await.unwrap_err()]
    {
        assert!(matches!(error.problem, DriverProblem::Unreachable(_)), "{error}");
        assert!(error.to_string().contains("refused"), "{error}");
    }
}

#[tokio::test]
async fn an_endpoint_that_does_not_answer_is_given_up() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let transport = TcpTransport::new(address.clone(), std::time::Duration::from_millis(100));
    let error = driver("web", &["web1"], Arc::new(transport)).read().await.unwrap_err();
    assert!(error.to_string().ends_with(&format!("{address} did not answer within 100ms")), "{error}");
}
