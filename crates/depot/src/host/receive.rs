//! Which objects a host lacks, what it has in their place, and taking those that arrive.
//!
//! An object is written under its own name and sealed last: what a kill leaves has no seal, and is found by its bytes.
//! Chunks go straight to their place in the file that they make up, under `large/HASH.part`; a transfer that is begun again
//! reads there which ones it has.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use greenlight_model::id::ContentHash;
use greenlight_model::manifest::{Entry, Manifest};

use super::{HostDepot, PART, object_mode, object_name};
use crate::check;
use crate::disk;
use crate::error::{At, DepotError};
use crate::object::{Encoding, OBJECT_BYTES_MAX, content_hash, decode_with};
use crate::pack;
use crate::shipment::Lacking;

/// Most objects for which something is proposed that they may be sent as the difference to. When more than these have
/// changed, so have most, and one by one they cost more than they save.
const BASES_MAX: usize = 16_384;

/// Where each chunk of the large files that are here lies.
pub(super) type Large = HashMap<ContentHash, Within>;

/// A chunk within a large file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Within {
    file: ContentHash,
    is_executable: bool,
    offset: u64,
    bytes: u32,
}

/// What becomes of the objects of a release as they arrive.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    /// What is lacking. Packs bring other objects too.
    missing: HashSet<ContentHash>,
    /// Files of which every one is executable, so that the object is needed as such.
    executable: HashSet<ContentHash>,
    /// Objects that are small files.
    whole: HashSet<ContentHash>,
    /// The places of each chunk: the file with its size in bytes, and the offset.
    chunks: HashMap<ContentHash, Vec<(ContentHash, u64, u64)>>,
    large: Large,
    /// The chunks that were verified and written by this process, by file and offset: they need not be read again.
    written: Mutex<HashSet<(ContentHash, u64)>>,
}

impl Incoming {
    fn of(manifest: &Manifest, large: Large) -> Self {
        let mut incoming = Self { large, ..Self::default() };
        let mut plain = HashSet::new();
        for entry in manifest.entries.values() {
            let Entry::File { size, executable, hash, chunks } = entry else { continue };
            match executable {
                true => incoming.executable.insert(*hash),
                false => plain.insert(*hash),
            };
            if chunks.is_empty() {
                incoming.whole.insert(*hash);
            }
            let mut offset = 0;
            for (chunk, bytes) in chunks {
                let places = incoming.chunks.entry(*chunk).or_default();
                // The same content under two paths is one file here.
                if !places.contains(&(*hash, *size, offset)) {
                    places.push((*hash, *size, offset));
                }
                offset += u64::from(*bytes);
            }
        }
        incoming.executable.retain(|hash| !plain.contains(hash));
        incoming
    }
}

impl HostDepot {
    /// The objects that this host lacks for a release, each once, in the order in which the files stand in the manifest.
    ///
    /// # Errors
    /// When the manifest may not be placed, or what is here cannot be read.
    pub fn missing(&self, manifest: &Manifest) -> Result<Vec<ContentHash>, DepotError> {
        check::check(manifest)?;
        let is_cut = |entry: &Entry| matches!(entry, Entry::File { chunks, .. } if !chunks.is_empty());
        let large = if manifest.entries.values().any(is_cut) { self.large()? } else { Large::new() };
        let mut seen = HashSet::new();
        let mut missing = Vec::new();
        for entry in manifest.entries.values() {
            let Entry::File { size, hash, chunks, .. } = entry else { continue };
            if !seen.insert(*hash) || self.has_either(*hash, *size)? {
                continue;
            }
            if chunks.is_empty() {
                missing.push(*hash);
                continue;
            }
            let part = self.open_part(*hash)?;
            let mut offset = 0;
            for (chunk, bytes) in chunks {
                // A chunk may also be a small file of its own, which then was asked for already.
                if !large.contains_key(chunk)
                    && !part.as_ref().is_some_and(|part| has_arrived(part, *chunk, *bytes, offset))
                    && seen.insert(*chunk)
                    && !self.has_either(*chunk, u64::from(*bytes))?
                {
                    missing.push(*chunk);
                }
                offset += u64::from(*bytes);
            }
        }
        let incoming =
            Incoming { missing: missing.iter().copied().collect(), ..Incoming::of(manifest, large) };
        *self.incoming.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(incoming);
        Ok(missing)
    }

    /// The same by number, with what is here in their place: what the sender is to be told.
    ///
    /// # Errors
    /// As [`HostDepot::missing`].
    pub fn lacking(&self, manifest: &Manifest) -> Result<Lacking, DepotError> {
        let missing: HashSet<ContentHash> = self.missing(manifest)?.into_iter().collect();
        let bases = self.bases(manifest, &missing)?;
        let mut lacking = Lacking::default();
        for (number, (hash, _)) in (0u32..).zip(manifest.objects()) {
            if !missing.contains(&hash) {
                continue;
            }
            match lacking.objects.last_mut() {
                Some((first, count)) if *first + *count == number => *count += 1,
                _ => lacking.objects.push((number, 1)),
            }
            if lacking.bases.len() < BASES_MAX
                && let Some(base) = bases.get(&hash)
            {
                lacking.bases.insert(number, *base);
            }
        }
        Ok(lacking)
    }

    /// What this host has in the place of missing objects: the same path of the current release, or of the one that was
    /// staged last. Only a proposal for the sender: whether it helps is for it to find out.
    ///
    /// # Errors
    /// When what is here cannot be read.
    fn bases(
        &self,
        manifest: &Manifest,
        missing: &HashSet<ContentHash>,
    ) -> Result<HashMap<ContentHash, ContentHash>, DepotError> {
        let mut bases = HashMap::new();
        let Some(before) = self.release_before()? else { return Ok(bases) };
        for (path, entry) in &manifest.entries {
            let (Some(now), Some(before)) = (objects(entry), before.entries.get(path).and_then(objects))
            else {
                continue;
            };
            for (index, (hash, _)) in now.iter().enumerate() {
                // What a file ends with stays at its end, however much longer it has become.
                let index =
                    if index + 1 == now.len() { before.len() - 1 } else { index.min(before.len() - 1) };
                let (base, bytes) = before[index];
                if missing.contains(hash) && !bases.contains_key(hash) && self.has_base(base, bytes)? {
                    bases.insert(*hash, base);
                }
            }
        }
        Ok(bases)
    }

    fn release_before(&self) -> Result<Option<Manifest>, DepotError> {
        let mut newest = None;
        for id in self.staged()? {
            newest = newest.max(Some((self.staged_at(id)?, id)));
        }
        match self.current().or(newest.map(|(_, id)| id)) {
            Some(id) => self.manifest(id),
            None => Ok(None),
        }
    }

    /// Whether a chunk was written to its place in a file by this process.
    pub(super) fn has_written(&self, file: ContentHash, offset: u64) -> bool {
        self.incoming().written.lock().unwrap_or_else(PoisonError::into_inner).contains(&(file, offset))
    }

    fn incoming(&self) -> Arc<Incoming> {
        Arc::clone(&self.incoming.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn has_base(&self, hash: ContentHash, bytes: u64) -> Result<bool, DepotError> {
        let is_within = self.incoming().large.contains_key(&hash);
        Ok(bytes > 0 && (is_within || self.has_either(hash, bytes)?))
    }

    /// The bytes of an object that another one is the difference to, verified: one that was changed is not proposed again.
    fn base(&self, hash: ContentHash, incoming: &Incoming) -> Result<Option<Vec<u8>>, DepotError> {
        let mut bytes = incoming.large.get(&hash).map(|within| within.bytes);
        for name in [object_name(hash, false), object_name(hash, true)] {
            if let Some(object) = self.open_object(&name)? {
                let length = object.metadata().at("look at", self.objects.join(&name))?.len();
                bytes = Some(u32::try_from(length).unwrap_or(u32::MAX));
            }
        }
        let Some(bytes) = bytes else { return Ok(None) };
        match self.chunk(hash, bytes, &incoming.large) {
            Ok(data) => Ok(Some(data)),
            Err(DepotError::ObjectMissing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Takes an object, or a pack of them, that arrived: of a pack, what is lacking. Any number of threads may do so at a
    /// time. Durable only after the [`HostDepot::complete`] of a release that uses it.
    ///
    /// # Errors
    /// When the bytes are not those that the hash names, are more than [`OBJECT_BYTES_MAX`], or cannot be written.
    pub fn receive(&self, hash: ContentHash, encoding: Encoding, data: &[u8]) -> Result<(), DepotError> {
        let incoming = self.incoming();
        if encoding == Encoding::Pack {
            return pack::read(hash, data)?
                .each(|hash| incoming.missing.contains(hash), |hash, data| self.take(&incoming, hash, data));
        }
        let data = decode_with(hash, encoding, data, |base| self.base(base, &incoming))?;
        self.take(&incoming, hash, &data)
    }

    /// Puts the bytes of an object where they belong.
    fn take(&self, incoming: &Incoming, hash: ContentHash, data: &[u8]) -> Result<(), DepotError> {
        let places = incoming.chunks.get(&hash);
        for (file, bytes, offset) in places.into_iter().flatten() {
            let path = self.part(*file);
            let part = self.create_part(*file, *bytes)?;
            let written = part.write_all_at(data, *offset).at("write", &path);
            if written.is_err() {
                drop(disk::remove_file(&path));
            }
            written?;
            incoming.written.lock().unwrap_or_else(PoisonError::into_inner).insert((*file, *offset));
        }
        match places.is_none() || incoming.whole.contains(&hash) {
            true => self.write_object(hash, incoming.executable.contains(&hash), data),
            false => Ok(()),
        }
    }

    fn write_object(&self, hash: ContentHash, executable: bool, data: &[u8]) -> Result<(), DepotError> {
        let name = object_name(hash, executable);
        let path = self.objects.join(&name);
        let mode = object_mode(executable);
        let create =
            || OpenOptions::new().write(true).create_new(true).custom_flags(NO_FOLLOW).mode(mode).open(&path);
        let created = match create() {
            // Sent twice, or half-written by somebody who was killed meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                disk::remove_file(&path)?;
                create()
            }
            created => created,
        };
        let mut file = created.at("create", &path)?;
        let written = file
            .write_all(data)
            .at("write", &path)
            .and_then(|()| self.seal(&file, &path, executable, hash, data.len() as u64));
        if written.is_err() {
            // Best effort, to give a full disk its space back at once; the first error is the one to tell.
            drop(disk::remove_file(&path));
        }
        written
    }

    /// Where a large file is put together.
    pub(super) fn part(&self, file: ContentHash) -> PathBuf {
        self.large_directory().join(format!("{file}{PART}"))
    }

    /// The large file that is put together, of its whole size from the beginning.
    pub(super) fn create_part(&self, file: ContentHash, bytes: u64) -> Result<File, DepotError> {
        let path = self.part(file);
        let part = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(NO_FOLLOW)
            .mode(0o600)
            .open(&path)
            .at("create", &path)?;
        part.set_len(bytes).at("write", &path)?;
        Ok(part)
    }

    fn open_part(&self, file: ContentHash) -> Result<Option<File>, DepotError> {
        let path = self.part(file);
        disk::absent_is_none(OpenOptions::new().read(true).custom_flags(NO_FOLLOW).open(&path))
            .at("open", path)
    }

    fn has_either(&self, hash: ContentHash, size: u64) -> Result<bool, DepotError> {
        Ok(self.has(&object_name(hash, false), hash, size)?
            || self.has(&object_name(hash, true), hash, size)?)
    }

    /// Every chunk of the large files that are here and sound.
    pub(super) fn large(&self) -> Result<Large, DepotError> {
        let mut large = Large::new();
        let directory = self.large_directory();
        for name in disk::names(&directory)? {
            let Ok(file) = name.parse::<ContentHash>() else { continue };
            let path = directory.join(&name);
            let Chunks { chunks } = match disk::read_document(&path) {
                Ok(Some(chunks)) => chunks,
                Ok(None) => continue,
                // What a crash leaves of one whose release was not complete. The file itself is sound or not by its own seal.
                Err(DepotError::Unreadable { .. }) => {
                    disk::remove_file(&path)?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let size = chunks.iter().map(|(_, size)| u64::from(*size)).sum();
            let is_executable = if self.has(&object_name(file, false), file, size)? {
                false
            } else if self.has(&object_name(file, true), file, size)? {
                true
            } else {
                continue;
            };
            let mut offset = 0;
            for (chunk, size) in chunks {
                large.entry(chunk).or_insert(Within { file, is_executable, offset, bytes: size });
                offset += u64::from(size);
            }
        }
        Ok(large)
    }

    /// The bytes of a chunk, from an object of its own or from within a large file, verified.
    pub(super) fn chunk(&self, hash: ContentHash, size: u32, large: &Large) -> Result<Vec<u8>, DepotError> {
        let places = [(object_name(hash, false), 0, None), (object_name(hash, true), 0, None)];
        let within =
            large.get(&hash).map(|at| (object_name(at.file, at.is_executable), at.offset, Some(at.file)));
        for (name, offset, file) in places.into_iter().chain(within) {
            let Some(object) = self.open_object(&name)? else { continue };
            let mut data = vec![0; (size as usize).min(OBJECT_BYTES_MAX)];
            let read = object.read_exact_at(&mut data, offset);
            if read.is_ok() && content_hash(&data) == hash {
                return Ok(data);
            }
            // It is not what its name says, whatever its time of change pretends: it must not be found again.
            disk::remove_file(&self.objects.join(&name))?;
            if let Some(file) = file {
                disk::remove_file(&self.large_directory().join(file.to_string()))?;
            }
        }
        Err(DepotError::ObjectMissing { hash })
    }
}

#[expect(clippy::cast_possible_wrap, reason = "a flag of a few bits, which the other crate gives unsigned")]
const NO_FOLLOW: i32 = rustix::fs::OFlags::NOFOLLOW.bits() as i32;

/// Whether a chunk is at its place in a file that is being put together.
pub(super) fn has_arrived(part: &File, hash: ContentHash, bytes: u32, offset: u64) -> bool {
    let mut data = vec![0; (bytes as usize).min(OBJECT_BYTES_MAX)];
    part.read_exact_at(&mut data, offset).is_ok() && content_hash(&data) == hash
}

/// The objects of a file with their sizes in bytes, in order; none of what is no file.
fn objects(entry: &Entry) -> Option<Vec<(ContentHash, u64)>> {
    match entry {
        Entry::File { size, hash, chunks, .. } if chunks.is_empty() => Some(vec![(*hash, *size)]),
        Entry::File { chunks, .. } => {
            Some(chunks.iter().map(|(hash, bytes)| (*hash, u64::from(*bytes))).collect())
        }
        Entry::Directory | Entry::Symlink { .. } => None,
    }
}

/// The chunks of a large file, as kept under `large/`.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct Chunks {
    pub(super) chunks: Vec<(ContentHash, u32)>,
}
