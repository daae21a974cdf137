//! Building the tree of a release out of objects.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{OnceLock, PoisonError};

use greenlight_model::id::{ContentHash, ReleaseId};
use greenlight_model::manifest::Manifest;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::receive::{Chunks, Large, has_arrived};
use super::{HostDepot, object_mode, object_name};
use crate::check::{self, Tree};
use crate::disk;
use crate::error::{At, DepotError};

/// Threads that link: the file system serialises what lies in one directory, and hosts have other work to do.
const THREADS_MAX: usize = 4;

impl HostDepot {
    /// Builds the tree of a release and puts it at [`HostDepot::release_directory`], whole; it is durable when the release is
    /// complete. One that is complete is left alone; what a crash left of one that is not is removed first.
    ///
    /// # Errors
    /// [`DepotError::ObjectMissing`] when an object is not there or was found damaged (ask [`HostDepot::missing`]
    /// again), or when the manifest is refused or the disk does not take it. Nothing of the tree is left then.
    pub fn place(&self, id: ReleaseId, manifest: &Manifest) -> Result<(), DepotError> {
        let tree = check::tree(manifest)?;
        if self.is_staged(id, manifest)? {
            return Ok(());
        }
        let directory = self.release_directory(id);
        disk::remove_tree(&directory)?;
        let building = self.workplace.fresh();
        let placed = self
            .build(&tree, &building)
            .and_then(|()| fs::rename(&building, &directory).at("put in place", &directory));
        if let Err(error) = placed {
            disk::remove_tree(&building)?;
            return Err(error);
        }
        self.forget_chunks(&tree)
    }

    fn build(&self, tree: &Tree<'_>, building: &Path) -> Result<(), DepotError> {
        make_directory(building)?;
        for directory in &tree.directories {
            make_directory(&building.join(directory))?;
        }
        self.link_files(tree, building)?;
        // Links come last: while files are written there is none that a path could lead through.
        for (path, target) in &tree.symlinks {
            let path = building.join(path);
            rustix::fs::symlink(*target, &path).at("create the link", &path)?;
        }
        Ok(())
    }

    fn link_files(&self, tree: &Tree<'_>, building: &Path) -> Result<(), DepotError> {
        // In the manifest's order, the files of `a` may be interrupted by those of `a/b`.
        let mut files = tree.files.clone();
        files.sort_by_key(|file| file.directory);
        let groups: Vec<&[check::File<'_>]> = files.chunk_by(|a, b| a.directory == b.directory).collect();
        let large = OnceLock::new();
        let next = AtomicUsize::new(0);
        let has_failed = AtomicBool::new(false);
        let work = || {
            while let Some(group) = groups.get(next.fetch_add(1, Ordering::Relaxed)) {
                if has_failed.load(Ordering::Relaxed) {
                    break;
                }
                self.link_group(group, building, &large)
                    .inspect_err(|_| has_failed.store(true, Ordering::Relaxed))?;
            }
            Ok(())
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let own = work();
            workers
                .into_iter()
                .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .fold(own, Result::and)
        })
    }

    /// Links the files of one directory.
    fn link_group(
        &self,
        group: &[check::File<'_>],
        building: &Path,
        large: &OnceLock<Large>,
    ) -> Result<(), DepotError> {
        let Some(first) = group.first() else { return Ok(()) };
        let path = building.join(first.directory);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&path, flags, Mode::empty()).at("open", &path)?;
        for file in group {
            let object = object_name(file.hash, file.executable);
            if !self.has(&object, file.hash, file.size)? {
                // One at a time: the same large file may be wanted in two directories.
                let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
                if !self.has(&object, file.hash, file.size)? {
                    self.make(file, large)?;
                }
            }
            if self.clone_object(file, &object, &directory, &path)? {
                continue;
            }
            match rustix::fs::linkat(
                &self.objects_directory,
                &*object,
                &directory,
                file.name,
                AtFlags::empty(),
            ) {
                Ok(()) => {}
                // An inode has only so many links, and some systems forbid linking what another user owns.
                Err(Errno::MLINK | Errno::PERM | Errno::XDEV | Errno::OPNOTSUPP) => {
                    self.copy(file, &object, &path.join(file.name))?;
                }
                Err(error) => return Err(error).at("link", path.join(file.name)),
            }
        }
        Ok(())
    }

    /// Makes a file of a release that shares the object's bytes on the disk, and nothing else: what the application writes to it
    /// is its own. False where the file system has no such thing; then it is not asked again.
    fn clone_object(
        &self,
        file: &check::File<'_>,
        object: &str,
        directory: &OwnedFd,
        path: &Path,
    ) -> Result<bool, DepotError> {
        if self.cannot_clone.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let from = self.open_object(object)?.ok_or(DepotError::ObjectMissing { hash: file.hash })?;
        let (to, mode) = (path.join(file.name), Mode::from_raw_mode(object_mode(file.executable)));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let out = rustix::fs::openat(directory, file.name, flags, mode).at("create", &to)?;
        match rustix::fs::ioctl_ficlone(&out, &from) {
            Ok(()) if self.are_modes_kept => Ok(true),
            Ok(()) => rustix::fs::fchmod(&out, mode).at("set the mode of", &to).map(|()| true),
            Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL | Errno::XDEV | Errno::NOSYS) => {
                self.cannot_clone.store(true, Ordering::Relaxed);
                rustix::fs::unlinkat(directory, file.name, AtFlags::empty()).at("remove", &to)?;
                Ok(false)
            }
            Err(error) => Err(error).at("write", &to),
        }
    }

    /// Makes the object of a file that is not there as such: out of the one with the other mode, or out of its chunks.
    fn make(&self, file: &check::File<'_>, large: &OnceLock<Large>) -> Result<(), DepotError> {
        let other = object_name(file.hash, !file.executable);
        let is_copied = self.has(&other, file.hash, file.size)?;
        if !is_copied && file.chunks.is_empty() {
            return Err(DepotError::ObjectMissing { hash: file.hash });
        }
        if !is_copied {
            return self.assemble(file, large);
        }
        let temporary = self.workplace.fresh();
        let made = self.copy(file, &other, &temporary);
        let made = made.and_then(|()| {
            let object = File::open(&temporary).at("open", &temporary)?;
            self.put(&object, &temporary, file.executable, file.hash, file.size)
        });
        if made.is_err() {
            disk::remove_file(&temporary)?;
        }
        made
    }

    /// Puts a large file together: what has arrived is at its place, the rest is found in the large files that are here.
    fn assemble(&self, file: &check::File<'_>, large: &OnceLock<Large>) -> Result<(), DepotError> {
        let large = match large.get() {
            Some(large) => large,
            None => {
                let found = self.large()?;
                large.get_or_init(|| found)
            }
        };
        let to = &self.part(file.hash);
        let out = self.create_part(file.hash, file.size)?;
        let mut offset = 0;
        for (hash, bytes) in file.chunks {
            if !self.has_written(file.hash, offset) && !has_arrived(&out, *hash, *bytes, offset) {
                let data = self.chunk(*hash, *bytes, large)?;
                out.write_all_at(&data, offset).at("write", to)?;
            }
            offset += u64::from(*bytes);
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&out).at("read", to)?;
        let found = ContentHash::from_bytes(*hasher.finalize().as_bytes());
        if found != file.hash {
            disk::remove_file(to)?;
            let why = format!("its chunks make up a file with the hash {found}");
            return Err(DepotError::ObjectDamaged { hash: file.hash, why });
        }
        let chunks = Chunks { chunks: file.chunks.to_vec() };
        disk::write_document_unsynced(&self.large_directory().join(file.hash.to_string()), &chunks)?;
        self.put(&out, to, file.executable, file.hash, file.size)
    }

    fn copy(&self, file: &check::File<'_>, object: &str, to: &Path) -> Result<(), DepotError> {
        let mut from = self.open_object(object)?.ok_or(DepotError::ObjectMissing { hash: file.hash })?;
        let mut out = create(to)?;
        io::copy(&mut from, &mut out).at("write", to)?;
        rustix::fs::fchmod(&out, Mode::from_raw_mode(object_mode(file.executable))).at("set the mode of", to)
    }

    /// Removes the chunks that are now part of a file: they are found in there when another release needs them.
    fn forget_chunks(&self, tree: &Tree<'_>) -> Result<(), DepotError> {
        let whole: std::collections::HashSet<ContentHash> = tree.files.iter().map(|file| file.hash).collect();
        let chunks = tree.files.iter().flat_map(|file| file.chunks).map(|(hash, _)| *hash);
        for hash in chunks.filter(|hash| !whole.contains(hash)) {
            disk::remove_file(&self.objects.join(object_name(hash, false)))?;
        }
        Ok(())
    }
}

fn create(path: &Path) -> Result<File, DepotError> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).at("create", path)
}

fn make_directory(path: &Path) -> Result<(), DepotError> {
    rustix::fs::mkdir(path, Mode::RWXU).at("create", path)?;
    // Set apart from the creation, so that no umask takes away what the service's user needs.
    rustix::fs::chmod(path, Mode::from_raw_mode(0o755)).at("set the mode of", path)
}
