//! Sending a release within a stage request: its manifest, and then what the host lacks.
//!
//! Guarantees: at most three batches are in memory per connection (one being read, one queued, one being written), however
//! large what is sent; when the call ends early, for whatever reason, the host gets its end of data and can finish.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use greenlight_model::id::ContentHash;
use tokio::sync::{mpsc, oneshot, watch};

use crate::connection::{CallError, Connection, Progress};
use crate::frame::{Encoding, Frame};
use crate::message::{Event, Reply, Request};

/// Parcels are read until they make this many bytes: many small ones cost one step, a large one takes several. Three of
/// them for each of a hundred hosts are 19 MB.
const BATCH_BYTES: usize = 64 * 1024;

/// One release, for all hosts that want it. Called on threads that may block.
pub trait ReleaseSource: Send + Sync {
    /// What it consists of, in the encoding for that.
    ///
    /// # Errors
    /// When it cannot be read; the call that wants it fails.
    fn manifest(&self) -> io::Result<Parcel>;

    /// What one host lacks, in parcels.
    ///
    /// # Errors
    /// When the release does not have what it asks for.
    fn parcels(&self, lacking: Lacking) -> io::Result<Box<dyn Parcels>>;
}

/// What one host lacks, as it said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lacking {
    /// As in [`Event::Missing`].
    pub objects: Vec<(u32, u32)>,
    /// As in [`Event::Missing`].
    pub bases: BTreeMap<u32, ContentHash>,
}

/// Parcels, one after the other.
pub trait Parcels: Send {
    /// The next; none when all were given.
    ///
    /// # Errors
    /// When it cannot be read or made; the call fails.
    fn next(&mut self) -> io::Result<Option<Parcel>>;

    /// About how many bytes those have that were not given yet.
    fn left_bytes(&self) -> u64;
}

/// Something that is sent as a whole, in pieces.
pub struct Parcel {
    /// What the frame names it by.
    pub hash: ContentHash,
    /// How the bytes are packed.
    pub encoding: Encoding,
    /// How many of the objects that the host lacks it brings.
    pub objects: u64,
    /// How many bytes it has, at most [`crate::message::PARCEL_BYTES_MAX`], or, of a manifest,
    /// [`crate::message::MANIFEST_PARCEL_BYTES_MAX`].
    pub bytes: u64,
    /// The bytes.
    pub content: Box<dyn Read + Send>,
}

/// How far the sending is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StageProgress {
    /// Objects handed over, of those that the host lacked.
    pub objects_sent: u64,
    /// Objects that the host lacked.
    pub objects_total: u64,
    /// Bytes handed over, as encoded.
    pub bytes_sent: u64,
    /// Bytes that there will have been in the end: an estimate, which ends as what was sent.
    pub bytes_total: u64,
}

impl Connection {
    /// Makes a [`Request::Stage`], and sends the release as the host needs it. `timeout` is for the whole.
    /// Progress may skip steps; the last one is always told.
    ///
    /// # Errors
    /// As [`Connection::call`], and [`CallError::Object`] when something cannot be read here.
    pub async fn stage(
        &self,
        request: Request,
        release: Arc<dyn ReleaseSource>,
        timeout: Duration,
        mut on_progress: impl FnMut(StageProgress) + Send,
        mut on_event: impl FnMut(Event) + Send,
    ) -> Result<Reply, CallError> {
        let what = request.title();
        self.within(timeout, what, async {
            let mut exchange = self.begin(request).await?;
            let (mut sending, tell) = Sending::start(exchange.id, release, self.data());
            let mut tell = Some(tell);
            loop {
                let progress = tokio::select! {
                    // A reply must not overtake the last progress.
                    biased;
                    step = sending.next() => {
                        match step {
                            Ok(progress) => on_progress(progress),
                            Err(source) => {
                                return Err(CallError::Object { host: self.host().clone(), source });
                            }
                        }
                        continue;
                    }
                    progress = exchange.next() => progress?,
                };
                match progress {
                    Progress::Event(Event::Missing { objects, bases }) => {
                        let Some(tell) = tell.take() else {
                            return Err(exchange.protocol("it said twice what it lacks"));
                        };
                        // A sending that has failed has said why.
                        let _ = tell.send(Lacking { objects, bases });
                    }
                    Progress::Event(event) => on_event(event),
                    Progress::Reply(reply) => return Ok(reply),
                }
            }
        })
        .await
    }
}

/// The thread that sends one release to one host. It stops when this is dropped, but not without its end of data.
struct Sending {
    progress: watch::Receiver<StageProgress>,
    failure: Option<oneshot::Receiver<io::Error>>,
}

impl Sending {
    fn start(
        id: u64,
        release: Arc<dyn ReleaseSource>,
        data: mpsc::Sender<Vec<Frame>>,
    ) -> (Self, oneshot::Sender<Lacking>) {
        let (progress, told) = watch::channel(StageProgress::default());
        let (fail, failure) = oneshot::channel();
        let (tell, lacking) = oneshot::channel();
        tokio::task::spawn_blocking(move || {
            let mut outlet = Outlet { id, data, progress, batch: Vec::new(), batch_bytes: 0 };
            let sent = send(&mut outlet, &*release, lacking);
            let data = outlet.data;
            drop(outlet.progress);
            if let Err(Stop::Failed(error)) = sent {
                // Nobody listens when the call is over already.
                let _ = fail.send(error);
            }
            // A host that is left without it would wait for the rest; one whose connection is gone does not matter.
            let _ = data.blocking_send(vec![Frame::EndOfData { id }]);
        });
        (Self { progress: told, failure: Some(failure) }, tell)
    }

    /// The next step of the sending; never when there is none left. Safe to cancel.
    async fn next(&mut self) -> io::Result<StageProgress> {
        if self.progress.changed().await.is_ok() {
            return Ok(*self.progress.borrow_and_update());
        }
        // The progress has ended, and with it the sending: only its result is left.
        if let Some(failure) = &mut self.failure {
            let failed = failure.await;
            self.failure = None;
            if let Ok(error) = failed {
                return Err(error);
            }
        }
        std::future::pending().await
    }
}

/// Why a sending ends before its end.
enum Stop {
    /// Nobody wants it any more: the call is over, or the connection dying.
    Unwanted,
    /// Something cannot be read.
    Failed(io::Error),
}

fn send(
    outlet: &mut Outlet,
    release: &dyn ReleaseSource,
    lacking: oneshot::Receiver<Lacking>,
) -> Result<(), Stop> {
    outlet.parcel(release.manifest().map_err(Stop::Failed)?)?;
    outlet.flush()?;
    let lacking = lacking.blocking_recv().map_err(|_| Stop::Unwanted)?;
    let objects_total = lacking.objects.iter().map(|(_, count)| u64::from(*count)).sum();
    let mut parcels = release.parcels(lacking).map_err(Stop::Failed)?;
    let mut progress = StageProgress { objects_total, ..StageProgress::default() };
    progress.bytes_total = parcels.left_bytes();
    outlet.progress.send_replace(progress);
    while let Some(parcel) = parcels.next().map_err(Stop::Failed)? {
        progress.objects_sent += parcel.objects;
        progress.bytes_sent += parcel.bytes;
        progress.bytes_total = progress.bytes_sent + parcels.left_bytes();
        outlet.parcel(parcel)?;
        outlet.progress.send_replace(progress);
    }
    outlet.flush()
}

/// Where one sending's frames go.
struct Outlet {
    id: u64,
    data: mpsc::Sender<Vec<Frame>>,
    progress: watch::Sender<StageProgress>,
    batch: Vec<Frame>,
    batch_bytes: usize,
}

impl Outlet {
    fn parcel(&mut self, parcel: Parcel) -> Result<(), Stop> {
        let Parcel { hash, encoding, bytes, mut content, .. } = parcel;
        let mut left = bytes;
        loop {
            let room = (BATCH_BYTES - self.batch_bytes) as u64;
            let mut data = Vec::with_capacity(usize::try_from(room.min(left)).unwrap_or(BATCH_BYTES));
            let piece = (&mut content).take(room.min(left)).read_to_end(&mut data).map_err(Stop::Failed)?;
            if piece == 0 && left > 0 {
                // What was begun is not ended: the host drops it with the end of the data.
                return Err(Stop::Failed(io::Error::other("it became shorter while it was sent")));
            }
            left -= piece as u64;
            self.batch_bytes += piece;
            self.batch.push(Frame::Data { id: self.id, hash, encoding, has_more: left > 0, data });
            if self.batch_bytes >= BATCH_BYTES {
                self.flush()?;
            }
            if left == 0 {
                return Ok(());
            }
        }
    }

    fn flush(&mut self) -> Result<(), Stop> {
        self.batch_bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        if self.progress.is_closed() || self.data.blocking_send(batch).is_err() {
            return Err(Stop::Unwanted);
        }
        Ok(())
    }
}
