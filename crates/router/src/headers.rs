//! Header lines that belong to one connection and are not passed on (RFC 9110, section 7.6.1).

use hyper::header::{self, HeaderName};

/// Whether a line is about this connection only. `Content-Length` is not among them: it is written anew on each side.
pub(crate) fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(
        *name,
        header::CONNECTION
            | header::TRANSFER_ENCODING
            | header::UPGRADE
            | header::TE
            | header::TRAILER
            | header::PROXY_AUTHENTICATE
            | header::PROXY_AUTHORIZATION
    ) || matches!(name.as_str(), "keep-alive" | "proxy-connection")
}

/// The header that a token of `Connection` declares to be hop-by-hop. `None` for the tokens that are no header here.
pub(crate) fn named_by_connection(token: &[u8]) -> Option<HeaderName> {
    if token.eq_ignore_ascii_case(b"keep-alive") || token.eq_ignore_ascii_case(b"close") {
        return None;
    }
    HeaderName::from_bytes(token).ok()
}
