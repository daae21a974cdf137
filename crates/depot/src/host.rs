//! The host's side: the objects and releases of one service, under the service's root.
//!
//! ```text
//! releases/ID/                    the tree of a release; its files are clones of objects, or hard links to them
//! shared/                         outlives releases; nothing in here is touched
//! .greenlight/objects/ab/HASH     a file's bytes, mode 0444; HASH.x is the same with mode 0555
//! .greenlight/large/HASH          which chunks a large file consists of, so that they need not be kept apart
//! .greenlight/large/HASH.part     a large file of which not all chunks have arrived
//! .greenlight/staged/ID.json      the release is complete: written last; with ID.manifest.zst and ID.tree.zst
//! .greenlight/tmp/                work under way
//! ```
//!
//! Guarantees: a release's directory appears whole or not at all; a release counts as staged only when its marker exists,
//! and all of it is on disk by then; bytes are verified against their hash before they are named by it; a file that was changed
//! in place is found by its time of change and never linked into another release; a manifest cannot reach outside
//! its release; a full disk, a crash or a kill leaves nothing that counts, and the next [`HostDepot::open`] clears it away.
//!
//! Where the file system can share bytes between files (XFS, btrfs), nothing that an application writes into its release
//! reaches the store. Elsewhere files are hard links: read-only, so that only root and their owner can write to them at all;
//! then the object changes with them, which is found before it goes into another release, and the object is fetched again.
//! Not guaranteed there: that an older release which shares the file keeps its bytes. One service root is changed by one rollout at a time:
//! the ledger's claim sees to that, not this module.

mod changes;
mod place;
mod prune;
mod receive;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use greenlight_model::host::ReleaseMark;
use greenlight_model::id::{ContentHash, ReleaseId};
use greenlight_model::manifest::Manifest;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use serde::{Deserialize, Serialize};

use self::receive::Incoming;
use crate::disk::{self, Workplace};
use crate::error::{At, DepotError};
use crate::object::{is_sealed, set_seal, size_of_stat};

pub use changes::{CHANGES_MAX, ChangeKind, LocalChange};

/// The objects and releases of one service on this host.
#[derive(Debug)]
pub struct HostDepot {
    root: PathBuf,
    objects: PathBuf,
    /// The same, open, so that thousands of links do not each walk the path.
    objects_directory: File,
    workplace: Workplace,
    incoming: Mutex<Arc<Incoming>>,
    /// Held by whoever makes an object out of others.
    making: Mutex<()>,
    /// Whether the process's mask leaves the modes of objects as they are asked for.
    are_modes_kept: bool,
    /// Whether the file system was found unable to share bytes between files.
    cannot_clone: AtomicBool,
}

/// What says that a release is complete.
#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    mark: ReleaseMark,
    /// The hash of the manifest, as [`crate::manifest::digest`] gives it.
    manifest: ContentHash,
}

/// Subdirectories of `.greenlight/objects`, by the first two digits: a directory of a million names is slow on some
/// file systems.
const FAN_OUT_DIGITS: usize = 2;

impl HostDepot {
    /// Opens the depot of the service whose root (`/srv/web`) this is; creates what is not there, and clears away the
    /// work of processes that were killed.
    ///
    /// # Errors
    /// When a directory cannot be created or read.
    pub fn open(service_root: &Path) -> Result<Self, DepotError> {
        for (path, mode) in [("", 0o755), ("releases", 0o755), ("shared", 0o755), (".greenlight", 0o700)] {
            disk::create_directory(&service_root.join(path), mode)?;
        }
        let own = service_root.join(".greenlight");
        for path in ["objects", "large", "staged", "tmp"] {
            disk::create_directory(&own.join(path), 0o700)?;
        }
        let objects = own.join("objects");
        for number in 0..=u8::MAX {
            disk::create_directory(&objects.join(format!("{number:02x}")), 0o700)?;
        }
        let objects_directory = File::open(&objects).at("open", &objects)?;
        let workplace = Workplace::create(&own.join("tmp"), "work-")?;
        Ok(Self {
            root: service_root.to_owned(),
            objects,
            objects_directory,
            workplace,
            incoming: Mutex::default(),
            making: Mutex::default(),
            are_modes_kept: are_modes_kept(),
            cannot_clone: AtomicBool::new(false),
        })
    }

    /// Where the tree of a release is, or will be.
    #[must_use]
    pub fn release_directory(&self, id: ReleaseId) -> PathBuf {
        self.releases().join(id.to_string())
    }

    /// The releases that are complete here.
    ///
    /// # Errors
    /// When the directory of markers cannot be read.
    pub fn staged(&self) -> Result<BTreeSet<ReleaseId>, DepotError> {
        let names = disk::names(&self.staged_directory())?;
        let ids = names.iter().filter_map(|name| name.strip_suffix(".json")?.parse().ok());
        Ok(ids.filter(|id| self.release_directory(*id).is_dir()).collect())
    }

    /// The mark of a release that is complete here; none of any other.
    ///
    /// # Errors
    /// When its marker cannot be read.
    pub fn mark(&self, id: ReleaseId) -> Result<Option<ReleaseMark>, DepotError> {
        Ok(self.marker(id)?.map(|marker| marker.mark))
    }

    /// The manifest of a release that is complete here; none of any other.
    ///
    /// # Errors
    /// When its marker or its manifest cannot be read, or they do not belong together.
    pub fn manifest(&self, id: ReleaseId) -> Result<Option<Manifest>, DepotError> {
        let Some(marker) = self.marker(id)? else { return Ok(None) };
        let path = self.document(id, "manifest.zst");
        let unreadable = |why: &str| DepotError::Unreadable { path: path.clone(), why: why.to_owned() };
        let manifest = disk::read_document(&path)?.ok_or_else(|| unreadable("it is gone"))?;
        if crate::manifest::digest(&manifest) != marker.manifest {
            return Err(unreadable("it is not the manifest that the release was staged with"));
        }
        Ok(Some(manifest))
    }

    /// Says that a release is complete: placed by [`HostDepot::place`], and prepared in its directory. What its tree
    /// consists of now is what [`HostDepot::local_changes`] compares with later. Idempotent.
    ///
    /// # Errors
    /// When its tree is not there or cannot be read, the marker cannot be written, or the release is complete with
    /// another manifest.
    pub fn complete(&self, mark: &ReleaseMark, manifest: &Manifest) -> Result<(), DepotError> {
        if self.is_staged(mark.id, manifest)? {
            return Ok(());
        }
        let directory = self.release_directory(mark.id);
        let tree = changes::look(&directory)?;
        disk::write_document_unsynced(&self.document(mark.id, "manifest.zst"), manifest)?;
        disk::write_document_unsynced(&self.document(mark.id, "tree.zst"), &tree)?;
        // One call in place of thousands: a single fsync takes milliseconds. Nothing of the tree, of its objects and of what the
        // preparation wrote may be lost by a crash that the marker survives.
        disk::sync_file_system(&directory)?;
        let marker = Marker { mark: mark.clone(), manifest: crate::manifest::digest(manifest) };
        disk::write_document(&self.document(mark.id, "json"), &marker)
    }

    /// What the file system under the service's root has left for us, in bytes.
    ///
    /// # Errors
    /// When the file system does not say.
    pub fn free_bytes(&self) -> Result<u64, DepotError> {
        let stat = rustix::fs::statvfs(&self.root).at("look at", &self.root)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Whether the release is complete here. One id never stands for two trees.
    fn is_staged(&self, id: ReleaseId, manifest: &Manifest) -> Result<bool, DepotError> {
        match self.marker(id)? {
            None => Ok(false),
            Some(marker) if marker.manifest == crate::manifest::digest(manifest) => Ok(true),
            Some(_) => Err(DepotError::OtherTree { release: id }),
        }
    }

    fn marker(&self, id: ReleaseId) -> Result<Option<Marker>, DepotError> {
        if !self.release_directory(id).is_dir() {
            return Ok(None);
        }
        disk::read_document(&self.document(id, "json"))
    }

    fn releases(&self) -> PathBuf {
        self.root.join("releases")
    }

    fn staged_directory(&self) -> PathBuf {
        self.root.join(".greenlight/staged")
    }

    fn large_directory(&self) -> PathBuf {
        self.root.join(".greenlight/large")
    }

    fn document(&self, id: ReleaseId, extension: &str) -> PathBuf {
        self.staged_directory().join(format!("{id}.{extension}"))
    }

    /// Whether an object of this name is there, sound. One that was changed is removed.
    fn has(&self, name: &str, hash: ContentHash, size: u64) -> Result<bool, DepotError> {
        let path = || self.objects.join(name);
        let found = rustix::fs::statat(&self.objects_directory, name, AtFlags::SYMLINK_NOFOLLOW);
        let stat = match found {
            Ok(stat) => stat,
            Err(rustix::io::Errno::NOENT) => return Ok(false),
            Err(error) => return Err(error).at("look at", path()),
        };
        if is_file(&stat) && is_sealed(&stat, hash, size) {
            return Ok(true);
        }
        // The time of change does not tell. The bytes do: a copied tree, or a `touch`, is no damage.
        if is_file(&stat) && size_of_stat(&stat) == size && hash_of(&path())? == hash {
            let file = File::open(path()).at("open", path())?;
            set_seal(&file, hash, size).at("set the time of", path())?;
            return Ok(true);
        }
        disk::remove_tree(&path())?;
        Ok(false)
    }

    /// Gives a finished file of the work place its name among the objects.
    fn put(
        &self,
        file: &File,
        from: &Path,
        executable: bool,
        hash: ContentHash,
        size: u64,
    ) -> Result<(), DepotError> {
        let mode = Mode::from_raw_mode(object_mode(executable));
        rustix::fs::fchmod(file, mode).at("set the mode of", from)?;
        set_seal(file, hash, size).at("set the time of", from)?;
        fs::rename(from, self.objects.join(object_name(hash, executable))).at("put in place", from)
    }

    /// Finishes a file that was created as an object, and with an object's mode. One call less for each, of thousands.
    fn seal(
        &self,
        file: &File,
        path: &Path,
        executable: bool,
        hash: ContentHash,
        size: u64,
    ) -> Result<(), DepotError> {
        if !self.are_modes_kept {
            let mode = Mode::from_raw_mode(object_mode(executable));
            rustix::fs::fchmod(file, mode).at("set the mode of", path)?;
        }
        set_seal(file, hash, size).at("set the time of", path)
    }

    fn open_object(&self, name: &str) -> Result<Option<File>, DepotError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(self.objects_directory.as_fd(), name, flags, Mode::empty()) {
            Ok(file) => Ok(Some(file.into())),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(error) => Err(error).at("open", self.objects.join(name)),
        }
    }
}

const EXECUTABLE: &str = ".x";
/// What stands behind the hash of a large file that is being put together.
const PART: &str = ".part";

/// An object is read by every account of the host and written by none.
fn object_mode(executable: bool) -> u32 {
    if executable { 0o555 } else { 0o444 }
}

/// Whether a file that is created with an object's mode has it. The mask can be read only here without being changed;
/// where it cannot, modes are set apart.
fn are_modes_kept() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask =
        status.lines().find_map(|line| u32::from_str_radix(line.strip_prefix("Umask:")?.trim(), 8).ok());
    mask.is_some_and(|mask| mask & object_mode(true) == 0)
}

/// The name of an object under `objects/`. A file's mode belongs to its inode, so what is executable in one place and
/// not in another is two objects.
fn object_name(hash: ContentHash, executable: bool) -> String {
    let hash = hash.to_string();
    let (fan_out, _) = hash.split_at(FAN_OUT_DIGITS);
    format!("{fan_out}/{hash}{}", if executable { EXECUTABLE } else { "" })
}

fn is_file(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
}

fn hash_of(path: &Path) -> Result<ContentHash, DepotError> {
    let mut hasher = blake3::Hasher::new();
    File::open(path).and_then(|file| hasher.update_reader(file).map(drop)).at("read", path)?;
    Ok(ContentHash::from_bytes(*hasher.finalize().as_bytes()))
}

#[cfg(test)]
mod tests;
