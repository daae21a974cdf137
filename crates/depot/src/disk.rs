//! Files as a depot writes them: whole or not at all.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FlockOperation;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{At, DepotError};

/// Most bytes of a stored manifest or list of paths, decompressed: two million entries fit.
const DOCUMENT_BYTES_MAX: u64 = 512 * 1024 * 1024;
/// The version of the documents that this build writes.
pub(crate) const DOCUMENT_VERSION: u32 = 1;
/// How often a work place is made anew when a cleaner takes it away between its creation and its lock.
const WORKPLACE_TRIES_MAX: u32 = 100;

/// Creates a directory and its parents; those that exist are left as they are.
pub(crate) fn create_directory(path: &Path, mode: u32) -> Result<(), DepotError> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(mode).create(path).at("create", path)?;
    // The umask may have taken away what other users need.
    fs::set_permissions(path, Permissions::from_mode(mode)).at("set the mode of", path)
}

/// Writes a file beside its place, syncs it and moves it there.
pub(crate) fn write_file(path: &Path, data: &[u8]) -> Result<(), DepotError> {
    write(path, data, true)
}

fn write(path: &Path, data: &[u8], is_synced: bool) -> Result<(), DepotError> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}-{number}.new", std::process::id()));
    let temporary = path.with_file_name(name);
    let result = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .at("create", &temporary)?;
        file.write_all(data).at("write", path)?;
        if !is_synced {
            return fs::rename(&temporary, path).at("put in place", path);
        }
        file.sync_all().at("sync", path)?;
        fs::rename(&temporary, path).at("put in place", path)?;
        sync_directory(path.parent().unwrap_or(path))
    })();
    if result.is_err() {
        // Best effort: the first error is the one to tell, and the file may not even be there.
        drop(fs::remove_file(&temporary));
    }
    result
}

/// Makes the names in a directory durable.
pub(crate) fn sync_directory(path: &Path) -> Result<(), DepotError> {
    File::open(path).and_then(|directory| directory.sync_all()).at("sync", path)
}

/// Makes everything on the file system of `path` durable: one call in place of one per file.
pub(crate) fn sync_file_system(path: &Path) -> Result<(), DepotError> {
    let directory = File::open(path).at("open", path)?;
    rustix::fs::syncfs(&directory).at("sync", path)
}

/// Reads a file; none when it is not there.
pub(crate) fn read_file(path: &Path) -> Result<Option<Vec<u8>>, DepotError> {
    absent_is_none(fs::read(path)).at("read", path)
}

/// Removes a file; one that is not there is removed already.
pub(crate) fn remove_file(path: &Path) -> Result<(), DepotError> {
    absent_is_none(fs::remove_file(path)).at("remove", path).map(drop)
}

/// Removes a whole tree; one that is not there is removed already. Symbolic links are not followed.
pub(crate) fn remove_tree(path: &Path) -> Result<(), DepotError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => {
            absent_is_none(fs::remove_dir_all(path)).at("remove", path).map(drop)
        }
        Ok(_) => remove_file(path),
        Err(error) => absent_is_none(Err(error)).at("look at", path).map(|_: Option<()>| ()),
    }
}

/// The names in a directory; those that are not UTF-8 are none of ours.
pub(crate) fn names(path: &Path) -> Result<Vec<String>, DepotError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path).at("read", path)? {
        if let Ok(name) = entry.at("read", path)?.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}

pub(crate) fn absent_is_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// What every stored document begins with, so that a newer one is told apart before it is misread.
#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    content: T,
}

#[derive(Deserialize)]
struct OnlyVersion {
    version: u32,
}

/// Writes a document as versioned JSON; compressed when `path` ends in `.zst`.
pub(crate) fn write_document<T: Serialize>(path: &Path, content: &T) -> Result<(), DepotError> {
    write_file(path, &encode_document(path, content)?)
}

/// The same, durable only after the next [`sync_file_system`].
pub(crate) fn write_document_unsynced<T: Serialize>(path: &Path, content: &T) -> Result<(), DepotError> {
    write(path, &encode_document(path, content)?, false)
}

fn encode_document<T: Serialize>(path: &Path, content: &T) -> Result<Vec<u8>, DepotError> {
    let unreadable = |why: String| DepotError::Unreadable { path: path.to_owned(), why };
    let document = Versioned { version: DOCUMENT_VERSION, content };
    let mut data = serde_json::to_vec(&document).map_err(|error| unreadable(error.to_string()))?;
    if is_compressed(path) {
        data = zstd::stream::encode_all(data.as_slice(), 3).at("compress", path)?;
    }
    Ok(data)
}

/// Reads a document that [`write_document`] wrote; none when it is not there.
pub(crate) fn read_document<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, DepotError> {
    match read_file(path)? {
        Some(data) => decode_document(path, &data, is_compressed(path)).map(Some),
        None => Ok(None),
    }
}

/// Reads a document from its bytes; `path` is what errors name.
pub(crate) fn decode_document<T: DeserializeOwned>(
    path: &Path,
    data: &[u8],
    is_compressed: bool,
) -> Result<T, DepotError> {
    let unreadable = |why: String| DepotError::Unreadable { path: path.to_owned(), why };
    let mut plain = Vec::new();
    let mut data = data;
    if is_compressed {
        zstd::stream::read::Decoder::with_buffer(data)
            .and_then(|decoder| decoder.take(DOCUMENT_BYTES_MAX + 1).read_to_end(&mut plain))
            .map_err(|error| unreadable(error.to_string()))?;
        if plain.len() as u64 > DOCUMENT_BYTES_MAX {
            return Err(unreadable(format!("it has more than {DOCUMENT_BYTES_MAX} bytes")));
        }
        data = &plain;
    }
    let newer =
        |found| Err(DepotError::NewerFormat { path: path.to_owned(), found, known: DOCUMENT_VERSION });
    // Manifests are large: one is read once, and again only when it turns out to be none of ours.
    let document: Versioned<T> = match serde_json::from_slice(data) {
        Ok(document) => document,
        Err(error) => match serde_json::from_slice(data) {
            Ok(OnlyVersion { version: found }) if found > DOCUMENT_VERSION => return newer(found),
            _ => return Err(unreadable(error.to_string())),
        },
    };
    if document.version > DOCUMENT_VERSION {
        return newer(document.version);
    }
    Ok(document.content)
}

fn is_compressed(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "zst")
}

/// A directory for half-done work. It is removed when dropped; what a killed process left is removed by the next one
/// that makes one beside it.
#[derive(Debug)]
pub(crate) struct Workplace {
    directory: tempfile::TempDir,
    /// Held for as long as the work goes on; the system lets go of it when the process dies, however it dies.
    _lock: File,
    number: AtomicU64,
}

impl Workplace {
    /// Makes one in `parent`, under a name that begins with `prefix`, and removes those of our own in which nobody works
    /// any more.
    pub(crate) fn create(parent: &Path, prefix: &str) -> Result<Self, DepotError> {
        for name in names(parent)?.iter().filter(|name| name.starts_with(prefix)) {
            remove_abandoned(&parent.join(name))?;
        }
        for _ in 0..WORKPLACE_TRIES_MAX {
            let directory = tempfile::Builder::new()
                .prefix(prefix)
                .tempdir_in(parent)
                .at("create a directory in", parent)?;
            let lock = absent_is_none(File::open(directory.path())).at("open", directory.path())?;
            let Some(lock) = lock else { continue };
            rustix::fs::flock(&lock, FlockOperation::LockExclusive).at("lock", directory.path())?;
            let locked = lock.metadata().at("look at", directory.path())?;
            let named = absent_is_none(fs::metadata(directory.path())).at("look at", directory.path())?;
            // A cleaner may have held the lock first and removed the directory.
            if named.is_some_and(|named| named.ino() == locked.ino()) {
                return Ok(Self { directory, _lock: lock, number: AtomicU64::new(0) });
            }
        }
        let source = io::Error::other("it is removed again and again by somebody else");
        Err(DepotError::Io { doing: "create a directory in", path: parent.to_owned(), source })
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A path in here that nobody has had before.
    pub(crate) fn fresh(&self) -> PathBuf {
        self.path().join(self.number.fetch_add(1, Ordering::Relaxed).to_string())
    }
}

fn remove_abandoned(path: &Path) -> Result<(), DepotError> {
    // In a directory that is open to all, others may have put something under such a name.
    let found = absent_is_none(fs::symlink_metadata(path)).at("look at", path)?;
    if !found.is_some_and(|found| found.is_dir() && found.uid() == rustix::process::geteuid().as_raw()) {
        return Ok(());
    }
    let Some(directory) = absent_is_none(File::open(path)).at("open", path)? else { return Ok(()) };
    match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => remove_tree(path),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(()),
        Err(error) => Err(error).at("lock", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn abandoned_work_is_removed_and_work_under_way_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let at = |name: &str| parent.path().join(name);
        let busy = Workplace::create(parent.path(), "work-").unwrap();
        fs::write(busy.fresh(), "half").unwrap();
        // What a killed process leaves: a directory that nobody holds.
        fs::create_dir_all(at("work-gone/tree/deep")).unwrap();
        // What is not ours, whatever its name.
        fs::create_dir(at("other")).unwrap();
        std::os::unix::fs::symlink(at("other"), at("work-link")).unwrap();
        let next = Workplace::create(parent.path(), "work-").unwrap();
        assert_eq!(names(busy.path()).unwrap(), ["0"]);
        drop((busy, next));
        let mut left = names(parent.path()).unwrap();
        left.sort();
        assert_eq!(left, ["other", "work-link"]);
    }

    #[test]
    fn documents_round_trip_and_newer_ones_are_refused() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct Content {
            text: String,
        }
        let directory = tempfile::tempdir().unwrap();
        for name in ["a.json", "a.json.zst"] {
            let path = directory.path().join(name);
            assert_eq!(read_document::<Content>(&path).unwrap(), None);
            let content = Content { text: "x".repeat(1000) };
            write_document(&path, &content).unwrap();
            assert_eq!(read_document::<Content>(&path).unwrap(), Some(content));
        }
        assert_eq!(names(directory.path()).unwrap().len(), 2);
        let path = directory.path().join("b.json");
        fs::write(&path, r#"{"version":2,"words":7}"#).unwrap();
        let error = read_document::<Content>(&path).unwrap_err();
        assert!(matches!(error, DepotError::NewerFormat { found: 2, .. }), "{error}");
        fs::write(&path, "{").unwrap();
        assert!(matches!(read_document::<Content>(&path), Err(DepotError::Unreadable { .. })));
    }
}
