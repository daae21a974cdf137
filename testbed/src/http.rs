//! A small HTTP/1.1 client with keep-alive: enough to ask an application, and to put load on it.
//!
//! It never tries again and hides nothing: a connection that the other side closed under a request is a
//! failure, because a user would have seen one.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// The largest head of an answer, in bytes.
const HEAD_BYTES_MAX: u64 = 64 * 1024;
/// The largest body of an answer, in bytes.
const BODY_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// No connection.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// Where to.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The connection broke, or the answer took too long.
    #[error("{address}: {source}")]
    Broken {
        /// Where to.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// What came is not HTTP, or too large.
    #[error("{address} answered with {what}")]
    Malformed {
        /// Where from.
        address: SocketAddr,
        /// What is wrong.
        what: String,
    },
}

/// What is asked.
#[derive(Debug, Clone)]
pub struct Request {
    method: &'static str,
    path: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Request {
    /// A GET.
    pub fn get(path: &str) -> Self {
        Self { method: "GET", path: path.into(), headers: Vec::new(), body: Vec::new() }
    }

    /// A POST.
    pub fn post(path: &str, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        Self { method: "POST", path: path.into(), headers: Vec::new(), body: body.into() }
            .header("Content-Type", content_type)
    }

    /// A PUT.
    pub fn put(path: &str, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        Self { method: "PUT", ..Self::post(path, content_type, body) }
    }

    /// With one more header.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Whether it asks for a change.
    pub fn is_write(&self) -> bool {
        self.method != "GET"
    }
}

/// What came back.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The headers, in their order.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Response {
    /// The first header of a name, in whatever case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A connection that is kept from one request to the next.
#[derive(Debug)]
pub struct Connection {
    address: SocketAddr,
    stream: BufReader<TcpStream>,
    usable: bool,
}

impl Connection {
    /// Connects; the timeout is for this and for each wait after it.
    pub fn open(address: SocketAddr, timeout: Duration) -> Result<Self, HttpError> {
        let connect = || {
            let stream = TcpStream::connect_timeout(&address, timeout)?;
            stream.set_read_timeout(Some(timeout))?;
            stream.set_write_timeout(Some(timeout))?;
            stream.set_nodelay(true)?;
            Ok(stream)
        };
        let stream = connect().map_err(|source| HttpError::Connect { address, source })?;
        Ok(Self { address, stream: BufReader::new(stream), usable: true })
    }

    /// Whether another request may follow on it.
    pub fn is_usable(&self) -> bool {
        self.usable
    }

    /// Sends a request and reads its answer to the end.
    pub fn send(&mut self, request: &Request) -> Result<Response, HttpError> {
        self.usable = false;
        let mut message =
            format!("{} {} HTTP/1.1\r\nHost: {}\r\n", request.method, request.path, self.address);
        for (name, value) in &request.headers {
            message.push_str(&format!("{name}: {value}\r\n"));
        }
        if request.is_write() {
            message.push_str(&format!("Content-Length: {}\r\n", request.body.len()));
        }
        message.push_str("\r\n");
        let mut bytes = message.into_bytes();
        bytes.extend_from_slice(&request.body);
        self.stream.get_mut().write_all(&bytes).map_err(|source| self.broken(source))?;
        self.receive()
    }

    fn receive(&mut self) -> Result<Response, HttpError> {
        let first = self.line("its first line")?;
        let status = first.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
        let status: u16 = status.ok_or_else(|| self.malformed(format!("{first:?} in place of a status")))?;
        let mut headers = Vec::new();
        let mut head_bytes = first.len() as u64;
        loop {
            let line = self.line("a header")?;
            head_bytes += line.len() as u64;
            if head_bytes > HEAD_BYTES_MAX {
                return Err(self.malformed("a head over 64 KiB".into()));
            }
            if line.is_empty() {
                break;
            }
            let (name, value) = line
                .split_once(':')
                .ok_or_else(|| self.malformed(format!("{line:?} in place of a header")))?;
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
        let mut response = Response { status, headers, body: Vec::new() };
        let is_closed_by_body = self.read_body(&mut response)?;
        let closes = response.header("Connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        self.usable = !closes && !is_closed_by_body && first.starts_with("HTTP/1.1");
        Ok(response)
    }

    /// Reads the body; true when its end was the end of the connection.
    fn read_body(&mut self, response: &mut Response) -> Result<bool, HttpError> {
        let chunked =
            response.header("Transfer-Encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
        if matches!(response.status, 204 | 304) {
            return Ok(false);
        }
        if chunked {
            loop {
                let line = self.line("a chunk")?;
                let length =
                    line.split(';').next().and_then(|size| u64::from_str_radix(size.trim(), 16).ok());
                let length =
                    length.ok_or_else(|| self.malformed(format!("{line:?} in place of a chunk's size")))?;
                if length == 0 {
                    while !self.line("a trailer")?.is_empty() {}
                    return Ok(false);
                }
                self.read_exactly(length, &mut response.body)?;
                self.line("the end of a chunk")?;
            }
        }
        match response.header("Content-Length") {
            Some(length) => {
                let length = length.parse().map_err(|_| self.malformed(format!("a length of {length:?}")))?;
                self.read_exactly(length, &mut response.body)?;
                Ok(false)
            }
            None => {
                let mut limited = (&mut self.stream).take(BODY_BYTES_MAX);
                let read = limited.read_to_end(&mut response.body);
                read.map_err(|source| self.broken(source)).map(|_| true)
            }
        }
    }

    fn read_exactly(&mut self, length: u64, body: &mut Vec<u8>) -> Result<(), HttpError> {
        if body.len() as u64 + length > BODY_BYTES_MAX {
            return Err(self.malformed("a body over 64 MiB".into()));
        }
        let read = (&mut self.stream).take(length).read_to_end(body).map_err(|source| self.broken(source))?;
        if read as u64 == length { Ok(()) } else { Err(self.broken(io::ErrorKind::UnexpectedEof.into())) }
    }

    fn line(&mut self, what: &str) -> Result<String, HttpError> {
        let mut line = String::new();
        (&mut self.stream).take(HEAD_BYTES_MAX).read_line(&mut line).map_err(|source| self.broken(source))?;
        match line.strip_suffix('\n') {
            Some(text) => Ok(text.trim_end_matches('\r').to_owned()),
            None => {
                let message = format!("closed before {what} was complete");
                Err(self.broken(io::Error::new(io::ErrorKind::UnexpectedEof, message)))
            }
        }
    }

    fn broken(&self, source: io::Error) -> HttpError {
        HttpError::Broken { address: self.address, source }
    }

    fn malformed(&self, what: String) -> HttpError {
        HttpError::Malformed { address: self.address, what }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// What the client makes of these bytes, with whether the connection may be used again.
    fn check(answer: &'static str) -> Result<(Response, bool), HttpError> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = [0; 1024];
            let length = stream.read(&mut asked).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8_lossy(&asked[..length]).into_owned()
        });
        let mut connection = Connection::open(address, Duration::from_secs(5)).unwrap();
        let response = connection.send(&Request::post("/a?b", "text/plain", "body"));
        let asked = server.join().unwrap();
        assert_eq!(
            asked,
            format!(
                "POST /a?b HTTP/1.1\r\nHost: {address}\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\nbody"
            )
        );
        response.map(|response| (response, connection.is_usable()))
    }

    #[test]
    fn reads_bodies_of_every_kind() {
        for (answer, body, usable) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", "abc", true),
            ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc", "abc", false),
            (
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\n\r\n",
                "abc",
                true,
            ),
            ("HTTP/1.1 200 OK\r\n\r\nabc", "abc", false),
            ("HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", "", false),
            ("HTTP/1.1 204 No Content\r\n\r\n", "", true),
        ] {
            let (response, reusable) = check(answer).unwrap();
            assert_eq!((response.text().as_str(), reusable), (body, usable), "{answer:?}");
        }
    }

    #[test]
    fn names_what_is_wrong() {
        for (answer, error) in [
            ("", "closed before its first line was complete"),
            ("SSH-2.0\r\n", "in place of a status"),
            ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", "unexpected end of file"),
            ("HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\nab", "a body over 64 MiB"),
            ("HTTP/1.1 200 OK\r\nnonsense\r\n\r\n", "in place of a header"),
        ] {
            let message = check(answer).unwrap_err().to_string();
            assert!(message.contains(error), "{answer:?}: {message}");
        }
    }
}
