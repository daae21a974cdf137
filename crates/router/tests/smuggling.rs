//! Requests that two servers could read differently: each is refused with 400, the connection is closed, and nothing
//! of it, nor what is hidden behind it, reaches a backend.

mod support;

use std::sync::atomic::Ordering::SeqCst;

use support::{Backend, Bed, Client};

/// What would be a second request to whoever reads the first one as shorter than we do.
const HIDDEN: &str = "GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n";

#[tokio::test]
async fn every_case_is_refused_and_nothing_passes() {
    let post = "POST / HTTP/1.1\r\nHost: a\r\n";
    let chunked = "Transfer-Encoding: chunked\r\n\r\n";
    let cases: Vec<(&str, String)> = vec![
        ("length, then chunked", format!("{post}Content-Length: 5\r\n{chunked}0\r\n\r\n")),
        ("chunked, then length", format!("{post}Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n")),
        ("two equal lengths", format!("{post}Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello")),
        ("two different lengths", format!("{post}Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello")),
        ("a list of lengths", format!("{post}Content-Length: 5,5\r\n\r\nhello")),
        ("a length with a sign", format!("{post}Content-Length: +5\r\n\r\nhello")),
        ("a negative length", format!("{post}Content-Length: -5\r\n\r\nhello")),
        ("a length in hexadecimal", format!("{post}Content-Length: 0x5\r\n\r\nhello")),
        ("a length too large to count", format!("{post}Content-Length: 99999999999999999999\r\n\r\nhello")),
        ("blank before the colon", format!("{post}Content-Length : 5\r\n\r\nhello")),
        ("another encoding", format!("{post}Transfer-Encoding: gzip\r\n\r\n")),
        ("a list of encodings", format!("{post}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n")),
        ("chunked is not last", format!("{post}Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n")),
        ("an encoding in disguise", format!("{post}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n")),
        ("a vertical tab before chunked", format!("{post}Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n")),
        ("a folded encoding", format!("{post}Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n")),
        ("two encodings", format!("{post}Transfer-Encoding: chunked\r\n{chunked}0\r\n\r\n")),
        ("chunked in HTTP/1.0", format!("POST / HTTP/1.0\r\nHost: a\r\n{chunked}0\r\n\r\n")),
        ("bare line feeds", "GET / HTTP/1.1\nHost: a\n\n".to_owned()),
        ("one bare line feed", format!("{post}X: 1\nContent-Length: 5\r\n\r\nhello")),
        ("a bare carriage return", format!("{post}X: 1\rY: 2\r\n\r\n")),
        ("Connection names the length", format!("{post}Connection: content-length\r\nContent-Length: 5\r\n\r\nhello")),
        ("Connection names the host", format!("{post}Connection: close, Host\r\n\r\n")),
        ("no host", "GET / HTTP/1.1\r\nX: 1\r\n\r\n".to_owned()),
        ("two hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n".to_owned()),
        ("an empty host", "GET / HTTP/1.1\r\nHost:\r\n\r\n".to_owned()),
        ("a host with a path", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n".to_owned()),
        ("two hosts in one", "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n".to_owned()),
        ("the target is of another host", "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n".to_owned()),
        ("the target is of another scheme", "GET gopher://a/ HTTP/1.1\r\nHost: a\r\n\r\n".to_owned()),
        ("a folded header", format!("{post}X: 1\r\n 2\r\n\r\n")),
        ("a folded first header", "GET / HTTP/1.1\r\n Host: a\r\n\r\n".to_owned()),
        ("a NUL", format!("{post}X: a\0b\r\n\r\n")),
        ("a line without a colon", format!("{post}nonsense\r\n\r\n")),
        ("a nameless header", format!("{post}: 1\r\n\r\n")),
        ("a blank in a name", format!("{post}X Y: 1\r\n\r\n")),
        ("a blank in the target", "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n".to_owned()),
        ("a tab in the request line", "GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n".to_owned()),
        ("another version", "GET / HTTP/1.2\r\nHost: a\r\n\r\n".to_owned()),
        ("a relative target", "GET a HTTP/1.1\r\nHost: a\r\n\r\n".to_owned()),
        (
            "a second request behind an upgrade",
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n".to_owned(),
        ),
        (
            "a body in an upgrade",
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n\r\nhello"
                .to_owned(),
        ),
    ];
    // Faults of the body show when the head may have been passed on already: as a request that never ends.
    let in_the_body: Vec<(&str, String)> = vec![
        ("a chunk size that ends in a line feed", format!("{post}{chunked}5\nhello\r\n0\r\n\r\n")),
        ("a chunk that ends in a line feed", format!("{post}{chunked}5\r\nhello\n0\r\n\r\n")),
        ("a chunk that is longer than it says", format!("{post}{chunked}5\r\nhello world\r\n0\r\n\r\n")),
        ("a negative chunk", format!("{post}{chunked}-5\r\nhello\r\n0\r\n\r\n")),
        ("a chunk size in disguise", format!("{post}{chunked}0x5\r\nhello\r\n0\r\n\r\n")),
    ];
    let backend = Backend::start("a").await;
    let bed = Bed::start(vec![backend.spec()]).await;
    let all = cases.iter().map(|case| (case, 0)).chain(in_the_body.iter().map(|case| (case, 1)));
    for ((what, bytes), may_begin) in all {
        // Behind a sound request on the same connection, and as the first one.
        for before in [true, false] {
            let mut client = Client::connect(bed.address()).await;
            if before {
                assert_eq!(client.ask("GET /sized", b"").await.unwrap().status, 200, "{what}");
            }
            let seen = backend.requests();
            client.send(format!("{bytes}{HIDDEN}").as_bytes()).await;
            let answer = client.answer(false).await.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(answer.status, 400, "{what}: {}", answer.text());
            let rest = client.rest().await;
            assert!(rest.is_empty(), "{what}: answered on: {}", String::from_utf8_lossy(&rest));
            assert!(backend.requests() - seen <= may_begin, "{what}: the backend saw it");
            assert_eq!(backend.seen.hidden.load(SeqCst), 0, "{what}: the backend saw what was hidden");
        }
    }
    assert!(bed.client.get().await.unwrap().refused > 0);
}

#[tokio::test]
async fn sound_requests_of_unusual_shape_pass() {
    let backend = Backend::start("a").await;
    let bed = Bed::start(vec![backend.spec()]).await;
    let cases = [
        ("lower case", "post / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello", "a 5"),
        (
            "upper case",
            "POST / HTTP/1.1\r\nHOST: A\r\nTRANSFER-ENCODING: CHUNKED\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            "a 5",
        ),
        ("no blank behind the colon", "POST / HTTP/1.1\r\nHost:a\r\nContent-Length:5\r\n\r\nhello", "a 5"),
        (
            "blanks around the value",
            "POST / HTTP/1.1\r\nHost: \t a \t\r\nContent-Length:  5 \r\n\r\nhello",
            "a 5",
        ),
        (
            "an extension and a trailer",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x=\"y\"\r\nhello\r\n000\r\nT: 1\r\n\r\n",
            "a 5",
        ),
        ("absolute form", "GET http://a:80/ HTTP/1.1\r\nHost: a:80\r\n\r\n", "a 0"),
        ("an IPv6 host", "GET / HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n", "a 0"),
        ("empty lines first", "\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "a 0"),
        ("old", "GET / HTTP/1.0\r\n\r\n", "a 0"),
        ("options for the server", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "a 0"),
    ];
    for (what, bytes, expected) in cases {
        let mut client = Client::connect(bed.address()).await;
        client.send(bytes.as_bytes()).await;
        let answer = client.answer(false).await.unwrap();
        assert_eq!((answer.status, answer.text()), (200, expected), "{what}");
    }
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let backend = Backend::start("a").await;
    let bed = Bed::start(vec![backend.spec()]).await;
    let mut client = Client::connect(bed.address()).await;
    let post = "POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n";
    let chunked = "POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n";
    let mut all = String::new();
    for index in 0..10 {
        all.push_str(&format!("{post}{index}{chunked}{index}\r\n0\r\n\r\n"));
    }
    client.send(all.as_bytes()).await;
    for index in 0..20 {
        assert_eq!(client.answer(false).await.unwrap().text(), (index / 2).to_string());
    }
}

#[tokio::test]
async fn connect_is_not_for_us() {
    let bed = Bed::start(Vec::new()).await;
    let mut client = Client::connect(bed.address()).await;
    client.send(b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n").await;
    assert_eq!(client.answer(false).await.unwrap().status, 501);
    assert!(client.rest().await.is_empty());
}
