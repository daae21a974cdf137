//! What happens to single requests: split, framing, streaming, upgrades, refusals without a backend.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test as the tests do")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use greenlight_router::{BackendState, Health};
use support::{Backend, Bed, Client, LARGE, plain_spec, raw_backend, status_of, within};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_split_of_70_to_30_is_kept() {
    let (a, b) = (Backend::start("a").await, Backend::start("b").await);
    let (mut first, mut second) = (a.spec(), b.spec());
    (first.weight, second.weight) = (70, 30);
    let bed = Bed::start(vec![first, second]).await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(Client::connect(bed.address()).await);
    }
    for round in 0..1000 {
        let answer = clients[round % 4].ask("GET /", b"").await.unwrap();
        assert_eq!(answer.status, 200);
    }
    assert_eq!(a.requests() + b.requests(), 1000);
    assert!((250..=350).contains(&b.requests()), "{} of 1000 instead of about 300", b.requests());
    let snapshot = bed.client.get().await.unwrap();
    assert_eq!(status_of(&snapshot, "a").requests, a.requests());
    assert_eq!(status_of(&snapshot, "b").requests, b.requests());
    assert_eq!(snapshot.connections, 4);
}

#[tokio::test]
async fn without_a_backend_the_answer_is_503() {
    let bed = Bed::start(Vec::new()).await;
    let answer = bed.ask("GET /").await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
    assert!(answer.text().contains("no backend"), "{}", answer.text());

    let drained = Backend::start("drained").await;
    let mut stopped = Backend::start("stopped").await;
    stopped.stop().await;
    let mut spec = drained.spec();
    spec.state = BackendState::Drain;
    let bed = Bed::start(vec![spec, stopped.spec()]).await;
    // The connection stays: the next request may find a backend.
    let mut client = Client::connect(bed.address()).await;
    for _ in 0..2 {
        assert_eq!(client.ask("GET /", b"").await.unwrap().status, 503);
        assert_eq!(client.ask("POST /", b"body").await.unwrap().status, 503);
    }
    bed.set_state("drained", BackendState::Ready).await;
    assert_eq!(client.ask("GET /", b"").await.unwrap().status, 200);
    assert_eq!(bed.client.get().await.unwrap().unrouted, 4);
}

#[tokio::test]
async fn the_backend_is_told_where_a_request_came_from() {
    let backend = Backend::start("a").await;
    let bed = Bed::start(vec![backend.spec()]).await;
    let text = bed
        .ask("GET /head?q=1\nConnection: x-mine\nX-Mine: 1\nX-Forwarded-For: 203.0.113.9\nCookie: c\nTE: trailers")
        .await;
    let lines: Vec<&str> = text.text().lines().collect();
    assert_eq!(lines[0], "GET /head?q=1");
    for line in [
        "host: test",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-proto: http",
        "x-forwarded-host: test",
        "cookie: c",
    ] {
        assert!(lines.contains(&line), "{line}: {lines:?}");
    }
    assert!(lines.iter().any(|line| line.starts_with("x-request-id: ") && line.len() == 46), "{lines:?}");
    for name in ["x-mine", "connection:", "\nte:", "203.0.113.9"] {
        assert!(!text.text().contains(name), "{name}: {lines:?}");
    }
    let text = bed.ask("GET /head\nX-Request-Id: mine-1").await;
    assert!(text.text().contains("x-request-id: mine-1\n"));
}

#[tokio::test]
async fn bodiless_answers_leave_the_connection_usable() {
    let backend = Backend::start("a").await;
    let bed = Bed::start(vec![backend.spec()]).await;
    let mut client = Client::connect(bed.address()).await;
    for _ in 0..3 {
        let head = client.ask("HEAD /sized", b"").await.unwrap();
        assert_eq!((head.status, head.header("content-length")), (200, Some("12345")));
        let unchanged = client.ask("GET /not-modified", b"").await.unwrap();
        assert_eq!((unchanged.status, unchanged.header("etag")), (304, Some("\"1\"")));
        let whole = client.ask("GET /sized", b"").await.unwrap();
        assert_eq!((whole.status, whole.body.len()), (200, 12_345));
        let echoed = client.ask("PUT /echo", b"hello").await.unwrap();
        assert_eq!(echoed.text(), "hello");
        assert_eq!(client.ask("POST /\nContent-Length: 0", b"").await.unwrap().text(), "a 0");
    }
    assert_eq!(status_of(&bed.client.get().await.unwrap(), "a").errors, 0);
}

/// What backends may answer, and what the client gets.
#[tokio::test]
async fn answers_of_every_shape() {
    let cases: [(&str, &str, u16, &str); 14] = [
        ("sized", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", 200, "hello"),
        (
            "chunked",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1;x\r\n \r\n5\r\nworld\r\n0\r\nT: 1\r\n\r\n",
            200,
            "hello world",
        ),
        ("until close", "HTTP/1.1 200 OK\r\n\r\nhello", 200, "hello"),
        ("old", "HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", 200, "hello"),
        (
            "informational first",
            "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
            200,
            "hello",
        ),
        ("no content", "HTTP/1.1 204 No Content\r\n\r\n", 204, ""),
        ("304 with a length", "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", 304, ""),
        ("not HTTP", "SSH-2.0-OpenSSH\r\n\r\n", 502, ""),
        ("closed", "", 502, ""),
        ("half a head", "HTTP/1.1 200 OK\r\nContent-", 502, ""),
        ("two lengths", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 502, ""),
        (
            "length and chunks",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            502,
            "",
        ),
        ("unasked upgrade", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", 502, ""),
        ("only informational", &"HTTP/1.1 100 Continue\r\n\r\n".repeat(17), 502, ""),
    ];
    for (what, text, status, body) in cases {
        let text = text.to_owned();
        let (address, _task) = raw_backend(move |_, mut stream| {
            let text = text.clone();
            async move { stream.write_all(text.as_bytes()).await.unwrap() }
        })
        .await;
        let bed = Bed::start(vec![plain_spec("raw", address)]).await;
        let answer = bed.ask("GET /").await;
        assert_eq!(answer.status, status, "{what}: {}", answer.text());
        if status != 502 {
            assert_eq!(answer.text(), body, "{what}");
        }
        let errors = u64::from(status == 502);
        let snapshot = bed.until("the request ended", |snapshot| snapshot.backends[0].sessions == 0).await;
        assert_eq!((snapshot.backends[0].requests, snapshot.backends[0].errors), (1, errors), "{what}");
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_not_made_to_look_whole() {
    for text in [
        "HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nnonsense\r\n",
    ] {
        let (address, _task) =
            raw_backend(move |_, mut stream| async move { stream.write_all(text.as_bytes()).await.unwrap() })
                .await;
        let bed = Bed::start(vec![plain_spec("raw", address)]).await;
        let mut client = Client::connect(bed.address()).await;
        let error = client.ask("GET /", b"").await.unwrap_err();
        assert!(
            matches!(
                error.kind(),
                std::io::ErrorKind::UnexpectedEof
                    | std::io::ErrorKind::ConnectionReset
                    | std::io::ErrorKind::Other
            ),
            "{text:?}: {error}"
        );
        let snapshot = bed.until("the request ended", |snapshot| snapshot.backends[0].sessions == 0).await;
        assert_eq!(snapshot.backends[0].errors, 1, "{text:?}");
    }
}

/// Sends a body while its echo is read: both directions at once, without either being held whole anywhere.
async fn echo(chunked: bool) {
    const TOTAL: usize = 32 * 1024 * 1024;
    let backend = Backend::start("a").await;
    let bed = Bed::start(vec![backend.spec()]).await;
    let client = Client::connect(bed.address()).await;
    let (mut reading, mut writing) = client.stream.into_inner().into_split();
    let framing =
        if chunked { "Transfer-Encoding: chunked".to_owned() } else { format!("Content-Length: {TOTAL}") };
    writing
        .write_all(
            format!("POST /echo HTTP/1.1\r\nHost: a\r\n{framing}\r\nConnection: close\r\n\r\n").as_bytes(),
        )
        .await
        .unwrap();
    let pattern: Vec<u8> = (0..64 * 1024u32).map(|index| (index % 251) as u8).collect();
    let expected = pattern.clone();
    let sending = tokio::spawn(async move {
        for _ in 0..TOTAL / pattern.len() {
            if chunked {
                writing.write_all(format!("{:x}\r\n", pattern.len()).as_bytes()).await.unwrap();
            }
            writing.write_all(&pattern).await.unwrap();
            if chunked {
                writing.write_all(b"\r\n").await.unwrap();
            }
        }
        if chunked {
            writing.write_all(b"0\r\n\r\n").await.unwrap();
        }
        writing
    });
    let mut all = Vec::new();
    within("the echo", reading.read_to_end(&mut all)).await.unwrap();
    let _writing = sending.await.unwrap();
    let end = all.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    let mut body = all.split_off(end);
    assert!(all.starts_with(b"HTTP/1.1 200 OK\r\n"));
    if chunked {
        body = unchunk(&body);
    }
    assert_eq!(body.len(), TOTAL);
    assert!(body.chunks(expected.len()).all(|chunk| chunk == expected));
}

fn unchunk(mut text: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let end = text.iter().position(|&byte| byte == b'\n').unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&text[..end]).unwrap().trim(), 16).unwrap();
        text = &text[end + 1..];
        if size == 0 {
            return body;
        }
        body.extend_from_slice(&text[..size]);
        text = &text[size + 2..];
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_body_streams_both_ways() {
    echo(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_chunked_body_streams_both_ways() {
    echo(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_holds_the_backend_back() {
    let backend = Backend::start("a").await;
    let bed = Bed::start(vec![backend.spec()]).await;
    let mut lazy = Client::connect(bed.address()).await;
    lazy.send(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n").await;
    lazy.head().await.unwrap();
    // Other requests pass the time, and show that nobody else is held back.
    let mut busy = Client::connect(bed.address()).await;
    let mut before = 0;
    within("the backend is held back", async {
        loop {
            for _ in 0..100 {
                assert_eq!(busy.ask("GET /", b"").await.unwrap().status, 200);
            }
            let produced = backend.seen.produced.load(SeqCst);
            if produced == before {
                break;
            }
            before = produced;
        }
    })
    .await;
    assert!(before < LARGE / 8, "{before} bytes were produced for a client that reads none");
    let snapshot = bed.client.get().await.unwrap();
    assert_eq!(status_of(&snapshot, "a").sessions, 1);
    // A client that goes away ends the request at the backend too.
    drop(lazy);
    bed.until("the session ended", |snapshot| snapshot.backends[0].sessions == 0).await;
}

#[tokio::test]
async fn an_early_answer_reaches_a_client_that_still_sends() {
    let (address, _task) = raw_backend(|_, mut stream| async move {
        stream.write_all(b"HTTP/1.1 413 Payload Too Large\r\nContent-Length: 3\r\n\r\nno\n").await.unwrap();
        // It goes on reading a little, as servers do, and closes.
        let mut some = vec![0; 64 * 1024];
        drop(stream.read_exact(&mut some).await);
    })
    .await;
    let bed = Bed::start(vec![plain_spec("raw", address)]).await;
    let client = Client::connect(bed.address()).await;
    let (reading, mut writing) = client.stream.into_inner().into_split();
    writing.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n").await.unwrap();
    let sending = tokio::spawn(async move {
        let piece = vec![0; 64 * 1024];
        // Ends when the router closes the connection.
        while writing.write_all(&piece).await.is_ok() {}
    });
    let mut reading = tokio::io::BufReader::new(reading);
    let mut text = String::new();
    while !text.ends_with("no\n") {
        assert_ne!(
            tokio::io::AsyncBufReadExt::read_line(&mut reading, &mut text).await.unwrap(),
            0,
            "{text}"
        );
    }
    assert!(text.starts_with("HTTP/1.1 413 "), "{text}");
    within("the router stops reading", sending).await.unwrap();
}

#[tokio::test]
async fn expectations_are_answered_here() {
    let backend = Backend::start("a").await;
    let bed = Bed::start(vec![backend.spec()]).await;
    let mut client = Client::connect(bed.address()).await;
    client.send(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n").await;
    assert_eq!(client.head().await.unwrap().status, 100);
    client.send(b"hello").await;
    assert_eq!(client.answer(false).await.unwrap().text(), "hello");
    assert_eq!(client.ask("GET /\nExpect: magic", b"").await.unwrap().status, 417);
}

#[tokio::test]
async fn websockets_are_carried_both_ways() {
    let (address, _task) = raw_backend(|head, mut stream| async move {
        assert!(head.contains("connection: upgrade\r\nupgrade: websocket\r\n"), "{head}");
        assert!(head.contains("sec-websocket-key: k\r\n"), "{head}");
        let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: a\r\n\r\nfirst";
        stream.write_all(answer.as_bytes()).await.unwrap();
        let mut asked = [0; 4];
        while stream.read_exact(&mut asked).await.is_ok() {
            stream.write_all(b"pong").await.unwrap();
        }
    })
    .await;
    let bed = Bed::start(vec![plain_spec("raw", address)]).await;
    let mut client = Client::connect(bed.address()).await;
    client
        .send(b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Key: k\r\n\r\n")
        .await;
    let head = client.head().await.unwrap();
    assert_eq!((head.status, head.header("sec-websocket-accept")), (101, Some("a")));
    let mut came = [0; 5];
    client.stream.read_exact(&mut came).await.unwrap();
    assert_eq!(&came, b"first");
    for _ in 0..3 {
        client.send(b"ping").await;
        let mut came = [0; 4];
        client.stream.read_exact(&mut came).await.unwrap();
        assert_eq!(&came, b"pong");
    }
    // It is a session for as long as it lasts, also over a drain.
    let snapshot = bed.set_state("raw", BackendState::Drain).await;
    assert_eq!(snapshot.backends[0].sessions, 1);
    client.send(b"ping").await;
    client.stream.read_exact(&mut [0; 4]).await.unwrap();
    drop(client);
    bed.until("the session ended", |snapshot| snapshot.backends[0].sessions == 0).await;
}

#[tokio::test]
async fn other_upgrades_are_ordinary_requests() {
    let backend = Backend::start("a").await;
    let bed = Bed::start(vec![backend.spec()]).await;
    let mut client = Client::connect(bed.address()).await;
    for _ in 0..2 {
        let answer = client
            .ask("GET /head\nConnection: Upgrade, HTTP2-Settings\nUpgrade: h2c\nHTTP2-Settings: x", b"")
            .await;
        let answer = answer.unwrap();
        assert_eq!(answer.status, 200);
        assert!(
            !answer.text().contains("upgrade") && !answer.text().contains("http2-settings"),
            "{}",
            answer.text()
        );
    }
}

#[tokio::test]
async fn a_backend_that_is_silent_is_answered_with_504() {
    let held = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&held);
    let (address, _task) = raw_backend(move |_, mut stream| {
        count.fetch_add(1, SeqCst);
        async move {
            let mut end = Vec::new();
            drop(stream.read_to_end(&mut end).await);
        }
    })
    .await;
    let bed = Bed::start_with(vec![plain_spec("raw", address)], |config| {
        config.limits.answer_timeout = std::time::Duration::from_millis(300);
    })
    .await;
    let mut client = Client::connect(bed.address()).await;
    assert_eq!(client.ask("GET /", b"").await.unwrap().status, 504);
    assert_eq!(held.load(SeqCst), 1, "a request that may have been processed is not sent again");
    let snapshot = bed.client.get().await.unwrap();
    let backend = &snapshot.backends[0];
    assert_eq!((backend.errors, backend.sessions, backend.health), (1, 0, Health::Up));
}

#[tokio::test]
async fn limits_hold() {
    let backend = Backend::start("a").await;
    let bed = Bed::start_with(vec![backend.spec()], |config| {
        config.limits.max_body_bytes = 1000;
        config.limits.head_timeout = std::time::Duration::from_millis(300);
    })
    .await;
    let mut client = Client::connect(bed.address()).await;
    assert_eq!(client.ask("POST /", &[b'x'; 1000]).await.unwrap().status, 200);
    assert_eq!(client.ask("POST /", &[b'x'; 1001]).await.unwrap().status, 413);
    client.rest().await;

    let mut client = Client::connect(bed.address()).await;
    client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    client.send(format!("{:x}\r\n{}\r\n", 2000, "x".repeat(2000)).as_bytes()).await;
    assert_eq!(client.answer(false).await.unwrap().status, 413);
    client.rest().await;

    let mut client = Client::connect(bed.address()).await;
    let long = "x".repeat(70_000);
    assert_eq!(client.ask(&format!("GET /\nX-Long: {long}"), b"").await.unwrap().status, 431);

    // A head that never ends is not waited for.
    let mut client = Client::connect(bed.address()).await;
    client.send(b"GET / HTTP/1.1\r\nHost:").await;
    assert_eq!(client.rest().await, b"");
}

#[tokio::test]
async fn a_sampled_log_says_for_how_many_requests_a_line_stands() {
    let a = Backend::start("a").await;
    let bed = Bed::start_with(vec![a.spec()], |config| config.access_log_one_in = 10).await;
    let mut client = Client::connect(bed.address()).await;
    for _ in 0..1000 {
        assert_eq!(client.ask("GET /", b"").await.unwrap().status, 200);
    }
    drop(client);
    let path = bed.log_path();
    let Bed { router, directory: _directory, .. } = bed;
    router.shutdown(std::time::Duration::from_secs(60)).await;
    let text = std::fs::read_to_string(path).unwrap();
    let lines = text.lines().count();
    // Seven standard deviations around 100.
    assert!((34..=166).contains(&lines), "{lines} of 1000");
    assert!(text.lines().all(|line| line.contains("\"one_in\":10")), "{text}");
}
