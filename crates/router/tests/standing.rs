//! What holds requests back on purpose, what leaves a backend out for its answers, and what Prometheus reads.

mod support;

use std::net::SocketAddr;

use greenlight_router::{MaintenancePage, PassiveHealth, Pause, RouterState};
use support::{Backend, Bed, Client, plain_spec, raw_backend, status_of, within};
use tokio::io::AsyncWriteExt;

fn paused(backend: &Backend, generation: u64, max_requests: usize, max_wait_ms: u64) -> RouterState {
    let mut state = RouterState::new(generation, vec![backend.spec()]);
    state.pause = Some(Pause { max_wait_ms, max_requests });
    state
}

#[tokio::test]
async fn a_maintenance_page_answers_everything_until_it_is_taken_away() {
    let backend = Backend::start("a").await;
    let bed = Bed::start(vec![backend.spec()]).await;
    let mut state = RouterState::new(2, vec![backend.spec()]);
    state.maintenance = Some(MaintenancePage {
        body: "<h1>Back soon</h1>".to_owned(),
        content_type: "text/html; charset=utf-8".to_owned(),
        retry_after_seconds: Some(120),
    });
    bed.client.set(state).await.unwrap();
    let mut client = Client::connect(bed.address()).await;
    for body in [&b""[..], b"hello"] {
        let answer = client.ask("POST /", body).await.unwrap();
        assert_eq!((answer.status, answer.text()), (503, "<h1>Back soon</h1>"));
        assert_eq!(answer.header("retry-after"), Some("120"));
        assert_eq!(answer.header("content-type"), Some("text/html; charset=utf-8"));
    }
    assert_eq!(backend.requests(), 0);
    bed.client.set(RouterState::new(3, vec![backend.spec()])).await.unwrap();
    assert_eq!(client.ask("POST /", b"hello").await.unwrap().text(), "a 5");
}

#[tokio::test]
async fn requests_wait_in_a_pause_and_lose_nothing() {
    let backend = Backend::start("a").await;
    let bed = Bed::start(vec![backend.spec()]).await;
    bed.client.set(paused(&backend, 2, 100, 30_000)).await.unwrap();
    let mut waiting = Vec::new();
    for _ in 0..20 {
        let mut client = Client::connect(bed.address()).await;
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello").await;
        waiting.push(client);
    }
    bed.until("all are connected", |snapshot| snapshot.connections == 20).await;
    assert_eq!(backend.requests(), 0);
    bed.client.set(RouterState::new(3, vec![backend.spec()])).await.unwrap();
    for mut client in waiting {
        assert_eq!(client.answer(false).await.unwrap().text(), "a 5");
    }
    assert_eq!(backend.requests(), 20);
}

#[tokio::test]
async fn a_pause_is_bounded_in_time_and_number() {
    let backend = Backend::start("a").await;
    let bed = Bed::start_with(vec![backend.spec()], |config| config.workers = 1).await;
    bed.client.set(paused(&backend, 2, 1, 30_000)).await.unwrap();
    let mut first = Client::connect(bed.address()).await;
    first.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    // One of the two is one too many; which of them came first, only the router knows.
    let mut second = Client::connect(bed.address()).await;
    second.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let refused = tokio::select! {
        answer = first.head() => answer,
        answer = second.head() => answer,
    };
    assert_eq!(refused.unwrap().status, 503);
    // A shorter pause is one of its own; the one that waits has the time it was given.
    bed.client.set(paused(&backend, 3, 10, 50)).await.unwrap();
    let answer = bed.ask("GET /").await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
    assert_eq!(backend.requests(), 0);
}

#[tokio::test]
async fn a_backend_that_answers_badly_is_left_out_although_its_checks_pass() {
    let (bad, _task) = raw_backend(|_, mut stream| async move {
        let answer = b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno";
        drop(stream.write_all(answer).await);
    })
    .await;
    let good = Backend::start("good").await;
    let bed = Bed::start(vec![good.spec(), plain_spec("bad", bad)]).await;
    let mut state = RouterState::new(2, vec![good.spec(), plain_spec("bad", bad)]);
    state.passive = Some(PassiveHealth { errors_in_a_row: 5, out_ms: 600_000 });
    bed.client.set(state).await.unwrap();
    let mut client = Client::connect(bed.address()).await;
    within("the bad one is left out", async {
        loop {
            client.ask("GET /", b"").await.unwrap();
            let snapshot = bed.client.get().await.unwrap();
            if status_of(&snapshot, "bad").is_left_out {
                break;
            }
        }
    })
    .await;
    for _ in 0..100 {
        assert_eq!(client.ask("GET /", b"").await.unwrap().status, 200);
    }
    assert_eq!(status_of(&bed.client.get().await.unwrap(), "bad").answers_5xx, 5);
}

#[tokio::test]
async fn prometheus_reads_what_was_counted() {
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let backend = Backend::start("a").await;
    let bed = Bed::start_with(vec![backend.spec()], |config| config.metrics = Some(any)).await;
    for _ in 0..3 {
        assert_eq!(bed.ask("GET /sized").await.status, 200);
    }
    let mut client = Client::connect(bed.router.metrics_addr().unwrap()).await;
    let page = client.ask("GET /metrics", b"").await.unwrap();
    assert_eq!(page.status, 200);
    let labels = r#"backend="a",release="release-of-a",route="other""#;
    for line in [
        format!(r#"greenlight_router_answers_total{{{labels},class="2xx"}} 3"#),
        format!("greenlight_router_answer_bytes_total{{{labels}}} {}", 3 * 12_345),
        format!(r#"greenlight_router_latency_seconds_bucket{{{labels},le="+Inf"}} 3"#),
        format!("greenlight_router_latency_seconds_count{{{labels}}} 3"),
        r#"greenlight_router_backend_up{backend="a",release="release-of-a"} 1"#.to_owned(),
        "greenlight_router_held 0".to_owned(),
        "greenlight_router_canary_share 0.000".to_owned(),
    ] {
        assert!(page.text().lines().any(|given| given == line), "{line} is not in\n{}", page.text());
    }
    // Every line is of the format: a comment, or a name, labels and a number.
    for line in page.text().lines().filter(|line| !line.starts_with("# ")) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(name.starts_with("greenlight_router_") && value.parse::<f64>().is_ok(), "{line}");
    }
    assert_eq!(client.ask("GET /", b"").await.unwrap().status, 404);
}

#[tokio::test]
async fn what_cannot_be_is_refused() {
    type Spoil = fn(&mut RouterState);
    let bed = Bed::start(Vec::new()).await;
    let page = |body: String, content_type: &str| {
        Some(MaintenancePage { body, content_type: content_type.to_owned(), retry_after_seconds: None })
    };
    let mut states = Vec::new();
    let spoils: [Spoil; 5] = [
        |state| state.pause = Some(Pause { max_wait_ms: 0, max_requests: 1 }),
        |state| state.pause = Some(Pause { max_wait_ms: 1, max_requests: 10_001 }),
        |state| state.passive = Some(PassiveHealth { errors_in_a_row: 0, out_ms: 1 }),
        |state| state.slow_start_ms = 10_000_000,
        |state| state.routes = vec!["no".to_owned()],
    ];
    for spoil in spoils {
        let mut state = RouterState::new(2, Vec::new());
        spoil(&mut state);
        states.push(state);
    }
    for maintenance in [page("x".repeat(64 * 1024 + 1), "text/plain"), page(String::new(), "a\nb")] {
        states.push(RouterState { maintenance, ..RouterState::new(2, Vec::new()) });
    }
    for state in states {
        assert!(bed.client.set(state.clone()).await.is_err(), "{state:?}");
    }
    assert_eq!(bed.client.get().await.unwrap().generation, 1);
}
