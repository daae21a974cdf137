//! A router that is replaced by another one: nothing is lost, nothing is forgotten, and what goes wrong leaves the old one.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test as the tests do")]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use greenlight_router::{
    AlertRaised, BackendState, CanaryChange, CanarySpec, Router, RouterConfig, RouterError, RouterHandle,
    RouterState,
};
use support::{Backend, Bed, Client, status_of, within};

/// Starts a router that takes over from that of `bed`. Its own state is another one, and not to be used.
async fn successor(
    bed: &Bed,
    change: impl FnOnce(&mut RouterConfig) + Send + 'static,
) -> Result<RouterHandle, RouterError> {
    let mut config = RouterConfig::new(bed.address(), bed.directory.path().join("control"));
    config.take_over = true;
    config.access_log = Some(bed.log_path());
    config.health.interval = Duration::from_millis(20);
    change(&mut config);
    let start = tokio::task::spawn_blocking(|| Router::start(config, RouterState::new(0, Vec::new())));
    within("the start of a successor", start).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_is_replaced_again_and_again_under_load_and_no_request_is_lost() {
    let (a, b) = (Backend::start("a").await, Backend::start("b").await);
    let mut bed = Bed::start(vec![a.spec(), b.spec()]).await;
    let (is_over, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..12 {
        let (is_over, answered, address) = (Arc::clone(&is_over), Arc::clone(&answered), bed.address());
        clients.spawn(async move {
            let mut client = Client::connect(address).await;
            while !is_over.load(SeqCst) {
                // A connection that is to end is said to: there is nothing that a client would have to try again.
                let answer = client.ask("POST /", b"body").await.unwrap();
                assert_eq!(answer.status, 200, "{}", answer.text());
                answered.fetch_add(1, SeqCst);
                let is_ended = answer.header("connection") == Some("close");
                if is_ended || number % 3 == 0 {
                    client = Client::connect(address).await;
                }
            }
        });
    }
    let progress = async |more: u64| {
        let goal = answered.load(SeqCst) + more;
        within("more answers", async {
            while answered.load(SeqCst) < goal {
                tokio::task::yield_now().await;
            }
        })
        .await;
    };
    for _ in 0..5 {
        progress(200).await;
        let next = successor(&bed, |_| {}).await.unwrap();
        let mut old = std::mem::replace(&mut bed.router, next);
        let report = within("the end of the old one", old.handed_over()).await;
        assert!(report.is_handed_over);
        assert_eq!(report.connections_cut, 0);
    }
    progress(200).await;
    is_over.store(true, SeqCst);
    while let Some(client) = within("the clients' end", clients.join_next()).await {
        client.unwrap();
    }
    assert_eq!(a.requests() + b.requests(), answered.load(SeqCst));
    let snapshot = bed.client.get().await.unwrap();
    assert_eq!((snapshot.generation, snapshot.unrouted, snapshot.log_lines_dropped), (1, 0, 0));
    bed.router.shutdown(Duration::from_secs(60)).await;
    let log = std::fs::read_to_string(bed.directory.path().join("access.log")).unwrap();
    assert_eq!(log.lines().count() as u64, answered.load(SeqCst), "each router logged what it answered");
    assert!(!bed.directory.path().join("control").exists(), "the last one removes the control socket");
}

#[tokio::test]
async fn what_the_old_one_was_told_the_new_one_knows() {
    let (a, b) = (Backend::start("a").await, Backend::start("b").await);
    let mut bed = Bed::start_with(vec![a.spec(), b.spec()], |config| {
        config.metrics = Some("127.0.0.1:0".parse().unwrap());
    })
    .await;
    let metrics = bed.router.metrics_addr().unwrap();
    let spec = CanarySpec { release: "release-of-b".to_owned(), share_per_mille: 100, lease_ms: 3_600_000 };
    bed.client.canary(CanaryChange { spec: spec.clone(), generation: None }).await.unwrap();
    let before = bed.set_state("a", BackendState::Drain).await;
    let keep = bed.directory.path().join("kept");
    let kept = keep.clone();
    let next = successor(&bed, move |config| {
        config.metrics = Some(metrics);
        config.keep = Some(kept);
    })
    .await
    .unwrap();
    assert_eq!(next.metrics_addr(), Some(metrics));
    let mut old = std::mem::replace(&mut bed.router, next);
    within("the end of the old one", old.handed_over()).await;
    let after = bed.client.get().await.unwrap();
    assert_eq!(after.generation, before.generation);
    assert_eq!(status_of(&after, "a").spec.state, BackendState::Drain);
    let canary = after.canary.unwrap();
    assert_eq!((canary.spec, canary.share_in_force_per_mille), (spec, 100));
    assert!((1..=3_600_000).contains(&canary.lease_left_ms));
    assert!(std::fs::read_to_string(&keep).unwrap().contains("release-of-b"));

    // An alert goes with it, and the share does not come back.
    bed.client.alert(AlertRaised { reason: "errors".to_owned(), by: "test".to_owned() }).await.unwrap();
    let next = successor(&bed, move |config| config.metrics = Some(metrics)).await.unwrap();
    let old = std::mem::replace(&mut bed.router, next);
    // Whoever stops a router that was replaced waits for the same end.
    assert!(within("the end of the old one", old.shutdown(Duration::from_secs(60))).await.is_handed_over);
    let last = bed.client.get().await.unwrap();
    assert_eq!(last.alert.unwrap().reason, "errors");
    assert_eq!(last.canary.map_or(0, |canary| canary.share_in_force_per_mille), 0);
}

#[tokio::test]
async fn a_router_that_was_changed_meanwhile_is_not_replaced() {
    let a = Backend::start("a").await;
    let bed = Bed::start(vec![a.spec()]).await;
    // A blocking one: where sockets come with the first byte, a read ends behind it, and tokio takes a short read for the last.
    let stream = UnixStream::connect(bed.directory.path().join("control")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut stream = BufReader::new(stream);
    let mut ask = |line: String| {
        stream.get_mut().write_all(line.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_line(&mut answer).unwrap();
        serde_json::from_str::<serde_json::Value>(&answer).unwrap()
    };
    let handover = ask("{\"handover\":{}}\n".to_owned());
    let token = handover["handover"]["token"].as_u64().unwrap();
    bed.set_state("a", BackendState::Drain).await;
    for token in [token, token.wrapping_add(1), 0] {
        let refused = ask(format!("{{\"takeover\":{{\"token\":{token}}}}}\n"));
        assert_eq!(refused["error"]["kind"], "unavailable", "{refused}");
    }
    assert_eq!(bed.ask("GET /").await.status, 503);
    bed.set_state("a", BackendState::Ready).await;
    bed.until("a is up", |now| now.backends[0].health == greenlight_router::Health::Up).await;
    assert_eq!(bed.ask("GET /").await.status, 200);
}

#[tokio::test]
async fn a_successor_that_cannot_begin_leaves_the_old_one_as_it_was() {
    let a = Backend::start("a").await;
    let bed = Bed::start(vec![a.spec()]).await;
    let elsewhere = successor(&bed, |config| config.listen.set_ip("127.0.0.2".parse().unwrap())).await;
    let error = elsewhere.unwrap_err();
    assert!(
        matches!(error, RouterError::TakeOver { .. }) && error.to_string().contains("it listens on"),
        "{error}"
    );
    let no_log = bed.directory.path().join("missing/access.log");
    let unlogged = successor(&bed, move |config| config.access_log = Some(no_log)).await;
    assert!(matches!(unlogged.unwrap_err(), RouterError::AccessLog { .. }));
    for _ in 0..20 {
        assert_eq!(bed.ask("GET /").await.status, 200);
    }
    let snapshot = bed.client.get().await.unwrap();
    assert_eq!((snapshot.generation, status_of(&snapshot, "a").requests), (1, 20));
    let left: Vec<_> =
        std::fs::read_dir(bed.directory.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name == "control" || name == "access.log"), "{left:?}");
}

#[tokio::test]
async fn without_a_router_before_it_one_starts_as_ever() {
    let a = Backend::start("a").await;
    let bed = Bed::start_with(vec![a.spec()], |config| config.take_over = true).await;
    assert_eq!(bed.ask("GET /").await.status, 200);
}
