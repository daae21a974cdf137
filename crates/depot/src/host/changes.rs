//! What was changed in a release's directory since it was staged, by whomever.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use greenlight_model::id::ReleaseId;
use greenlight_model::manifest::{Entry, Manifest};
use serde::{Deserialize, Serialize};

use super::{HostDepot, hash_of};
use crate::disk;
use crate::error::{At, DepotError};

/// Most changes that are reported: enough to see what is going on.
pub const CHANGES_MAX: usize = 1_000;
/// What Python writes beside its sources whenever it runs them. Nobody misses it.
const CACHE_DIRECTORY: &str = "__pycache__";

/// A difference between a release's directory and what was staged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalChange {
    /// Where, relative to the release; what is not UTF-8 in it is replaced.
    pub path: String,
    /// What.
    pub kind: ChangeKind,
}

/// Kinds of difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    /// It was not there when the release was staged.
    Added,
    /// It has other bytes, or is something else.
    Changed,
    /// It is gone.
    Removed,
}

/// Everything in a directory, by path.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Seen {
    paths: BTreeMap<String, Stamp>,
}

/// What tells whether something was changed, without reading it: kind, size in bytes, seconds and nanoseconds of its
/// time of change.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Stamp(Kind, u64, i64, i64);

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
enum Kind {
    #[serde(rename = "d")]
    Directory,
    #[serde(rename = "f")]
    File,
    #[serde(rename = "l")]
    Symlink,
    #[serde(rename = "o")]
    Other,
}

impl HostDepot {
    /// What differs in a release's directory from what was staged and prepared there, in order of the paths, at most
    /// [`CHANGES_MAX`]. What lies behind links (shared files) is not looked at, nor are caches of compiled Python.
    /// Empty when the release is not complete here.
    ///
    /// # Errors
    /// When the tree, or what was noted of it, cannot be read.
    pub fn local_changes(&self, id: ReleaseId) -> Result<Vec<LocalChange>, DepotError> {
        if self.marker(id)?.is_none() {
            return Ok(Vec::new());
        }
        // Of thousands of files hardly any has changed: the manifest is read for the first that may have.
        let manifest: OnceCell<Manifest> = OnceCell::new();
        let entry = |path: &str| -> Result<Option<Entry>, DepotError> {
            let manifest = match manifest.get() {
                Some(manifest) => manifest,
                None => {
                    let found = self.manifest(id)?.unwrap_or_default();
                    manifest.get_or_init(|| found)
                }
            };
            Ok(manifest.entries.get(path).cloned())
        };
        let Some(then): Option<Seen> = disk::read_document(&self.document(id, "tree.zst"))? else {
            let path = self.document(id, "tree.zst");
            return Err(DepotError::Unreadable { path, why: "it is gone".to_owned() });
        };
        let directory = self.release_directory(id);
        let now = look(&directory)?;
        let mut changes = BTreeMap::new();
        for (path, stamp) in &now.paths {
            match then.paths.get(path) {
                None => {
                    changes.insert(path, ChangeKind::Added);
                }
                Some(before)
                    if before != stamp && is_changed(&directory, entry(path)?, path, *before, *stamp)? =>
                {
                    changes.insert(path, ChangeKind::Changed);
                }
                Some(_) => {}
            }
        }
        let removed = then.paths.keys().filter(|path| !now.paths.contains_key(*path));
        changes.extend(removed.map(|path| (path, ChangeKind::Removed)));
        let changes = changes.into_iter().map(|(path, kind)| LocalChange { path: path.clone(), kind });
        Ok(changes.take(CHANGES_MAX).collect())
    }
}

fn is_changed(
    directory: &Path,
    entry: Option<Entry>,
    path: &str,
    before: Stamp,
    now: Stamp,
) -> Result<bool, DepotError> {
    match (before.0, now.0, entry) {
        // Directories change with what is in them, which is reported as such.
        (Kind::Directory, Kind::Directory, _) => Ok(false),
        (Kind::File, Kind::File, Some(Entry::File { size, hash, .. })) => {
            Ok(size != now.1 || hash_of(&directory.join(path))? != hash)
        }
        (Kind::Symlink, Kind::Symlink, Some(Entry::Symlink { target })) => {
            let path = directory.join(path);
            let found = fs::read_link(&path).at("read the link", &path)?;
            Ok(found.as_os_str().as_bytes() != target.as_bytes())
        }
        _ => Ok(true),
    }
}

/// Looks at everything in a directory; nothing behind links.
pub(super) fn look(directory: &Path) -> Result<Seen, DepotError> {
    let mut seen = Seen::default();
    let walk = walkdir::WalkDir::new(directory).min_depth(1).follow_links(false);
    for entry in walk.into_iter().filter_entry(|entry| entry.file_name() != CACHE_DIRECTORY) {
        let entry = match entry {
            Ok(entry) => entry,
            // An application at work may remove its temporary files while we look.
            Err(error) if error.io_error().is_some_and(is_absent) && error.depth() > 0 => continue,
            Err(error) => return Err(std::io::Error::from(error)).at("look through", directory),
        };
        let metadata = match entry.metadata() {
            Ok(metadata) => metadata,
            Err(error) if error.io_error().is_some_and(is_absent) => continue,
            Err(error) => return Err(std::io::Error::from(error)).at("look at", entry.path()),
        };
        let kind = match metadata.file_type() {
            found if found.is_dir() => Kind::Directory,
            found if found.is_file() => Kind::File,
            found if found.is_symlink() => Kind::Symlink,
            _ => Kind::Other,
        };
        let path = entry.path().strip_prefix(directory).unwrap_or(entry.path());
        let stamp = Stamp(kind, metadata.size(), metadata.mtime(), metadata.mtime_nsec());
        seen.paths.insert(path.to_string_lossy().into_owned(), stamp);
    }
    Ok(seen)
}

fn is_absent(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound
}
