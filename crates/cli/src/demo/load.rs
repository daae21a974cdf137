//! A steady load on the demo's router: keep-alive connections that ask again and again, and count every answer.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::net::TcpStream;
use tokio::time::MissedTickBehavior;

/// Connections that ask at the same time.
const CONNECTIONS: usize = 8;
/// How often each of them asks.
const INTERVAL: Duration = Duration::from_millis(10);
/// An answer that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Reasons of failures that are kept.
const REASONS_MAX: usize = 5;

/// What was asked and answered.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Counts {
    /// Requests that were sent.
    pub(crate) requests: u64,
    /// Those that got no answer, or another than 200, but for `canary_errors`.
    pub(crate) failed: u64,
    /// Those that the release on trial answered with an error of its own: what a canary is for.
    pub(crate) canary_errors: u64,
    /// Answers by the release that gave them.
    pub(crate) by_release: BTreeMap<String, u64>,
    /// Why the first few failed.
    pub(crate) reasons: Vec<String>,
}

/// A load that runs until it is stopped.
pub(crate) struct Load {
    counts: Arc<Mutex<Counts>>,
    /// The release on trial whose errors are its own.
    on_trial: Arc<Mutex<Option<String>>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Load {
    pub(crate) fn start(address: SocketAddr) -> std::io::Result<Self> {
        let counts = Arc::new(Mutex::new(Counts::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let on_trial = Arc::new(Mutex::new(None));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (shared, stopping) = (Arc::clone(&counts), Arc::clone(&stop));
        let trial = Arc::clone(&on_trial);
        let thread = std::thread::Builder::new().name("load".to_owned()).spawn(move || {
            runtime.block_on(async {
                let clients: Vec<_> = (0..CONNECTIONS)
                    .map(|_| {
                        let (counts, trial) = (Arc::clone(&shared), Arc::clone(&trial));
                        tokio::spawn(ask(address, counts, trial, Arc::clone(&stopping)))
                    })
                    .collect();
                for client in clients {
                    if let Err(error) = client.await {
                        count(&shared, None, Err(format!("the load itself failed: {error}")));
                    }
                }
            });
        })?;
        Ok(Self { counts, on_trial, stop, thread })
    }

    /// From here on errors of this release are counted apart.
    pub(crate) fn tries(&self, release: &str) {
        *self.on_trial.lock().unwrap_or_else(PoisonError::into_inner) = Some(release.to_owned());
    }

    /// What was counted so far.
    pub(crate) fn counts(&self) -> Counts {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Stops after the requests that are under way, and gives the final counts.
    pub(crate) fn stop(self) -> Counts {
        self.stop.store(true, Ordering::SeqCst);
        if self.thread.join().is_err() {
            count(&self.counts, None, Err("the load's thread failed".to_owned()));
        }
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn ask(
    address: SocketAddr,
    counts: Arc<Mutex<Counts>>,
    on_trial: Arc<Mutex<Option<String>>>,
    stop: Arc<AtomicBool>,
) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut connection: Option<SendRequest<Empty<Bytes>>> = None;
    while !stop.load(Ordering::SeqCst) {
        ticks.tick().await;
        // A connection that was closed between two requests has failed none.
        let is_open = match &mut connection {
            Some(open) => open.ready().await.is_ok(),
            None => false,
        };
        if !is_open {
            connection = match connect(address).await {
                Ok(open) => Some(open),
                Err(why) => {
                    count(&counts, None, Err(why));
                    continue;
                }
            };
        }
        let Some(open) = &mut connection else { continue };
        let answer = match tokio::time::timeout(TIMEOUT, get(open, address)).await {
            Ok(answer) => answer,
            Err(_) => Err(format!("no answer within {} s", TIMEOUT.as_secs())),
        };
        if answer.is_err() {
            connection = None;
        }
        let trial = on_trial.lock().unwrap_or_else(PoisonError::into_inner).clone();
        count(&counts, trial.as_deref(), answer);
    }
}

/// An answer of the application.
enum Answer {
    /// The page, and the release that gave it.
    Page(String),
    /// An error of the application's own: which release, and what it said.
    Error(String, String),
}

async fn connect(address: SocketAddr) -> Result<SendRequest<Empty<Bytes>>, String> {
    let stream = TcpStream::connect(address).await.map_err(|error| format!("cannot connect: {error}"))?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    // How the connection ends is seen by the request on it.
    tokio::spawn(async move { drop(connection.await) });
    Ok(sender)
}

/// One request; the first word of the answer is the release that gave it.
async fn get(open: &mut SendRequest<Empty<Bytes>>, address: SocketAddr) -> Result<Answer, String> {
    let request = Request::get("/")
        .header("Host", address.to_string())
        .body(Empty::new())
        .map_err(|error| error.to_string())?;
    let answer = open.send_request(request).await.map_err(|error| error.to_string())?;
    let status = answer.status();
    let body = answer.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
    let text = String::from_utf8_lossy(&body);
    let release = text.split_whitespace().next().unwrap_or("nothing").to_owned();
    Ok(if status == 200 {
        Answer::Page(release)
    } else {
        Answer::Error(release, format!("{status}: {}", text.trim()))
    })
}

fn count(counts: &Mutex<Counts>, on_trial: Option<&str>, answer: Result<Answer, String>) {
    let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
    counts.requests += 1;
    match answer {
        Ok(Answer::Page(release)) => *counts.by_release.entry(release).or_default() += 1,
        Ok(Answer::Error(release, _)) if on_trial == Some(release.as_str()) => counts.canary_errors += 1,
        Ok(Answer::Error(_, why)) | Err(why) => {
            counts.failed += 1;
            if counts.reasons.len() < REASONS_MAX {
                counts.reasons.push(why);
            }
        }
    }
}
