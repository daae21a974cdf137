//! One connection: the greeting, then requests as they come, each in a thread of its own.
//!
//! Guarantees: each request gets exactly one reply, also when the agent itself fails inside; when the input ends, what was being
//! prepared, migrated or executed is killed, an activation is finished, for a host must not be left between two releases, and what
//! was lent is taken back when its time is up.

use std::collections::HashMap;
use std::io::{BufReader, BufWriter, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use greenlight_link::frame::{Frame, FrameError, read_frame, write_frame};
use greenlight_link::message::{AgentError, Message, PROTOCOL_VERSION, Reply, Request};
use rustix::fs::Mode;

use crate::context::Context;
use crate::facts;
use crate::failure::{host, passing};
use crate::handle;
use crate::lease;
use crate::room;
use crate::stage::Piece;

/// Requests that are worked on at once on one connection. A rollout has a handful under way on a host.
const REQUESTS_MAX: usize = 64;
/// Pieces of parcels, of at most 1 MiB each and usually 64 KiB, that wait to be put together; beyond it the sender waits.
const PIECES_QUEUE_MAX: usize = 16;

/// Why a connection could not be served to its end.
#[derive(Debug, thiserror::Error)]
pub enum AgentFailure {
    /// What arrives is not the protocol, or the stream broke.
    #[error("the connection to the controller failed: {0}")]
    Frame(#[from] FrameError),
    /// The controller sent what only an agent sends.
    #[error("the other side sent {0}, which only an agent sends: it is not a controller")]
    NotAController(&'static str),
    /// The machine cannot say what it is.
    #[error("the agent cannot tell what machine it runs on: {0}")]
    Facts(#[source] AgentError),
    /// The agent does not know its own program.
    #[error("the agent cannot find its own program: {0}")]
    Program(#[source] std::io::Error),
}

/// The agent of this host.
#[derive(Debug, Clone)]
pub struct Agent {
    program: PathBuf,
}

impl Agent {
    /// The agent, as this program.
    ///
    /// # Errors
    /// When the system does not say which program this is.
    pub fn new() -> Result<Self, AgentFailure> {
        Ok(Self::with_program(std::env::current_exe().map_err(AgentFailure::Program)?))
    }

    /// The agent; its own supervision is started as `program agent supervise --root ROOT --process NAME`.
    #[must_use]
    pub fn with_program(program: PathBuf) -> Self {
        Self { program }
    }

    /// Serves one controller until `input` ends and what must be finished is finished.
    ///
    /// # Errors
    /// When what arrives is not the protocol. Requests under way are ended as if the input had ended.
    pub fn serve(
        &self,
        input: impl Read + Send + 'static,
        output: impl Write + Send + 'static,
    ) -> Result<(), AgentFailure> {
        // Trees are readable for the accounts that processes run under; what is private says so itself.
        rustix::process::umask(Mode::from_raw_mode(0o022));
        let connection = Arc::new(Connection {
            output: Mutex::new(Box::new(BufWriter::new(output))),
            ended: Arc::new(AtomicBool::new(false)),
            under_way: AtomicUsize::new(0),
            program: self.program.clone(),
        });
        let facts = facts::gather().map_err(AgentFailure::Facts)?;
        connection.send(&Frame::Message(Message::Greeting { protocol: PROTOCOL_VERSION, facts }))?;
        let mut requests = Vec::new();
        let result = read_all(&connection, input, &mut requests);
        connection.ended.store(true, Ordering::Relaxed);
        for request in requests {
            // A panic inside was already answered as such.
            drop(request.join());
        }
        lease::wait();
        result
    }
}

/// Serves one controller on these streams, as this program; see [`Agent::serve`].
///
/// # Errors
/// As [`Agent::new`] and [`Agent::serve`].
pub fn serve(
    input: impl Read + Send + 'static,
    output: impl Write + Send + 'static,
) -> Result<(), AgentFailure> {
    Agent::new()?.serve(input, output)
}

struct Connection {
    output: Mutex<Box<dyn Write + Send>>,
    /// Whether the controller has gone.
    ended: Arc<AtomicBool>,
    under_way: AtomicUsize,
    program: PathBuf,
}

impl Connection {
    fn send(&self, frame: &Frame) -> Result<(), FrameError> {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        write_frame(&mut *output, frame)?;
        output.flush().map_err(FrameError::Write)
    }

    /// Sends what a request has to say. That nobody listens any more is noted, and ends what need not be finished.
    fn tell(&self, message: Message) {
        if self.send(&Frame::Message(message)).is_err() {
            self.ended.store(true, Ordering::Relaxed);
        }
    }
}

fn read_all(
    connection: &Arc<Connection>,
    input: impl Read,
    requests: &mut Vec<thread::JoinHandle<()>>,
) -> Result<(), AgentFailure> {
    let mut input = BufReader::new(input);
    let mut stages: HashMap<u64, SyncSender<Piece>> = HashMap::new();
    while let Some(frame) = read_frame(&mut input)? {
        match frame {
            Frame::Message(Message::Request { id, request }) => {
                let (sender, pieces) = sync_channel(PIECES_QUEUE_MAX);
                if matches!(*request, Request::Stage { .. }) {
                    stages.insert(id, sender);
                }
                requests.retain(|thread| !thread.is_finished());
                requests.extend(begin(connection, id, *request, pieces));
            }
            Frame::Data { id, hash, encoding, has_more, data } => {
                pass_on(&mut stages, id, Piece::Data { hash, encoding, has_more, data });
            }
            Frame::EndOfData { id } => {
                pass_on(&mut stages, id, Piece::End);
                stages.remove(&id);
            }
            Frame::Message(Message::Greeting { .. }) => {
                return Err(AgentFailure::NotAController("a greeting"));
            }
            Frame::Message(Message::Event { .. }) => return Err(AgentFailure::NotAController("an event")),
            Frame::Message(Message::Reply { .. }) => return Err(AgentFailure::NotAController("a reply")),
        }
    }
    Ok(())
}

/// Gives a piece to its stage. One whose stage has ended is dropped: its reply says why.
fn pass_on(stages: &mut HashMap<u64, SyncSender<Piece>>, id: u64, piece: Piece) {
    if stages.get(&id).is_some_and(|stage| stage.send(piece).is_err()) {
        stages.remove(&id);
    }
}

/// Starts a request's thread; none when it is refused at once.
fn begin(
    connection: &Arc<Connection>,
    id: u64,
    request: Request,
    pieces: Receiver<Piece>,
) -> Option<thread::JoinHandle<()>> {
    let refuse = |why: String| connection.tell(Message::Reply { id, result: Err(passing(why)) });
    if connection.under_way.fetch_add(1, Ordering::Relaxed) >= REQUESTS_MAX {
        connection.under_way.fetch_sub(1, Ordering::Relaxed);
        refuse(format!("the agent already works on {REQUESTS_MAX} requests of this connection"));
        return None;
    }
    let own = Arc::clone(connection);
    let title = request.title();
    let spawned = thread::Builder::new().name(title.to_owned()).spawn(move || {
        let result = work(&own, id, &request, &pieces);
        // The pieces' receiver goes first, so that the reader does not wait on a stage that has ended.
        drop(pieces);
        own.under_way.fetch_sub(1, Ordering::Relaxed);
        own.tell(Message::Reply { id, result });
    });
    match spawned {
        Ok(thread) => Some(thread),
        Err(error) => {
            connection.under_way.fetch_sub(1, Ordering::Relaxed);
            refuse(format!("the host gives the agent no thread for {title}: {error}"));
            None
        }
    }
}

fn work(
    connection: &Arc<Connection>,
    id: u64,
    request: &Request,
    pieces: &Receiver<Piece>,
) -> Result<Reply, AgentError> {
    let events = Arc::clone(connection);
    let context = Context {
        events: Box::new(move |event| events.tell(Message::Event { id, event })),
        cancelled: Arc::clone(&connection.ended),
        program: connection.program.clone(),
    };
    let handled = || handle::handle(&context, request, pieces).map_err(|error| room::explain(request, error));
    catch_unwind(AssertUnwindSafe(handled)).unwrap_or_else(|panic| {
        let said =
            panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        let said = said.unwrap_or("it did not say why");
        Err(host(format!(
            "{} failed inside the agent, which is a defect of greenlight: {said}",
            request.title()
        )))
    })
}
