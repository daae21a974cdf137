//! `cargo xtask soak router`: a router that is changed all the time, in front of backends that die, under a steady load.
//!
//! Three of four backends are killed with everything they have in hand, drained, lent to a canary and taken back, in an
//! order that chance decides; the first one stays. Every client asks again as soon as it is answered, by GET, and every
//! eighth time by POST. What must hold:
//! - no GET is lost: it is idempotent, and there always is a backend that lives;
//! - a POST is lost only while a backend dies: it may have been in its hands;
//! - once a drain is acknowledged and its sessions have ended, the backend gets no request until it is admitted;
//! - once an alert is acknowledged, the canary's backends get none until the next canary is set.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use greenlight_router::{
    AlertRaised, BackendChange, BackendSpec, BackendState, BackendStatus, CanaryChange, CanarySpec,
    Conclusion, Enabling, Limits, Pause, Router, RouterClient, RouterClientError, RouterConfig,
    RouterSnapshot, RouterState,
};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

use crate::Error;
use crate::chance::Chance;

/// Backends; the first is never touched.
const BACKENDS: usize = 4;
/// Between two changes.
const CHANGE_INTERVAL: Duration = Duration::from_millis(20);
/// Longest wait for anything; reaching it is a failure.
const PATIENCE: Duration = Duration::from_secs(60);
/// Every so many requests is a POST.
const POST_EVERY: usize = 8;
/// The body of an answer.
const BODY: &[u8] = &[b'x'; 1024];

#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// The built-in router, changed all the time in front of backends that die. Exits with 1 when a request is lost that a
    /// correct proxy could have saved.
    Router {
        /// Requests in all.
        #[arg(long, default_value_t = 10_000_000)]
        requests: u64,
        /// Connections that are kept open.
        #[arg(long, default_value_t = 64)]
        connections: usize,
        /// Where chance begins; the same seed makes the same changes, though not at the same moments.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Print the figures as JSON.
        #[arg(long)]
        json: bool,
    },
}

/// What happened.
#[derive(Debug, Default, Serialize)]
struct Report {
    requests: u64,
    seconds: f64,
    changes: u64,
    kills: u64,
    drains: u64,
    alerts: u64,
    gets_lost: u64,
    /// Those that no backend's death excuses.
    posts_lost: u64,
    posts_killed: u64,
    /// Requests that a drained backend, or a canary after an alert, got.
    strays: u64,
    /// The first few losses and strays.
    reasons: Vec<String>,
}

/// True when nothing was lost that could have been saved.
pub(crate) fn run(options: &Options) -> Result<bool, Error> {
    let What::Router { requests, connections, seed, json } = options.what;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(Error::system("start a runtime"))?;
    let report = runtime.block_on(soak(requests, connections.max(1), seed))?;
    let is_kept = report.gets_lost == 0 && report.posts_lost == 0 && report.strays == 0;
    if json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(Error::Json)?);
    } else {
        println!(
            "{} requests in {:.0} s, {} changes ({} kills, {} drains, {} alerts)\nGETs lost: {}\nPOSTs lost: {}, \
             and {} while a backend died\nstrays: {}\n{}",
            report.requests,
            report.seconds,
            report.changes,
            report.kills,
            report.drains,
            report.alerts,
            report.gets_lost,
            report.posts_lost,
            report.posts_killed,
            report.strays,
            if is_kept { "Kept." } else { "MISSED." }
        );
        report.reasons.iter().for_each(|reason| println!("- {reason}"));
    }
    Ok(is_kept)
}

async fn soak(requests: u64, connections: usize, seed: u64) -> Result<Report, Error> {
    let directory = tempfile::tempdir().map_err(Error::system("make a directory"))?;
    let mut backends = Vec::new();
    for _ in 0..BACKENDS {
        backends.push(Backend::start().await?);
    }
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut config = RouterConfig::new(any, directory.path().join("control"));
    config.workers = 2;
    config.health.interval = Duration::from_millis(100);
    config.limits = Limits { idle_timeout: Duration::from_millis(500), ..Limits::default() };
    let client = RouterClient::new(&config.control);
    let specs: Vec<BackendSpec> = backends.iter().enumerate().map(|(index, it)| it.spec(index)).collect();
    let router = Router::start(config, RouterState::new(1, specs))
        .map_err(|error| Error::Refused(format!("the router does not start: {error}")))?;

    let shared = Arc::new(Shared::default());
    let begin = Instant::now();
    let mut clients = JoinSet::new();
    for index in 0..connections {
        let left = requests / connections as u64 + u64::from((index as u64) < requests % connections as u64);
        clients.spawn(ask_all(router.local_addr(), left, Arc::clone(&shared), client.clone()));
    }
    let mut changer = Changer {
        backends,
        client,
        chance: Chance::new(seed),
        shared: Arc::clone(&shared),
        report: Report::default(),
    };
    let asking = async { while clients.join_next().await.is_some() {} };
    tokio::pin!(asking);
    let mut pause = tokio::time::interval(CHANGE_INTERVAL);
    loop {
        tokio::select! {
            () = &mut asking => break,
            _ = pause.tick() => {}
        }
        changer.change().await?;
    }
    let mut report = changer.report;
    report.requests = requests;
    report.seconds = begin.elapsed().as_secs_f64();
    report.gets_lost = shared.gets_lost.load(SeqCst);
    report.posts_lost = shared.posts_lost.load(SeqCst);
    report.posts_killed = shared.posts_killed.load(SeqCst);
    report.reasons.extend(shared.reasons.lock().map(|it| it.clone()).unwrap_or_default());
    router.shutdown(Duration::from_secs(5)).await;
    Ok(report)
}

/// What the clients found.
#[derive(Debug, Default)]
struct Shared {
    gets_lost: AtomicU64,
    posts_lost: AtomicU64,
    posts_killed: AtomicU64,
    /// Raised when a backend begins to die and when it is dead.
    deaths: AtomicU64,
    reasons: std::sync::Mutex<Vec<String>>,
}

impl Shared {
    /// Counts a request without an answer. Whether a correct proxy could have saved it.
    fn is_lost(&self, is_post: bool, deaths_before: u64) -> bool {
        let somebody_died = deaths_before % 2 == 1 || self.deaths.load(SeqCst) != deaths_before;
        let (count, is_lost) = match (is_post, somebody_died) {
            (true, true) => (&self.posts_killed, false),
            (true, false) => (&self.posts_lost, true),
            (false, _) => (&self.gets_lost, true),
        };
        count.fetch_add(1, SeqCst);
        is_lost
    }

    fn tell(&self, reason: String) {
        /// More say no more.
        const REASONS_MAX: usize = 10;
        if let Ok(mut reasons) = self.reasons.lock()
            && reasons.len() < REASONS_MAX
        {
            reasons.push(reason);
        }
    }
}

/// A backend as the router sees it, in a few words.
fn describe(backend: &BackendStatus) -> String {
    let detail = backend.health_detail.as_deref().unwrap_or_default();
    let (name, state, health) = (&backend.spec.name, backend.spec.state, backend.health);
    format!("{name} {state:?} {health:?} {detail}, {} connections failed", backend.connect_failures)
}

async fn ask_all(address: SocketAddr, requests: u64, shared: Arc<Shared>, router: RouterClient) {
    let mut connection = None;
    for number in 0..requests {
        let is_post = number % POST_EVERY as u64 == 0;
        let deaths = shared.deaths.load(SeqCst);
        if let Err(error) = ask(&mut connection, address, is_post).await {
            connection = None;
            if shared.is_lost(is_post, deaths) {
                let backends = match router.get().await {
                    Ok(snapshot) => snapshot.backends.iter().map(describe).collect::<Vec<_>>().join("; "),
                    Err(error) => error.to_string(),
                };
                let what = if is_post { "POST" } else { "GET" };
                let first = error.to_string();
                shared.tell(format!(
                    "a {what}: {}. Then: {backends}",
                    first.lines().next().unwrap_or_default()
                ));
            }
        }
    }
}

async fn ask(connection: &mut Option<TcpStream>, address: SocketAddr, is_post: bool) -> std::io::Result<()> {
    let stream = match connection {
        Some(stream) => stream,
        None => {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            connection.insert(stream)
        }
    };
    let request: &[u8] = if is_post {
        b"POST /orders HTTP/1.1\r\nHost: soak\r\nContent-Length: 5\r\n\r\nhello"
    } else {
        b"GET /items/7 HTTP/1.1\r\nHost: soak\r\n\r\n"
    };
    stream.write_all(request).await?;
    let mut buffer = Vec::with_capacity(2048);
    let answer = async {
        loop {
            if stream.read_buf(&mut buffer).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let Some(end) = buffer.windows(4).position(|it| it == b"\r\n\r\n") else { continue };
            if !buffer.starts_with(b"HTTP/1.1 200 ") {
                let head = String::from_utf8_lossy(&buffer).into_owned();
                return Err(std::io::Error::other(head));
            }
            if buffer.len() >= end + 4 + BODY.len() {
                return Ok(());
            }
        }
    };
    tokio::time::timeout(PATIENCE, answer).await.map_err(std::io::Error::other)?
}

/// A backend that can be killed and started again on its address.
struct Backend {
    address: SocketAddr,
    seen: Arc<Seen>,
    /// What serves while it lives, and what tells it to die.
    task: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

#[derive(Debug, Default)]
struct Seen {
    requests: AtomicU64,
}

impl Backend {
    async fn start() -> Result<Self, Error> {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
            .await
            .map_err(Error::system("listen as a backend"))?;
        let address = listener.local_addr().map_err(Error::system("listen as a backend"))?;
        let mut backend = Self { address, seen: Arc::default(), task: None };
        backend.serve(listener);
        Ok(backend)
    }

    fn spec(&self, index: usize) -> BackendSpec {
        BackendSpec {
            name: format!("backend-{index}"),
            address: self.address,
            weight: 100,
            state: BackendState::Ready,
            release: Some("v1".to_owned()),
            health: None,
        }
    }

    fn serve(&mut self, listener: TcpListener) {
        let seen = Arc::clone(&self.seen);
        let (die, mut dying) = oneshot::channel();
        let serving = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    _ = &mut dying => break,
                };
                let Ok((stream, _)) = accepted else { break };
                let seen = Arc::clone(&seen);
                // A router that goes away is no failure.
                connections.spawn(async move { drop(answer_all(stream, &seen).await) });
            }
            drop(listener);
            connections.shutdown().await;
        });
        self.task = Some((die, serving));
    }

    /// Ends it with everything it has in hand. When this returns every connection is closed.
    async fn kill(&mut self) {
        if let Some((die, serving)) = self.task.take() {
            // It may have ended by itself, for want of descriptors.
            let _ = die.send(());
            drop(serving.await);
        }
    }

    async fn revive(&mut self) -> Result<(), Error> {
        let listener =
            TcpListener::bind(self.address).await.map_err(Error::system("listen again as a backend"))?;
        self.serve(listener);
        Ok(())
    }
}

async fn answer_all(mut stream: TcpStream, seen: &Seen) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(4096);
    let mut answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", BODY.len()).into_bytes();
    answer.extend_from_slice(BODY);
    loop {
        while !is_whole(&buffer) {
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
        buffer.clear();
        seen.requests.fetch_add(1, SeqCst);
        // The work, within which it may die.
        tokio::task::yield_now().await;
        stream.write_all(&answer).await?;
    }
}

/// Whether a request has come with its body, which only a POST has: five bytes.
fn is_whole(request: &[u8]) -> bool {
    let body = if request.starts_with(b"POST") { 5 } else { 0 };
    request.windows(4).position(|it| it == b"\r\n\r\n").is_some_and(|end| request.len() >= end + 4 + body)
}

/// Changes the router and its backends.
struct Changer {
    backends: Vec<Backend>,
    client: RouterClient,
    chance: Chance,
    shared: Arc<Shared>,
    report: Report,
}

impl Changer {
    async fn change(&mut self) -> Result<(), Error> {
        self.report.changes += 1;
        let index = 1 + self.chance.below(BACKENDS - 1);
        match self.chance.below(8) {
            0 => self.kill_and_revive(index).await,
            1 => self.drain_and_admit(index).await,
            2 => self.lend_and_alert(index).await,
            3 => self.pause().await,
            4 => self.rewrite().await,
            _ => {
                let weight = 1 + u32::try_from(self.chance.below(200)).unwrap_or(0);
                self.set(index, None, Some(weight), None).await.map(drop)
            }
        }
    }

    /// Dies under its load, and comes back some requests later.
    async fn kill_and_revive(&mut self, index: usize) -> Result<(), Error> {
        self.report.kills += 1;
        self.shared.deaths.fetch_add(1, SeqCst);
        self.backends[index].kill().await;
        self.shared.deaths.fetch_add(1, SeqCst);
        self.wait_for_requests(200).await?;
        self.backends[index].revive().await
    }

    async fn drain_and_admit(&mut self, index: usize) -> Result<(), Error> {
        self.report.drains += 1;
        self.set(index, Some(BackendState::Drain), None, None).await?;
        self.until_idle(&[index]).await?;
        self.count_strays(&[index], "a drained backend").await?;
        self.set(index, Some(BackendState::Ready), None, None).await.map(drop)
    }

    /// A canary with some share, an alert, and back.
    async fn lend_and_alert(&mut self, index: usize) -> Result<(), Error> {
        self.report.alerts += 1;
        let share_per_mille = u32::try_from(1 + self.chance.below(500)).unwrap_or(1);
        let spec = CanarySpec { release: "v2".to_owned(), share_per_mille, lease_ms: 60_000 };
        accepted(self.client.canary(CanaryChange { spec, generation: None }).await)?;
        self.set(index, None, None, Some("v2")).await?;
        self.wait_for_requests(200).await?;
        let alert = AlertRaised { reason: "the soak".to_owned(), by: "the soak".to_owned() };
        accepted(self.client.alert(alert).await)?;
        self.until_idle(&[index]).await?;
        self.count_strays(&[index], "a canary after an alert").await?;
        accepted(self.client.enable(Enabling { by: "the soak".to_owned() }).await)?;
        self.set(index, None, None, Some("v1")).await?;
        accepted(self.client.conclude(Conclusion { release: "v2".to_owned() }).await).map(drop)
    }

    /// Everything waits for a moment.
    async fn pause(&mut self) -> Result<(), Error> {
        let mut state = self.state().await?;
        state.generation += 1;
        state.pause = Some(Pause { max_wait_ms: 30_000, max_requests: 10_000 });
        accepted(self.client.set(state.clone()).await)?;
        tokio::task::yield_now().await;
        state.generation += 1;
        state.pause = None;
        accepted(self.client.set(state).await).map(drop)
    }

    /// The whole state anew: other routes, another order.
    async fn rewrite(&mut self) -> Result<(), Error> {
        let mut state = self.state().await?;
        state.generation += 1;
        state.backends.reverse();
        state.routes = vec![format!("/items/{{id{}}}", self.chance.below(1000))];
        accepted(self.client.set(state).await).map(drop)
    }

    async fn set(
        &self,
        index: usize,
        state: Option<BackendState>,
        weight: Option<u32>,
        release: Option<&str>,
    ) -> Result<RouterSnapshot, Error> {
        let change = BackendChange {
            name: format!("backend-{index}"),
            state,
            weight,
            release: release.map(str::to_owned),
            generation: None,
        };
        accepted(self.client.change(change).await)
    }

    /// The state in force, as far as this changes it.
    async fn state(&self) -> Result<RouterState, Error> {
        let snapshot = accepted(self.client.get().await)?;
        let backends = snapshot.backends.into_iter().map(|it| it.spec).collect();
        Ok(RouterState::new(snapshot.generation, backends))
    }

    /// Waits until none of these backends has a request in hand.
    async fn until_idle(&self, indexes: &[usize]) -> Result<(), Error> {
        let names: Vec<String> = indexes.iter().map(|index| format!("backend-{index}")).collect();
        let waiting = async {
            loop {
                let snapshot = accepted(self.client.get().await)?;
                let busy = |it: &BackendStatus| names.contains(&it.spec.name) && it.sessions > 0;
                if !snapshot.backends.iter().any(busy) {
                    return Ok(());
                }
            }
        };
        tokio::time::timeout(PATIENCE, waiting)
            .await
            .unwrap_or_else(|_| Err(Error::Refused(format!("{names:?} never finished what they had"))))
    }

    /// Lets requests pass, and counts those that came where none should.
    async fn count_strays(&mut self, indexes: &[usize], what: &str) -> Result<(), Error> {
        let seen = |changer: &Self| -> u64 {
            indexes.iter().map(|index| changer.backends[*index].seen.requests.load(SeqCst)).sum()
        };
        let before = seen(self);
        self.wait_for_requests(200).await?;
        let strays = seen(self) - before;
        if strays > 0 {
            self.report.reasons.push(format!("{strays} requests came to {what}"));
        }
        self.report.strays += strays;
        Ok(())
    }

    /// Waits until the first backend, which always serves, saw some more requests; or until nobody asks any more.
    async fn wait_for_requests(&self, count: u64) -> Result<(), Error> {
        /// With no request for so long, the clients are done.
        const QUIET: Duration = Duration::from_secs(2);
        let seen = &self.backends[0].seen.requests;
        let goal = seen.load(SeqCst) + count;
        let (mut last, mut since) = (seen.load(SeqCst), Instant::now());
        while seen.load(SeqCst) < goal && since.elapsed() < QUIET {
            tokio::time::sleep(Duration::from_millis(1)).await;
            if seen.load(SeqCst) != last {
                (last, since) = (seen.load(SeqCst), Instant::now());
            }
        }
        Ok(())
    }
}

fn accepted<T>(result: Result<T, RouterClientError>) -> Result<T, Error> {
    result.map_err(|error| Error::Refused(error.to_string()))
}
