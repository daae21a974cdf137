//! The two ends: backends that answer at once, and clients that ask again as soon as they are answered.
//!
//! Both are as plain as they can be: what they cost is the same for every proxy between them, and not counted.

use std::net::SocketAddr;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// What clients send.
const REQUEST: &[u8] =
    b"GET /items/1234 HTTP/1.1\r\nHost: bench.example\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n";
/// Longest head of an answer.
const HEAD_BYTES_MAX: usize = 4096;
/// A round that takes longer has stuck.
const ROUND_TIME_MAX: Duration = Duration::from_secs(300);

/// Backends on a thread of their own, for as long as the process lives.
pub(super) struct Backends {
    pub(super) addresses: [SocketAddr; 2],
    _thread: JoinHandle<()>,
}

impl Backends {
    /// Two backends whose answers have bodies of `bytes`.
    pub(super) fn start(bytes: usize) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let bind = || runtime.block_on(TcpListener::bind("127.0.0.1:0"));
        let listeners = [bind()?, bind()?];
        let addresses = [listeners[0].local_addr()?, listeners[1].local_addr()?];
        let mut answer = format!(
            "HTTP/1.1 200 OK\r\nServer: bench\r\nContent-Type: application/octet-stream\r\nContent-Length: {bytes}\r\n\r\n"
        )
        .into_bytes();
        answer.resize(answer.len() + bytes, b'x');
        let answer: &'static [u8] = answer.leak();
        let thread = std::thread::Builder::new().name("backends".to_owned()).spawn(move || {
            runtime.block_on(async {
                let [one, two] = listeners;
                tokio::join!(serve(one, answer), serve(two, answer));
            });
        })?;
        Ok(Self { addresses, _thread: thread })
    }
}

async fn serve(listener: TcpListener, answer: &'static [u8]) {
    while let Ok((stream, _)) = listener.accept().await {
        // How a proxy ends its connection is its own affair.
        tokio::spawn(async move { drop(answer_all(stream, answer).await) });
    }
}

async fn answer_all(mut stream: TcpStream, answer: &[u8]) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(HEAD_BYTES_MAX);
    loop {
        while !buffer.ends_with(b"\r\n\r\n") {
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
        buffer.clear();
        stream.write_all(answer).await?;
    }
}

/// What clients saw.
pub(super) struct Seen {
    pub(super) time: Duration,
    /// Of each request, sorted.
    pub(super) latencies: Vec<Duration>,
}

impl Seen {
    /// The latency that this share of the requests did not exceed.
    pub(super) fn quantile(&self, share: f64) -> Duration {
        let index = (self.latencies.len() as f64 * share) as usize;
        self.latencies.get(index.min(self.latencies.len().saturating_sub(1))).copied().unwrap_or_default()
    }
}

/// `requests` over `connections` that are kept open. An answer other than 200 with a whole body of `bytes` is an error.
pub(super) fn load(
    address: SocketAddr,
    connections: usize,
    requests: usize,
    bytes: usize,
) -> std::io::Result<Seen> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut streams = Vec::new();
        for _ in 0..connections {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            streams.push(stream);
        }
        let begin = Instant::now();
        let mut clients = JoinSet::new();
        for (index, stream) in streams.into_iter().enumerate() {
            let share = requests / connections + usize::from(index < requests % connections);
            clients.spawn(ask(stream, share, bytes));
        }
        let mut latencies = Vec::with_capacity(requests);
        let all = async {
            while let Some(client) = clients.join_next().await {
                latencies.extend(client.map_err(std::io::Error::other)??);
            }
            Ok::<(), std::io::Error>(())
        };
        tokio::time::timeout(ROUND_TIME_MAX, all).await.map_err(std::io::Error::other)??;
        let time = begin.elapsed();
        latencies.sort_unstable();
        Ok(Seen { time, latencies })
    })
}

async fn ask(mut stream: TcpStream, requests: usize, bytes: usize) -> std::io::Result<Vec<Duration>> {
    let mut latencies = Vec::with_capacity(requests);
    let mut buffer = Vec::with_capacity(HEAD_BYTES_MAX + bytes);
    for _ in 0..requests {
        buffer.clear();
        let begin = Instant::now();
        stream.write_all(REQUEST).await?;
        let mut whole = None;
        while whole.is_none_or(|whole| buffer.len() < whole) {
            if stream.read_buf(&mut buffer).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            if whole.is_none() {
                whole = head_length(&buffer)?.map(|head| head + bytes);
            }
        }
        if whole != Some(buffer.len()) {
            return Err(std::io::Error::other("an answer of another length"));
        }
        latencies.push(begin.elapsed());
    }
    Ok(latencies)
}

/// The length of the head, once it is whole.
fn head_length(buffer: &[u8]) -> std::io::Result<Option<usize>> {
    let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") else {
        return if buffer.len() > HEAD_BYTES_MAX { Err(std::io::Error::other("no head")) } else { Ok(None) };
    };
    if !buffer.starts_with(b"HTTP/1.1 200 ") {
        let line = String::from_utf8_lossy(&buffer[..end]).into_owned();
        return Err(std::io::Error::other(format!("answered {line:?}")));
    }
    Ok(Some(end + 4))
}
