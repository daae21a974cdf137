//! The body of an answer on its way to the client, and the record that is written when it ends.

use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper::http::request::Parts;
use hyper::{Method, Uri, Version};

use crate::access_log::{AccessLine, micros};
use crate::balance::Reason;
use crate::exchange::{Exchange, ExchangeError, Session};
use crate::request::RequestId;
use crate::tally::{Counted, Tally};
use crate::watch::{Phase, Watch};
use crate::worker::Worker;

/// The status that is logged when the client went away before there was an answer.
const CLIENT_CLOSED: u16 = 499;

/// What is known of one request; it becomes a line of the access log when dropped.
#[derive(Debug)]
pub(crate) struct Record {
    worker: Rc<Worker>,
    watch: Rc<Watch>,
    started: Instant,
    peer: Rc<str>,
    version: Version,
    method: Method,
    uri: Uri,
    pub(crate) request_id: RequestId,
    pub(crate) status: u16,
    /// The row by which it is counted, and whether it is.
    pub(crate) route: usize,
    pub(crate) is_counted: bool,
    pub(crate) chosen_by: Option<Reason>,
    pub(crate) retried: u32,
    incomplete: bool,
    bytes: u64,
    tally: Option<Rc<Tally>>,
    is_canary: bool,
    counted: Option<Counted>,
}

impl Record {
    pub(crate) fn begin(
        worker: &Rc<Worker>,
        watch: &Rc<Watch>,
        peer: &Rc<str>,
        parts: &Parts,
        request_id: RequestId,
    ) -> Self {
        Self {
            worker: Rc::clone(worker),
            watch: Rc::clone(watch),
            started: Instant::now(),
            peer: Rc::clone(peer),
            version: parts.version,
            method: parts.method.clone(),
            uri: parts.uri.clone(),
            request_id,
            status: CLIENT_CLOSED,
            route: 0,
            is_counted: false,
            chosen_by: None,
            retried: 0,
            incomplete: false,
            bytes: 0,
            tally: None,
            is_canary: false,
            counted: None,
        }
    }

    /// The backend that the request goes to now, with the release that it runs at this moment.
    pub(crate) fn sent_to(&mut self, session: &Session) {
        let tally = session.entry.tally();
        self.is_canary = session.entry.is_canary();
        self.counted = self.is_counted.then(|| Counted::begin(Rc::clone(&tally), self.route));
        self.tally = Some(tally);
    }

    /// The backend could not be given the request; another will.
    pub(crate) fn moved(&mut self) {
        self.retried += 1;
        self.tally = None;
        if let Some(counted) = self.counted.take() {
            counted.moved();
        }
    }

    /// The head of the backend's answer came.
    pub(crate) fn answered(&mut self, status: u16) {
        self.status = status;
        if let Some(counted) = &mut self.counted {
            counted.answered(status);
        }
    }

    /// The backend failed to answer.
    pub(crate) fn failed(&mut self) {
        if let Some(counted) = &mut self.counted {
            counted.failed();
        }
    }

    /// The backend's answer broke off, or was not one.
    pub(crate) fn broke_off(&mut self) {
        self.incomplete = true;
        if let Some(counted) = &self.counted {
            counted.broke_off();
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if self.watch.phase() != Phase::Tunnel {
            self.watch.enter(Phase::Idle);
        }
        if let Some(counted) = &self.counted {
            counted.passed_on(self.bytes);
        }
        let Some(one_in) = self.worker.log.draw(&self.worker.random) else { return };
        let tally = self.tally.as_deref();
        self.worker.log.add(AccessLine {
            time: jiff::Timestamp::now(),
            peer: &self.peer,
            version: self.version,
            method: self.method.as_str(),
            path: self.uri.path(),
            status: self.status,
            bytes: self.bytes,
            duration_us: micros(self.started.elapsed()),
            backend: tally.map(|tally| &*tally.backend),
            release: tally.and_then(|tally| tally.release.as_deref()),
            is_canary: self.is_canary,
            chosen_by: self.chosen_by.filter(|_| tally.is_some()),
            retried: self.retried,
            request_id: self.request_id.as_str(),
            incomplete: self.incomplete,
            one_in,
        });
    }
}

/// The body of an answer.
#[derive(Debug)]
pub(crate) struct AnswerBody {
    source: Source,
    /// Kept until the body ends. `None` for the head of an upgrade, whose record goes on with the tunnel.
    record: Option<Record>,
}

#[derive(Debug)]
enum Source {
    Empty,
    Whole(Bytes),
    Stream { first: Option<Bytes>, exchange: Box<Exchange>, watch: Rc<Watch> },
}

impl AnswerBody {
    pub(crate) fn empty(record: Option<Record>) -> Self {
        Self { source: Source::Empty, record }
    }

    pub(crate) fn whole(text: Bytes, record: Record) -> Self {
        Self { source: Source::Whole(text), record: Some(record) }
    }

    /// An answer whose first body bytes, if there were any, have been taken. What is already whole leaves its
    /// connection free at once.
    pub(crate) fn of(exchange: Exchange, first: Option<Bytes>, watch: &Rc<Watch>, record: Record) -> Self {
        let source = if exchange.is_done() && exchange.is_sent() {
            exchange.finish();
            first.map_or(Source::Empty, Source::Whole)
        } else {
            Source::Stream { first, exchange: Box::new(exchange), watch: Rc::clone(watch) }
        };
        Self { source, record: Some(record) }
    }

    fn took(&mut self, bytes: &Bytes) {
        if let Some(record) = &mut self.record {
            record.bytes += bytes.len() as u64;
        }
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, ExchangeError>>> {
        match std::mem::replace(&mut self.source, Source::Empty) {
            Source::Empty => Poll::Ready(None),
            Source::Whole(bytes) => Poll::Ready(Some(Ok(bytes))),
            Source::Stream { mut first, mut exchange, watch } => {
                let polled = match first.take() {
                    Some(bytes) => Poll::Ready(Some(Ok(bytes))),
                    None => exchange.poll_body(cx, &watch),
                };
                match &polled {
                    Poll::Ready(None) => exchange.finish(),
                    Poll::Ready(Some(Ok(_))) if exchange.is_done() && exchange.is_sent() => exchange.finish(),
                    Poll::Ready(Some(Err(_))) => {
                        exchange.session().slot().errors.fetch_add(1, Relaxed);
                    }
                    Poll::Ready(Some(Ok(_))) | Poll::Pending => {
                        self.source = Source::Stream { first, exchange, watch };
                    }
                }
                polled
            }
        }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = ExchangeError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ExchangeError>>> {
        let polled = ready!(self.poll_data(cx));
        match &polled {
            Some(Ok(bytes)) => self.took(bytes),
            Some(Err(_)) => {
                if let Some(record) = &mut self.record {
                    record.broke_off();
                }
            }
            None => {}
        }
        Poll::Ready(polled.map(|result| result.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.source, Source::Empty)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Empty => SizeHint::with_exact(0),
            Source::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::Stream { first, exchange, .. } => match exchange.body_left() {
                Some(left) => {
                    SizeHint::with_exact(left + first.as_ref().map_or(0, |bytes| bytes.len() as u64))
                }
                None => SizeHint::default(),
            },
        }
    }
}
