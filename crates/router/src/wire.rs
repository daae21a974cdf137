//! A second look at every byte a client sends, before the HTTP parser sees it.
//!
//! The parser in front is lenient where a proxy must not be: it drops a `Content-Length` beside a `Transfer-Encoding`,
//! merges repeated lengths, and takes lines that end in a bare line feed. Two servers that read such a request
//! differently can be made to disagree where it ends, which is request smuggling. [`WireCheck`] follows the framing of
//! the byte stream with the strict rules of RFC 9112 and leaves one finding per request head, in order; the service
//! takes them in the same order and refuses what has a fault. Nothing is forwarded without a finding.
//!
//! It does not parse for content, and it does not change a byte.

use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::{cell::Cell, cell::RefCell, io};

use memchr::memchr;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::config::MAX_REQUEST_HEAD_BYTES;
use crate::tls::Transport;
use crate::watch::Watch;

/// What is wrong with a request head. Its text goes to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeadFault {
    #[error("a line ends in a bare line feed")]
    BareLineFeed,
    #[error("a control character in the head")]
    ControlCharacter,
    #[error("a folded header line")]
    FoldedLine,
    #[error("a header line without a valid name")]
    HeaderName,
    #[error("Content-Length given more than once")]
    RepeatedLength,
    #[error("Content-Length is not a number")]
    BadLength,
    #[error("Transfer-Encoding given more than once")]
    RepeatedEncoding,
    #[error("a Transfer-Encoding other than chunked")]
    UnknownEncoding,
    #[error("Content-Length together with Transfer-Encoding")]
    LengthAndEncoding,
    #[error("Transfer-Encoding in an HTTP/1.0 request")]
    EncodingInOldVersion,
    #[error("Host given more than once")]
    RepeatedHost,
    #[error("no Host in an HTTP/1.1 request")]
    MissingHost,
    #[error("a request that follows one that was not understood")]
    OutOfStep,
    #[error("Host is not a valid host name")]
    BadHost,
    #[error("the target names another host than Host does")]
    OtherAuthority,
    #[error("a target that is not valid for this method")]
    BadTarget,
    #[error("Connection names a header that frames or routes the message")]
    ConnectionNamesFraming,
    #[error("bytes behind an upgrade request, or a body in it")]
    BytesBehindUpgrade,
}

/// Where in the byte stream we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In a head, or between two requests when no byte of one has come.
    Head,
    /// In a body with this many bytes left.
    Body(u64),
    ChunkSize,
    ChunkData(u64),
    ChunkEnd,
    Trailers,
    /// After a fault, or after an upgrade: nothing is followed any more.
    Blind,
}

/// Follows the framing of one client's byte stream.
#[derive(Debug)]
pub(crate) struct WireCheck {
    place: Place,
    /// The beginning of a line whose end has not come.
    line: Vec<u8>,
    head: HeadFacts,
}

#[derive(Debug, Default)]
struct HeadFacts {
    begun: bool,
    old_version: bool,
    hosts: u32,
    lengths: u32,
    length: u64,
    encodings: u32,
    fault: Option<HeadFault>,
}

/// What the check found, shared with the service of the same connection.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    heads: RefCell<VecDeque<Option<HeadFault>>>,
    /// No byte of a further request, or of a body, is outstanding or has come.
    at_rest: Cell<bool>,
}

impl Findings {
    /// The finding for the next request head. An error when it must be refused.
    pub(crate) fn next(&self) -> Result<(), HeadFault> {
        match self.heads.borrow_mut().pop_front() {
            Some(None) => Ok(()),
            Some(Some(fault)) => Err(fault),
            None => Err(HeadFault::OutOfStep),
        }
    }

    /// Whether everything that was received belongs to requests that were taken, bodies included.
    pub(crate) fn nothing_behind(&self) -> bool {
        self.at_rest.get() && self.heads.borrow().is_empty()
    }

    /// Whether the client has sent all of its last request.
    pub(crate) fn whole(&self) -> bool {
        self.at_rest.get()
    }
}

/// What is found for each request head in a client's bytes, which come in these pieces: nothing, or what is wrong with it.
///
/// A running router does this by itself. It is shown so that hostile bytes can be fed without one.
#[must_use]
pub fn findings<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Option<String>> {
    let (mut check, findings) = (WireCheck::new(), Findings::default());
    pieces.into_iter().for_each(|piece| check.follow(piece, &findings));
    let heads = findings.heads.borrow();
    heads.iter().map(|fault| fault.map(|fault| fault.to_string())).collect()
}

impl WireCheck {
    fn new() -> Self {
        Self { place: Place::Head, line: Vec::new(), head: HeadFacts::default() }
    }

    /// Follows `bytes`. Findings for heads that end in them are put into `findings`.
    fn follow(&mut self, mut bytes: &[u8], findings: &Findings) {
        while !bytes.is_empty() {
            match self.place {
                Place::Blind => break,
                Place::Body(left) => {
                    bytes = skip(bytes, left, Place::Body, Place::Head, &mut self.place);
                }
                Place::ChunkData(left) => {
                    bytes = skip(bytes, left, Place::ChunkData, Place::ChunkEnd, &mut self.place);
                }
                Place::Head | Place::ChunkSize | Place::ChunkEnd | Place::Trailers => {
                    let Some(end) = memchr(b'\n', bytes) else {
                        self.line.extend_from_slice(bytes);
                        if self.line.len() > MAX_REQUEST_HEAD_BYTES {
                            // The parser has its own limit and ends the connection; this one bounds our memory.
                            self.go_blind();
                        }
                        break;
                    };
                    let (line, rest) = bytes.split_at(end + 1);
                    bytes = rest;
                    if self.line.is_empty() {
                        self.line_ended(line, findings);
                    } else {
                        let mut whole = std::mem::take(&mut self.line);
                        whole.extend_from_slice(line);
                        self.line_ended(&whole, findings);
                    }
                }
            }
        }
        findings.at_rest.set(self.place == Place::Head && !self.head.begun && self.line.is_empty());
    }

    fn go_blind(&mut self) {
        self.place = Place::Blind;
        self.line = Vec::new();
    }

    fn line_ended(&mut self, line: &[u8], findings: &Findings) {
        let (text, bare) = match line.strip_suffix(b"\r\n") {
            Some(text) => (text, false),
            None => (&line[..line.len() - 1], true),
        };
        match self.place {
            Place::Head => {
                if bare {
                    self.head.fault = Some(HeadFault::BareLineFeed);
                }
                if !text.is_empty() {
                    self.head_line(text);
                } else if self.head.begun {
                    self.head_ended(findings);
                }
            }
            _ if bare => self.go_blind(),
            Place::ChunkSize => match chunk_size(text) {
                Some(0) => self.place = Place::Trailers,
                Some(size) => self.place = Place::ChunkData(size),
                None => self.go_blind(),
            },
            Place::ChunkEnd if text.is_empty() => self.place = Place::ChunkSize,
            Place::Trailers if text.is_empty() => self.place = Place::Head,
            Place::Trailers => {}
            Place::ChunkEnd | Place::Body(_) | Place::ChunkData(_) | Place::Blind => self.go_blind(),
        }
    }

    fn head_line(&mut self, text: &[u8]) {
        let head = &mut self.head;
        if !head.begun {
            head.begun = true;
            head.old_version = !text.ends_with(b"HTTP/1.1");
            return;
        }
        if let Err(fault) = head.header(text) {
            head.fault.get_or_insert(fault);
        }
    }

    fn head_ended(&mut self, findings: &Findings) {
        let head = std::mem::take(&mut self.head);
        let fault = head.fault.or_else(|| head.conclusion());
        findings.heads.borrow_mut().push_back(fault);
        self.place = match (fault, head.encodings, head.length) {
            (Some(_), ..) => Place::Blind,
            (None, 1.., _) => Place::ChunkSize,
            (None, 0, 0) => Place::Head,
            (None, 0, length) => Place::Body(length),
        };
    }
}

impl HeadFacts {
    fn header(&mut self, text: &[u8]) -> Result<(), HeadFault> {
        if matches!(text[0], b' ' | b'\t') {
            return Err(HeadFault::FoldedLine);
        }
        let colon = memchr(b':', text).ok_or(HeadFault::HeaderName)?;
        let (name, value) = (&text[..colon], &text[colon + 1..]);
        if name.is_empty() || matches!(name[name.len() - 1], b' ' | b'\t') {
            return Err(HeadFault::HeaderName);
        }
        if value.iter().any(|&byte| matches!(byte, 0 | b'\r')) {
            return Err(HeadFault::ControlCharacter);
        }
        // The length of the name decides first: most lines are then done with.
        match name.len() {
            4 if name.eq_ignore_ascii_case(b"host") => self.hosts += 1,
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                self.lengths += 1;
                self.length = decimal(value.trim_ascii()).ok_or(HeadFault::BadLength)?;
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                self.encodings += 1;
                if !value.trim_ascii().eq_ignore_ascii_case(b"chunked") {
                    return Err(HeadFault::UnknownEncoding);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn conclusion(&self) -> Option<HeadFault> {
        let rules = [
            (self.lengths > 0 && self.encodings > 0, HeadFault::LengthAndEncoding),
            (self.lengths > 1, HeadFault::RepeatedLength),
            (self.encodings > 1, HeadFault::RepeatedEncoding),
            (self.encodings > 0 && self.old_version, HeadFault::EncodingInOldVersion),
            (self.hosts > 1, HeadFault::RepeatedHost),
            (self.hosts == 0 && !self.old_version, HeadFault::MissingHost),
        ];
        rules.into_iter().find_map(|(broken, fault)| broken.then_some(fault))
    }
}

/// Skips up to `left` bytes and sets the place behind them.
fn skip<'a>(
    bytes: &'a [u8],
    left: u64,
    within: fn(u64) -> Place,
    behind: Place,
    place: &mut Place,
) -> &'a [u8] {
    let step = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
    let left = left - step as u64;
    *place = if left == 0 { behind } else { within(left) };
    &bytes[step..]
}

/// Digits only, as RFC 9110 says: no sign, no list, no blank inside.
pub(crate) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 19 {
        return None;
    }
    text.iter().try_fold(0u64, |sum, byte| byte.is_ascii_digit().then(|| sum * 10 + u64::from(byte - b'0')))
}

/// The size in a chunk's first line. An extension behind it is skipped.
pub(crate) fn chunk_size(line: &[u8]) -> Option<u64> {
    let digits = line.split(|byte| matches!(byte, b';' | b' ' | b'\t')).next()?;
    if digits.is_empty() || digits.len() > 15 {
        return None;
    }
    digits.iter().try_fold(0u64, |sum, &byte| Some(sum * 16 + u64::from(char::from(byte).to_digit(16)?)))
}

/// A client's connection whose bytes are followed on their way to the parser.
pub(crate) struct CheckedStream {
    stream: Transport,
    check: WireCheck,
    findings: Rc<Findings>,
    watch: Rc<Watch>,
}

impl CheckedStream {
    pub(crate) fn new(stream: Transport, watch: Rc<Watch>) -> (Self, Rc<Findings>) {
        let findings = Rc::new(Findings::default());
        findings.at_rest.set(true);
        (Self { stream, check: WireCheck::new(), findings: Rc::clone(&findings), watch }, findings)
    }

    /// Stops following: what comes now is not HTTP any more.
    pub(crate) fn stop_following(&mut self) {
        self.check.go_blind();
    }
}

impl AsyncRead for CheckedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buf);
        let came = &buf.filled()[before..];
        if !came.is_empty() {
            this.watch.client_sent();
            this.check.follow(came, &this.findings);
        }
        polled
    }
}

impl AsyncWrite for CheckedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        if polled.is_ready() {
            self.watch.client_took();
        }
        polled
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        if polled.is_ready() {
            self.watch.client_took();
        }
        polled
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The findings for `bytes`, sent whole and byte by byte: both must agree.
    fn findings(bytes: &str) -> (Vec<Option<HeadFault>>, bool) {
        let run = |pieces: Vec<&[u8]>| {
            let (mut check, findings) = (WireCheck::new(), Findings::default());
            for piece in pieces {
                check.follow(piece, &findings);
            }
            (findings.heads.take().into(), findings.at_rest.get())
        };
        let whole = run(vec![bytes.as_bytes()]);
        let single = run(bytes.as_bytes().chunks(1).collect());
        assert_eq!(whole, single, "{bytes:?}");
        whole
    }

    #[test]
    fn sound_requests_are_followed_through_their_bodies() {
        let get = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
        let sized = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n\n\n\n\n\n";
        let chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\n\r\n\r\n!\r\n0\r\nT: 1\r\n\r\n";
        assert_eq!(findings(&format!("{get}{sized}{chunked}\r\n{get}")), (vec![None; 4], true));
        assert_eq!(findings(&sized[..sized.len() - 1]), (vec![None], false));
        assert_eq!(findings(&chunked[..chunked.len() - 1]), (vec![None], false));
        assert_eq!(findings("GET / HTTP/1.0\r\n\r\n"), (vec![None], true));
    }

    #[test]
    fn every_fault_is_found_and_ends_the_following() {
        let post = "POST / HTTP/1.1\r\nHost: a\r\n";
        let cases = [
            (
                format!("{post}Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"),
                HeadFault::LengthAndEncoding,
            ),
            (
                format!("{post}Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n"),
                HeadFault::LengthAndEncoding,
            ),
            (format!("{post}Content-Length: 5\r\nContent-Length: 5\r\n\r\n"), HeadFault::RepeatedLength),
            (format!("{post}Content-Length: 5,5\r\n\r\n"), HeadFault::BadLength),
            (format!("{post}Content-Length: +5\r\n\r\n"), HeadFault::BadLength),
            (format!("{post}Content-Length: \r\n\r\n"), HeadFault::BadLength),
            (format!("{post}Content-Length: 99999999999999999999\r\n\r\n"), HeadFault::BadLength),
            (format!("{post}Content-Length : 5\r\n\r\n"), HeadFault::HeaderName),
            (format!("{post}Transfer-Encoding: gzip, chunked\r\n\r\n"), HeadFault::UnknownEncoding),
            (format!("{post}Transfer-Encoding:\r\n chunked\r\n\r\n"), HeadFault::UnknownEncoding),
            (
                format!("{post}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"),
                HeadFault::RepeatedEncoding,
            ),
            (format!("{post}X: 1\r\n folded\r\n\r\n"), HeadFault::FoldedLine),
            (format!("{post}X: a\0b\r\n\r\n"), HeadFault::ControlCharacter),
            (format!("{post}X: a\rb\r\n\r\n"), HeadFault::ControlCharacter),
            (format!("{post}nonsense\r\n\r\n"), HeadFault::HeaderName),
            (format!("{post}X: 1\nY: 2\r\n\r\n"), HeadFault::BareLineFeed),
            (format!("{post}X: 1\r\n\n"), HeadFault::BareLineFeed),
            (format!("{post}Host: b\r\n\r\n"), HeadFault::RepeatedHost),
            ("GET / HTTP/1.1\r\n\r\n".to_owned(), HeadFault::MissingHost),
            (
                "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(),
                HeadFault::EncodingInOldVersion,
            ),
        ];
        for (bytes, fault) in cases {
            let hidden = format!("{bytes}GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n");
            assert_eq!(findings(&hidden), (vec![Some(fault)], false), "{bytes:?}");
        }
    }

    #[test]
    fn a_chunk_that_is_not_understood_ends_the_following() {
        let post = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        for body in
            ["5\nhello\r\n0\r\n\r\n", "5\r\nhello\n0\r\n\r\n", "x\r\n", "\r\n", "5\r\nhelloworld", "-1\r\n"]
        {
            let bytes = format!("{post}{body}GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n");
            assert_eq!(findings(&bytes), (vec![None], false), "{body:?}");
        }
    }

    #[test]
    fn numbers_are_read_strictly() {
        assert_eq!(decimal(b"0"), Some(0));
        assert_eq!(decimal(b"9999999999999999999"), Some(9_999_999_999_999_999_999));
        assert_eq!(decimal(b"1 2"), None);
        assert_eq!(chunk_size(b"fF"), Some(255));
        assert_eq!(chunk_size(b"0x10"), None);
        assert_eq!(chunk_size(b"ffffffffffffffff"), None);
        assert_eq!(chunk_size(b" 5"), None);
    }
}
