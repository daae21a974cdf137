//! A client's bytes at the router: what is found in them does not depend on how they were cut on their way.

use greenlight_router::{MAX_REQUEST_HEAD_BYTES, wire_findings};

use super::{Target, demand};

pub(super) const TARGET: Target = Target {
    name: "http",
    about: "requests at the router",
    words: &[
        "\r\n",
        "\r\n\r\n",
        "GET / HTTP/1.1\r\n",
        "POST / HTTP/1.1\r\n",
        "HTTP/1.0",
        "Host: a\r\n",
        "host:a\r\n",
        "Content-Length: 5\r\n",
        "Content-Length: 0\r\n",
        "Transfer-Encoding: chunked\r\n",
        "transfer-encoding",
        "chunked",
        "identity",
        "0\r\n\r\n",
        "5\r\nhello\r\n",
        "ffffffffffffffff\r\n",
        "Connection: close\r\n",
        "Upgrade: websocket\r\n",
        " ",
        "\t",
        "\n",
        "\r",
        "\0",
        ":",
        ";",
    ],
    make: None,
    mend: None,
    feed,
    bytes_fixed: 1 << 20,
    // A finding for each of the shortest requests.
    bytes_per_byte: 16,
};

fn feed(input: &[u8]) -> Result<bool, String> {
    let whole = wire_findings([input]);
    // A single line as long as a head may be is judged when its end has come, or when it has grown too long: which of the
    // two comes first does depend on the cuts, and the parser behind refuses it either way.
    let longest = input.split(|byte| *byte == b'\n').map(<[u8]>::len).max().unwrap_or(0);
    if longest < MAX_REQUEST_HEAD_BYTES {
        for length in [1, 2, 7, 1_000] {
            let cut = wire_findings(input.chunks(length));
            demand(cut == whole, || format!("found {whole:?}, and {cut:?} in pieces of {length} bytes"))?;
        }
    }
    Ok(whole.iter().any(Option::is_none))
}
