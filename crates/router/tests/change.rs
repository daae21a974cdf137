//! What happens when the fleet changes under load: drains, deaths, restarts, checks, generations, shutdown.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test as the tests do")]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use greenlight_router::{
    BackendChange, BackendState, ControlErrorKind, Health, Router, RouterClientError, RouterConfig,
    RouterError, RouterState, run_until,
};
use support::{Backend, Bed, Client, plain_spec, raw_backend, status_of, within};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Several keep-alive clients that send reads and writes for as long as the test wants.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    clients: Vec<tokio::task::JoinHandle<Vec<String>>>,
}

impl Load {
    fn start(bed: &Bed, clients: usize) -> Self {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let address = bed.address();
        let clients = (0..clients)
            .map(|_| {
                let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
                tokio::spawn(async move {
                    let mut client = Client::connect(address).await;
                    let mut failures = Vec::new();
                    while !stop.load(SeqCst) {
                        for (request, body) in
                            [("GET /", &b""[..]), ("POST /", b"hello"), ("GET /sized", b"")]
                        {
                            match client.ask(request, body).await {
                                Ok(answer) if answer.status == 200 => {
                                    answered.fetch_add(1, SeqCst);
                                }
                                Ok(answer) => {
                                    failures.push(format!("{request}: {} {}", answer.status, answer.text()));
                                }
                                Err(error) => {
                                    failures.push(format!("{request}: {error}"));
                                    client = Client::connect(address).await;
                                }
                            }
                        }
                    }
                    failures
                })
            })
            .collect();
        Self { stop, answered, clients }
    }

    /// Waits until `count` more requests were answered.
    async fn more(&self, count: u64) {
        let until = self.answered.load(SeqCst) + count;
        within("more answers", async {
            while self.answered.load(SeqCst) < until {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// Stops it and returns what was answered and what failed.
    async fn end(self) -> (u64, Vec<String>) {
        self.stop.store(true, SeqCst);
        let mut failures = Vec::new();
        for client in self.clients {
            failures.extend(within("the end of a client", client).await.unwrap());
        }
        (self.answered.load(SeqCst), failures)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drained_backends_are_stopped_and_started_without_a_lost_request() {
    let mut backends = [Backend::start("a").await, Backend::start("b").await, Backend::start("c").await];
    let bed = Bed::start(backends.iter().map(Backend::spec).collect()).await;
    let load = Load::start(&bed, 6);
    for _ in 0..4 {
        for backend in &mut backends {
            let snapshot = bed.set_state(backend.name, BackendState::Drain).await;
            assert_eq!(status_of(&snapshot, backend.name).spec.state, BackendState::Drain);
            let name = backend.name;
            let drained =
                bed.until("it is drained", |snapshot| status_of(snapshot, name).sessions == 0).await;
            let before = (backend.requests(), status_of(&drained, name).requests);
            load.more(50).await;
            let after = bed.client.get().await.unwrap();
            assert_eq!(
                (backend.requests(), status_of(&after, name).requests),
                before,
                "a drained backend got requests"
            );
            backend.stop().await;
            load.more(20).await;
            backend.start_again().await;
            bed.set_state(name, BackendState::Ready).await;
            bed.until("it is up", |snapshot| status_of(snapshot, name).health == Health::Up).await;
            let seen = backend.requests();
            within("it gets requests again", async {
                while backend.requests() < seen + 10 {
                    load.more(1).await;
                }
            })
            .await;
        }
    }
    let (answered, failures) = load.end().await;
    assert_eq!(failures, Vec::<String>::new(), "of {answered}");
    let snapshot = bed.until("all sessions ended", |snapshot| {
        snapshot.backends.iter().all(|backend| backend.sessions == 0)
    });
    let snapshot = snapshot.await;
    assert_eq!(snapshot.generation, 1 + 4 * 3 * 2);
    let counted: u64 = snapshot.backends.iter().map(|backend| backend.requests).sum();
    assert_eq!(counted, answered);
    assert_eq!(snapshot.backends.iter().map(|backend| backend.errors).sum::<u64>(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_dies_between_requests_costs_no_idempotent_request() {
    let mut a = Backend::start("a").await;
    let b = Backend::start("b").await;
    let bed = Bed::start_with(vec![a.spec(), b.spec()], |config| {
        // Only requests find out.
        config.health.interval = Duration::from_secs(3600);
    })
    .await;
    for _ in 0..10 {
        // Many connections at once fill the pools.
        let mut asking = Vec::new();
        for _ in 0..20 {
            let address = bed.address();
            asking.push(tokio::spawn(async move {
                Client::connect(address).await.ask("GET /sized", b"").await.unwrap().status
            }));
        }
        for asked in asking {
            assert_eq!(asked.await.unwrap(), 200);
        }
        bed.until("nothing is in flight", |s| s.backends.iter().all(|backend| backend.sessions == 0)).await;
        a.stop().await;
        let mut client = Client::connect(bed.address()).await;
        for method in ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"] {
            for _ in 0..10 {
                let answer = client.ask(&format!("{method} /"), b"").await.unwrap();
                assert_eq!(answer.status, 200, "{method}: {}", answer.text());
            }
        }
        let snapshot = bed.client.get().await.unwrap();
        let dead = status_of(&snapshot, "a");
        assert_eq!(dead.health, Health::Down);
        assert!(dead.retries > 0 && dead.connect_failures >= 3, "{dead:?}");
        assert!(dead.health_detail.as_ref().unwrap().contains("refused"), "{dead:?}");
        a.start_again().await;
        bed.set_state("a", BackendState::Drain).await;
        bed.set_state("a", BackendState::Ready).await;
        bed.until("it is up again", |snapshot| status_of(snapshot, "a").health == Health::Up).await;
    }
    assert!(a.requests() > 0);
}

/// A backend whose idle connections are closed at the very moment at which they are used again.
#[tokio::test]
async fn a_request_is_sent_again_only_when_it_was_not_processed() {
    let received = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&received);
    let (address, _task) = raw_backend(move |_, mut stream| {
        let count = Arc::clone(&count);
        async move {
            count.fetch_add(1, SeqCst);
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
            // The connection is kept, and closed as soon as a byte of another request comes.
            let mut byte = [0];
            drop(stream.read_exact(&mut byte).await);
        }
    })
    .await;
    let bed = Bed::start(vec![plain_spec("raw", address)]).await;
    let mut client = Client::connect(bed.address()).await;
    assert_eq!(client.ask("GET /", b"").await.unwrap().status, 200);
    // The same worker has the connection in its pool now.
    let again = client.ask("GET /", b"").await.unwrap();
    assert_eq!((again.status, again.text()), (200, "ok"));
    assert_eq!(received.load(SeqCst), 2);
    // What is not idempotent may have been processed, so it is not sent again.
    let post = client.ask("POST /", b"hello").await.unwrap();
    assert_eq!(post.status, 502, "{}", post.text());
    assert_eq!(received.load(SeqCst), 2);
    let snapshot = bed.client.get().await.unwrap();
    let backend = &snapshot.backends[0];
    assert_eq!((backend.requests, backend.retries, backend.errors), (3, 1, 1));
}

#[tokio::test]
async fn a_backend_that_fails_before_its_answer_costs_no_idempotent_request_but_one_attempt() {
    let received = Arc::new(AtomicU64::new(0));
    let mute = |name: &'static str| {
        let count = Arc::clone(&received);
        async move {
            let (address, task) = raw_backend(move |_, _| {
                count.fetch_add(1, SeqCst);
                std::future::ready(())
            })
            .await;
            (plain_spec(name, address), task)
        }
    };
    let good = Backend::start("good").await;
    let ((one, _first), (two, _second), (three, _third)) =
        (mute("one").await, mute("two").await, mute("three").await);
    let failed = |bed: &Bed| {
        let client = bed.client.clone();
        async move { client.get().await.unwrap().backends.iter().map(|it| it.errors).sum::<u64>() }
    };
    // Everything is drawn to the one that fails, and goes on to the good one.
    let (mut first, mut last) = (one.clone(), good.spec());
    (first.weight, last.weight) = (1_000_000, 1);
    let bed = Bed::start(vec![first, last]).await;
    let mut client = Client::connect(bed.address()).await;
    assert_eq!(client.ask("GET /", b"").await.unwrap().text(), "good 0");
    assert_eq!((received.load(SeqCst), failed(&bed).await), (1, 1));
    // What is not idempotent may have been done.
    assert_eq!(client.ask("POST /", b"x").await.unwrap().status, 502);
    assert_eq!(received.load(SeqCst), 2);
    // A request that kills what it meets does not meet all.
    let bed = Bed::start(vec![one.clone(), two, three]).await;
    assert_eq!(bed.ask("GET /").await.status, 502);
    assert_eq!(received.load(SeqCst), 4);
    // With nobody left to ask it is the failure that is told.
    let bed = Bed::start(vec![one]).await;
    assert_eq!(bed.ask("GET /").await.status, 502);
    assert_eq!(bed.client.get().await.unwrap().unrouted, 0);
}

#[tokio::test]
async fn checks_take_a_backend_down_and_up() {
    let (a, b) = (Backend::start("a").await, Backend::start("b").await);
    let bed = Bed::start(vec![a.spec(), b.spec()]).await;
    a.seen.sick.store(true, SeqCst);
    let snapshot = bed.until("it is down", |snapshot| status_of(snapshot, "a").health == Health::Down).await;
    assert_eq!(status_of(&snapshot, "a").health_detail.as_deref(), Some("GET /health answered 500"));
    let before = a.requests();
    for _ in 0..50 {
        assert_eq!(bed.ask("GET /").await.text(), "b 0");
    }
    assert_eq!(a.requests(), before);
    b.seen.sick.store(true, SeqCst);
    bed.until("both are down", |snapshot| status_of(snapshot, "b").health == Health::Down).await;
    assert_eq!(bed.ask("GET /").await.status, 503);
    a.seen.sick.store(false, SeqCst);
    bed.until("it is up", |snapshot| status_of(snapshot, "a").health == Health::Up).await;
    assert_eq!(bed.ask("GET /").await.text(), "a 0");

    // Draining goes on checking, maintenance does not.
    bed.set_state("a", BackendState::Drain).await;
    let checks = a.seen.health_checks.load(SeqCst);
    within("more checks", async {
        while a.seen.health_checks.load(SeqCst) < checks + 3 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let snapshot = bed.set_state("a", BackendState::Maintenance).await;
    assert_eq!(status_of(&snapshot, "a").health, Health::Checking);
    assert_eq!(bed.ask("GET /").await.status, 503);
}

#[tokio::test]
async fn generations_fence_changes() {
    let (a, b) = (Backend::start("a").await, Backend::start("b").await);
    let bed = Bed::start(vec![a.spec()]).await;
    let state = |generation, specs: &[&Backend]| {
        RouterState::new(generation, specs.iter().map(|backend| backend.spec()).collect())
    };
    let refused = |result: Result<_, RouterClientError>| match result {
        Err(RouterClientError::Refused(error)) => error.kind,
        other => panic!("{other:?}"),
    };
    assert_eq!(bed.client.set(state(7, &[&a, &b])).await.unwrap().generation, 7);
    assert_eq!(
        bed.client.set(state(7, &[&a, &b])).await.unwrap().generation,
        7,
        "the same again is no conflict"
    );
    assert_eq!(refused(bed.client.set(state(7, &[&a])).await), ControlErrorKind::Conflict);
    assert_eq!(refused(bed.client.set(state(6, &[&a, &b])).await), ControlErrorKind::Stale);
    assert_eq!(refused(bed.client.set(state(8, &[&a, &a])).await), ControlErrorKind::Invalid);
    let unknown = BackendChange { name: "c".to_owned(), ..BackendChange::default() };
    assert_eq!(refused(bed.client.change(unknown).await), ControlErrorKind::UnknownBackend);
    let late = BackendChange { name: "a".to_owned(), generation: Some(6), ..BackendChange::default() };
    assert_eq!(refused(bed.client.change(late).await), ControlErrorKind::Stale);
    let snapshot = bed.router.snapshot().await.unwrap();
    assert_eq!((snapshot.generation, snapshot.backends.len()), (7, 2));

    let change = BackendChange {
        name: "b".to_owned(),
        weight: Some(0),
        release: Some("v2".to_owned()),
        generation: Some(7),
        ..BackendChange::default()
    };
    let snapshot = bed.router.change(change).await.unwrap();
    assert_eq!(snapshot.generation, 8);
    let b_now = &status_of(&snapshot, "b").spec;
    assert_eq!((b_now.weight, b_now.release.as_deref()), (0, Some("v2")));
    for _ in 0..20 {
        assert_eq!(bed.ask("GET /").await.text(), "a 0");
    }
    assert_eq!(b.requests(), 0);
}

#[tokio::test]
async fn the_control_socket_is_strict_and_private() {
    let bed = Bed::start(Vec::new()).await;
    let path = bed.directory.path().join("control");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut stream = UnixStream::connect(&path).await.unwrap();
    stream
        .write_all(b"{\"get\":{}}\nnonsense\n{\"set\":{\"generation\":2,\"backends\":[{\"nme\":1}]}}\n")
        .await
        .unwrap();
    let mut lines = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(&mut stream));
    let mut line = async || within("a line", lines.next_line()).await.unwrap().unwrap();
    assert!(line().await.starts_with("{\"ok\":{\"generation\":1,"));
    assert!(line().await.starts_with("{\"error\":{\"kind\":\"malformed\",\"message\":\"not a command: "));
    let misspelt = line().await;
    assert!(misspelt.contains("malformed") && misspelt.contains("nme"), "{misspelt}");

    // A line without an end is cut off at the limit.
    let mut stream = UnixStream::connect(&path).await.unwrap();
    let piece = vec![b'x'; 1024 * 1024];
    // The router may close before it has read all of it.
    while stream.write_all(&piece).await.is_ok() {}
    let mut answer = Vec::new();
    drop(within("the end", stream.read_to_end(&mut answer)).await);
    assert_eq!(bed.client.get().await.unwrap().generation, 1);

    let mut config = RouterConfig::new("127.0.0.1:0".parse().unwrap(), path.clone());
    let empty = || RouterState::new(1, Vec::new());
    let error = Router::start(config.clone(), empty()).unwrap_err();
    assert!(
        matches!(error, RouterError::Control { .. }) && error.to_string().contains("already answers"),
        "{error}"
    );
    config.control = bed.directory.path().join("other");
    config.listen = bed.address();
    let error = Router::start(config.clone(), empty()).unwrap_err();
    assert!(matches!(error, RouterError::Listen { .. }), "two routers on one port: {error}");

    // A file that a dead router left is no obstacle.
    config.listen = "127.0.0.1:0".parse().unwrap();
    drop(std::os::unix::net::UnixListener::bind(&config.control).unwrap());
    let router = Router::start(config.clone(), empty()).unwrap();
    router.shutdown(Duration::from_secs(5)).await;
    assert!(!config.control.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_lets_requests_finish_and_then_cuts() {
    let (address, _task) = raw_backend(|head, mut stream| async move {
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello").await.unwrap();
        if head.starts_with("GET /never") {
            let mut end = Vec::new();
            drop(stream.read_to_end(&mut end).await);
        } else {
            // Ends when the client has what came first and the router is being shut down.
            GO.notified().await;
            stream.write_all(b"world").await.unwrap();
        }
    })
    .await;
    static GO: tokio::sync::Notify = tokio::sync::Notify::const_new();
    for (target, within_time, cut) in
        [("/slow", Duration::from_secs(60), 0), ("/never", Duration::from_millis(50), 1)]
    {
        let bed = Bed::start(vec![plain_spec("raw", address)]).await;
        let idle = Client::connect(bed.address()).await;
        let mut client = Client::connect(bed.address()).await;
        client.send(format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).await;
        assert_eq!(client.head().await.unwrap().status, 200);
        let mut first = [0; 5];
        client.stream.read_exact(&mut first).await.unwrap();
        bed.until("both are connected", |snapshot| snapshot.connections == 2).await;
        let (address, log) = (bed.address(), bed.log_path());
        let stopping = tokio::spawn(bed.router.shutdown(within_time));
        // The idle connection is closed at once: then the shutdown has begun everywhere.
        let mut idle = idle;
        assert_eq!(idle.rest().await, b"");
        GO.notify_one();
        let rest = client.rest().await;
        assert_eq!(rest, if cut == 0 { &b"world"[..] } else { b"" });
        let report = within("the shutdown", stopping).await.unwrap();
        assert_eq!(report.connections_cut, cut);
        assert!(std::net::TcpStream::connect(address).is_err());
        let log = std::fs::read_to_string(log).unwrap();
        assert_eq!(log.lines().count(), 1, "{log}");
    }
}

#[tokio::test]
async fn the_access_log_says_which_release_answered() {
    let a = Backend::start("a").await;
    let bed = Bed::start(vec![a.spec()]).await;
    let mut client = Client::connect(bed.address()).await;
    client.ask("GET /sized?token=secret\nX-Request-Id: id-1\nCookie: secret", b"").await.unwrap();
    let change =
        BackendChange { name: "a".to_owned(), release: Some("v\"2".to_owned()), ..BackendChange::default() };
    bed.client.change(change).await.unwrap();
    client.ask("POST /echo", b"hello").await.unwrap();
    client.send(b"GET / HTTP/1.1\r\n\r\n").await;
    assert_eq!(client.answer(false).await.unwrap().status, 400);
    let path = bed.log_path();
    bed.router.shutdown(Duration::from_secs(5)).await;
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(!text.contains("secret"), "{text}");
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let expected = [
        ("GET", "/sized", 200, 12_345, Some("a"), Some("release-of-a")),
        ("POST", "/echo", 200, 5, Some("a"), Some("v\"2")),
        ("GET", "/", 400, "400 Bad Request: no Host in an HTTP/1.1 request\n".len(), None, None),
    ];
    assert_eq!(lines.len(), expected.len(), "{text}");
    for (line, (method, path, status, bytes, backend, release)) in lines.iter().zip(expected) {
        assert_eq!(line["method"], method);
        assert_eq!(line["path"], path);
        assert_eq!(line["status"], status);
        assert_eq!(line["bytes"], bytes, "{line}");
        assert_eq!(line["retried"], 0);
        assert_eq!(line.get("backend").and_then(|value| value.as_str()), backend);
        assert_eq!(line.get("release").and_then(|value| value.as_str()), release);
        assert!(
            line["duration_us"].as_u64().is_some() && line["time"].as_str().unwrap().ends_with('Z'),
            "{line}"
        );
    }
    assert_eq!(lines[0]["request_id"], "id-1");
    assert_eq!(lines[1]["request_id"].as_str().unwrap().len(), 32);
}

#[test]
fn run_until_serves_until_told_to_end() {
    let directory = tempfile::tempdir().unwrap();
    let config = RouterConfig::new("127.0.0.1:0".parse().unwrap(), directory.path().join("control"));
    let (send, address) = std::sync::mpsc::channel();
    let report =
        run_until(config, RouterState::new(1, Vec::new()), |address| send.send(address).unwrap(), async {
            let mut client = Client::connect(address.recv().unwrap()).await;
            assert_eq!(client.ask("GET /", b"").await.unwrap().status, 503);
        });
    assert_eq!(report.unwrap().connections_cut, 0);
}
