//! Reading a backend's answer: its head, and where its body ends. No I/O; what is not understood is refused.

use std::mem::MaybeUninit;

use bytes::{Buf, Bytes, BytesMut};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, StatusCode};
use memchr::memchr;

use crate::config::{MAX_ANSWER_HEAD_BYTES, MAX_HEADERS};
use crate::headers::{is_hop_by_hop, named_by_connection};
use crate::wire::{chunk_size, decimal};

/// Longest line between chunks, in bytes: a size with its extension, or a trailer.
const MAX_CHUNK_LINE_BYTES: usize = 4096;
/// Bytes of trailers that are skipped behind the last chunk.
const MAX_TRAILER_BYTES: usize = MAX_ANSWER_HEAD_BYTES;

/// Why an answer is not forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AnswerFault {
    #[error("the head is not HTTP/1: {0}")]
    NotHttp(httparse::Error),
    #[error("the head is longer than {MAX_ANSWER_HEAD_BYTES} bytes")]
    HeadTooLong,
    #[error("a status below 100 or above 999")]
    BadStatus,
    #[error("a header that is not valid")]
    BadHeader,
    #[error("Content-Length is not one number")]
    BadLength,
    #[error("a Transfer-Encoding other than chunked, or in HTTP/1.0")]
    UnknownEncoding,
    #[error("Content-Length together with Transfer-Encoding")]
    LengthAndEncoding,
    #[error("a chunk that is not valid")]
    BadChunk,
    #[error("101 without an upgrade having been asked for")]
    UnaskedUpgrade,
    #[error("too many informational answers")]
    TooManyInformational,
}

/// The head of an answer, ready to be passed on.
#[derive(Debug)]
pub(crate) struct AnswerHead {
    pub(crate) status: StatusCode,
    /// Without the hop-by-hop lines and, where the body has a known length, without `Content-Length`: the front writes
    /// its own.
    pub(crate) headers: HeaderMap,
    pub(crate) body: BodyDecoder,
    /// Whether the connection may be used again after a clean end.
    pub(crate) reusable: bool,
    /// `Upgrade` of a 101.
    pub(crate) upgrade: Option<HeaderValue>,
}

/// Takes a head off the front of `buffer`; `None` when it is not whole.
pub(crate) fn take_head(buffer: &mut BytesMut, method: &Method) -> Result<Option<AnswerHead>, AnswerFault> {
    let mut slots = [const { MaybeUninit::<httparse::Header<'_>>::uninit() }; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut []);
    let parsed = httparse::ParserConfig::default()
        .parse_response_with_uninit_headers(&mut response, buffer, &mut slots)
        .map_err(AnswerFault::NotHttp)?;
    let httparse::Status::Complete(length) = parsed else {
        return if buffer.len() > MAX_ANSWER_HEAD_BYTES { Err(AnswerFault::HeadTooLong) } else { Ok(None) };
    };
    let head = read_head(&response, method)?;
    buffer.advance(length);
    Ok(Some(head))
}

fn read_head(response: &httparse::Response<'_, '_>, method: &Method) -> Result<AnswerHead, AnswerFault> {
    let status =
        response.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(AnswerFault::BadStatus)?;
    let new_version = response.version == Some(1);
    let mut headers = HeaderMap::with_capacity(response.headers.len() + 2);
    let mut length: Option<u64> = None;
    let mut length_value = None;
    let mut chunked = false;
    let mut reusable = new_version;
    let mut upgrade = None;
    let mut named = Vec::new();
    for line in response.headers.iter() {
        let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| AnswerFault::BadHeader)?;
        let value = || HeaderValue::from_bytes(line.value).map_err(|_| AnswerFault::BadHeader);
        match name {
            header::CONTENT_LENGTH => {
                let given = decimal(line.value).ok_or(AnswerFault::BadLength)?;
                if length.is_some_and(|known| known != given) {
                    return Err(AnswerFault::BadLength);
                }
                length = Some(given);
                length_value = Some(value()?);
            }
            header::TRANSFER_ENCODING => {
                if chunked || !new_version || !line.value.eq_ignore_ascii_case(b"chunked") {
                    return Err(AnswerFault::UnknownEncoding);
                }
                chunked = true;
            }
            header::CONNECTION => {
                for token in line.value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii) {
                    if token.eq_ignore_ascii_case(b"close") {
                        reusable = false;
                    } else if let Some(name) = named_by_connection(token) {
                        named.push(name);
                    }
                }
            }
            header::UPGRADE => upgrade = Some(value()?),
            _ if is_hop_by_hop(&name) => {}
            _ => {
                headers.append(name, value()?);
            }
        }
    }
    for name in named {
        headers.remove(name);
    }
    if chunked && length.is_some() {
        return Err(AnswerFault::LengthAndEncoding);
    }
    let bodiless = status.is_informational()
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
        || method == Method::HEAD;
    let body = match (bodiless, chunked, length) {
        (true, ..) => BodyDecoder::Done,
        (false, true, _) => BodyDecoder::Chunked(ChunkPlace::Size),
        (false, false, Some(0)) => BodyDecoder::Done,
        (false, false, Some(length)) => BodyDecoder::Length(length),
        (false, false, None) => BodyDecoder::UntilClose,
    };
    if body == BodyDecoder::UntilClose {
        reusable = false;
    }
    if let Some(value) = length_value
        && method == Method::HEAD
    {
        headers.insert(header::CONTENT_LENGTH, value);
    }
    Ok(AnswerHead { status, headers, body, reusable, upgrade })
}

/// Where the body of an answer ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyDecoder {
    /// All of it was taken, or there is none.
    Done,
    /// This many bytes are left.
    Length(u64),
    /// In chunks.
    Chunked(ChunkPlace),
    /// Until the backend closes the connection.
    UntilClose,
}

/// Where in a chunked body we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChunkPlace {
    Size,
    Data(u64),
    End,
    /// In the trailers, of which this many bytes were skipped.
    Trailers(usize),
}

impl BodyDecoder {
    /// The bytes that are left, when the head said so.
    pub(crate) fn left(self) -> Option<u64> {
        match self {
            Self::Done => Some(0),
            Self::Length(left) => Some(left),
            Self::Chunked(_) | Self::UntilClose => None,
        }
    }

    /// Takes body bytes off the front of `buffer` without copying them. `None` when more must be read, or when the
    /// body is done.
    pub(crate) fn take(&mut self, buffer: &mut BytesMut) -> Result<Option<Bytes>, AnswerFault> {
        loop {
            match self {
                Self::Done => return Ok(None),
                _ if buffer.is_empty() => return Ok(None),
                Self::UntilClose => return Ok(Some(buffer.split().freeze())),
                Self::Length(left) => {
                    let data = take_up_to(buffer, left);
                    if *left == 0 {
                        *self = Self::Done;
                    }
                    return Ok(Some(data));
                }
                Self::Chunked(ChunkPlace::Data(left)) => {
                    let data = take_up_to(buffer, left);
                    if *left == 0 {
                        *self = Self::Chunked(ChunkPlace::End);
                        // The end often lies in the same bytes; reading it now tells that the body is done.
                        if buffer.starts_with(b"\r\n0\r\n\r\n") {
                            buffer.advance(7);
                            *self = Self::Done;
                        }
                    }
                    return Ok(Some(data));
                }
                Self::Chunked(place) => {
                    let Some(end) = memchr(b'\n', buffer) else {
                        return if buffer.len() > MAX_CHUNK_LINE_BYTES {
                            Err(AnswerFault::BadChunk)
                        } else {
                            Ok(None)
                        };
                    };
                    let line = buffer[..end].strip_suffix(b"\r").ok_or(AnswerFault::BadChunk)?;
                    *self = place.after(line)?;
                    buffer.advance(end + 1);
                }
            }
        }
    }
}

impl ChunkPlace {
    fn after(self, line: &[u8]) -> Result<BodyDecoder, AnswerFault> {
        let next = match self {
            Self::Size => match chunk_size(line).ok_or(AnswerFault::BadChunk)? {
                0 => Self::Trailers(0),
                size => Self::Data(size),
            },
            Self::End if line.is_empty() => Self::Size,
            Self::Trailers(_) if line.is_empty() => return Ok(BodyDecoder::Done),
            Self::Trailers(skipped) if skipped + line.len() <= MAX_TRAILER_BYTES => {
                Self::Trailers(skipped + line.len() + 2)
            }
            Self::End | Self::Trailers(_) | Self::Data(_) => return Err(AnswerFault::BadChunk),
        };
        Ok(BodyDecoder::Chunked(next))
    }
}

fn take_up_to(buffer: &mut BytesMut, left: &mut u64) -> Bytes {
    let step = buffer.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
    *left -= step as u64;
    buffer.split_to(step).freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str, method: &Method) -> Result<Option<AnswerHead>, AnswerFault> {
        take_head(&mut BytesMut::from(text), method)
    }

    #[test]
    fn the_end_of_the_body_follows_from_method_status_and_head() {
        let chunked = BodyDecoder::Chunked(ChunkPlace::Size);
        let cases = [
            ("GET", "200 OK", "Content-Length: 5\r\n", BodyDecoder::Length(5), true),
            ("GET", "200 OK", "Content-Length: 5\r\nContent-Length: 5\r\n", BodyDecoder::Length(5), true),
            ("GET", "200 OK", "Content-Length: 0\r\n", BodyDecoder::Done, true),
            ("GET", "200 OK", "Transfer-Encoding: Chunked\r\n", chunked, true),
            ("GET", "200 OK", "", BodyDecoder::UntilClose, false),
            ("GET", "200 OK", "Content-Length: 5\r\nConnection: x, Close\r\n", BodyDecoder::Length(5), false),
            ("HEAD", "200 OK", "Content-Length: 5\r\n", BodyDecoder::Done, true),
            ("HEAD", "200 OK", "Transfer-Encoding: chunked\r\n", BodyDecoder::Done, true),
            ("GET", "304 Not Modified", "Content-Length: 5\r\n", BodyDecoder::Done, true),
            ("DELETE", "204 No Content", "", BodyDecoder::Done, true),
            ("GET", "103 Early Hints", "Link: x\r\n", BodyDecoder::Done, true),
        ];
        for (method, status, lines, body, reusable) in cases {
            let text = format!("HTTP/1.1 {status}\r\n{lines}\r\n");
            let head = head(&text, &method.parse().unwrap()).unwrap().unwrap();
            assert_eq!((head.body, head.reusable), (body, reusable), "{method} {text:?}");
        }
        let old =
            head("HTTP/1.0 200 OK\r\nContent-Length: 5\r\nConnection: keep-alive\r\n\r\n", &Method::GET);
        assert!(!old.unwrap().unwrap().reusable);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let cases = [
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", AnswerFault::BadLength),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n", AnswerFault::BadLength),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", AnswerFault::UnknownEncoding),
            ("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", AnswerFault::UnknownEncoding),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
                AnswerFault::LengthAndEncoding,
            ),
            ("HTTP/2 200 OK\r\n\r\n", AnswerFault::NotHttp(httparse::Error::Version)),
            ("SSH-2.0-x\r\n", AnswerFault::NotHttp(httparse::Error::Version)),
        ];
        for (text, fault) in cases {
            assert_eq!(head(text, &Method::GET).unwrap_err(), fault, "{text:?}");
        }
        let long = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(MAX_ANSWER_HEAD_BYTES));
        assert_eq!(head(&long, &Method::GET).unwrap_err(), AnswerFault::HeadTooLong);
    }

    #[test]
    fn hop_by_hop_lines_stay_here() {
        let text = "HTTP/1.1 200 OK\r\nConnection: x-mine\r\nKeep-Alive: timeout=5\r\nX-Mine: 1\r\nX-Theirs: 2\r\nTrailer: T\r\nContent-Length: 0\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n\r\n";
        let head = head(text, &Method::GET).unwrap().unwrap();
        let mut names: Vec<&str> = head.headers.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["set-cookie", "set-cookie", "x-theirs"]);
    }

    /// Decodes a chunked body that arrives in pieces of `step` bytes.
    fn decode(text: &str, step: usize) -> Result<(String, bool, usize), AnswerFault> {
        let mut decoder = BodyDecoder::Chunked(ChunkPlace::Size);
        let (mut buffer, mut body) = (BytesMut::new(), String::new());
        for piece in text.as_bytes().chunks(step) {
            buffer.extend_from_slice(piece);
            while let Some(data) = decoder.take(&mut buffer)? {
                body.push_str(std::str::from_utf8(&data).unwrap());
            }
        }
        Ok((body, decoder == BodyDecoder::Done, buffer.len()))
    }

    #[test]
    fn chunks_are_decoded_however_they_arrive() {
        let text = "5\r\nhello\r\n1;ext=1\r\n \r\n5\r\nworld\r\n0\r\n\r\n";
        let trailers = "5\r\nhello\r\n1\r\n \r\n5\r\nworld\r\n0\r\nX: y\r\n\r\n";
        for step in 1..=text.len() {
            for text in [text, trailers] {
                assert_eq!(decode(text, step), Ok(("hello world".to_owned(), true, 0)), "{text:?} by {step}");
            }
        }
        assert_eq!(decode("5\r\nhello\r\n0\r\n\r\nHTTP/1.1", 100), Ok(("hello".to_owned(), true, 8)));
        for bad in ["5\nhello", "5\r\nhello0\r\n\r\n", "z\r\n", "\r\n", "5\r\nhelloxx\r\n"] {
            assert_eq!(decode(bad, 100), Err(AnswerFault::BadChunk), "{bad:?}");
        }
        assert_eq!(decode(&"1".repeat(MAX_CHUNK_LINE_BYTES + 1), 9999), Err(AnswerFault::BadChunk));
    }
}
