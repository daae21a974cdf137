//! The driver against the built-in router, in front of two real servers.

#![expect(clippy::unwrap_used, reason = "these are tests")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use greenlight_drivers::balancer::{BalancerDriver, DriverProblem};
use greenlight_drivers::canary::Share;
use greenlight_model::fleet::{Balancer, BalancerKind};
use greenlight_model::traffic::{Admission, ServerHealth};
use greenlight_router::{
    BackendChange, BackendSpec, BackendState, Router, RouterConfig, RouterHandle, RouterState,
};
use support::{Application, Client, SocketFile, host, until};

struct Bed {
    router: RouterHandle,
    directory: tempfile::TempDir,
    first: Application,
    _second: Application,
}

impl Bed {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (first, second) = (Application::start("first"), Application::start("second"));
        let mut config =
            RouterConfig::new("127.0.0.1:0".parse().unwrap(), directory.path().join("control.sock"));
        config.workers = 2;
        config.health.interval = Duration::from_millis(20);
        let backend = |name: &str, application: &Application, weight| BackendSpec {
            name: name.to_owned(),
            address: application.address,
            weight,
            state: BackendState::Ready,
            release: None,
            health: None,
        };
        let backends = vec![backend("web1", &first, 100), backend("second", &second, 50)];
        let router = Router::start(config, RouterState::new(1, backends)).unwrap();
        let bed = Self { router, directory, first, _second: second };
        until(&bed.driver(&["web1", "web2"]), "both are up", |servers| {
            servers.values().all(|server| server.health == ServerHealth::Up)
        })
        .await;
        bed
    }

    fn driver(&self, hosts: &[&str]) -> BalancerDriver {
        let balancer = Balancer {
            service: "web".parse().unwrap(),
            kind: BalancerKind::Router { host: host("lb"), path: "/run/router.sock".to_owned() },
            backend: "web".to_owned(),
            servers: BTreeMap::from([(host("web2"), "second".to_owned())]),
        };
        let hosts: Vec<_> = hosts.iter().map(|name| host(name)).collect();
        BalancerDriver::new(
            &balancer,
            &hosts,
            Arc::new(SocketFile(self.directory.path().join("control.sock"))),
        )
    }

    fn client(&self) -> Client {
        Client::connect(self.router.local_addr())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_is_drained_and_admitted() {
    let bed = Bed::start().await;
    let driver = bed.driver(&["web1", "web2"]);
    let (web1, web2) = (host("web1"), host("web2"));
    let servers = driver.read().await.unwrap();
    assert_eq!((servers[&web1].weight, servers[&web2].weight), (100, 50));
    assert!(servers.values().all(|server| server.serves() && server.sessions == 0), "{servers:?}");

    driver.drain(&web2).await.unwrap();
    let mut client = bed.client();
    let slow = std::thread::spawn(move || client.get("/slow"));
    bed.first.wait_for_a_slow_request();
    driver.admit(&web2, None).await.unwrap();
    until(&driver, "web2 serves", |servers| servers[&web2].serves()).await;
    driver.drain(&web1).await.unwrap();
    let servers = driver.read().await.unwrap();
    assert_eq!((servers[&web1].admission, servers[&web1].sessions), (Admission::Drain, 1));
    for _ in 0..10 {
        assert_eq!(bed.client().get("/"), "second");
    }
    bed.first.go.send(()).unwrap();
    assert_eq!(slow.join().unwrap(), "first");
    until(&driver, "the slow request is over", |servers| servers[&web1].sessions == 0).await;
    driver.admit(&web1, None).await.unwrap();
    until(&driver, "web1 serves", |servers| servers[&web1].serves()).await;
}

/// The scenario of every balancer: 70 to 30, an alert, nothing after it, and back by a person only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_canary_is_lent_its_share_and_loses_it_by_an_alert() {
    let bed = Bed::start().await;
    let driver = bed.driver(&["web1", "web2"]);
    let canary = BTreeSet::from([host("web2")]);
    let share = |percent: u8| Share {
        release: "v2",
        hosts: &canary,
        share: percent.try_into().unwrap(),
        lease: Duration::from_secs(600),
    };
    // Before its first request, and again after it.
    driver.drain(&host("web2")).await.unwrap();
    driver.lend(&share(30)).await.unwrap();
    driver.admit(&host("web2"), Some("v2")).await.unwrap();
    driver.lend(&share(30)).await.unwrap();
    let servers = driver.read().await.unwrap();
    let (one, two) = (servers[&host("web1")].weight, servers[&host("web2")].weight);
    assert!((295..=300).contains(&(1000 * two / (one + two))), "{one} and {two}");
    driver.renew("v2", Duration::from_secs(600)).await.unwrap();
    let seen = support::ask(bed.client(), 1000);
    assert!((250..=350).contains(&seen["second"]), "{seen:?}");
    let counts = driver.counts().await.unwrap();
    let requests = |name: &str| -> u64 {
        counts.rows.iter().filter(|row| row.host == host(name)).map(|row| row.requests).sum()
    };
    assert_eq!((requests("web1"), requests("web2")), (seen["first"], seen["second"]));
    assert!(counts.rows.iter().all(|row| row.errors == 0 && !row.latency.is_empty()), "{counts:?}");

    driver.alert(&canary, "5 % errors", "verdict").await.unwrap();
    assert_eq!(support::ask(bed.client(), 1000).get("second"), None);
    let error = driver.lend(&share(30)).await.unwrap_err().to_string();
    assert!(error.contains("5 % errors") && error.contains("a person"), "{error}");
    assert!(driver.conclude().await.is_err());
    driver.enable("ada").await.unwrap();
    driver.lend(&share(99)).await.unwrap();
    assert!(support::ask(bed.client(), 200)["second"] > 180);
    driver.conclude().await.unwrap();
    let seen = support::ask(bed.client(), 1000);
    assert!((260..=410).contains(&seen["second"]), "100 to 50 again: {seen:?}");
}

#[tokio::test]
async fn maintenance_and_unknown_backends_are_told() {
    let bed = Bed::start().await;
    let driver = bed.driver(&["web1", "web2"]);
    let change = BackendChange {
        name: "web1".to_owned(),
        state: Some(BackendState::Maintenance),
        ..BackendChange::default()
    };
    bed.router.change(change).await.unwrap();
    assert_eq!(driver.read().await.unwrap()[&host("web1")].admission, Admission::Maintenance);
    let error = driver.admit(&host("web1"), None).await.unwrap_err();
    assert!(matches!(error.problem, DriverProblem::InMaintenance { .. }), "{error}");

    let error = bed.driver(&["web7"]).read().await.unwrap_err();
    assert!(
        error.to_string().starts_with(
            "router lb:/run/router.sock web: it has no server `web7` for host web7; it has second, web1"
        ),
        "{error}"
    );
    bed.router.shutdown(Duration::ZERO).await;
    let error = driver.read().await.unwrap_err();
    assert!(matches!(error.problem, DriverProblem::Unreachable(_)), "{error}");
}
