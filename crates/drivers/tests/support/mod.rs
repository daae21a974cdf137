//! What the drivers' tests share: backends that answer on command, and a way to a socket of this machine.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use greenlight_drivers::balancer::{BalancerDriver, DriverError};
use greenlight_drivers::transport::{BoxFuture, Transport, TransportError};
use greenlight_model::id::HostName;
use greenlight_model::traffic::Server;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Far more than anything here takes: reaching it is the failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A stream socket on this machine, spoken to as an agent does it.
pub(crate) struct SocketFile(pub(crate) PathBuf);

impl Transport for SocketFile {
    fn exchange<'a>(&'a self, input: &'a str) -> BoxFuture<'a, Result<String, TransportError>> {
        Box::pin(async move {
            let ask = async {
                let mut stream = tokio::net::UnixStream::connect(&self.0).await?;
                stream.write_all(input.as_bytes()).await?;
                stream.shutdown().await?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer).await?;
                Ok::<_, std::io::Error>(answer)
            };
            ask.await.map_err(|error| TransportError::new(format!("{}: {error}", self.0.display())))
        })
    }
}

/// A server that says its name. A request for `/slow` is reported and answered when the test says so.
pub(crate) struct Application {
    pub(crate) address: SocketAddr,
    /// Says that a slow request has arrived.
    pub(crate) arrived: Mutex<Receiver<()>>,
    /// Lets one slow request be answered.
    pub(crate) go: Sender<()>,
}

impl Application {
    pub(crate) fn start(name: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (arrive, arrived) = channel();
        let (go, gone) = channel();
        let gone = std::sync::Arc::new(Mutex::new(gone));
        std::thread::spawn(move || {
            for stream in listener.incoming().map(Result::unwrap) {
                let (arrive, gone) = (arrive.clone(), std::sync::Arc::clone(&gone));
                std::thread::spawn(move || answer(stream, name, &arrive, &gone));
            }
        });
        Self { address, arrived: Mutex::new(arrived), go }
    }

    pub(crate) fn wait_for_a_slow_request(&self) {
        self.arrived.lock().unwrap().recv_timeout(PATIENCE).unwrap();
    }
}

/// Answers requests on one connection, which is kept open in between.
fn answer(mut stream: TcpStream, name: &str, arrive: &Sender<()>, gone: &Mutex<Receiver<()>>) {
    while let Some(head) = read_head(&mut stream) {
        if head.starts_with("GET /slow ") {
            arrive.send(()).unwrap();
            gone.lock().unwrap().recv().unwrap();
        }
        let length = name.len();
        // A client that went away, as a balancer's check does, is no event.
        // In one piece: several would wait for each other's acknowledgement.
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{name}");
        let _ = stream.write_all(answer.as_bytes());
    }
}

/// A client's connection, kept open between its requests.
pub(crate) struct Client(TcpStream);

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    /// Who answered.
    pub(crate) fn get(&mut self, path: &str) -> String {
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n");
        self.0.write_all(request.as_bytes()).unwrap();
        let head = read_head(&mut self.0).unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        let length = head
            .lines()
            .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
        let mut body = vec![0; length.unwrap()];
        self.0.read_exact(&mut body).unwrap();
        String::from_utf8(body).unwrap()
    }
}

/// How often each server answered.
pub(crate) fn ask(mut client: Client, times: usize) -> BTreeMap<String, u64> {
    let mut seen = BTreeMap::new();
    for _ in 0..times {
        *seen.entry(client.get("/")).or_default() += 1;
    }
    seen
}

/// Everything up to the empty line; none when the connection ends before it.
fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.extend_from_slice(&byte);
    }
    Some(String::from_utf8(head).unwrap())
}

/// Reads until the servers are as wanted. A balancer does not say when its checks have changed something, so it is
/// asked again and again; what is waited for comes or the test fails.
pub(crate) async fn until(
    driver: &BalancerDriver,
    what: &str,
    is_wanted: impl Fn(&BTreeMap<HostName, Server>) -> bool,
) -> BTreeMap<HostName, Server> {
    let mut last: Option<Result<BTreeMap<HostName, Server>, DriverError>> = None;
    let waiting = async {
        loop {
            match driver.read().await {
                Ok(servers) if is_wanted(&servers) => return servers,
                other => last = Some(other),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    match tokio::time::timeout(PATIENCE, waiting).await {
        Ok(servers) => servers,
        Err(_) => panic!("waited in vain until {what}: {last:?}"),
    }
}

pub(crate) fn host(name: &str) -> HostName {
    name.parse().unwrap()
}
