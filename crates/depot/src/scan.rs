//! Reading a tree: every path that belongs to the release, with its hash; large files cut by content.
//!
//! Guarantees: what a release cannot hold is refused, all of it at once, before a byte is hashed; memory stays bounded
//! whatever the tree (a chunk or two per thread). Not in here: what the files mean.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{Cursor, Read};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use fastcdc::v2020::StreamCDC;
use globset::{Glob, GlobBuilder, GlobSet, GlobSetBuilder};
use greenlight_model::id::ContentHash;
use greenlight_model::manifest::{Entry, MANIFEST_ENTRIES_MAX, Manifest, PATH_BYTES_MAX};

use crate::check;
use crate::error::{At, DepotError};
use crate::object::{OBJECT_BYTES_MAX, content_hash};

/// A file of more bytes than this is cut by content, so that a changed byte costs a chunk and not the file.
pub const CUT_BYTES_MIN: usize = 1 << 20;
/// Smallest, average and largest chunk in bytes. Smaller ones would save bytes in what changed and cost more hashes
/// in every manifest.
const CHUNK_BYTES: (usize, usize, usize) = (256 << 10, 1 << 20, OBJECT_BYTES_MAX);
/// Threads that hash: at least two, because reading waits; more than eight only compete for the disk.
const THREADS: std::ops::RangeInclusive<usize> = 2..=8;
/// The history of the sources is never part of a release: it is large, and it may hold what was removed for a reason.
const NEVER: &str = ".git";

/// Something that cannot be part of a release.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {why}", path.escape_debug())]
pub struct Refusal {
    /// Where, relative to the tree (what is not UTF-8 is replaced); or the pattern that cannot be used.
    pub path: String,
    /// Why, and what to do about it.
    pub why: String,
}

/// What is done with every object that a tree consists of, as it is found. Called by several threads.
pub(crate) type Keep<'a> = dyn Fn(ContentHash, &[u8]) -> Result<(), DepotError> + Sync + 'a;

/// Reads the tree under `directory`.
///
/// `include` and `exclude` are globs as in a `.gitignore`: one without a slash names things at any depth, one with a
/// slash is meant from the top; a directory stands for everything in it; `*` does not match a slash, `**` does. What is
/// excluded is so whatever `include` says; no `include` means everything. `.git` is always excluded.
///
/// # Errors
/// [`DepotError::Refused`] with everything that cannot be part of a release: names and link targets that are not UTF-8,
/// links that lead outside, sockets, devices, pipes, set-user-id and set-group-id files, patterns that cannot be read,
/// an `include` that matches nothing. Otherwise when the tree cannot be read.
pub fn scan(directory: &Path, include: &[String], exclude: &[String]) -> Result<Manifest, DepotError> {
    scan_into(directory, include, exclude, &|_, _| Ok(()))
}

pub(crate) fn scan_into(
    directory: &Path,
    include: &[String],
    exclude: &[String],
    keep: &Keep<'_>,
) -> Result<Manifest, DepotError> {
    let mut walk = Walk::new(directory, include, exclude);
    walk.enter(Path::new(""), include.is_empty())?;
    let Found { mut manifest, files, mut refusals } = walk.finish();
    for (path, entry) in &manifest.entries {
        if let Entry::Symlink { target } = entry
            && let Err(why) = check::check_target(&manifest, path, target)
        {
            refusals.push(Refusal { path: path.clone(), why: format!("{why} (it points to `{target}`)") });
        }
    }
    if !refusals.is_empty() {
        refusals.sort_by(|a, b| a.path.cmp(&b.path));
        return Err(DepotError::Refused { directory: directory.to_owned(), refusals });
    }
    manifest.entries.extend(hash_all(directory, &files, keep)?);
    Ok(manifest)
}

/// Globs, and which of them have matched.
/// A pattern as in a `.gitignore`.
pub(crate) fn glob(text: &str) -> Result<Glob, globset::Error> {
    let from_top = text.trim_end_matches('/');
    let pattern = match from_top.contains('/') {
        true => from_top.trim_start_matches('/').to_owned(),
        false => format!("**/{from_top}"),
    };
    GlobBuilder::new(&pattern).literal_separator(true).build()
}

struct Patterns<'a> {
    texts: &'a [String],
    set: GlobSet,
    has_matched: Vec<bool>,
}

impl<'a> Patterns<'a> {
    fn new(texts: &'a [String], refusals: &mut Vec<Refusal>) -> Self {
        let mut set = GlobSetBuilder::new();
        for text in texts {
            match glob(text) {
                Ok(glob) => {
                    set.add(glob);
                }
                Err(error) => {
                    refusals.push(Refusal {
                        path: text.clone(),
                        why: format!("it is not a glob: {}", error.kind()),
                    });
                }
            }
        }
        let set = set.build().unwrap_or_else(|error| {
            let why = format!("the patterns cannot be used together: {}", error.kind());
            refusals.push(Refusal { path: texts.join(" "), why });
            GlobSet::empty()
        });
        Self { texts, has_matched: vec![false; texts.len()], set }
    }

    fn matches(&mut self, path: &Path) -> bool {
        let found = self.set.matches(path);
        for index in &found {
            if let Some(has_matched) = self.has_matched.get_mut(*index) {
                *has_matched = true;
            }
        }
        !found.is_empty()
    }

    fn unmatched(&self) -> impl Iterator<Item = &'a String> + '_ {
        self.texts
            .iter()
            .zip(&self.has_matched)
            .filter(|(_, has_matched)| !**has_matched)
            .map(|(text, _)| text)
    }
}

struct Found {
    manifest: Manifest,
    files: Vec<(String, bool)>,
    refusals: Vec<Refusal>,
}

struct Walk<'a> {
    directory: &'a Path,
    include: Patterns<'a>,
    exclude: Patterns<'a>,
    entries: BTreeMap<String, Entry>,
    /// Path and whether it is executable.
    files: Vec<(String, bool)>,
    refusals: Vec<Refusal>,
}

impl<'a> Walk<'a> {
    fn new(directory: &'a Path, include: &'a [String], exclude: &'a [String]) -> Self {
        let mut refusals = Vec::new();
        let include = Patterns::new(include, &mut refusals);
        let exclude = Patterns::new(exclude, &mut refusals);
        Self { directory, include, exclude, entries: BTreeMap::new(), files: Vec::new(), refusals }
    }

    /// Looks at everything in a directory below the top. `is_included`: whether it, or one above it, is included.
    fn enter(&mut self, path: &Path, is_included: bool) -> Result<(), DepotError> {
        let whole = self.directory.join(path);
        let mut is_empty = true;
        for entry in fs::read_dir(&whole).at("read", &whole)? {
            let entry = entry.at("read", &whole)?;
            is_empty = false;
            let path = path.join(entry.file_name());
            if entry.file_name() == NEVER || self.exclude.matches(&path) {
                continue;
            }
            // Asked for what is included anyway too: a pattern is to know that it matches something.
            let is_included = self.include.matches(&path) || is_included;
            let metadata = entry.metadata().at("look at", entry.path())?;
            if metadata.is_dir() {
                self.enter(&path, is_included)?;
            } else if is_included {
                self.take(&path, &metadata)?;
            }
        }
        if is_empty && is_included && !path.as_os_str().is_empty() {
            self.name(path, |walk, path| {
                walk.entries.insert(path, Entry::Directory);
                Ok(())
            })?;
        }
        Ok(())
    }

    fn take(&mut self, path: &Path, metadata: &Metadata) -> Result<(), DepotError> {
        let kind = metadata.file_type();
        let mode = metadata.permissions().mode();
        let special = if kind.is_socket() {
            Some("it is a socket")
        } else if kind.is_fifo() {
            Some("it is a named pipe")
        } else if kind.is_block_device() || kind.is_char_device() {
            Some("it is a device")
        } else if kind.is_file() && mode & 0o6000 != 0 {
            Some("it has the set-user-id or set-group-id bit")
        } else {
            None
        };
        if let Some(why) = special {
            let why =
                format!("{why}, which a release cannot carry; remove it in a build step, or exclude it");
            self.refuse(path, why);
            return Ok(());
        }
        self.name(path, |walk, name| {
            if kind.is_symlink() {
                let whole = walk.directory.join(path);
                match fs::read_link(&whole).at("read the link", &whole)?.into_os_string().into_string() {
                    Ok(target) => {
                        walk.entries.insert(name, Entry::Symlink { target });
                    }
                    Err(_) => walk.refuse(path, "it is a link whose target is not UTF-8".to_owned()),
                }
            } else {
                walk.files.push((name, mode & 0o100 != 0));
            }
            Ok(())
        })
    }

    /// Goes on with the path as text, unless it cannot be one or there are too many.
    fn name(
        &mut self,
        path: &Path,
        then: impl FnOnce(&mut Self, String) -> Result<(), DepotError>,
    ) -> Result<(), DepotError> {
        if self.entries.len() + self.files.len() >= MANIFEST_ENTRIES_MAX {
            return Err(check::ManifestError::TooMany(MANIFEST_ENTRIES_MAX + 1).into());
        }
        match path.to_str() {
            Some(name) if name.len() <= PATH_BYTES_MAX => return then(self, name.to_owned()),
            Some(_) => self.refuse(path, format!("its path is longer than {PATH_BYTES_MAX} bytes")),
            None => self.refuse(path, "its name is not UTF-8; rename it, or exclude it".to_owned()),
        }
        Ok(())
    }

    fn refuse(&mut self, path: &Path, why: String) {
        self.refusals.push(Refusal { path: path.to_string_lossy().into_owned(), why });
    }

    fn finish(mut self) -> Found {
        // A broken pattern shifts the numbers of the others; it is refused anyway.
        if self.refusals.is_empty() {
            let unmatched = self.include.unmatched().map(|pattern| Refusal {
                path: pattern.clone(),
                why: "nothing in the tree matches this `include`".to_owned(),
            });
            self.refusals.extend(unmatched);
        }
        Found { manifest: Manifest { entries: self.entries }, files: self.files, refusals: self.refusals }
    }
}

fn hash_all(
    directory: &Path,
    files: &[(String, bool)],
    keep: &Keep<'_>,
) -> Result<Vec<(String, Entry)>, DepotError> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let work = || {
        let mut done = Vec::new();
        while let Some((path, executable)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            match hash_file(&directory.join(path), *executable, keep) {
                Ok(entry) => done.push((path.clone(), entry)),
                Err(error) => {
                    next.store(files.len(), Ordering::Relaxed);
                    failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(error);
                }
            }
        }
        done
    };
    let threads =
        std::thread::available_parallelism().map_or(1, usize::from).clamp(*THREADS.start(), *THREADS.end());
    let done = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let joined = workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        joined.flatten().collect()
    });
    match failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(done),
    }
}

fn hash_file(path: &Path, executable: bool, keep: &Keep<'_>) -> Result<Entry, DepotError> {
    let file = File::open(path).at("open", path)?;
    let mut head = Vec::new();
    (&file).take(CUT_BYTES_MIN as u64 + 1).read_to_end(&mut head).at("read", path)?;
    if head.len() <= CUT_BYTES_MIN {
        let hash = content_hash(&head);
        keep(hash, &head)?;
        return Ok(Entry::File { size: head.len() as u64, executable, hash, chunks: Vec::new() });
    }
    let mut hasher = blake3::Hasher::new();
    let mut chunks = Vec::new();
    let mut size = 0;
    let (min, average, max) = CHUNK_BYTES;
    for chunk in StreamCDC::new(Cursor::new(head).chain(file), min, average, max) {
        let data = chunk.map_err(std::io::Error::from).at("read", path)?.data;
        hasher.update(&data);
        let hash = content_hash(&data);
        keep(hash, &data)?;
        size += data.len() as u64;
        // A chunk has at most OBJECT_BYTES_MAX bytes, far below what 32 bits hold.
        chunks.push((hash, u32::try_from(data.len()).unwrap_or(u32::MAX)));
    }
    if chunks.len() == 1 {
        chunks.clear();
    }
    Ok(Entry::File { size, executable, hash: ContentHash::from_bytes(*hasher.finalize().as_bytes()), chunks })
}

#[cfg(test)]
mod tests;
