//! A release on its way to its hosts: what each of them lacks, in parcels, read as they are sent.
//!
//! Guarantees: what is held in memory does not grow with the number of hosts or the size of the tree, but for some 40 bytes
//! per object of the depot, once for all hosts: objects and packs are sent from the files in which they lie. A difference is
//! made once for all hosts that want it at about the same time, and one at a time. Only objects of the release are sent,
//! whatever a host asks for.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{Cursor, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use greenlight_model::id::{ContentHash, ReleaseId};

use crate::depot::{Depot, Found};
use crate::error::DepotError;
use crate::index::Index;
use crate::object::{EncodedObject, Encoding};

/// Most bytes of differences that are held for hosts which are behind. Hosts of one wave begin together and are seldom
/// further apart.
const HELD_BYTES_MAX: usize = 16 << 20;
/// What a difference, or an object out of a pack, is taken to be of its whole size before it is made: for the estimate of what is left.
const ESTIMATED_SHARE: u64 = 4;
/// Stands for no pack.
const ALONE: u32 = u32::MAX;

/// What a host lacks of a release.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lacking {
    /// The numbers of the objects, by [`greenlight_model::manifest::Manifest::objects`]: the first of each run, and how many.
    pub objects: Vec<(u32, u32)>,
    /// What it has in the place of some of them.
    pub bases: BTreeMap<u32, ContentHash>,
}

/// Something that is sent in one piece.
pub struct Parcel {
    /// The object's hash, or the pack's.
    pub hash: ContentHash,
    /// How the bytes are written.
    pub encoding: Encoding,
    /// How many of the objects that the host lacks it brings.
    pub objects: u64,
    /// How many bytes it is.
    pub bytes: u64,
    /// The bytes.
    pub content: Box<dyn Read + Send>,
}

/// One release, for all hosts that want it.
pub struct Shipment {
    depot: Arc<Depot>,
    release: ReleaseId,
    /// Hash, size in bytes and number of the pack of each object, in the manifest's order.
    objects: Vec<(ContentHash, u32, u32)>,
    index: Index,
    made: Mutex<Made>,
}

/// What was made for a host and may serve the next.
#[derive(Default)]
struct Made {
    /// By object and what it is sent as the difference to, if to any.
    objects: HashMap<Key, Arc<EncodedObject>>,
    /// Oldest first.
    order: VecDeque<Key>,
    bytes: usize,
}

type Key = (ContentHash, Option<ContentHash>);

impl Made {
    fn keep(&mut self, key: Key, object: &Arc<EncodedObject>) {
        if self.objects.insert(key, Arc::clone(object)).is_some() {
            return;
        }
        self.order.push_back(key);
        self.bytes += object.data.len();
        while self.bytes > HELD_BYTES_MAX {
            let oldest = self.order.pop_front().and_then(|oldest| self.objects.remove(&oldest));
            self.bytes -= oldest.map_or(0, |oldest| oldest.data.len());
        }
    }
}

impl Shipment {
    /// A release of the depot, ready to be sent.
    ///
    /// # Errors
    /// When there is no such release, or the depot cannot be read.
    pub fn new(depot: Arc<Depot>, release: ReleaseId) -> Result<Arc<Self>, DepotError> {
        let index = depot.index()?;
        let manifest = depot.manifest(release)?;
        let located = |(hash, bytes): (ContentHash, u32)| (hash, bytes, index.find(hash).unwrap_or(ALONE));
        let mut objects: Vec<_> = manifest.objects().into_iter().map(located).collect();
        objects.shrink_to_fit();
        Ok(Arc::new(Self { depot, release, objects, index, made: Mutex::default() }))
    }

    /// The manifest as it lies in the depot: a zstd frame.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn manifest(&self) -> Result<Parcel, DepotError> {
        let (file, bytes) = self.depot.open_manifest(self.release)?;
        let hash = ContentHash::from_bytes(*self.release.as_bytes());
        Ok(Parcel { hash, encoding: Encoding::Zstd, objects: 0, bytes, content: Box::new(file.take(bytes)) })
    }

    /// What a host lacks, in parcels.
    ///
    /// # Errors
    /// [`DepotError::NotInRelease`] when it asks for what the release does not have.
    pub fn parcels(self: &Arc<Self>, lacking: Lacking) -> Result<Parcels, DepotError> {
        let mut wanted_of_pack = vec![(0u64, 0u64); self.index.packs.len()];
        let mut left = 0u64;
        let mut end_before = 0;
        for (first, count) in &lacking.objects {
            let range = (*first as usize)..(*first as usize).saturating_add(*count as usize);
            let not_there = || DepotError::NotInRelease { number: *first, release: self.release };
            if range.start < end_before {
                return Err(not_there());
            }
            end_before = range.end;
            let objects = self.objects.get(range).ok_or_else(not_there)?;
            for (number, (_, bytes, pack)) in (*first..).zip(objects) {
                match wanted_of_pack.get_mut(*pack as usize) {
                    Some((objects, wanted)) if !lacking.bases.contains_key(&number) => {
                        *objects += 1;
                        *wanted += u64::from(*bytes);
                    }
                    _ => left += u64::from(*bytes),
                }
            }
        }
        let mut packs = Vec::new();
        let mut in_parts = 0;
        for (number, ((objects, wanted), pack)) in
            (0u32..).zip(wanted_of_pack.into_iter().zip(&self.index.packs))
        {
            // From half of it on they would be no smaller one by one.
            if objects > 0 && wanted * 2 >= pack.object_bytes {
                left += pack.file_bytes;
                packs.push((number, objects));
            } else {
                in_parts += wanted / ESTIMATED_SHARE;
            }
        }
        Ok(Parcels {
            shipment: Arc::clone(self),
            whole: packs.iter().map(|(number, _)| *number).collect(),
            packs: packs.into_iter(),
            gone: Vec::new(),
            runs: lacking.objects.into_iter(),
            run: 0..0,
            bases: lacking.bases,
            left_bytes: left + in_parts,
        })
    }

    /// An object that is made for the wire: once for all who want it.
    fn made(&self, key: Key) -> Result<Arc<EncodedObject>, DepotError> {
        // Nothing panics while it is held; if something did, what is held would still be objects. Held while one is made:
        // the others would make the same, and each takes memory.
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(object) = made.objects.get(&key) {
            return Ok(Arc::clone(object));
        }
        let object = Arc::new(match key {
            (hash, Some(base)) => self.depot.difference(&self.index, hash, base)?,
            (hash, None) => self.depot.object_in(&self.index, hash)?,
        });
        made.keep(key, &object);
        Ok(object)
    }
}

/// What one host lacks, parcel by parcel.
pub struct Parcels {
    shipment: Arc<Shipment>,
    /// Packs that are sent whole, in order.
    whole: Vec<u32>,
    /// The same, with how many objects are wanted of each.
    packs: std::vec::IntoIter<(u32, u64)>,
    /// Of those, the ones that are gone since: their objects are looked for elsewhere.
    gone: Vec<u32>,
    runs: std::vec::IntoIter<(u32, u32)>,
    run: Range<u32>,
    bases: BTreeMap<u32, ContentHash>,
    left_bytes: u64,
}

impl Parcels {
    /// About how many bytes are still to be sent.
    #[must_use]
    pub fn left_bytes(&self) -> u64 {
        self.left_bytes
    }

    fn next_parcel(&mut self) -> Result<Option<Parcel>, DepotError> {
        let depot = &self.shipment.depot;
        for (number, objects) in self.packs.by_ref() {
            let Some(pack) = self.shipment.index.pack(number) else { continue };
            self.left_bytes = self.left_bytes.saturating_sub(pack.file_bytes);
            // Pruning may have put what is left of it into another.
            let Some((file, bytes)) = depot.open_pack(pack.name)? else {
                self.gone.push(number);
                continue;
            };
            return Ok(Some(Parcel {
                hash: pack.name,
                encoding: Encoding::Pack,
                objects,
                bytes,
                content: Box::new(file.take(bytes)),
            }));
        }
        loop {
            let Some(number) = self.run.next() else {
                let Some((first, count)) = self.runs.next() else { return Ok(None) };
                self.run = first..first.saturating_add(count);
                continue;
            };
            let Some((hash, bytes, pack)) = self.shipment.objects.get(number as usize).copied() else {
                continue;
            };
            let base = self.bases.get(&number).copied();
            let was_sent =
                base.is_none() && self.whole.binary_search(&pack).is_ok() && !self.gone.contains(&pack);
            if was_sent {
                continue;
            }
            self.left_bytes = self.left_bytes.saturating_sub(u64::from(bytes));
            if base.is_none()
                && pack == ALONE
                && let Some(Found { file, encoding, bytes }) = depot.open_object(hash)?
            {
                let content = Box::new(file.take(bytes));
                return Ok(Some(Parcel { hash, encoding, objects: 1, bytes, content }));
            }
            let object = self.shipment.made((hash, base))?;
            let (encoding, bytes) = (object.encoding, object.data.len() as u64);
            let content = Box::new(Cursor::new(Shared(object)));
            return Ok(Some(Parcel { hash, encoding, objects: 1, bytes, content }));
        }
    }
}

impl Iterator for Parcels {
    type Item = Result<Parcel, DepotError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_parcel().transpose()
    }
}

/// The bytes of an object that others send as well.
struct Shared(Arc<EncodedObject>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0.data
    }
}
