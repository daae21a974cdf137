use std::net::TcpListener;

use greenlight_model::check::CheckOutcome;

use super::*;

/// Asks what a thread serves on a port of its own.
fn asked(url: &str, serve: impl FnOnce(TcpStream) + Send + 'static) -> Check {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serving = thread::spawn(move || serve(listener.accept().unwrap().0));
    let reach = Reach::Url {
        url: url.replace("HOST", &address.to_string()),
        password: Some("PASSWORD".parse().unwrap()),
    };
    let secrets = [("PASSWORD".parse().unwrap(), SecretValue::new("s3cret".to_owned()))].into();
    let mut checks = check(&[("it".to_owned(), reach)].into(), &secrets);
    serving.join().unwrap();
    checks.remove(0)
}

fn read(stream: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn redis_is_asked_with_its_password() {
    let dialogue = |answer: &'static str| {
        asked("redis://web@HOST", move |mut stream| {
            let sent = b"*3\r\n$4\r\nAUTH\r\n$3\r\nweb\r\n$6\r\ns3cret\r\n";
            assert_eq!(read(&mut stream, sent.len()), sent);
            stream.write_all(answer.as_bytes()).unwrap();
            if answer.starts_with('+') {
                assert_eq!(read(&mut stream, 14), b"*1\r\n$4\r\nPING\r\n");
                stream.write_all(b"+PONG\r\n").unwrap();
            }
        })
    };
    assert_eq!(dialogue("+OK\r\n").outcome, CheckOutcome::Passed);
    let refused = dialogue("-WRONGPASS invalid username-password pair\r\n");
    assert_eq!(refused.found, "it refuses AUTH: WRONGPASS invalid username-password pair");
    assert!(!format!("{refused:?}").contains("s3cret"));
    let other = dialogue("HTTP/1.1 400\r\n");
    assert!(other.found.contains("does not speak Redis"), "{other:?}");
}

#[test]
fn a_service_that_closes_or_talks_nonsense_fails_and_names_itself() {
    for (url, answer) in [
        ("postgresql://web@HOST", &b"HTTP/1.1 400 Bad Request\r\n"[..]),
        ("postgresql://web@HOST", b""),
        ("amqp://web@HOST", b"HTTP/1.1 400 Bad Request\r\n"),
        ("amqp://web@HOST", b"AMQP\x00\x01\x00\x00"),
        ("redis://HOST", b""),
        // A length that nobody could hold.
        ("amqp://web@HOST", b"\x01\x00\x00\xff\xff\xff\xff"),
    ] {
        let check = asked(url, move |mut stream| {
            // The greeting first, or closing would reset what was answered.
            let mut greeting = [0; 8];
            stream.read_exact(&mut greeting).unwrap();
            stream.write_all(answer).unwrap();
            // Who has heard enough nonsense may have hung up already, and then there is nothing left to close.
            drop(stream.shutdown(std::net::Shutdown::Write));
            drop(io::copy(&mut stream, &mut io::sink()));
        });
        assert_eq!(check.outcome, CheckOutcome::Failed, "{url}: {check:?}");
        assert!(check.expected.contains("127.0.0.1") && !check.mend.is_empty(), "{check:?}");
    }
}

#[test]
fn nobody_there_is_a_failure_and_so_is_a_secret_without_value() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let tcp = Reach::Url { url: format!("tcp://127.0.0.1:{port}"), password: None };
    let secret = Reach::Secret { secret: "NOT_THERE".parse().unwrap() };
    let checks = check(&[("a".to_owned(), tcp), ("b".to_owned(), secret)].into(), &BTreeMap::new());
    assert!(checks[0].found.contains("refused") && checks[0].outcome == CheckOutcome::Failed, "{checks:?}");
    assert!(checks[1].found.contains("NOT_THERE has no value"), "{checks:?}");
}
