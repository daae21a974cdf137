//! Sending a release's missing objects within a stage request.
//!
//! Guarantees: at most three batches are in memory per connection (one being read, one queued, one being written); only
//! objects of the request's own manifest are sent, whatever the host asks for; when the call ends early, for whatever
//! reason, the host gets its end of data and can finish.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use greenlight_model::id::ContentHash;
use greenlight_model::manifest::{Entry, Manifest};
use tokio::sync::{mpsc, oneshot, watch};

use crate::connection::{CallError, Connection, Progress};
use crate::frame::{Encoding, Frame};
use crate::message::{Event, Reply, Request};

/// Objects are read until they make this many bytes: many small ones cost one step, a large one is a step of its own.
const BATCH_BYTES: usize = 256 * 1024;

/// Where objects come from.
pub trait ObjectSource: Send + Sync {
    /// The object's bytes as they are to be sent, at most [`crate::message::DATA_BYTES_MAX`]; as the difference to `base`,
    /// which the other side has, where that is known here and gains. Called on a thread that may block.
    ///
    /// # Errors
    /// When it is not there or cannot be read; the call that wants it fails.
    fn object(&self, hash: ContentHash, base: Option<ContentHash>) -> io::Result<(Encoding, Vec<u8>)>;
}

/// How far the sending is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StageProgress {
    /// Objects handed over.
    pub objects_sent: u64,
    /// Objects that the host lacked.
    pub objects_total: u64,
    /// Bytes handed over, as encoded.
    pub bytes_sent: u64,
}

impl Connection {
    /// Makes a [`Request::Stage`] and sends the objects that the host lacks from `objects`. `timeout` is for the whole.
    /// Progress may skip steps; the last one is always told.
    ///
    /// # Errors
    /// As [`Connection::call`], and [`CallError::Object`] when an object cannot be read here.
    pub async fn stage(
        &self,
        request: Request,
        objects: Arc<dyn ObjectSource>,
        timeout: Duration,
        mut on_progress: impl FnMut(StageProgress) + Send,
        mut on_event: impl FnMut(Event) + Send,
    ) -> Result<Reply, CallError> {
        let what = request.title();
        let known = match &request {
            Request::Stage { manifest, .. } => hashes(manifest),
            _ => HashSet::new(),
        };
        self.within(timeout, what, async {
            let mut exchange = self.begin(request).await?;
            let mut sending: Option<Sending> = None;
            loop {
                let progress = tokio::select! {
                    // A reply must not overtake the last progress.
                    biased;
                    step = Sending::next(&mut sending) => {
                        match step {
                            Ok(progress) => on_progress(progress),
                            Err((hash, source)) => {
                                return Err(CallError::Object { host: self.host().clone(), hash, source });
                            }
                        }
                        continue;
                    }
                    progress = exchange.next() => progress?,
                };
                match progress {
                    Progress::Event(Event::Missing { objects: missing, bases }) => {
                        if sending.is_some() {
                            return Err(exchange.protocol("it said twice what it lacks"));
                        }
                        if let Some(foreign) = missing.iter().find(|hash| !known.contains(*hash)) {
                            let why = format!(
                                "it asked for object {}, which the release does not have",
                                foreign.short()
                            );
                            return Err(exchange.protocol(why));
                        }
                        let wanted = missing.iter().map(|hash| (*hash, bases.get(hash).copied())).collect();
                        sending =
                            Some(Sending::start(exchange.id, wanted, Arc::clone(&objects), self.data()));
                    }
                    Progress::Event(event) => on_event(event),
                    Progress::Reply(reply) => return Ok(reply),
                }
            }
        })
        .await
    }
}

fn hashes(manifest: &Manifest) -> HashSet<ContentHash> {
    let mut known = HashSet::new();
    for entry in manifest.entries.values() {
        if let Entry::File { hash, chunks, .. } = entry {
            known.insert(*hash);
            known.extend(chunks.iter().map(|(hash, _)| *hash));
        }
    }
    known
}

/// An object that the host lacks, and what it has in its place.
type Wanted = (ContentHash, Option<ContentHash>);
type ObjectError = (ContentHash, io::Error);

/// The task that sends one request's objects. It stops when this is dropped, but not without its end of data.
struct Sending {
    progress: watch::Receiver<StageProgress>,
    failure: Option<oneshot::Receiver<ObjectError>>,
    /// Held for its drop, which the task sees.
    _keep: oneshot::Sender<()>,
}

impl Sending {
    fn start(
        id: u64,
        missing: Vec<Wanted>,
        objects: Arc<dyn ObjectSource>,
        data: mpsc::Sender<Vec<Frame>>,
    ) -> Self {
        let total = StageProgress { objects_total: missing.len() as u64, ..StageProgress::default() };
        let (tell, mut progress) = watch::channel(total);
        progress.mark_changed();
        let (fail, failure) = oneshot::channel();
        let (keep, mut dropped) = oneshot::channel();
        tokio::spawn(async move {
            tokio::select! {
                result = send_objects(id, missing, objects, &data, &tell) => if let Err(error) = result {
                    // Nobody listens when the call is over already.
                    let _ = fail.send(error);
                },
                _ = &mut dropped => {}
            }
            // A host that is left without it would wait for the rest; one whose connection is gone does not matter.
            let _ = data.send(vec![Frame::EndOfData { id }]).await;
        });
        Self { progress, failure: Some(failure), _keep: keep }
    }

    /// The next step of a sending that is under way; never when there is none, or none left. Safe to cancel.
    async fn next(sending: &mut Option<Self>) -> Result<StageProgress, ObjectError> {
        let Some(this) = sending else { return std::future::pending().await };
        loop {
            let Some(failure) = &mut this.failure else { return std::future::pending().await };
            tokio::select! {
                biased;
                changed = this.progress.changed() => if changed.is_ok() {
                    return Ok(*this.progress.borrow_and_update());
                },
                failed = &mut *failure => {
                    this.failure = None;
                    if let Ok(error) = failed {
                        return Err(error);
                    }
                    continue;
                }
            }
            // The progress has ended, and with it the sending: only its result is left.
            let failed = (&mut *failure).await;
            this.failure = None;
            if let Ok(error) = failed {
                return Err(error);
            }
        }
    }
}

async fn send_objects(
    id: u64,
    missing: Vec<Wanted>,
    objects: Arc<dyn ObjectSource>,
    data: &mpsc::Sender<Vec<Frame>>,
    tell: &watch::Sender<StageProgress>,
) -> Result<(), ObjectError> {
    let mut missing = missing.into_iter();
    loop {
        let objects = Arc::clone(&objects);
        let read = tokio::task::spawn_blocking(move || {
            let batch = read_batch(id, &mut missing, &*objects);
            (missing, batch)
        });
        let batch;
        (missing, batch) = match read.await {
            Ok((rest, batch)) => (rest, batch?),
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is going down, and this task with it.
                Err(_) => return Ok(()),
            },
        };
        if batch.is_empty() {
            return Ok(());
        }
        let (count, bytes) = batch.iter().fold((0, 0), |(count, bytes), frame| match frame {
            Frame::Data { data, .. } => (count + 1, bytes + data.len() as u64),
            Frame::Message(_) | Frame::EndOfData { .. } => (count, bytes),
        });
        if data.send(batch).await.is_err() {
            // The connection is dying; the call ends with the reason.
            return Ok(());
        }
        tell.send_modify(|progress| {
            progress.objects_sent += count;
            progress.bytes_sent += bytes;
        });
    }
}

fn read_batch(
    id: u64,
    missing: &mut impl Iterator<Item = Wanted>,
    objects: &dyn ObjectSource,
) -> Result<Vec<Frame>, ObjectError> {
    let mut batch = Vec::new();
    let mut bytes = 0;
    while bytes < BATCH_BYTES {
        let Some((hash, base)) = missing.next() else { break };
        let (encoding, data) = objects.object(hash, base).map_err(|error| (hash, error))?;
        bytes += data.len();
        batch.push(Frame::Data { id, hash, encoding, data });
    }
    Ok(batch)
}
