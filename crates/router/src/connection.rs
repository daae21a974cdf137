//! One client's connection, from its first byte to its end: TLS, HTTP/1.1 or HTTP/2, upgrades.
//!
//! An HTTP/1.1 connection has one request at a time, one task and one [`Watch`]. Over HTTP/2 each request is a task with a watch
//! of its own: what stands still is reset alone, and the others go on. A connection that is told to end is told so by its
//! protocol's means (`Connection: close`, GOAWAY), and its requests end first.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::rt::Executor;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::config::{
    HTTP_2_CONNECTION_WINDOW_BYTES, HTTP_2_SEND_BUFFER_BYTES, HTTP_2_STREAM_WINDOW_BYTES, MAX_HTTP_2_STREAMS,
    MAX_REQUEST_HEAD_BYTES,
};
use crate::proxy::{Client, Tunnel, answer};
use crate::tls::Transport;
use crate::watch::{Phase, Watch};
use crate::wire::CheckedStream;
use crate::worker::Worker;

/// After an answer that ends the connection while the client still sends, this much is read and thrown away, so that
/// the answer is not lost to a reset.
const LINGER_BYTES: usize = 1024 * 1024;
/// And for this long.
const LINGER: Duration = Duration::from_secs(1);

/// Serves one client connection to its end.
pub(crate) async fn serve(worker: &Rc<Worker>, stream: TcpStream, peer: String) {
    if stream.set_nodelay(true).is_err() {
        // The client is gone already.
        return;
    }
    let stream = match worker.tls() {
        None => Transport::Plain(stream),
        Some(config) => match agree(worker, stream, config).await {
            Some(stream) => stream,
            None => return,
        },
    };
    if stream.is_http_2() {
        serve_http_2(worker, stream, peer.into()).await;
    } else {
        serve_http_1(worker, stream, peer.into()).await;
    }
}

/// The handshake, which takes no longer than a request head may.
async fn agree(worker: &Worker, stream: TcpStream, config: Arc<ServerConfig>) -> Option<Transport> {
    match timeout(worker.limits.head_timeout, Transport::agreed(stream, config)).await {
        Ok(Ok(stream)) => Some(stream),
        // Scanners, clients that distrust the certificate, and such that speak no TLS: a count says it all.
        Ok(Err(_)) | Err(_) => {
            worker.counts.handshakes_failed.fetch_add(1, Relaxed);
            None
        }
    }
}

async fn serve_http_1(worker: &Rc<Worker>, stream: Transport, peer: Rc<str>) {
    let watch = worker.watch();
    let is_tls = stream.is_tls();
    let (stream, findings) = CheckedStream::new(stream, Rc::clone(&watch));
    let client = Rc::new(Client {
        worker: Rc::clone(worker),
        watch: Rc::clone(&watch),
        findings: Some(Rc::clone(&findings)),
        peer,
        is_tls,
        tunnel: RefCell::new(None),
    });
    let service = {
        let client = Rc::clone(&client);
        service_fn(move |request| answer(Rc::clone(&client), request))
    };
    let mut http = http1::Builder::new()
        .max_buf_size(MAX_REQUEST_HEAD_BYTES)
        .max_header_size(MAX_REQUEST_HEAD_BYTES)
        // Deadlines are the watch's.
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(stream), service);
    let mut told_to_end = false;
    let ended = poll_fn(|cx| {
        watch.register(cx);
        if worker.is_stopping() && !told_to_end {
            told_to_end = true;
            Pin::new(&mut http).graceful_shutdown();
        }
        match Pin::new(&mut http).poll(cx) {
            Poll::Ready(ended) => Poll::Ready(Some(ended)),
            // While a request is handled the service answers 504 itself; the rest is cut.
            Poll::Pending if watch.must_be_cut() => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await;
    // A client that breaks the connection or the protocol is not an event of ours.
    let Some(Ok(())) = ended else { return };
    let tunnel = client.tunnel.take();
    let parts = http.into_parts();
    let mut stream = parts.io.into_inner();
    match tunnel {
        Some(tunnel) => join(&watch, stream, tunnel, parts.read_buf).await,
        None if !findings.whole() => linger(&mut stream).await,
        None => {}
    }
}

async fn serve_http_2(worker: &Rc<Worker>, stream: Transport, peer: Rc<str>) {
    let is_tls = stream.is_tls();
    let streams = Streams::new(worker.watch());
    let service = {
        let (worker, streams) = (Rc::clone(worker), streams.clone());
        service_fn(move |request| {
            let watch = worker.watch();
            streams.begun.replace(Some(Rc::clone(&watch)));
            let client = Client {
                worker: Rc::clone(&worker),
                watch,
                findings: None,
                peer: Rc::clone(&peer),
                is_tls,
                tunnel: RefCell::new(None),
            };
            answer(Rc::new(client), request)
        })
    };
    let mut http = pin!(
        http2::Builder::new(streams.clone())
            .max_concurrent_streams(MAX_HTTP_2_STREAMS)
            .max_header_list_size(MAX_REQUEST_HEAD_BYTES as u32)
            .initial_stream_window_size(HTTP_2_STREAM_WINDOW_BYTES)
            .initial_connection_window_size(HTTP_2_CONNECTION_WINDOW_BYTES)
            .max_send_buf_size(HTTP_2_SEND_BUFFER_BYTES)
            .serve_connection(TokioIo::new(stream), service)
    );
    let mut told_to_end = false;
    // How it ends, a client that breaks the protocol included, is not an event of ours.
    poll_fn(|cx| {
        streams.idle.register(cx);
        let is_idle = streams.open.get() == 0 && streams.idle.is_over();
        if !told_to_end && (worker.is_leaving() || is_idle) {
            told_to_end = true;
            // What is left of it may take as long as a connection may be idle: a client that does not hear GOAWAY is cut.
            streams.idle.touch();
            http.as_mut().graceful_shutdown();
        }
        match http.as_mut().poll(cx) {
            Poll::Pending if told_to_end && streams.open.get() == 0 && streams.idle.is_over() => {
                Poll::Ready(())
            }
            Poll::Pending => Poll::Pending,
            Poll::Ready(_) => Poll::Ready(()),
        }
    })
    .await;
}

/// The requests of one HTTP/2 connection, as tasks.
#[derive(Clone)]
struct Streams {
    /// The watch of the request that was just begun: its task is given to the executor right behind the service's call.
    begun: Rc<RefCell<Option<Rc<Watch>>>>,
    /// Requests that are not answered to their end.
    open: Rc<Cell<usize>>,
    /// For how long there has been none.
    idle: Rc<Watch>,
}

impl Streams {
    fn new(idle: Rc<Watch>) -> Self {
        Self { begun: Rc::default(), open: Rc::default(), idle }
    }
}

impl<F: Future + 'static> Executor<F> for Streams {
    fn execute(&self, future: F) {
        let watch = self.begun.take();
        let open = OpenStream::new(self);
        tokio::task::spawn_local(async move {
            let mut future = pin!(future);
            // Dropping what stands still resets its stream.
            poll_fn(|cx| poll_watched(future.as_mut(), watch.as_deref(), cx)).await;
            drop(open);
        });
    }
}

fn poll_watched<F: Future>(future: Pin<&mut F>, watch: Option<&Watch>, cx: &mut Context<'_>) -> Poll<()> {
    if let Some(watch) = watch {
        watch.register(cx);
    }
    match future.poll(cx) {
        Poll::Pending if watch.is_some_and(Watch::must_be_cut) => Poll::Ready(()),
        Poll::Pending => Poll::Pending,
        Poll::Ready(_) => Poll::Ready(()),
    }
}

/// Counts a request of an HTTP/2 connection for as long as it lives.
struct OpenStream {
    open: Rc<Cell<usize>>,
    idle: Rc<Watch>,
}

impl OpenStream {
    fn new(streams: &Streams) -> Self {
        streams.open.set(streams.open.get() + 1);
        Self { open: Rc::clone(&streams.open), idle: Rc::clone(&streams.idle) }
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.open.set(self.open.get() - 1);
        self.idle.touch();
    }
}

/// Carries bytes both ways between an upgraded client and its backend, until both have ended or nothing moves.
async fn join(watch: &Watch, mut client: CheckedStream, mut tunnel: Tunnel, from_client: Bytes) {
    watch.enter(Phase::Tunnel);
    client.stop_following();
    let mut carrying = std::pin::pin!(async {
        tunnel.stream.write_all(&from_client).await?;
        client.write_all(&tunnel.first).await?;
        client.flush().await?;
        copy_bidirectional(&mut client, &mut tunnel.stream).await
    });
    // Either end may break off; both are then closed, which is all there is to say.
    poll_fn(|cx| {
        watch.register(cx);
        match carrying.as_mut().poll(cx) {
            Poll::Pending if !watch.is_over() => Poll::Pending,
            Poll::Pending | Poll::Ready(_) => Poll::Ready(()),
        }
    })
    .await;
}

/// Reads on for a moment behind a final answer, see [`LINGER_BYTES`].
async fn linger(stream: &mut CheckedStream) {
    stream.stop_following();
    let mut rubbish = vec![0; 16 * 1024];
    let reading = async {
        let mut left = LINGER_BYTES;
        while left > 0 {
            match stream.read(&mut rubbish).await {
                Ok(0) | Err(_) => return,
                Ok(count) => left = left.saturating_sub(count),
            }
        }
    };
    // Whether the client stopped sending or the time is up: the connection is closed.
    drop(timeout(LINGER, reading).await);
}
