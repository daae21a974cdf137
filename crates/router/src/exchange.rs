//! One request and its answer on one connection to a backend.
//!
//! The request head goes out from one buffer in one write. The request body is passed on while the answer is already
//! being waited for or read, because a backend may answer early. Both directions are pulled: nothing is read from one
//! side before the other has taken what was read before, so a slow reader holds back a fast writer.
//!
//! The connection returns to its pool only after a clean end: the whole request sent, the whole answer read, no byte
//! left over, and neither side having asked to close.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::Method;
use hyper::StatusCode;
use hyper::body::{Body, Incoming};
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;

use crate::answer::{AnswerFault, AnswerHead, BodyDecoder, take_head};
use crate::backend::Slot;
use crate::balance::Entry;
use crate::config::{MAX_INFORMATIONAL_ANSWERS, READ_BUFFER_BYTES};
use crate::watch::Watch;
use crate::worker::Worker;

/// With less free space than this the shared read buffer is renewed.
const MIN_READ_BYTES: usize = 4096;
/// Pieces that are written in one system call.
const MAX_WRITE_PIECES: usize = 4;

/// Why there is no whole answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExchangeError {
    #[error("the backend closed the connection before it answered")]
    ClosedBeforeAnswer,
    #[error("the connection to the backend broke within its answer")]
    Broken(#[source] io::Error),
    #[error("the backend's answer is not valid: {0}")]
    Answer(#[from] AnswerFault),
    #[error("the backend did not answer in time")]
    TimedOut,
    #[error("the request body could not be read to its end")]
    RequestBody(#[source] hyper::Error),
    #[error("the request body is longer than {limit} bytes")]
    RequestBodyTooLong { limit: u64 },
}

impl ExchangeError {
    /// Whether the backend is to blame, rather than the client.
    pub(crate) fn is_of_backend(&self) -> bool {
        !matches!(self, Self::RequestBody(_) | Self::RequestBodyTooLong { .. })
    }
}

/// Where a request may be sent again, with its body.
#[derive(Debug)]
pub(crate) enum Retry {
    Here(Option<RequestBody>),
    Elsewhere(Option<RequestBody>),
}

/// A request in flight at a backend, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) entry: Rc<Entry>,
    worker: Rc<Worker>,
}

impl Session {
    pub(crate) fn begin(worker: &Rc<Worker>, entry: Rc<Entry>) -> Self {
        let session = Self { entry, worker: Rc::clone(worker) };
        session.slot().sessions.fetch_add(1, Relaxed);
        session
    }

    pub(crate) fn slot(&self) -> &Slot {
        self.entry.backend.slot(self.worker.index)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.slot().sessions.fetch_sub(1, Relaxed);
    }
}

/// A request body on its way to a backend.
#[derive(Debug)]
pub(crate) struct RequestBody {
    incoming: Incoming,
    chunked: bool,
    taken: u64,
    limit: u64,
}

impl RequestBody {
    /// `chunked` when its length is not known. More than `limit` bytes are refused.
    pub(crate) fn new(incoming: Incoming, chunked: bool, limit: u64) -> Self {
        Self { incoming, chunked, taken: 0, limit }
    }

    /// Reads what is left, for an answer that needs none of it. Whether its end came, within `limit` bytes and the
    /// time of `watch`; if not, the connection cannot be used for another request.
    pub(crate) async fn discard(mut self, limit: usize, watch: &Watch) -> bool {
        let mut discarded = 0;
        poll_fn(|cx| {
            while discarded <= limit && !watch.is_over() {
                match ready!(pin!(self.incoming.frame()).poll(cx)) {
                    Some(Ok(frame)) => discarded += frame.data_ref().map_or(0, Bytes::len),
                    Some(Err(_)) => return Poll::Ready(false),
                    None => return Poll::Ready(true),
                }
            }
            Poll::Ready(false)
        })
        .await
    }
}

/// How far the request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sending {
    /// Something is left to send.
    Open,
    /// All of it was sent.
    Sent,
    /// It could not be sent. An answer may still come.
    Failed,
}

/// One request and its answer.
#[derive(Debug)]
pub(crate) struct Exchange {
    stream: TcpStream,
    session: Session,
    reused: bool,
    outbox: VecDeque<Bytes>,
    request_body: Option<RequestBody>,
    /// Something of the body, or its end, was taken: it cannot be sent again.
    body_begun: bool,
    sending: Sending,
    accepted_bytes: u64,
    buffer: BytesMut,
    anything_read: bool,
    reusable: bool,
    decoder: BodyDecoder,
}

impl Exchange {
    /// Begins by writing `head`, as far as the socket takes it at once.
    pub(crate) fn begin(
        stream: TcpStream,
        reused: bool,
        session: Session,
        head: &[u8],
        request_body: Option<RequestBody>,
    ) -> Self {
        session.slot().requests.fetch_add(1, Relaxed);
        let mut exchange = Self {
            stream,
            session,
            reused,
            outbox: VecDeque::new(),
            request_body,
            body_begun: false,
            sending: Sending::Open,
            accepted_bytes: 0,
            buffer: BytesMut::new(),
            anything_read: false,
            reusable: false,
            decoder: BodyDecoder::Done,
        };
        let written = match exchange.stream.try_write(head) {
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(_) => {
                exchange.sending = Sending::Failed;
                return exchange;
            }
        };
        exchange.accepted_bytes = written as u64;
        if written < head.len() {
            exchange.outbox.push_back(Bytes::copy_from_slice(&head[written..]));
        }
        exchange
    }

    /// Sends what can be sent and waits for the head of the answer.
    pub(crate) fn poll_answer(
        &mut self,
        cx: &mut Context<'_>,
        watch: &Watch,
        method: &Method,
        upgrading: bool,
        informational: &mut u32,
    ) -> Poll<Result<AnswerHead, ExchangeError>> {
        if watch.is_over() {
            return Poll::Ready(Err(ExchangeError::TimedOut));
        }
        if self.sending == Sending::Open
            && let Poll::Ready(Err(error)) = self.poll_send(cx, watch)
        {
            return Poll::Ready(Err(error));
        }
        loop {
            if !self.buffer.is_empty()
                && let Some(head) = take_head(&mut self.buffer, method)?
            {
                if head.status == StatusCode::SWITCHING_PROTOCOLS {
                    let fault = AnswerFault::UnaskedUpgrade;
                    return Poll::Ready(if upgrading { Ok(head) } else { Err(fault.into()) });
                }
                if head.status.is_informational() {
                    *informational += 1;
                    if *informational > MAX_INFORMATIONAL_ANSWERS {
                        return Poll::Ready(Err(AnswerFault::TooManyInformational.into()));
                    }
                    continue;
                }
                self.reusable = head.reusable;
                self.decoder = head.body;
                return Poll::Ready(Ok(head));
            }
            match ready!(self.poll_fill(cx)) {
                Ok(0) if self.anything_read => {
                    return Poll::Ready(Err(ExchangeError::Broken(io::ErrorKind::UnexpectedEof.into())));
                }
                Ok(0) => return Poll::Ready(Err(ExchangeError::ClosedBeforeAnswer)),
                Err(_) if !self.anything_read => {
                    return Poll::Ready(Err(ExchangeError::ClosedBeforeAnswer));
                }
                Err(error) => return Poll::Ready(Err(ExchangeError::Broken(error))),
                Ok(_) => {}
            }
        }
    }

    /// The next piece of the answer's body; `None` at its end.
    pub(crate) fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        watch: &Watch,
    ) -> Poll<Option<Result<Bytes, ExchangeError>>> {
        // An early answer: the request is still being sent. If the client fails now, the answer does not change.
        if self.sending == Sending::Open && matches!(self.poll_send(cx, watch), Poll::Ready(Err(_))) {
            self.sending = Sending::Failed;
        }
        loop {
            if let Some(data) = self.decoder.take(&mut self.buffer)? {
                watch.touch();
                return Poll::Ready(Some(Ok(data)));
            }
            if self.decoder == BodyDecoder::Done {
                return Poll::Ready(None);
            }
            match ready!(self.poll_fill(cx)) {
                Ok(0) if self.decoder == BodyDecoder::UntilClose => self.decoder = BodyDecoder::Done,
                Ok(0) => {
                    let error = io::ErrorKind::UnexpectedEof.into();
                    return Poll::Ready(Some(Err(ExchangeError::Broken(error))));
                }
                Ok(_) => {}
                Err(error) => return Poll::Ready(Some(Err(ExchangeError::Broken(error)))),
            }
        }
    }

    /// What the head said about the rest of the body.
    pub(crate) fn body_left(&self) -> Option<u64> {
        self.decoder.left()
    }

    pub(crate) fn is_done(&self) -> bool {
        self.decoder == BodyDecoder::Done
    }

    /// Whether all of the request was sent, or cannot be.
    pub(crate) fn is_sent(&self) -> bool {
        self.sending != Sending::Open
    }

    /// Body bytes that came with the head.
    pub(crate) fn first_piece(&mut self) -> Result<Option<Bytes>, AnswerFault> {
        self.decoder.take(&mut self.buffer)
    }

    /// Ends it: the connection goes back to its pool if the end was clean.
    pub(crate) fn finish(self) {
        let sent = self.sending == Sending::Sent;
        if self.reusable && sent && self.is_done() && self.buffer.is_empty() {
            let worker = &self.session.worker;
            self.session.entry.pool.put(self.stream, worker.clock.now());
        }
    }

    /// For an upgraded connection: the stream, what was already read from it, and the session that goes on.
    pub(crate) fn into_tunnel(self) -> (TcpStream, Bytes, Session) {
        (self.stream, self.buffer.freeze(), self.session)
    }

    /// Whether some of the request's body has not been read from the client, and may never be.
    pub(crate) fn has_unread_body(&self) -> bool {
        self.request_body.as_ref().is_some_and(|body| !body.incoming.is_end_stream())
    }

    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    /// After `error`: whether and where the request may be sent again, with its body, of which nothing was taken.
    ///
    /// A connection that was kept and is closed before a byte of an answer most likely was idle too long: the same backend
    /// is asked over a new one, if the method is idempotent or not one byte of the request was taken by this side's kernel.
    /// A new connection that breaks is the backend's failure: another one is asked, if the method is idempotent.
    pub(crate) fn into_retry(self, error: &ExchangeError, idempotent: bool) -> Option<Retry> {
        if !matches!(error, ExchangeError::ClosedBeforeAnswer) || self.body_begun {
            return None;
        }
        match self.reused {
            true if idempotent || self.accepted_bytes == 0 => Some(Retry::Here(self.request_body)),
            false if idempotent => Some(Retry::Elsewhere(self.request_body)),
            _ => None,
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, watch: &Watch) -> Poll<Result<(), ExchangeError>> {
        loop {
            while !self.outbox.is_empty() {
                match ready!(self.poll_write_out(cx)) {
                    Ok(()) => watch.touch(),
                    Err(_) => {
                        // The backend may have answered early and closed: whether it did is seen by reading.
                        self.sending = Sending::Failed;
                        return Poll::Ready(Ok(()));
                    }
                }
            }
            let Some(body) = &mut self.request_body else {
                self.sending = Sending::Sent;
                return Poll::Ready(Ok(()));
            };
            let polled = ready!(pin!(body.incoming.frame()).poll(cx));
            self.body_begun = true;
            match polled {
                Some(Ok(frame)) => {
                    // Trailers end here, as they may: nobody behind us has asked for them.
                    let Ok(data) = frame.into_data() else { continue };
                    if data.is_empty() {
                        continue;
                    }
                    body.taken += data.len() as u64;
                    if body.taken > body.limit {
                        return Poll::Ready(Err(ExchangeError::RequestBodyTooLong { limit: body.limit }));
                    }
                    if body.chunked {
                        self.outbox.push_back(Bytes::from(format!("{:x}\r\n", data.len())));
                        self.outbox.push_back(data);
                        self.outbox.push_back(Bytes::from_static(b"\r\n"));
                    } else {
                        self.outbox.push_back(data);
                    }
                }
                Some(Err(error)) => return Poll::Ready(Err(ExchangeError::RequestBody(error))),
                None => {
                    if body.chunked {
                        self.outbox.push_back(Bytes::from_static(b"0\r\n\r\n"));
                    }
                    self.request_body = None;
                }
            }
        }
    }

    fn poll_write_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut pieces = [IoSlice::new(&[]); MAX_WRITE_PIECES];
        let count = self.outbox.len().min(MAX_WRITE_PIECES);
        for (piece, bytes) in pieces.iter_mut().zip(&self.outbox) {
            *piece = IoSlice::new(bytes);
        }
        let mut written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, &pieces[..count]))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.accepted_bytes += written as u64;
        while let Some(front) = self.outbox.front_mut() {
            let step = front.len().min(written);
            front.advance(step);
            written -= step;
            if !front.is_empty() {
                break;
            }
            self.outbox.pop_front();
        }
        Poll::Ready(Ok(()))
    }

    /// Reads more into the buffer. The bytes are read into a buffer that all exchanges of the worker share, and split
    /// off without a copy: an idle connection then holds no memory.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut shared = self.session.worker.read_buffer.borrow_mut();
        if shared.capacity() < MIN_READ_BYTES {
            shared.reserve(READ_BUFFER_BYTES);
        }
        let count = ready!(pin!(self.stream.read_buf(&mut *shared)).poll(cx))?;
        let came = shared.split();
        drop(shared);
        if count > 0 {
            self.anything_read = true;
            if self.buffer.is_empty() {
                self.buffer = came;
            } else {
                self.buffer.extend_from_slice(&came);
            }
        }
        Poll::Ready(Ok(count))
    }
}
