//! The controller's end of a link: one connection to one host's agent, shared by any number of calls.
//!
//! Guarantees: every call ends: with its reply, with the agent's refusal, at its timeout, or, when the connection dies,
//! with the reason of that death. A call that is dropped or timed out leaves the connection usable. Memory is bounded: a
//! slow host slows down who sends to it.
//! Not in here: how the connection comes about (`open`), and what a request means.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use greenlight_model::action::Blame;
use greenlight_model::host::HostFacts;
use greenlight_model::id::HostName;
use greenlight_model::quantity::human_duration;
use tokio::io::{AsyncWriteExt as _, BufReader, BufWriter};
use tokio::process::{ChildStdin, ChildStdout};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::frame::{Frame, FrameError, read_frame_async, write_frame_async};
use crate::message::{AgentError, Event, Message, Reply, Request};
pub use crate::open::{OpenError, OpenOptions, OpenProblem};
use crate::process::{END_GRACE, Life, Process};
pub use crate::stage::{Lacking, Parcel, Parcels, ReleaseSource, StageProgress};

/// Messages that may wait to be written: a caller's few requests, never a backlog.
const MESSAGES_QUEUED_MAX: usize = 64;
/// Batches of objects that may wait to be written, besides the one being written and the one being read.
const BATCHES_QUEUED_MAX: usize = 1;
/// Events that a call may leave unread; beyond that the host waits for the caller.
const EVENTS_QUEUED_MAX: usize = 1024;
/// What is gathered before it is written to the pipe.
const WRITE_BUFFER_BYTES: usize = 64 * 1024;

/// A connection to the agent of one host. Clones share it; it ends with the last of them.
#[derive(Debug, Clone)]
pub struct Connection {
    handle: Arc<Handle>,
}

#[derive(Debug)]
struct Handle {
    host: HostName,
    facts: HostFacts,
    next_id: AtomicU64,
    messages: mpsc::Sender<Outgoing>,
    data: mpsc::Sender<Vec<Frame>>,
    close: Arc<Notify>,
    ended: watch::Receiver<bool>,
    pending: Arc<Mutex<Pending>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.close.notify_one();
    }
}

/// What waits to be written.
#[derive(Debug)]
enum Outgoing {
    Message(Frame),
    /// To be answered when everything before it has been written.
    Mark(oneshot::Sender<()>),
}

/// Who waits for what.
#[derive(Debug)]
enum Pending {
    /// The connection lives; by request number.
    Open(HashMap<u64, mpsc::Sender<Answer>>),
    /// It died, and why.
    Lost(String),
}

#[derive(Debug)]
enum Answer {
    Event(Event),
    Reply(Result<Reply, AgentError>),
}

/// Why a call did not come to its reply.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The connection died, or had died before. Whether the request was carried out is unknown.
    #[error("the connection to {host} was lost during {what}: {why}")]
    Lost {
        /// The host.
        host: HostName,
        /// What was asked of it.
        what: &'static str,
        /// Why, as far as it is known: how ssh or the agent ended and the last lines it said.
        why: String,
    },
    /// No reply in time. The agent may still be at it.
    #[error("{host} did not finish {what} within {}", human_duration(*after))]
    TimedOut {
        /// The host.
        host: HostName,
        /// What was asked of it.
        what: &'static str,
        /// The time it had.
        after: Duration,
    },
    /// The agent refused or failed.
    #[error(transparent)]
    Agent(AgentError),
    /// Something of the release that the host lacks could not be read here.
    #[error("the release could not be read for {host}: {source}")]
    Object {
        /// The host.
        host: HostName,
        /// Why.
        source: std::io::Error,
    },
    /// The two sides do not understand each other: a defect, or a foreign agent.
    #[error("{host} broke the protocol during {what}: {why}")]
    Protocol {
        /// The host.
        host: HostName,
        /// What was asked of it.
        what: &'static str,
        /// What was wrong.
        why: String,
    },
}

impl CallError {
    /// Whose fault it looks like.
    #[must_use]
    pub fn blame(&self) -> Blame {
        match self {
            Self::Agent(error) => error.blame,
            Self::Lost { .. } | Self::TimedOut { .. } | Self::Object { .. } | Self::Protocol { .. } => {
                Blame::Passing
            }
        }
    }
}

impl Connection {
    /// The host, as the fleet file names it.
    #[must_use]
    pub fn host(&self) -> &HostName {
        &self.handle.host
    }

    /// What the agent said of its machine when it greeted.
    #[must_use]
    pub fn facts(&self) -> &HostFacts {
        &self.handle.facts
    }

    /// Whether the connection is not known to have died.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.lost().is_none()
    }

    fn lost(&self) -> Option<String> {
        match &*lock(&self.handle.pending) {
            Pending::Open(_) => None,
            Pending::Lost(why) => Some(why.clone()),
        }
    }

    /// Asks, passes each event on, and returns the reply. `on_event` is to be quick: while it runs, nothing else comes
    /// out of this connection. `timeout` is for the whole call.
    ///
    /// # Errors
    /// [`CallError`]; after [`CallError::TimedOut`] the connection goes on.
    pub async fn call(
        &self,
        request: Request,
        timeout: Duration,
        mut on_event: impl FnMut(Event) + Send,
    ) -> Result<Reply, CallError> {
        let what = request.title();
        self.within(timeout, what, async {
            let mut exchange = self.begin(request).await?;
            loop {
                match exchange.next().await? {
                    Progress::Event(event) => on_event(event),
                    Progress::Reply(reply) => return Ok(reply),
                }
            }
        })
        .await
    }

    /// Returns when all that was asked before has been handed to the connection's process, or cannot be any more.
    pub async fn written(&self) {
        let (mark, is_written) = oneshot::channel();
        // A writer that is gone writes nothing more, and drops the mark.
        let _ = self.handle.messages.send(Outgoing::Mark(mark)).await;
        let _ = is_written.await;
    }

    /// Ends the connection: calls that are under way fail, the agent sees the end of its input and exits. Returns when
    /// its process is gone.
    pub async fn close(self) {
        self.handle.close.notify_one();
        let mut ended = self.handle.ended.clone();
        // An error means that the task that would say so is gone, and the process with it.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// Takes over a process whose agent has greeted.
    pub(crate) fn over(host: HostName, facts: HostFacts, process: Process) -> Self {
        let (messages, message_queue) = mpsc::channel(MESSAGES_QUEUED_MAX);
        let (data, data_queue) = mpsc::channel(BATCHES_QUEUED_MAX);
        let (end, ended) = watch::channel(false);
        let close = Arc::new(Notify::new());
        let pending = Arc::new(Mutex::new(Pending::Open(HashMap::new())));
        let Process { stdin, stdout, life } = process;
        let writer = Writer { messages: message_queue, data: data_queue, close: Arc::clone(&close) };
        tokio::spawn(live(writer, stdin, stdout, life, Arc::clone(&pending), end));
        let next_id = AtomicU64::new(1);
        Self { handle: Arc::new(Handle { host, facts, next_id, messages, data, close, ended, pending }) }
    }

    pub(crate) async fn within<T>(
        &self,
        timeout: Duration,
        what: &'static str,
        work: impl Future<Output = Result<T, CallError>> + Send,
    ) -> Result<T, CallError> {
        match tokio::time::timeout(timeout, work).await {
            Ok(result) => result,
            Err(_) => Err(CallError::TimedOut { host: self.host().clone(), what, after: timeout }),
        }
    }

    /// Sends a request; its answers come out of what is returned.
    pub(crate) async fn begin(&self, request: Request) -> Result<Exchange, CallError> {
        let what = request.title();
        let id = self.handle.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, answers) = mpsc::channel(EVENTS_QUEUED_MAX);
        let exchange = Exchange { connection: self.clone(), id, what, answers };
        match &mut *lock(&self.handle.pending) {
            Pending::Open(waiting) => {
                waiting.insert(id, sender);
            }
            Pending::Lost(why) => return Err(exchange.lost(why.clone())),
        }
        let message = Frame::Message(Message::Request { id, request: Box::new(request) });
        // When the writer is gone the connection is dying, and the answer's channel says why once that is known.
        let _ = self.handle.messages.send(Outgoing::Message(message)).await;
        Ok(exchange)
    }

    /// Where batches of data frames are to be put.
    pub(crate) fn data(&self) -> mpsc::Sender<Vec<Frame>> {
        self.handle.data.clone()
    }
}

/// One request under way. Dropping it forgets the request; what the agent still says to it is ignored.
pub(crate) struct Exchange {
    connection: Connection,
    pub(crate) id: u64,
    what: &'static str,
    answers: mpsc::Receiver<Answer>,
}

pub(crate) enum Progress {
    Event(Event),
    Reply(Reply),
}

impl Exchange {
    /// What comes next. Safe to cancel.
    pub(crate) async fn next(&mut self) -> Result<Progress, CallError> {
        match self.answers.recv().await {
            Some(Answer::Event(event)) => Ok(Progress::Event(event)),
            Some(Answer::Reply(Ok(reply))) => Ok(Progress::Reply(reply)),
            Some(Answer::Reply(Err(error))) => Err(CallError::Agent(error)),
            None => Err(self.lost(self.connection.lost().unwrap_or_default())),
        }
    }

    pub(crate) fn protocol(&self, why: impl Into<String>) -> CallError {
        CallError::Protocol { host: self.connection.host().clone(), what: self.what, why: why.into() }
    }

    fn lost(&self, why: String) -> CallError {
        CallError::Lost { host: self.connection.host().clone(), what: self.what, why }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let Pending::Open(waiting) = &mut *lock(&self.connection.handle.pending) {
            waiting.remove(&self.id);
        }
    }
}

/// The life of a connection, from its first frame after the greeting until its process is gone.
async fn live(
    writer: Writer,
    stdin: ChildStdin,
    mut stdout: BufReader<ChildStdout>,
    life: Life,
    pending: Arc<Mutex<Pending>>,
    end: watch::Sender<bool>,
) {
    let mut reading = std::pin::pin!(read_answers(&mut stdout, &pending));
    let (why, grace) = tokio::select! {
        why = &mut reading => (why, END_GRACE),
        why = writer.run(stdin) => {
            // Its input is closed: the agent ends by itself, and what it still says is heard until then.
            match tokio::time::timeout(END_GRACE, &mut reading).await {
                Ok(_) => (why, END_GRACE),
                Err(_) => (why, Duration::ZERO),
            }
        }
    };
    let ending = life.end(grace).await;
    let why = why.unwrap_or_else(|| format!("its process ended with {}", ending.describe()));
    *lock(&pending) = Pending::Lost(why);
    end.send_replace(true);
}

/// Hands each answer to who waits for it until the stream ends. The reason, unless it just ended.
async fn read_answers(stdout: &mut BufReader<ChildStdout>, pending: &Mutex<Pending>) -> Option<String> {
    loop {
        let (id, answer) = match read_frame_async(stdout).await {
            Ok(Some(Frame::Message(Message::Event { id, event }))) => (id, Answer::Event(event)),
            Ok(Some(Frame::Message(Message::Reply { id, result }))) => (id, Answer::Reply(result)),
            Ok(Some(_)) => return Some("the agent sent what only a controller sends".to_owned()),
            // A process that dies while it speaks has not broken the protocol: how it ended says more.
            Ok(None) | Err(FrameError::Truncated) => return None,
            Err(error) => return Some(error.to_string()),
        };
        let waiting = match &mut *lock(pending) {
            Pending::Open(waiting) if matches!(answer, Answer::Reply(_)) => waiting.remove(&id),
            Pending::Open(waiting) => waiting.get(&id).cloned(),
            Pending::Lost(_) => None,
        };
        // Nobody waits for the answers to a call that was dropped.
        if let Some(waiting) = waiting {
            let _ = waiting.send(answer).await;
        }
    }
}

/// Writes what is queued; messages go before data, so that a small request does not wait for a large release.
struct Writer {
    messages: mpsc::Receiver<Outgoing>,
    data: mpsc::Receiver<Vec<Frame>>,
    close: Arc<Notify>,
}

impl Writer {
    /// Writes until the connection is closed, even if the other side takes nothing any more. The reason for the end,
    /// unless the other side just went away.
    async fn run(mut self, stdin: ChildStdin) -> Option<String> {
        let close = Arc::clone(&self.close);
        tokio::select! {
            biased;
            () = close.notified() => Some("it was closed".to_owned()),
            why = self.write(stdin) => why,
        }
    }

    async fn write(&mut self, stdin: ChildStdin) -> Option<String> {
        let mut pipe = BufWriter::with_capacity(WRITE_BUFFER_BYTES, stdin);
        loop {
            if self.messages.is_empty() && self.data.is_empty() && pipe.flush().await.is_err() {
                return None;
            }
            let frames = tokio::select! {
                biased;
                Some(outgoing) = self.messages.recv() => match outgoing {
                    Outgoing::Message(message) => vec![message],
                    Outgoing::Mark(mark) => {
                        if pipe.flush().await.is_err() {
                            return None;
                        }
                        // Who asked may have gone meanwhile.
                        let _ = mark.send(());
                        continue;
                    }
                },
                Some(batch) = self.data.recv() => batch,
                else => return Some("it was closed".to_owned()),
            };
            for frame in frames {
                match write_frame_async(&mut pipe, &frame).await {
                    Ok(()) => {}
                    Err(FrameError::Write(_)) => return None,
                    Err(error) => return Some(error.to_string()),
                }
            }
        }
    }
}

fn lock(pending: &Mutex<Pending>) -> MutexGuard<'_, Pending> {
    // Nothing panics while it is held; if something did, the map would still be whole.
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}
