//! Which objects a host lacks, and taking those that arrive.

use std::collections::{HashMap, HashSet};
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use greenlight_model::id::ContentHash;
use greenlight_model::manifest::{Entry, Manifest};

use super::{HostDepot, object_name};
use crate::check;
use crate::disk;
use crate::error::{At, DepotError};
use crate::object::{Encoding, OBJECT_BYTES_MAX, content_hash, decode};

/// Where each chunk of the large files that are here lies: the file, whether that is the executable one, and the offset.
pub(super) type Large = HashMap<ContentHash, (ContentHash, bool, u64)>;

impl HostDepot {
    /// The objects that this host lacks for a release, each once, in the order in which the files stand in the manifest.
    ///
    /// # Errors
    /// When the manifest may not be placed, or what is here cannot be read.
    pub fn missing(&self, manifest: &Manifest) -> Result<Vec<ContentHash>, DepotError> {
        check::check(manifest)?;
        let mut large = None;
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
            if large.is_none() {
                large = Some(self.large()?);
            }
            for (chunk, size) in chunks {
                let is_in_a_file = large.as_ref().is_some_and(|large| large.contains_key(chunk));
                // A chunk may also be a small file of its own, which then was asked for already.
                if !is_in_a_file && seen.insert(*chunk) && !self.has_either(*chunk, u64::from(*size))? {
                    missing.push(*chunk);
                }
            }
        }
        Ok(missing)
    }

    /// Takes an object that arrived. Durable only after the [`HostDepot::place`] that uses it.
    ///
    /// # Errors
    /// When the bytes are not those that the hash names, are more than [`OBJECT_BYTES_MAX`], or cannot be written.
    pub fn receive(&self, hash: ContentHash, encoding: Encoding, data: &[u8]) -> Result<(), DepotError> {
        let data = decode(hash, encoding, data)?;
        let path = self.workplace.fresh();
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).at("create", &path)?;
        let written = file
            .write_all(&data)
            .at("write", &path)
            .and_then(|()| self.put(&file, &path, &object_name(hash, false), hash, data.len() as u64));
        if written.is_err() {
            // Best effort, to give a full disk its space back at once; the first error is the one to tell.
            drop(disk::remove_file(&path));
        }
        written
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
            let chunks: Option<Chunks> = disk::read_document(&directory.join(&name))?;
            let Some(Chunks { chunks }) = chunks else { continue };
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
                large.entry(chunk).or_insert((file, is_executable, offset));
                offset += u64::from(size);
            }
        }
        Ok(large)
    }

    /// The bytes of a chunk, from an object of its own or from within a large file, verified.
    pub(super) fn chunk(&self, hash: ContentHash, size: u32, large: &Large) -> Result<Vec<u8>, DepotError> {
        let places = [(object_name(hash, false), 0, None), (object_name(hash, true), 0, None)];
        let within = large
            .get(&hash)
            .map(|(file, is_executable, offset)| (object_name(*file, *is_executable), *offset, Some(*file)));
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

/// The chunks of a large file, as kept under `large/`.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct Chunks {
    pub(super) chunks: Vec<(ContentHash, u32)>,
}
