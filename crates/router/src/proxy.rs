//! What happens to one request: checked, given to a backend, moved to another where that is safe, answered.
//!
//! A request is moved when it cannot have been processed: the connection could not be opened, or an idle connection
//! turned out to have been closed. An idempotent one is moved once more, to another backend, when a backend failed before a
//! byte of its answer (see [`Exchange::into_retry`]). Everything else is answered as it is.

use std::cell::RefCell;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Request, Response, StatusCode};
use tokio::net::TcpStream;

use crate::balance::Entry;
use crate::body::{AnswerBody, Record};
use crate::config::MAX_ATTEMPTS;
use crate::exchange::{Exchange, ExchangeError, RequestBody, Retry, Session};
use crate::request::{
    Checked, Framing, Origin, Refusal, RequestId, check, is_idempotent, is_websocket, write_head,
};
use crate::standing::MaintenancePage;
use crate::watch::{Phase, Watch};
use crate::wire::Findings;
use crate::worker::Worker;

/// Request bodies up to this size are read and thrown away to keep the connection, when no backend wants them.
const DISCARD_BYTES: usize = 64 * 1024;
/// When a client may ask again after a 503, in seconds: a check interval.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// What the requests of one HTTP/1 connection have in common. Over HTTP/2 each request has one of its own.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) worker: Rc<Worker>,
    pub(crate) watch: Rc<Watch>,
    /// What was found in the bytes of an HTTP/1 connection. HTTP/2 has none: its frames leave no doubt where a request ends.
    pub(crate) findings: Option<Rc<Findings>>,
    /// The client's address as text.
    pub(crate) peer: Rc<str>,
    /// Whether the client speaks TLS.
    pub(crate) is_tls: bool,
    /// Set when an answer of 101 was given.
    pub(crate) tunnel: RefCell<Option<Tunnel>>,
}

/// The backend's side of an upgraded connection. The session and the record last as long as it does.
#[derive(Debug)]
pub(crate) struct Tunnel {
    pub(crate) stream: TcpStream,
    /// What the backend sent behind its answer.
    pub(crate) first: Bytes,
    pub(crate) _session: Session,
    pub(crate) _record: Record,
}

/// Answers one request.
pub(crate) async fn answer(
    client: Rc<Client>,
    request: Request<Incoming>,
) -> Result<Response<AnswerBody>, Infallible> {
    let worker = &client.worker;
    client.watch.enter(Phase::Handling);
    let (parts, body) = request.into_parts();
    let request_id = RequestId::choose(&parts.headers, || {
        u128::from(worker.random.next()) << 64 | u128::from(worker.random.next())
    });
    let record = Record::begin(worker, &client.watch, &client.peer, &parts, request_id);
    let limit = worker.limits.max_body_bytes;
    let findings = client.findings.as_deref();
    let checked = findings
        .map_or(Ok(()), Findings::next)
        .map_err(Refusal::from)
        .and_then(|()| check(&parts, &body, findings, client.is_tls, limit));
    let answer = match checked {
        Ok(checked) => {
            let body = match checked.framing {
                Framing::None | Framing::Length(0) => None,
                Framing::Length(_) => Some(RequestBody::new(body, false, limit)),
                Framing::Chunked => Some(RequestBody::new(body, true, limit)),
            };
            route(&client, &parts, checked, body, record).await
        }
        Err(refusal) => {
            worker.counts.refused.fetch_add(1, Relaxed);
            closing(plain(refusal.status(), &refusal.to_string(), record))
        }
    };
    let is_tunnel = client.tunnel.borrow().is_some();
    client.watch.enter(if is_tunnel { Phase::Tunnel } else { Phase::Answering });
    // HTTP/2 has GOAWAY for it.
    let is_last = worker.is_leaving() && findings.is_some() && !is_tunnel;
    Ok(if is_last { closing(answer) } else { answer })
}

/// Gives the request to backends until one answers, or none is left.
async fn route(
    client: &Client,
    parts: &Parts,
    checked: Checked,
    mut body: Option<RequestBody>,
    mut record: Record,
) -> Response<AnswerBody> {
    let worker = &client.worker;
    if let Some(page) = worker.maintenance() {
        return in_maintenance(client, &page, body, record).await;
    }
    if !worker.pass_pause().await {
        return unavailable(client, "requests are paused here; too many wait, or for too long", body, record)
            .await;
    }
    // The pause is not the backend's time.
    client.watch.touch();
    let (wish, route) = worker.place(parts);
    record.is_counted = worker.is_counting && !wish.is_tester;
    record.route = route;
    let idempotent = is_idempotent(&parts.method);
    // A backend whose connection could not be opened, or that failed, is not asked again; one that closed an idle
    // connection is, once, over a new one.
    let mut unreachable: Vec<Rc<Entry>> = Vec::new();
    // Set when a backend failed with the request in its hands. Only one may: a request that kills what it meets must not
    // meet all.
    let mut first_failure: Option<ExchangeError> = None;
    let mut again: Option<Rc<Entry>> = None;
    for _ in 0..MAX_ATTEMPTS {
        let again_here = again.take().filter(|entry| entry.pool.is_open());
        let pooled_is_fine = again_here.is_none();
        let entry = match again_here {
            Some(entry) => entry,
            None => {
                let Some((entry, reason)) = worker.choose(wish, &unreachable) else { break };
                record.chosen_by = Some(reason);
                entry
            }
        };
        let session = Session::begin(worker, Rc::clone(&entry));
        // A request that must not be sent twice asks the kernel whether the connection still stands.
        let pooled = if pooled_is_fine { entry.pool.take(!idempotent || body.is_some()) } else { None };
        let reused = pooled.is_some();
        let stream = match pooled {
            Some(stream) => stream,
            None => match connect(worker, &session).await {
                Ok(stream) => stream,
                Err(_) => {
                    session.slot().retries.fetch_add(1, Relaxed);
                    record.sent_to(&session);
                    record.moved();
                    unreachable.push(entry);
                    continue;
                }
            },
        };
        record.sent_to(&session);
        client.watch.touch();
        let mut exchange = {
            let mut head = worker.head_buffer.borrow_mut();
            head.clear();
            let trusted = worker.trust_forwarded;
            let (peer, is_tls) = (&*client.peer, client.is_tls);
            let origin = Origin { peer, is_tls, trusted, id: &record.request_id };
            write_head(&mut head, parts, checked, &origin, entry.backend.address);
            Exchange::begin(stream, reused, session, &head, body.take())
        };
        let mut informational = 0;
        let answered = poll_fn(|cx| {
            exchange.poll_answer(cx, &client.watch, &parts.method, checked.upgrading, &mut informational)
        })
        .await;
        match answered {
            Ok(head) => {
                if head.status.is_server_error() {
                    exchange.session().slot().answers_5xx.fetch_add(1, Relaxed);
                }
                record.answered(head.status.as_u16());
                worker.judged(&entry, !head.status.is_server_error());
                let mut answer = Response::new(());
                *answer.status_mut() = head.status;
                *answer.headers_mut() = head.headers;
                if head.status == StatusCode::SWITCHING_PROTOCOLS {
                    return upgraded(client, answer, head.upgrade, exchange, record);
                }
                // An error that comes early ends the connection: the rest of the body is for nobody. An early success is
                // a conversation in both directions, and the request may well end in order.
                let unread = exchange.has_unread_body()
                    && (head.status.is_client_error() || head.status.is_server_error());
                let answer = match exchange.first_piece() {
                    Ok(first) => {
                        let body = AnswerBody::of(exchange, first, &client.watch, record);
                        answer.map(|()| body)
                    }
                    Err(fault) => {
                        exchange.session().slot().errors.fetch_add(1, Relaxed);
                        record.broke_off();
                        failed(&fault.into(), record)
                    }
                };
                return if unread { closing(answer) } else { answer };
            }
            Err(error) => {
                let slot = entry.backend.slot(worker.index);
                let unread = exchange.has_unread_body();
                let retry = exchange.into_retry(&error, idempotent);
                if let Some(Retry::Here(unsent)) = retry {
                    // The backend never saw it.
                    slot.requests.fetch_sub(1, Relaxed);
                    slot.retries.fetch_add(1, Relaxed);
                    record.moved();
                    body = unsent;
                    again = Some(Rc::clone(&entry));
                    continue;
                }
                if error.is_of_backend() {
                    slot.errors.fetch_add(1, Relaxed);
                    worker.judged(&entry, false);
                    record.failed();
                }
                match retry {
                    Some(Retry::Elsewhere(unsent)) if first_failure.is_none() => {
                        record.retried += 1;
                        body = unsent;
                        first_failure = Some(error);
                        unreachable.push(entry);
                    }
                    _ => {
                        let answer = failed(&error, record);
                        return if unread { closing(answer) } else { answer };
                    }
                }
            }
        }
    }
    if let Some(error) = first_failure {
        let whole = discard(client, body).await;
        let answer = failed(&error, record);
        return if whole { answer } else { closing(answer) };
    }
    worker.counts.unrouted.fetch_add(1, Relaxed);
    unavailable(client, "no backend can take this request now", body, record).await
}

/// The answer when a request is not given to any backend. The connection stays if the rest of the body is short.
async fn unavailable(
    client: &Client,
    why: &str,
    body: Option<RequestBody>,
    record: Record,
) -> Response<AnswerBody> {
    let whole = discard(client, body).await;
    let mut answer = plain(StatusCode::SERVICE_UNAVAILABLE, why, record);
    answer.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
    if whole { answer } else { closing(answer) }
}

/// The same with the page of a maintenance.
async fn in_maintenance(
    client: &Client,
    page: &MaintenancePage,
    body: Option<RequestBody>,
    mut record: Record,
) -> Response<AnswerBody> {
    let whole = discard(client, body).await;
    record.answered(StatusCode::SERVICE_UNAVAILABLE.as_u16());
    let mut answer = Response::new(AnswerBody::whole(Bytes::from(page.body.clone()), record));
    *answer.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    let headers = answer.headers_mut();
    // Both were looked at when the state was set.
    if let Ok(content_type) = HeaderValue::from_str(&page.content_type) {
        headers.insert(header::CONTENT_TYPE, content_type);
    }
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Some(seconds) = page.retry_after_seconds {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    if whole { answer } else { closing(answer) }
}

async fn discard(client: &Client, body: Option<RequestBody>) -> bool {
    match body {
        Some(body) => body.discard(DISCARD_BYTES, &client.watch).await,
        None => true,
    }
}

async fn connect(worker: &Worker, session: &Session) -> io::Result<TcpStream> {
    let backend = &session.entry.backend;
    let connected = tokio::time::timeout(worker.limits.connect_timeout, TcpStream::connect(backend.address))
        .await
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "no connection in time")))
        .and_then(|stream| stream.set_nodelay(true).map(|()| stream));
    match &connected {
        Ok(_) => backend.connected(),
        Err(error) => {
            session.slot().connect_failures.fetch_add(1, Relaxed);
            backend.connect_failed(worker.fall, &error.to_string());
        }
    }
    connected
}

/// Passes a 101 on and leaves the backend's side for the connection's task, which joins both.
fn upgraded(
    client: &Client,
    mut answer: Response<()>,
    protocol: Option<HeaderValue>,
    exchange: Exchange,
    mut record: Record,
) -> Response<AnswerBody> {
    let Some(protocol) = protocol.filter(is_websocket) else {
        exchange.session().slot().errors.fetch_add(1, Relaxed);
        record.broke_off();
        return plain(
            StatusCode::BAD_GATEWAY,
            "the backend switched to another protocol than was asked for",
            record,
        );
    };
    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    answer.headers_mut().insert(header::UPGRADE, protocol);
    let (stream, first, session) = exchange.into_tunnel();
    client.tunnel.replace(Some(Tunnel { stream, first, _session: session, _record: record }));
    answer.map(|()| AnswerBody::empty(None))
}

/// The answer when a backend, or the client within its body, failed.
fn failed(error: &ExchangeError, record: Record) -> Response<AnswerBody> {
    let status = match error {
        ExchangeError::TimedOut => StatusCode::GATEWAY_TIMEOUT,
        ExchangeError::RequestBody(_) => StatusCode::BAD_REQUEST,
        ExchangeError::RequestBodyTooLong { .. } => StatusCode::PAYLOAD_TOO_LARGE,
        ExchangeError::ClosedBeforeAnswer | ExchangeError::Broken(_) | ExchangeError::Answer(_) => {
            StatusCode::BAD_GATEWAY
        }
    };
    plain(status, &error.to_string(), record)
}

/// The last answer of its connection: behind it lies what was not read, or cannot be trusted.
fn closing(mut answer: Response<AnswerBody>) -> Response<AnswerBody> {
    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    answer
}

/// A short answer of our own. It names no backend: that is in the access log.
fn plain(status: StatusCode, text: &str, mut record: Record) -> Response<AnswerBody> {
    record.status = status.as_u16();
    let mut answer = Response::new(AnswerBody::whole(Bytes::from(format!("{status}: {text}\n")), record));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}
