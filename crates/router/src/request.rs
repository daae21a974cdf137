//! What is checked in a request, and how it is written for the backend.

use std::net::SocketAddr;

use hyper::body::{Body, Incoming};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, StatusCode, Version};

use crate::config::MAX_HEADERS;
use crate::headers::{is_hop_by_hop, named_by_connection};
use crate::wire::{Findings, HeadFault};

/// Longest request id that is taken over from a client, in bytes; it is written into every log on the way.
const MAX_REQUEST_ID_BYTES: usize = 128;

const FORWARDED_FOR: &str = "x-forwarded-for";
const FORWARDED_PROTO: &str = "x-forwarded-proto";
const FORWARDED_HOST: &str = "x-forwarded-host";
const REQUEST_ID: &str = "x-request-id";

/// Why a request is answered here instead of being passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error(transparent)]
    Fault(#[from] HeadFault),
    #[error("CONNECT is for forward proxies")]
    Connect,
    #[error("this expectation is not known")]
    Expectation,
    #[error("the body is longer than {limit} bytes")]
    BodyTooLong { limit: u64 },
    #[error("more than {MAX_HEADERS} header lines")]
    TooManyHeaders,
}

impl Refusal {
    pub(crate) fn status(self) -> StatusCode {
        match self {
            Self::Fault(_) => StatusCode::BAD_REQUEST,
            Self::Connect => StatusCode::NOT_IMPLEMENTED,
            Self::Expectation => StatusCode::EXPECTATION_FAILED,
            Self::BodyTooLong { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::TooManyHeaders => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        }
    }
}

/// How the body of a request is framed towards the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    None,
    Length(u64),
    Chunked,
}

/// What the checks found out about a request that may be passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Checked {
    pub(crate) framing: Framing,
    /// A WebSocket handshake. Other upgrades are not passed on: the request is then an ordinary one.
    pub(crate) upgrading: bool,
}

/// Checks what the parser and, for HTTP/1, the wire check let through.
pub(crate) fn check(
    parts: &Parts,
    body: &Incoming,
    findings: Option<&Findings>,
    is_tls: bool,
    max_body_bytes: u64,
) -> Result<Checked, Refusal> {
    if parts.method == Method::CONNECT {
        return Err(Refusal::Connect);
    }
    if parts.headers.len() > MAX_HEADERS {
        return Err(Refusal::TooManyHeaders);
    }
    check_target(parts, is_tls)?;
    for token in connection_tokens(&parts.headers) {
        let framing = ["content-length", "transfer-encoding", "host"];
        if framing.iter().any(|name| token.eq_ignore_ascii_case(name.as_bytes())) {
            return Err(HeadFault::ConnectionNamesFraming.into());
        }
    }
    if let Some(value) = parts.headers.get(header::EXPECT)
        && !value.as_bytes().eq_ignore_ascii_case(b"100-continue")
    {
        return Err(Refusal::Expectation);
    }
    let framing = match body.size_hint().exact() {
        Some(0) if parts.headers.contains_key(header::CONTENT_LENGTH) => Framing::Length(0),
        Some(0) => Framing::None,
        Some(length) if length > max_body_bytes => {
            return Err(Refusal::BodyTooLong { limit: max_body_bytes });
        }
        Some(length) => Framing::Length(length),
        None => Framing::Chunked,
    };
    let upgrading = wants_websocket(parts);
    if upgrading && (framing != Framing::None || !findings.is_some_and(Findings::nothing_behind)) {
        return Err(HeadFault::BytesBehindUpgrade.into());
    }
    Ok(Checked { framing, upgrading })
}

fn check_target(parts: &Parts, is_tls: bool) -> Result<(), HeadFault> {
    let is_http_2 = parts.version == Version::HTTP_2;
    let mut hosts = parts.headers.get_all(header::HOST).into_iter().map(HeaderValue::as_bytes);
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(HeadFault::RepeatedHost);
    }
    let uri = &parts.uri;
    if let Some(authority) = uri.authority() {
        // Absolute form, or HTTP/2: both names must be one, or two servers could choose differently.
        let same = host.is_none_or(|host| host.eq_ignore_ascii_case(authority.as_str().as_bytes()));
        if !same {
            return Err(HeadFault::OtherAuthority);
        }
        if uri.scheme_str() != Some(if is_tls { "https" } else { "http" }) {
            return Err(HeadFault::BadTarget);
        }
    }
    match host_of(parts) {
        Some(host) if !is_host(host) => return Err(HeadFault::BadHost),
        None if is_http_2 => return Err(HeadFault::MissingHost),
        _ => {}
    }
    match uri.path_and_query().map(|target| target.as_str()) {
        Some(target) if target.starts_with('/') => Ok(()),
        Some("*") if parts.method == Method::OPTIONS => Ok(()),
        _ => Err(HeadFault::BadTarget),
    }
}

/// Whom a request is for: HTTP/2 says it in `:authority`, the absolute form in the target, all else in `Host`.
fn host_of(parts: &Parts) -> Option<&[u8]> {
    let host = parts.headers.get(header::HOST).map(HeaderValue::as_bytes);
    host.or_else(|| parts.uri.authority().map(|authority| authority.as_str().as_bytes()))
}

/// A name, an IPv4 address or a bracketed IPv6 address, with or without a port.
fn is_host(host: &[u8]) -> bool {
    let (name, port): (&[u8], &[u8]) = if host.first() == Some(&b'[') {
        let Some(end) = host.iter().position(|&byte| byte == b']') else { return false };
        let inner = &host[1..end];
        if inner.is_empty()
            || !inner.iter().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b':' | b'.'))
        {
            return false;
        }
        (inner, &host[end + 1..])
    } else {
        let end = host.iter().position(|&byte| byte == b':').unwrap_or(host.len());
        let name = &host[..end];
        if !name.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_')) {
            return false;
        }
        (name, &host[end..])
    };
    let port_is_valid = match port {
        [] => true,
        [b':', digits @ ..] => digits.len() <= 5 && digits.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    !name.is_empty() && port_is_valid
}

fn connection_tokens(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    headers
        .get_all(header::CONNECTION)
        .into_iter()
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b',').map(<[u8]>::trim_ascii))
}

fn wants_websocket(parts: &Parts) -> bool {
    parts.method == Method::GET
        && parts.version == Version::HTTP_11
        && parts.headers.get(header::UPGRADE).is_some_and(is_websocket)
        && connection_tokens(&parts.headers).any(|token| token.eq_ignore_ascii_case(b"upgrade"))
}

/// Whether the value of an `Upgrade` line is exactly WebSocket.
pub(crate) fn is_websocket(value: &HeaderValue) -> bool {
    value.as_bytes().eq_ignore_ascii_case(b"websocket")
}

/// Whether sending the request twice has the effect of sending it once (RFC 9110, section 9.2.2).
pub(crate) fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE
    )
}

/// The id of a request: the client's, when it is fit to be logged, or our own.
#[derive(Debug, Clone)]
pub(crate) enum RequestId {
    Given(HeaderValue),
    Own([u8; 32]),
}

impl RequestId {
    /// `own` is called when the client gave none, or one that is too long or not printable.
    pub(crate) fn choose(headers: &HeaderMap, own: impl FnOnce() -> u128) -> Self {
        match headers.get(REQUEST_ID) {
            Some(value)
                if (1..=MAX_REQUEST_ID_BYTES).contains(&value.len())
                    && value.as_bytes().iter().all(u8::is_ascii_graphic) =>
            {
                Self::Given(value.clone())
            }
            _ => {
                const DIGITS: &[u8; 16] = b"0123456789abcdef";
                let mut rest = own();
                let mut text = [0; 32];
                for digit in text.iter_mut().rev() {
                    *digit = DIGITS[usize::from(rest.to_le_bytes()[0] & 15)];
                    rest >>= 4;
                }
                Self::Own(text)
            }
        }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Given(value) => value.as_bytes(),
            Self::Own(text) => text,
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        // Both kinds are printable ASCII, see `choose`.
        std::str::from_utf8(self.as_bytes()).unwrap_or_default()
    }
}

/// What is said to the backend about where a request came from.
#[derive(Debug)]
pub(crate) struct Origin<'a> {
    /// The client's address as text.
    pub(crate) peer: &'a str,
    /// Whether the client speaks TLS.
    pub(crate) is_tls: bool,
    /// Whether the client's own `X-Forwarded-*` lines are believed.
    pub(crate) trusted: bool,
    pub(crate) id: &'a RequestId,
}

/// Writes the request head for the backend at `address` into `out`.
pub(crate) fn write_head(
    out: &mut Vec<u8>,
    parts: &Parts,
    checked: Checked,
    origin: &Origin<'_>,
    address: SocketAddr,
) {
    let headers = &parts.headers;
    put(out, &[parts.method.as_str().as_bytes(), b" "]);
    let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
    put(out, &[target.as_bytes(), b" HTTP/1.1\r\nhost: "]);
    let host = host_of(parts);
    match host {
        Some(host) => out.extend_from_slice(host),
        // An HTTP/1.0 request may lack it; an HTTP/1.1 request may not.
        None => out.extend_from_slice(address.to_string().as_bytes()),
    }
    out.extend_from_slice(b"\r\n");
    let named: Vec<HeaderName> = connection_tokens(headers).filter_map(named_by_connection).collect();
    for (name, value) in headers {
        if is_passed_on(name, origin.trusted) && !named.contains(name) {
            put(out, &[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
        }
    }
    put_cookies(out, headers);
    match checked.framing {
        Framing::None => {}
        Framing::Length(length) => put(out, &[b"content-length: ", length.to_string().as_bytes(), b"\r\n"]),
        Framing::Chunked => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
    }
    out.extend_from_slice(b"x-forwarded-for: ");
    if origin.trusted {
        for value in headers.get_all(FORWARDED_FOR) {
            put(out, &[value.as_bytes(), b", "]);
        }
    }
    put(out, &[origin.peer.as_bytes(), b"\r\n"]);
    if !(origin.trusted && headers.contains_key(FORWARDED_PROTO)) {
        let scheme: &[u8] = if origin.is_tls { b"https" } else { b"http" };
        put(out, &[b"x-forwarded-proto: ", scheme, b"\r\n"]);
    }
    if !(origin.trusted && headers.contains_key(FORWARDED_HOST))
        && let Some(host) = host
    {
        put(out, &[b"x-forwarded-host: ", host, b"\r\n"]);
    }
    put(out, &[b"x-request-id: ", origin.id.as_bytes(), b"\r\n"]);
    if checked.upgrading {
        out.extend_from_slice(b"connection: upgrade\r\nupgrade: websocket\r\n");
    }
    out.extend_from_slice(b"\r\n");
}

/// One line, as HTTP/1 wants it: HTTP/2 clients send a line for each cookie (RFC 9113, section 8.2.3).
fn put_cookies(out: &mut Vec<u8>, headers: &HeaderMap) {
    let mut before: &[u8] = b"cookie: ";
    for value in headers.get_all(header::COOKIE) {
        put(out, &[before, value.as_bytes()]);
        before = b"; ";
    }
    if before == b"; " {
        out.extend_from_slice(b"\r\n");
    }
}

/// Lines that are written anew, answered here, or could be forged are left out.
fn is_passed_on(name: &HeaderName, trusted: bool) -> bool {
    match *name {
        header::HOST | header::CONTENT_LENGTH | header::EXPECT | header::COOKIE => false,
        header::FORWARDED => trusted,
        _ => match name.as_str() {
            REQUEST_ID | FORWARDED_FOR => false,
            FORWARDED_PROTO | FORWARDED_HOST => trusted,
            _ => !is_hop_by_hop(name),
        },
    }
}

fn put(out: &mut Vec<u8>, pieces: &[&[u8]]) {
    for piece in pieces {
        out.extend_from_slice(piece);
    }
}

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::*;

    fn parts(target: &str, lines: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().method("GET").uri(target);
        for (name, value) in lines {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn written(parts: &Parts, checked: Checked, trusted: bool) -> String {
        let id = RequestId::choose(&parts.headers, || 0xab);
        let mut out = Vec::new();
        let origin = Origin { peer: "192.0.2.1", is_tls: false, trusted, id: &id };
        write_head(&mut out, parts, checked, &origin, "127.0.0.1:7071".parse().unwrap());
        String::from_utf8(out).unwrap()
    }

    const PLAIN: Checked = Checked { framing: Framing::None, upgrading: false };

    #[test]
    fn a_head_is_written_without_what_is_not_the_backends() {
        let parts = parts(
            "/a?b=c",
            &[
                ("host", "example.org"),
                ("connection", "keep-alive, x-mine"),
                ("x-mine", "1"),
                ("keep-alive", "5"),
                ("te", "trailers"),
                ("upgrade", "h2c"),
                ("expect", "100-continue"),
                ("x-forwarded-for", "203.0.113.9"),
                ("x-forwarded-proto", "https"),
                ("forwarded", "for=203.0.113.9"),
                ("cookie", "c"),
            ],
        );
        let expected = "GET /a?b=c HTTP/1.1\r\nhost: example.org\r\ncookie: c\r\nx-forwarded-for: 192.0.2.1\r\n\
                        x-forwarded-proto: http\r\nx-forwarded-host: example.org\r\n\
                        x-request-id: 000000000000000000000000000000ab\r\n\r\n";
        assert_eq!(written(&parts, PLAIN, false), expected);
        let trusted = written(&parts, PLAIN, true);
        assert!(trusted.contains("x-forwarded-for: 203.0.113.9, 192.0.2.1\r\n"), "{trusted}");
        assert!(
            trusted.contains("x-forwarded-proto: https\r\n") && trusted.contains("forwarded: for="),
            "{trusted}"
        );
        assert!(!trusted.contains("x-forwarded-proto: http\r\n"), "{trusted}");
    }

    #[test]
    fn framing_and_upgrade_are_written_by_us() {
        let parts = parts("/", &[("host", "a"), ("content-length", "7"), ("x-request-id", "given-1")]);
        let sized = written(&parts, Checked { framing: Framing::Length(7), upgrading: false }, false);
        assert_eq!(sized.matches("content-length: 7\r\n").count(), 1);
        assert!(sized.contains("x-request-id: given-1\r\n"));
        let chunked = written(&parts, Checked { framing: Framing::Chunked, upgrading: false }, false);
        assert!(chunked.contains("transfer-encoding: chunked\r\n") && !chunked.contains("content-length"));
        let upgrade = written(&parts, Checked { framing: Framing::None, upgrading: true }, false);
        assert!(upgrade.ends_with("connection: upgrade\r\nupgrade: websocket\r\n\r\n"));
    }

    #[test]
    fn request_ids_that_could_spoil_a_log_are_replaced() {
        let long = "x".repeat(MAX_REQUEST_ID_BYTES + 1);
        for bad in ["", "a b", "a\tb", long.as_str()] {
            let parts = parts("/", &[("x-request-id", bad)]);
            assert!(matches!(RequestId::choose(&parts.headers, || 1), RequestId::Own(_)), "{bad:?}");
        }
    }

    #[test]
    fn hosts_and_targets_are_checked() {
        for good in ["a", "a.example:80", "127.0.0.1:1", "[::1]", "[::1]:8080", "a_b", "a:"] {
            assert!(is_host(good.as_bytes()), "{good}");
        }
        for bad in ["", "a b", "a/b", "a@b", "a:b", "a:123456", "[::1", "[]", "[::1]x", "a,b", ":80", "a\\b"]
        {
            assert!(!is_host(bad.as_bytes()), "{bad}");
        }
        let cases = [
            ("/", "a", Ok(())),
            ("http://a/x", "A", Ok(())),
            ("http://b/x", "a", Err(HeadFault::OtherAuthority)),
            ("http://user@a/x", "a", Err(HeadFault::OtherAuthority)),
            ("ftp://a/x", "a", Err(HeadFault::BadTarget)),
            ("*", "a", Err(HeadFault::BadTarget)),
        ];
        for (target, host, expected) in cases {
            assert_eq!(check_target(&parts(target, &[("host", host)]), false), expected, "{target}");
        }
    }
}
