//! Real backends and clients over real sockets, shared by the tests of this crate.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "each test file is a crate of its own and uses a part of this"
)]

pub mod encrypted;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use bytes::Bytes;
use greenlight_router::{
    BackendSpec, BackendState, BackendStatus, Health, Router, RouterClient, RouterConfig, RouterHandle,
    RouterSnapshot, RouterState,
};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// Longer than anything here takes; reaching it is a failure, never a wait.
const PATIENCE: Duration = Duration::from_secs(60);

/// Fails the test when `future` does not end.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("never happened: {what}"))
}

/// A backend on hyper's server that can be stopped and started again on its address.
pub struct Backend {
    pub name: &'static str,
    pub address: SocketAddr,
    pub seen: Arc<Seen>,
    task: Option<JoinHandle<()>>,
}

/// What a backend saw and what it is to do.
#[derive(Default)]
pub struct Seen {
    pub requests: AtomicU64,
    pub health_checks: AtomicU64,
    pub sick: AtomicBool,
    pub produced: AtomicU64,
    /// Requests for `/hidden`.
    pub hidden: AtomicU64,
}

pub const PIECE: usize = 64 * 1024;
pub const LARGE: u64 = 1024 * 1024 * 1024;

impl Backend {
    pub async fn start(name: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut backend = Self { name, address, seen: Arc::default(), task: None };
        backend.serve(listener);
        backend
    }

    /// Stops it at once: the listener and every connection are closed, whatever they do.
    pub async fn stop(&mut self) {
        let task = self.task.take().expect("it runs");
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
    }

    pub async fn start_again(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.serve(listener);
    }

    fn serve(&mut self, listener: TcpListener) {
        let (name, seen) = (self.name, Arc::clone(&self.seen));
        self.task = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let seen = Arc::clone(&seen);
                connections.spawn(async move {
                    let service = service_fn(move |request| answer(name, Arc::clone(&seen), request));
                    // A router that goes away is not the backend's failure.
                    drop(
                        hyper::server::conn::http1::Builder::new()
                            .serve_connection(TokioIo::new(stream), service)
                            .await,
                    );
                });
            }
        }));
    }

    pub fn spec(&self) -> BackendSpec {
        BackendSpec {
            name: self.name.to_owned(),
            address: self.address,
            weight: 100,
            state: BackendState::Ready,
            release: Some(format!("release-of-{}", self.name)),
            health: Some("/health".to_owned()),
        }
    }

    pub fn requests(&self) -> u64 {
        self.seen.requests.load(SeqCst)
    }
}

type Answered = Response<BoxBody<Bytes, hyper::Error>>;

async fn answer(name: &str, seen: Arc<Seen>, request: Request<Incoming>) -> Result<Answered, Infallible> {
    let whole = |bytes: Bytes| Full::new(bytes).map_err(|never| match never {}).boxed();
    if request.uri().path() == "/health" {
        seen.health_checks.fetch_add(1, SeqCst);
        let mut response = Response::new(whole(Bytes::new()));
        if seen.sick.load(SeqCst) {
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        }
        return Ok(response);
    }
    seen.requests.fetch_add(1, SeqCst);
    seen.hidden.fetch_add(u64::from(request.uri().path() == "/hidden"), SeqCst);
    let response = match request.uri().path() {
        "/echo" => Response::new(request.into_body().boxed()),
        "/head" => {
            let mut text = format!("{} {}\n", request.method(), request.uri());
            for (name, value) in request.headers() {
                text.push_str(&format!("{name}: {}\n", value.to_str().unwrap()));
            }
            Response::new(whole(text.into()))
        }
        "/large" => {
            let produced = Arc::clone(&seen);
            let piece = Bytes::from(vec![b'x'; PIECE]);
            let pieces = Pieces { left: LARGE / PIECE as u64, piece, seen: produced };
            Response::new(pieces.boxed())
        }
        "/not-modified" => {
            let mut response = Response::new(whole(Bytes::new()));
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            response.headers_mut().insert("etag", "\"1\"".parse().unwrap());
            response
        }
        "/sized" => Response::new(whole(Bytes::from(vec![b'x'; 12_345]))),
        _ => {
            let body = request.into_body().collect().await.map(|body| body.to_bytes().len());
            Response::new(whole(format!("{name} {}", body.unwrap_or(0)).into()))
        }
    };
    Ok(response)
}

/// A stream of equal pieces that counts what was taken.
struct Pieces {
    left: u64,
    piece: Bytes,
    seen: Arc<Seen>,
}

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        if this.left == 0 {
            return std::task::Poll::Ready(None);
        }
        this.left -= 1;
        this.seen.produced.fetch_add(PIECE as u64, SeqCst);
        std::task::Poll::Ready(Some(Ok(Frame::data(this.piece.clone()))))
    }
}

/// A router with a directory of its own.
pub struct Bed {
    pub router: RouterHandle,
    pub directory: tempfile::TempDir,
    pub client: RouterClient,
}

impl Bed {
    /// Starts a router and waits until every ready backend with a health check that shall pass is up.
    pub async fn start(backends: Vec<BackendSpec>) -> Self {
        Self::start_with(backends, |_| {}).await
    }

    pub async fn start_with(backends: Vec<BackendSpec>, change: impl FnOnce(&mut RouterConfig)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut config = RouterConfig::new("127.0.0.1:0".parse().unwrap(), directory.path().join("control"));
        config.workers = 2;
        config.access_log = Some(directory.path().join("access.log"));
        config.health.interval = Duration::from_millis(20);
        change(&mut config);
        let client = RouterClient::new(&config.control);
        let router = Router::start(config, RouterState::new(1, backends)).unwrap();
        let bed = Self { router, directory, client };
        bed.until("every backend was checked", |snapshot| {
            snapshot.backends.iter().all(|backend| {
                backend.health != Health::Checking || backend.spec.state == BackendState::Maintenance
            })
        })
        .await;
        bed
    }

    pub fn address(&self) -> SocketAddr {
        self.router.local_addr()
    }

    pub fn log_path(&self) -> PathBuf {
        self.directory.path().join("access.log")
    }

    /// Waits until the read-back satisfies `condition`. Each look is a round trip over the control socket.
    pub async fn until(&self, what: &str, condition: impl Fn(&RouterSnapshot) -> bool) -> RouterSnapshot {
        within(what, async {
            loop {
                let snapshot = self.client.get().await.unwrap();
                if condition(&snapshot) {
                    return snapshot;
                }
            }
        })
        .await
    }

    pub async fn set_state(&self, name: &str, state: BackendState) -> RouterSnapshot {
        let change = greenlight_router::BackendChange {
            name: name.to_owned(),
            state: Some(state),
            ..Default::default()
        };
        self.client.change(change).await.unwrap()
    }

    /// Sends one request on a connection of its own.
    pub async fn ask(&self, head: &str) -> Answer {
        let mut client = Client::connect(self.address()).await;
        client.ask(head, b"").await.unwrap()
    }
}

pub fn status_of<'a>(snapshot: &'a RouterSnapshot, name: &str) -> &'a BackendStatus {
    snapshot.backends.iter().find(|backend| backend.spec.name == name).unwrap()
}

/// A client that keeps its connection.
pub struct Client {
    pub stream: BufReader<TcpStream>,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

impl Client {
    pub async fn connect(address: SocketAddr) -> Self {
        Self { stream: BufReader::new(TcpStream::connect(address).await.unwrap()) }
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// Sends `METHOD TARGET`, more lines if there are, and a body; reads the whole answer.
    pub async fn ask(&mut self, request: &str, body: &[u8]) -> std::io::Result<Answer> {
        let (line, lines) = request.split_once('\n').unwrap_or((request, ""));
        let mut head = format!("{line} HTTP/1.1\r\nHost: test\r\n");
        for line in lines.lines() {
            head.push_str(line);
            head.push_str("\r\n");
        }
        if !body.is_empty() {
            head.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        self.stream.write_all(head.as_bytes()).await?;
        self.stream.write_all(body).await?;
        self.answer(line.starts_with("HEAD ")).await
    }

    /// Reads one whole answer.
    pub async fn answer(&mut self, to_head: bool) -> std::io::Result<Answer> {
        within("an answer", async {
            let mut answer = self.head().await?;
            let length = answer.header("content-length").map(|length| length.parse::<usize>().unwrap());
            if to_head || answer.status == 204 || answer.status == 304 {
                return Ok(answer);
            }
            if answer.header("transfer-encoding") == Some("chunked") {
                loop {
                    let mut line = String::new();
                    self.stream.read_line(&mut line).await?;
                    let size = usize::from_str_radix(line.trim(), 16).map_err(std::io::Error::other)?;
                    let mut chunk = vec![0; size + 2];
                    self.stream.read_exact(&mut chunk).await?;
                    if size == 0 {
                        return Ok(answer);
                    }
                    answer.body.extend_from_slice(&chunk[..size]);
                }
            }
            match length {
                Some(length) => {
                    answer.body = vec![0; length];
                    self.stream.read_exact(&mut answer.body).await?;
                }
                None => {
                    self.stream.read_to_end(&mut answer.body).await?;
                }
            }
            Ok(answer)
        })
        .await
    }

    /// Reads the head of an answer.
    pub async fn head(&mut self) -> std::io::Result<Answer> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.stream.read_line(&mut head).await? == 0 {
                return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, head));
            }
        }
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Ok(Answer { status, head, body: Vec::new() })
    }

    /// Reads what still comes, until the router closes the connection.
    pub async fn rest(&mut self) -> Vec<u8> {
        within("the end of the connection", async {
            let mut rest = Vec::new();
            match self.stream.read_to_end(&mut rest).await {
                Ok(_) => {}
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
            }
            rest
        })
        .await
    }
}

/// A backend of one answer: for each connection it reads one request head and then does what `behave` does.
pub async fn raw_backend<F, R>(behave: F) -> (SocketAddr, JoinHandle<()>)
where
    F: Fn(String, BufReader<TcpStream>) -> R + Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let behave = Arc::new(behave);
    let task = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let behave = Arc::clone(&behave);
            connections.spawn(async move {
                let mut stream = BufReader::new(stream);
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    if stream.read_line(&mut head).await.unwrap_or(0) == 0 {
                        // A check of the connection, which sends nothing.
                        return;
                    }
                }
                behave(head, stream).await;
            });
        }
    });
    (address, task)
}

/// A backend at `address` that is checked by a connection only.
pub fn plain_spec(name: &str, address: SocketAddr) -> BackendSpec {
    BackendSpec {
        name: name.to_owned(),
        address,
        weight: 100,
        state: BackendState::Ready,
        release: None,
        health: None,
    }
}
