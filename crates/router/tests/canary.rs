//! A release on trial: its share, its lease, the alert that holds it, testers and sticky users, and what is counted.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test as the tests do")]

mod support;

use std::sync::atomic::Ordering::SeqCst;

use greenlight_router::{
    AlertRaised, BackendChange, BackendSpec, CanaryChange, CanarySpec, Conclusion, ControlErrorKind,
    CountRow, CountsBy, CountsRequest, Enabling, Renewal, RequestKey, Router, RouterClientError,
    RouterConfig, RouterCounts, RouterSnapshot, RouterState, TesterSpec,
};
use support::{Backend, Bed, Client, plain_spec, raw_backend, within};
use tokio::io::AsyncWriteExt;

/// Longer than a test takes.
const LONG_MS: u64 = 600_000;

fn spec(backend: &Backend, release: &str) -> BackendSpec {
    BackendSpec { release: Some(release.to_owned()), ..backend.spec() }
}

fn canary(share_per_mille: u32, lease_ms: u64) -> CanaryChange {
    CanaryChange {
        spec: CanarySpec { release: "v2".to_owned(), share_per_mille, lease_ms },
        generation: None,
    }
}

fn kind<T: std::fmt::Debug>(result: Result<T, RouterClientError>) -> ControlErrorKind {
    match result {
        Err(RouterClientError::Refused(error)) => error.kind,
        other => panic!("{other:?}"),
    }
}

fn share(snapshot: &RouterSnapshot) -> u32 {
    snapshot.canary.as_ref().unwrap().share_in_force_per_mille
}

/// A stable and a canary backend of equal weight, and clients on both workers.
struct Trial {
    stable: Backend,
    canary: Backend,
    bed: Bed,
    clients: Vec<Client>,
}

impl Trial {
    async fn start(change: impl FnOnce(&mut RouterState)) -> Self {
        let (stable, canary) = (Backend::start("stable").await, Backend::start("canary").await);
        let backends = vec![spec(&stable, "v1"), spec(&canary, "v2")];
        let bed = Bed::start(backends.clone()).await;
        let mut state = RouterState::new(2, backends);
        change(&mut state);
        bed.client.set(state).await.unwrap();
        let mut clients = Vec::new();
        for _ in 0..4 {
            clients.push(Client::connect(bed.address()).await);
        }
        Self { stable, canary, bed, clients }
    }

    /// Sends requests and tells how many came to the canary.
    async fn ask(&mut self, count: usize, request: impl Fn(usize) -> String) -> u64 {
        let before = (self.stable.requests(), self.canary.requests());
        for number in 0..count {
            let client = &mut self.clients[number % 4];
            assert_eq!(client.ask(&request(number), b"").await.unwrap().status, 200);
        }
        let canary = self.canary.requests() - before.1;
        assert_eq!(self.stable.requests() - before.0 + canary, count as u64);
        canary
    }

    async fn plain(&mut self, count: usize) -> u64 {
        self.ask(count, |_| "GET /".to_owned()).await
    }
}

#[tokio::test]
async fn after_an_alert_the_canary_gets_nothing_until_a_person_enables_it() {
    let mut trial = Trial::start(|_| {}).await;
    let router = trial.bed.client.clone();
    assert_eq!(share(&router.canary(canary(300, LONG_MS)).await.unwrap()), 300);
    let of_canary = trial.plain(1000).await;
    assert!((250..=350).contains(&of_canary), "{of_canary} of 1000 instead of about 300");

    let alert = AlertRaised { reason: "5 % errors".to_owned(), by: "verdict".to_owned() };
    let held = router.alert(alert).await.unwrap();
    assert_eq!(trial.plain(1000).await, 0);
    let said = held.alert.as_ref().unwrap();
    assert_eq!((said.reason.as_str(), said.by.as_str()), ("5 % errors", "verdict"));
    assert_eq!((share(&held), said.release.as_deref()), (0, Some("v2")));

    // Nothing brings it back but a person: not the lease, not another share, not a whole state, not the trial's end.
    assert_eq!(
        share(&router.renew(Renewal { release: "v2".to_owned(), lease_ms: LONG_MS }).await.unwrap()),
        0
    );
    assert_eq!(kind(router.canary(canary(1, LONG_MS)).await), ControlErrorKind::Held);
    assert_eq!(kind(router.conclude(Conclusion { release: "v2".to_owned() }).await), ControlErrorKind::Held);
    let state = RouterState::new(100, vec![spec(&trial.stable, "v1"), spec(&trial.canary, "v2")]);
    assert_eq!(kind(router.set(state.clone()).await), ControlErrorKind::Held);
    let with_share = RouterState { canary: Some(canary(10, LONG_MS).spec), ..state };
    assert_eq!(kind(router.set(with_share).await), ControlErrorKind::Held);
    let again = AlertRaised { reason: "and slow".to_owned(), by: "verdict".to_owned() };
    assert_eq!(router.alert(again).await.unwrap().alert, held.alert, "the first alert is kept");
    assert_eq!(trial.plain(200).await, 0);

    let enabled = router.enable(Enabling { by: "ada".to_owned() }).await.unwrap();
    assert_eq!((enabled.alert.as_ref(), share(&enabled)), (None, 0));
    assert_eq!(trial.plain(200).await, 0, "enabled is not yet set");
    router.canary(canary(1000, LONG_MS)).await.unwrap();
    assert_eq!(trial.plain(200).await, 200);
}

#[tokio::test]
async fn a_lease_that_nobody_renews_returns_the_traffic_to_stable() {
    let mut trial = Trial::start(|_| {}).await;
    let router = trial.bed.client.clone();
    router.canary(canary(1000, 1000)).await.unwrap();
    assert_eq!(trial.plain(20).await, 20);
    let renewed = router.renew(Renewal { release: "v2".to_owned(), lease_ms: LONG_MS }).await.unwrap();
    assert!(renewed.canary.unwrap().lease_left_ms > LONG_MS - 60_000);
    router.renew(Renewal { release: "v2".to_owned(), lease_ms: 500 }).await.unwrap();
    let ended = trial.bed.until("the lease ended", |snapshot| share(snapshot) == 0).await;
    assert_eq!(ended.canary.unwrap().lease_left_ms, 0);
    // Every core follows within its tick: from some moment on not one request is the canary's.
    within("the canary gets nothing", async { while trial.plain(40).await > 0 {} }).await;
    assert_eq!(trial.plain(200).await, 0);
    // It does not come back by a late renewal, but by being set.
    let late = Renewal { release: "v2".to_owned(), lease_ms: LONG_MS };
    assert_eq!(kind(router.renew(late).await), ControlErrorKind::NotOnTrial);
    let other = Renewal { release: "v3".to_owned(), lease_ms: LONG_MS };
    assert_eq!(kind(router.renew(other).await), ControlErrorKind::NotOnTrial);
    router.canary(canary(1000, LONG_MS)).await.unwrap();
    assert_eq!(trial.plain(20).await, 20);
}

#[tokio::test]
async fn the_share_moves_with_the_release_and_ends_with_the_trial() {
    let mut trial = Trial::start(|_| {}).await;
    let router = trial.bed.client.clone();
    router.canary(canary(0, LONG_MS)).await.unwrap();
    assert_eq!(trial.plain(100).await, 0, "a share of 0");
    // A backend becomes the canary's by what it runs.
    let now_v2 = BackendChange {
        name: "stable".to_owned(),
        release: Some("v2".to_owned()),
        ..BackendChange::default()
    };
    router.change(now_v2).await.unwrap();
    assert_eq!(trial.clients[0].ask("GET /", b"").await.unwrap().status, 503, "nobody is stable any more");
    router.conclude(Conclusion { release: "v2".to_owned() }).await.unwrap();
    let of_canary = trial.plain(1000).await;
    assert!((400..=600).contains(&of_canary), "by weight again: {of_canary}");
    let conclude = Conclusion { release: "v2".to_owned() };
    assert_eq!(kind(router.conclude(conclude).await), ControlErrorKind::NotOnTrial);
}

#[tokio::test]
async fn testers_see_a_release_without_traffic() {
    let mark = RequestKey::Cookie("preview".to_owned());
    let mut trial = Trial::start(|state| {
        state.canary = Some(canary(0, LONG_MS).spec);
        state.tester = Some(TesterSpec { by: mark, value: "v2".to_owned() });
    })
    .await;
    let marked = |_| "GET /\nCookie: a=1; preview=v2".to_owned();
    assert_eq!(trial.ask(100, marked).await, 100);
    assert_eq!(trial.plain(100).await, 0);
    let counts = trial.bed.client.counts(CountsRequest::default()).await.unwrap();
    assert_eq!(requests(&counts), [("stable", "v1", false, 100)], "testers are no sample");
    trial.bed.client.alert(AlertRaised { reason: "x".to_owned(), by: "y".to_owned() }).await.unwrap();
    assert_eq!(trial.ask(100, marked).await, 0, "all requests go to stable");
}

#[tokio::test]
async fn users_with_a_key_stay_where_they_are() {
    let mut trial = Trial::start(|state| {
        state.canary = Some(canary(300, LONG_MS).spec);
        state.sticky = Some(RequestKey::Header("X-User".to_owned()));
    })
    .await;
    let mut of_canary = 0;
    for user in 0..300 {
        let seen = trial.ask(8, |_| format!("GET /\nX-User: {user}")).await;
        assert!(seen == 0 || seen == 8, "user {user} was moved: {seen}");
        of_canary += seen / 8;
    }
    assert!((60..=120).contains(&of_canary), "{of_canary} of 300 users instead of about 90");
}

/// Backend, release, canary, requests.
fn requests(counts: &RouterCounts) -> Vec<(&str, &str, bool, u64)> {
    let row = |row: &'_ CountRow| row.requests;
    let rows = counts.rows.iter();
    rows.map(|it| (it.backend.as_str(), it.release.as_deref().unwrap_or(""), it.is_canary, row(it))).collect()
}

#[tokio::test]
async fn counts_tell_canary_from_stable_by_route() {
    let (bad, _task) = raw_backend(|head, mut stream| async move {
        let answer: &[u8] = if head.contains(" /broken ") {
            b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\nConnection: close\r\n\r\nhalf"
        } else if head.contains(" /nothing ") {
            b""
        } else if head.contains(" /hang ") {
            return std::future::pending().await;
        } else {
            b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"
        };
        drop(stream.write_all(answer).await);
    })
    .await;
    let good = Backend::start("good").await;
    let bed = Bed::start(vec![spec(&good, "v1")]).await;
    let bad = BackendSpec { release: Some("v2".to_owned()), ..plain_spec("bad", bad) };
    let mut state = RouterState::new(2, vec![spec(&good, "v1"), bad]);
    state.routes = vec!["/items/{id}".to_owned()];
    state.canary = Some(canary(1000, LONG_MS).spec);
    bed.client.set(state).await.unwrap();
    bed.until("the canary is up", |snapshot| {
        snapshot.backends.iter().all(|backend| backend.health == greenlight_router::Health::Up)
    })
    .await;

    for (path, times) in [("/items/1", 2), ("/items/2", 1), ("/broken", 1), ("/nothing", 1)] {
        for _ in 0..times {
            let mut client = Client::connect(bed.address()).await;
            drop(client.ask(&format!("GET {path}"), b"").await);
        }
    }
    let mut hanging = Client::connect(bed.address()).await;
    hanging.send(b"GET /hang HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let ask = CountsRequest::default();
    let counts = within("the request hangs for more than 1 ms", async {
        loop {
            let counts = bed.client.counts(ask).await.unwrap();
            if counts.rows.iter().any(|row| row.is_canary && row.in_flight == 1 && row.slow(1000) == 1) {
                return counts;
            }
        }
    })
    .await;
    let row = |route: &str| counts.rows.iter().find(|row| row.route == route && row.is_canary).unwrap();
    let items = row("/items/{id}");
    assert_eq!((items.requests, items.answers, items.bad()), (3, [0, 0, 0, 0, 3], 3));
    assert_eq!((items.bytes, items.in_flight, items.latency.iter().map(|it| it.1).sum::<u64>()), (6, 0, 3));
    let other = row("other");
    assert_eq!((other.requests, other.answers, other.failed, other.broken), (2, [0, 1, 0, 0, 0], 1, 1));
    assert_eq!((other.in_flight, other.in_flight_ages.iter().map(|it| it.1).sum::<u64>()), (1, 1));
    assert_eq!(other.slow(LONG_MS * 1000), 0);
    drop(hanging);
    within("the request was given up", async {
        loop {
            let counts = bed.client.counts(ask).await.unwrap();
            let other = counts.rows.iter().find(|row| row.route == "other" && row.is_canary).unwrap();
            if (other.in_flight, other.cancelled, other.requests) == (0, 1, 2) {
                break;
            }
        }
    })
    .await;
    // By release there is one row for each; reading takes nothing away.
    let by_release = CountsRequest { by: CountsBy::Release };
    let again = bed.client.counts(by_release).await.unwrap();
    assert_eq!(again.instance, counts.instance);
    // What the canary failed to answer at all, stable answered.
    let expected = [("", "v1", false, 1), ("", "v2", true, 3), ("", "v2", true, 2)];
    assert_eq!(requests(&again), expected);
    // Another release begins a row of its own.
    let now_v3 =
        BackendChange { name: "good".to_owned(), release: Some("v3".to_owned()), ..Default::default() };
    bed.client.change(now_v3).await.unwrap();
    bed.client.canary(canary(0, LONG_MS)).await.unwrap();
    assert_eq!(bed.ask("GET /items/5").await.status, 200);
    let last = bed.client.counts(CountsRequest::default()).await.unwrap();
    let good = last.rows.iter().find(|row| row.backend == "good").unwrap();
    assert_eq!((good.release.as_deref(), good.since_generation, good.requests), (Some("v3"), 3, 1));
}

#[tokio::test]
async fn requests_that_cannot_be_delivered_are_counted_as_moved() {
    let mut trial = Trial::start(|state| state.canary = Some(canary(1000, LONG_MS).spec)).await;
    trial.canary.stop().await;
    assert_eq!(trial.clients[0].ask("GET /", b"").await.unwrap().text(), "stable 0");
    let counts = trial.bed.client.counts(CountsRequest::default()).await.unwrap();
    let canary = counts.rows.iter().find(|row| row.is_canary);
    // A check may have seen it before the request did, which then went to stable at once.
    if let Some(canary) = canary {
        assert_eq!((canary.requests, canary.moved), (0, 1));
    }
    assert_eq!(trial.stable.seen.requests.load(SeqCst), 1);
}

#[test]
fn the_state_and_the_alert_outlive_a_restart() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut config = RouterConfig::new("127.0.0.1:0".parse().unwrap(), directory.path().join("control"));
    config.keep = Some(directory.path().join("kept"));
    let first = || RouterState::new(1, Vec::new());
    let restart = || Router::start(config.clone(), first()).unwrap();
    let router = greenlight_router::RouterClient::new(&config.control);
    runtime.block_on(async {
        let handle = restart();
        assert_eq!(share(&router.canary(canary(500, LONG_MS)).await.unwrap()), 500);
        handle.shutdown(std::time::Duration::from_secs(5)).await;

        let handle = restart();
        let snapshot = router.get().await.unwrap();
        assert_eq!((snapshot.generation, share(&snapshot)), (2, 0), "the state is kept, the lease is not");
        router.alert(AlertRaised { reason: "errors".to_owned(), by: "verdict".to_owned() }).await.unwrap();
        handle.shutdown(std::time::Duration::from_secs(5)).await;

        let handle = restart();
        assert_eq!(router.get().await.unwrap().alert.unwrap().reason, "errors");
        assert_eq!(kind(router.canary(canary(1, LONG_MS)).await), ControlErrorKind::Held);
        router.enable(Enabling { by: "ada".to_owned() }).await.unwrap();
        handle.shutdown(std::time::Duration::from_secs(5)).await;

        let handle = restart();
        assert_eq!(router.get().await.unwrap().alert, None);
        handle.shutdown(std::time::Duration::from_secs(5)).await;
    });
    std::fs::write(directory.path().join("kept"), "no state").unwrap();
    let error = Router::start(config, first()).unwrap_err().to_string();
    assert!(error.contains("kept") && error.contains("move it away"), "{error}");
}
