//! The counts for Prometheus, over HTTP on an address of their own: `GET /metrics`.
//!
//! It only reads. Whoever can reach the address can read; it is for a private network or this machine.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::net::TcpListener as BoundListener;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use crate::authority::Command;
use crate::counts::{CountRow, CountsRequest, RouterCounts};
use crate::protocol::{ControlAnswer, ControlRequest, Nothing};
use crate::state::{BackendState, Health, RouterSnapshot};

/// Connections served at once; more wait. Those who scrape are few.
const MAX_CONNECTIONS: usize = 16;
/// A connection lasts no longer than this, whatever it does.
const CONNECTION_TIME: Duration = Duration::from_secs(30);
/// Longest head of a request, in bytes.
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Pause after a failed accept, as nothing signals that a descriptor is free again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Of the buckets of latencies only every eighth bound is shown, a doubling each: what a dashboard needs, and a fraction of
/// the lines.
const BOUNDS_APART: usize = 8;

/// Serves until dropped.
pub(crate) fn serve(
    listener: BoundListener,
    commands: mpsc::Sender<Command>,
) -> std::io::Result<impl Future<Output = ()>> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    Ok(async move {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let commands = commands.clone();
            tokio::task::spawn_local(async move {
                let service = service_fn(move |request| answer(request, commands.clone()));
                let serving = http1::Builder::new()
                    .max_buf_size(MAX_HEAD_BYTES)
                    .header_read_timeout(None)
                    .serve_connection(TokioIo::new(stream), service);
                // A peer that goes away or is silent is no event.
                drop(timeout(CONNECTION_TIME, serving).await);
                drop(place);
            });
        }
    })
}

async fn answer(
    request: Request<Incoming>,
    commands: mpsc::Sender<Command>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, text) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => {
            let snapshot = Command::ask(&commands, ControlRequest::Get(Nothing {})).await;
            let counts = Command::ask(&commands, ControlRequest::Counts(CountsRequest::default())).await;
            match (snapshot, counts) {
                (ControlAnswer::Ok(snapshot), ControlAnswer::Counts(counts)) => {
                    (StatusCode::OK, text(&snapshot, &counts))
                }
                (ControlAnswer::Error(error), _) | (_, ControlAnswer::Error(error)) => {
                    (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n"))
                }
                _ => (StatusCode::INTERNAL_SERVER_ERROR, "an answer to another request\n".to_owned()),
            }
        }
        _ => (StatusCode::NOT_FOUND, "ask for GET /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let text_format = hyper::header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, text_format);
    Ok(response)
}

/// In Prometheus's text format, version 0.0.4.
fn text(snapshot: &RouterSnapshot, counts: &RouterCounts) -> String {
    let mut out = String::new();
    let totals = [
        ("connections", "gauge", "Client connections now open.", snapshot.connections),
        ("generation", "gauge", "The generation in force on every core.", snapshot.generation),
        ("unrouted_total", "counter", "Requests that no backend could take.", snapshot.unrouted),
        ("refused_total", "counter", "Requests that were not safe to forward.", snapshot.refused),
        (
            "handshakes_failed_total",
            "counter",
            "Connections that ended before TLS was agreed on.",
            snapshot.handshakes_failed,
        ),
        (
            "log_lines_dropped_total",
            "counter",
            "Access log lines that were lost.",
            snapshot.log_lines_dropped,
        ),
        ("held", "gauge", "1 while an alert holds the canary.", u64::from(snapshot.alert.is_some())),
    ];
    for (name, kind, help, value) in totals {
        family(&mut out, name, kind, help);
        line(&mut out, name, &[], &value.to_string());
    }
    family(
        &mut out,
        "canary_share",
        "gauge",
        "The canary's share of the requests, from 0 to 1, in force now.",
    );
    let share = snapshot.canary.as_ref().map_or(0, |canary| canary.share_in_force_per_mille);
    line(&mut out, "canary_share", &[], &format!("{:.3}", f64::from(share) / 1000.0));

    type OfBackend = fn(&crate::state::BackendStatus) -> u64;
    let of_backends: [(&str, &str, OfBackend); 3] = [
        ("backend_up", "1 when its checks pass.", |it| u64::from(it.health == Health::Up)),
        ("backend_ready", "1 when it is to take requests.", |it| {
            u64::from(it.spec.state == BackendState::Ready)
        }),
        ("backend_sessions", "Requests in flight, upgraded connections too.", |it| it.sessions),
    ];
    for (name, help, value) in of_backends {
        family(&mut out, name, "gauge", help);
        for backend in &snapshot.backends {
            let release = backend.spec.release.as_deref().unwrap_or_default();
            let labels = [("backend", backend.spec.name.as_str()), ("release", release)];
            line(&mut out, name, &labels, &value(backend).to_string());
        }
    }
    rows(&mut out, counts);
    out
}

fn rows(out: &mut String, counts: &RouterCounts) {
    family(out, "answers_total", "counter", "Answers of backends, by the class of their status.");
    for row in &counts.rows {
        for (class, count) in ["1xx", "2xx", "3xx", "4xx", "5xx"].iter().zip(row.answers) {
            let [backend, release, route] = labels(row);
            line(out, "answers_total", &[backend, release, route, ("class", class)], &count.to_string());
        }
    }
    type OfRow = fn(&CountRow) -> u64;
    let of_rows: [(&str, &str, &str, OfRow); 6] = [
        ("failed_total", "counter", "Requests that got no answer.", |row| row.failed),
        ("broken_total", "counter", "Answers that broke off.", |row| row.broken),
        ("cancelled_total", "counter", "Requests whose client went away.", |row| row.cancelled),
        ("moved_total", "counter", "Requests that could not be delivered there.", |row| row.moved),
        ("answer_bytes_total", "counter", "Body bytes of answers.", |row| row.bytes),
        ("in_flight", "gauge", "Requests that wait for their answer.", |row| row.in_flight),
    ];
    for (name, kind, help, value) in of_rows {
        family(out, name, kind, help);
        for row in &counts.rows {
            line(out, name, &labels(row), &value(row).to_string());
        }
    }
    let name = "latency_seconds";
    family(
        out,
        name,
        "histogram",
        "Time to the head of the answer. The sum is that of the buckets' upper ends.",
    );
    for row in &counts.rows {
        let [backend, release, route] = labels(row);
        let mut bucket = |bound: &str, count: u64| {
            line(
                out,
                "latency_seconds_bucket",
                &[backend, release, route, ("le", bound)],
                &count.to_string(),
            );
        };
        for (index, bound_us) in
            counts.latency_bounds_us.iter().enumerate().skip(BOUNDS_APART - 1).step_by(BOUNDS_APART)
        {
            let within =
                row.latency.iter().filter(|(place, _)| *place <= index).map(|(_, count)| count).sum();
            bucket(&format!("{}", *bound_us as f64 / 1e6), within);
        }
        let all: u64 = row.latency.iter().map(|(_, count)| count).sum();
        bucket("+Inf", all);
        let last = counts.latency_bounds_us.last().copied().unwrap_or(0);
        let upper = |place: usize| counts.latency_bounds_us.get(place).copied().unwrap_or(last) as f64 / 1e6;
        let sum: f64 = row.latency.iter().map(|&(place, count)| upper(place) * count as f64).sum();
        line(out, "latency_seconds_sum", &labels(row), &sum.to_string());
        line(out, "latency_seconds_count", &labels(row), &all.to_string());
    }
}

fn labels(row: &CountRow) -> [(&'static str, &str); 3] {
    [
        ("backend", row.backend.as_str()),
        ("release", row.release.as_deref().unwrap_or_default()),
        ("route", row.route.as_str()),
    ]
}

fn family(out: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(out, "# HELP greenlight_router_{name} {help}\n# TYPE greenlight_router_{name} {kind}");
}

fn line(out: &mut String, name: &str, labels: &[(&str, &str)], value: &str) {
    let _ = write!(out, "greenlight_router_{name}");
    for (index, (label, text)) in labels.iter().enumerate() {
        let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let _ = write!(out, "{}{label}=\"{escaped}\"", if index == 0 { "{" } else { "," });
    }
    let end = if labels.is_empty() { "" } else { "}" };
    let _ = writeln!(out, "{end} {value}");
}
