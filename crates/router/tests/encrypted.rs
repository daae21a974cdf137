//! TLS and HTTP/2 in front: certificates that are renewed, split and drain over streams, what stands still.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test as the tests do")]

mod support;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use greenlight_router::{
    BackendSpec, BackendState, ControlErrorKind, RouterClientError, RouterConfig, RouterState, TlsFiles,
};
use http_body_util::{BodyExt, Full};
use support::encrypted::{Client2, Pair, request, text_of, try_connect};
use support::{Backend, Bed, Client, plain_spec, raw_backend, status_of, within};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::Notify;

/// A router that speaks TLS with a certificate of its own, whose files are beside its control socket.
async fn encrypted(
    backends: Vec<BackendSpec>,
    change: impl FnOnce(&mut RouterConfig),
) -> (Bed, Pair, TlsFiles) {
    let (pair, mut written) = (Pair::new(), None);
    let bed = Bed::start_with(backends, |config| {
        let files = pair.write(config.control.parent().unwrap(), "first");
        config.tls = Some(files.clone());
        written = Some(files);
        change(config);
    })
    .await;
    (bed, pair, written.unwrap())
}

#[tokio::test]
async fn both_protocols_are_spoken_and_the_backend_is_told() {
    let backend = Backend::start("a").await;
    let (bed, pair, ..) = encrypted(vec![backend.spec()], |_| {}).await;
    let mut old = BufReader::new(try_connect(bed.address(), &pair, "http/1.1").await.unwrap());
    for _ in 0..2 {
        old.write_all(b"GET /head HTTP/1.1\r\nHost: test\r\n\r\n").await.unwrap();
        let mut text = vec![0; 17];
        old.read_exact(&mut text).await.unwrap();
        assert_eq!(text, b"HTTP/1.1 200 OK\r\n");
        let mut seen = text;
        while !String::from_utf8_lossy(&seen).contains("x-forwarded-proto: https\n") {
            let mut more = vec![0; 4096];
            let count = within("the head that the backend saw", old.read(&mut more)).await.unwrap();
            assert!(count > 0, "{}", String::from_utf8_lossy(&seen));
            seen.extend_from_slice(&more[..count]);
        }
        // The rest of the answer is what is behind that line; the next answer begins on its own.
        while !String::from_utf8_lossy(&seen).contains("x-request-id: ") || !seen.ends_with(b"\n") {
            seen.push(old.read_u8().await.unwrap());
        }
    }

    let mut client = Client2::connect(bed.address(), &pair).await;
    let lines = request("/head?q=1").header("cookie", "a=1").header("cookie", "b=2").header("te", "trailers");
    let (status, text) = text_of(client.send(lines.body(Full::default()).unwrap()).await.unwrap()).await;
    assert_eq!(status, 200);
    let (first, others): (&str, Vec<&str>) = {
        let mut lines = text.lines();
        (lines.next().unwrap(), lines.filter(|line| !line.starts_with("x-request-id: ")).collect())
    };
    assert_eq!(first, "GET /head?q=1");
    let expected = [
        "host: test",
        "cookie: a=1; b=2",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-proto: https",
        "x-forwarded-host: test",
    ];
    assert_eq!(others, expected);
    let snapshot = bed.client.get().await.unwrap();
    assert_eq!((snapshot.handshakes_failed, snapshot.tls.unwrap().problem), (0, None));
}

#[tokio::test]
async fn bodies_of_many_streams_pass_both_ways_at_once() {
    let backend = Backend::start("a").await;
    let (bed, pair, ..) = encrypted(vec![backend.spec()], |_| {}).await;
    let client = Client2::connect(bed.address(), &pair).await;
    let body: Vec<u8> = (0..1024 * 1024u32).map(|index| (index % 251) as u8).collect();
    let body = Bytes::from(body);
    let mut streams = tokio::task::JoinSet::new();
    for _ in 0..40 {
        let (mut sender, body) = (client.sender.clone(), body.clone());
        streams.spawn(async move {
            sender.ready().await.unwrap();
            let request = request("/echo").method("POST").body(Full::new(body.clone())).unwrap();
            let answer = sender.send_request(request).await.unwrap();
            assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), body);
        });
    }
    within("every echo", async {
        while let Some(ended) = streams.join_next().await {
            ended.unwrap();
        }
    })
    .await;
    let snapshot = bed.until("all ended", |snapshot| snapshot.backends[0].sessions == 0).await;
    assert_eq!((snapshot.backends[0].requests, snapshot.backends[0].errors), (40, 0));
}

#[tokio::test]
async fn streams_of_one_connection_are_split_and_drained_each_for_itself() {
    let (a, b) = (Backend::start("a").await, Backend::start("b").await);
    let (mut first, mut second) = (a.spec(), b.spec());
    (first.weight, second.weight) = (70, 30);
    let (bed, pair, ..) = encrypted(vec![first, second], |_| {}).await;
    let mut client = Client2::connect(bed.address(), &pair).await;
    for _ in 0..1000 {
        assert_eq!(client.get("/").await.0, 200);
    }
    assert_eq!(a.requests() + b.requests(), 1000);
    assert!((250..=350).contains(&b.requests()), "{} of 1000 instead of about 300", b.requests());

    // A stream at each: that of the one that drains goes on, and what comes then goes to the other.
    bed.set_state("b", BackendState::Drain).await;
    let at_a = client.send(request("/large").body(Full::default()).unwrap()).await.unwrap();
    bed.set_state("b", BackendState::Ready).await;
    bed.until("b is up", |snapshot| status_of(snapshot, "b").health == greenlight_router::Health::Up).await;
    let drained = bed.set_state("a", BackendState::Drain).await;
    assert_eq!(status_of(&drained, "a").sessions, 1);
    let before = (a.requests(), b.requests());
    for _ in 0..20 {
        assert_eq!(client.get("/").await.1, "b 0");
    }
    assert_eq!((a.requests(), b.requests()), (before.0, before.1 + 20));
    assert_eq!(status_of(&bed.client.get().await.unwrap(), "a").sessions, 1);
    // The client resets the one stream; the connection stays.
    drop(at_a);
    bed.until("a is drained", |snapshot| status_of(snapshot, "a").sessions == 0).await;
    assert_eq!(client.get("/").await.0, 200);
}

#[tokio::test]
async fn a_router_that_stops_lets_streams_end_and_takes_no_more() {
    let go_on = Arc::new(Notify::new());
    let (address, _task) = {
        let go_on = Arc::clone(&go_on);
        raw_backend(move |head, mut stream| {
            let go_on = Arc::clone(&go_on);
            async move {
                if head.starts_with("GET /slow ") {
                    go_on.notified().await;
                }
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello").await.unwrap();
            }
        })
        .await
    };
    let (bed, pair, ..) = encrypted(vec![plain_spec("slow", address)], |_| {}).await;
    let mut client = Client2::connect(bed.address(), &pair).await;
    let mut sender = client.sender.clone();
    sender.ready().await.unwrap();
    let answer = tokio::spawn(sender.send_request(request("/slow").body(Full::default()).unwrap()));
    bed.until("the request is there", |snapshot| snapshot.backends[0].sessions == 1).await;
    let Bed { router, directory: _directory, .. } = bed;
    let stopping = tokio::spawn(router.shutdown(Duration::from_secs(60)));
    // Until GOAWAY has come the connection takes requests, and they are answered.
    while let Ok(answer) = client.send(request("/").body(Full::default()).unwrap()).await {
        assert_eq!(text_of(answer).await, (200, "hello".to_owned()));
    }
    go_on.notify_one();
    let answer = within("the answer", answer).await.unwrap().unwrap();
    assert_eq!(text_of(answer).await, (200, "hello".to_owned()));
    assert_eq!(within("the end", stopping).await.unwrap().connections_cut, 0);
    within("the connection's end", client.ended).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_stream_that_stands_still_is_reset_alone() {
    let backend = Backend::start("a").await;
    let (bed, pair, ..) = encrypted(vec![backend.spec()], |config| {
        config.limits.stall_timeout = Duration::from_secs(1);
        config.limits.keep_alive_timeout = Duration::from_secs(1);
    })
    .await;
    let mut client = Client2::connect(bed.address(), &pair).await;
    // Nobody reads it, so its window stays shut.
    let unread = client.send(request("/large").body(Full::default()).unwrap()).await.unwrap();
    bed.until("it began", |snapshot| snapshot.backends[0].sessions == 1).await;
    within("the end of it", async {
        loop {
            assert_eq!(client.get("/").await.0, 200, "the others go on");
            if bed.client.get().await.unwrap().backends[0].sessions == 0 {
                return;
            }
        }
    })
    .await;
    let end = within("the reset", unread.into_body().collect()).await;
    assert!(end.is_err(), "an answer that was cut does not look whole");
    // And with no stream left the connection ends in order.
    within("the idle end", client.ended).await.unwrap().unwrap();
}

#[tokio::test]
async fn requests_that_two_servers_could_read_differently_are_refused() {
    let backend = Backend::start("a").await;
    let (bed, pair, ..) = encrypted(vec![backend.spec()], |_| {}).await;
    let mut client = Client2::connect(bed.address(), &pair).await;
    let plain = || request("/hidden");
    let many = (0..101).fold(plain(), |request, number| request.header(format!("x-{number}"), "1"));
    let cases = [
        ("another host", plain().header("host", "other"), 400),
        ("two hosts", plain().header("host", "test").header("host", "test"), 400),
        ("a user", hyper::Request::builder().uri("https://user@test/hidden"), 400),
        ("another scheme", hyper::Request::builder().uri("http://test/hidden"), 400),
        ("an unknown expectation", plain().header("expect", "x"), 417),
        ("many headers", many, 431),
    ];
    for (what, request, status) in cases {
        let answer = client.send(request.body(Full::default()).unwrap()).await.unwrap();
        assert_eq!(text_of(answer).await.0, status, "{what}");
    }
    assert_eq!(backend.requests(), 0);
    assert_eq!(client.get("/").await.0, 200);
    assert_eq!(bed.client.get().await.unwrap().refused, 6);
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_without_a_restart() {
    let backend = Backend::start("a").await;
    let (bed, first, files) = encrypted(vec![backend.spec()], |_| {}).await;
    let mut open = Client2::connect(bed.address(), &first).await;
    let second = Pair::new();
    // The certificate is there before its key: the pair does not fit and is not shown.
    second.write_certificate(&files.certificate);
    let snapshot = bed.until("it was seen", |now| now.tls.as_ref().unwrap().problem.is_some()).await;
    let problem = snapshot.tls.unwrap().problem.unwrap();
    assert!(problem.contains("cannot be used with the key"), "{problem}");
    drop(try_connect(bed.address(), &first, "h2").await.unwrap());
    second.write_key(&files.key);
    bed.until("the pair was read", |now| now.tls.as_ref().unwrap().problem.is_none()).await;
    Client2::connect(bed.address(), &second).await.get("/").await;
    try_connect(bed.address(), &first, "h2").await.unwrap_err();
    assert_eq!(open.get("/").await.0, 200, "what was open stays");
}

#[tokio::test]
async fn another_certificate_by_the_state() {
    let backend = Backend::start("a").await;
    let (bed, first, files) = encrypted(vec![backend.spec()], |_| {}).await;
    let second = Pair::new();
    let others = second.write(bed.directory.path(), "second");
    let with = |generation, tls| RouterState { tls, ..RouterState::new(generation, vec![backend.spec()]) };
    let mixed = TlsFiles { certificate: others.certificate.clone(), key: files.key.clone() };
    let missing = TlsFiles { certificate: bed.directory.path().join("missing"), key: files.key.clone() };
    let swapped = TlsFiles { certificate: files.key.clone(), key: files.certificate.clone() };
    let open = TlsFiles { key: bed.directory.path().join("open.key"), ..files.clone() };
    std::fs::copy(&files.key, &open.key).unwrap();
    std::fs::set_permissions(&open.key, Permissions::from_mode(0o644)).unwrap();
    let cases = [
        (mixed, "cannot be used with the key"),
        (missing, "cannot read"),
        (swapped, "open to every user"),
        (open, "chmod o="),
    ];
    for (files, why) in cases {
        match bed.client.set(with(5, Some(files))).await {
            Err(RouterClientError::Refused(error)) => {
                assert_eq!(error.kind, ControlErrorKind::Invalid);
                assert!(error.message.contains(why), "{error}");
            }
            other => panic!("{why}: {other:?}"),
        }
        assert_eq!(bed.client.get().await.unwrap().generation, 1, "{why}");
        drop(try_connect(bed.address(), &first, "h2").await.unwrap());
    }
    let snapshot = bed.client.set(with(5, Some(others.clone()))).await.unwrap();
    assert_eq!(snapshot.tls.unwrap().files, others);
    drop(try_connect(bed.address(), &second, "h2").await.unwrap());
    try_connect(bed.address(), &first, "h2").await.unwrap_err();
    // Without one in the state it is that of the settings again.
    bed.client.set(with(6, None)).await.unwrap();
    drop(try_connect(bed.address(), &first, "h2").await.unwrap());

    let plain = Bed::start(vec![backend.spec()]).await;
    let refused = plain.client.set(with(2, Some(others))).await.unwrap_err();
    assert!(refused.to_string().contains("--tls-certificate"), "{refused}");
}

#[tokio::test]
async fn who_speaks_no_tls_is_counted_and_sees_nothing() {
    let backend = Backend::start("a").await;
    let (bed, ..) = encrypted(vec![backend.spec()], |config| {
        config.limits.head_timeout = Duration::from_secs(1);
    })
    .await;
    let mut plain = Client::connect(bed.address()).await;
    plain.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n").await;
    let rest = plain.rest().await;
    assert!(!rest.starts_with(b"HTTP"), "{rest:?}");
    let mut silent = TcpStream::connect(bed.address()).await.unwrap();
    let mut nothing = Vec::new();
    assert_eq!(within("the end of its time", silent.read_to_end(&mut nothing)).await.unwrap(), 0);
    bed.until("both were counted", |now| now.handshakes_failed == 2 && now.connections == 0).await;
    assert_eq!(backend.requests(), 0);
}
