//! The controller's side: every release that was built, with its manifest, its objects and its build log.
//!
//! ```text
//! releases/ID.json, ID.manifest.zst    written last: what has no ID.json is no release
//! objects/ab/HASH, HASH.zst            as they are sent: raw, or compressed once for all hosts
//! logs/ID.log                          what the build printed; failed-*.log of builds that failed
//! git/…                                copies of remote repositories
//! tmp/                                 work under way
//! ```
//!
//! Guarantees: several processes may build at once; an object is named only after it was written whole; removing and
//! building exclude each other, so nothing that a build counts on is swept away.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use greenlight_model::fleet::Service;
use greenlight_model::id::{ContentHash, ReleaseId, ServiceName};
use greenlight_model::manifest::{Entry, Manifest, Release};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::disk::{self, Workplace};
use crate::error::{At, DepotError};
use crate::object::{EncodedObject, Encoding, decode, is_sealed, set_seal, size_of_stat};

/// Every release that was built here.
#[derive(Debug, Clone)]
pub struct Depot {
    directory: PathBuf,
}

/// What the depot keeps of a release besides its tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Built {
    pub(crate) release: Release,
    pub(crate) recipe: Recipe,
}

/// What a service's tree is made by, besides the commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Recipe {
    pub(crate) directory: Option<String>,
    pub(crate) steps: Vec<String>,
    pub(crate) include: Vec<String>,
    pub(crate) exclude: Vec<String>,
}

impl Recipe {
    pub(crate) fn of(service: &Service) -> Self {
        Self {
            directory: service.source.directory.clone(),
            steps: service.build.clone(),
            include: service.include.clone(),
            exclude: service.exclude.clone(),
        }
    }
}

/// Why a text names no release.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// Nothing fits.
    #[error("no release of {service} is called `{text}`{}", known(candidates))]
    Unknown {
        /// Whose release.
        service: ServiceName,
        /// What was asked for.
        text: String,
        /// What there is, newest first.
        candidates: Vec<Release>,
    },
    /// Several fit.
    #[error("`{text}` fits {} releases of {service}; say more of the id:{}", candidates.len(), listed(candidates))]
    Ambiguous {
        /// Whose release.
        service: ServiceName,
        /// What was asked for.
        text: String,
        /// What fits, newest first.
        candidates: Vec<Release>,
    },
    /// The depot could not be read.
    #[error(transparent)]
    Depot(#[from] DepotError),
}

/// Fewest digits of an id or of a commit that are looked for: fewer fit by chance.
const PREFIX_DIGITS_MIN: usize = 4;
/// How many releases an error lists.
const LISTED_MAX: usize = 8;

fn known(candidates: &[Release]) -> String {
    if candidates.is_empty() {
        return "; none was built yet (greenlight build)".to_owned();
    }
    format!("; the newest are:{}", listed(candidates))
}

fn listed(candidates: &[Release]) -> String {
    candidates
        .iter()
        .take(LISTED_MAX)
        .map(|release| {
            let commit: String = release.commit.chars().take(12).collect();
            format!("\n  {}  {}  commit {commit}  {}", release.id.short(), release.label, release.built_at)
        })
        .collect()
}

impl Depot {
    /// Opens the depot in a directory, and creates it (mode 0700) when there is none.
    ///
    /// # Errors
    /// When a directory cannot be created.
    pub fn open(directory: &Path) -> Result<Self, DepotError> {
        for path in ["", "releases", "objects", "logs", "git", "tmp"] {
            disk::create_directory(&directory.join(path), 0o700)?;
        }
        Ok(Self { directory: directory.to_owned() })
    }

    /// Every release, newest first.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn releases(&self) -> Result<Vec<Release>, DepotError> {
        let mut releases = Vec::new();
        for name in disk::names(&self.directory.join("releases"))? {
            let Some(id) = name.strip_suffix(".json").and_then(|id| id.parse().ok()) else { continue };
            // One that is gone was pruned since the directory was read.
            releases.extend(self.built(id)?.map(|built| built.release));
        }
        releases.sort_by_key(|release| std::cmp::Reverse((release.built_at, release.id)));
        Ok(releases)
    }

    /// The release that a text names: by label, by the first digits (four or more) of its id or of its commit, or
    /// `latest`.
    ///
    /// # Errors
    /// When none or several fit; the error lists them.
    pub fn find(&self, service: &ServiceName, text: &str) -> Result<Release, FindError> {
        let mut releases = self.releases()?;
        releases.retain(|release| release.service == *service);
        if text == "latest" && !releases.is_empty() {
            return Ok(releases.swap_remove(0));
        }
        let is_prefix = text.len() >= PREFIX_DIGITS_MIN;
        let fits = |release: &Release| {
            is_prefix && (release.id.to_string().starts_with(text) || release.commit.starts_with(text))
        };
        // A label that looks like the beginning of some other id is still that label.
        let labelled: Vec<Release> =
            releases.iter().filter(|release| release.label == text).cloned().collect();
        let mut found = match labelled.is_empty() {
            true => releases.iter().filter(|release| fits(release)).cloned().collect(),
            false => labelled,
        };
        let (service, text) = (service.clone(), text.to_owned());
        match found.len() {
            0 => {
                releases.truncate(LISTED_MAX);
                Err(FindError::Unknown { service, text, candidates: releases })
            }
            1 => Ok(found.swap_remove(0)),
            _ => Err(FindError::Ambiguous { service, text, candidates: found }),
        }
    }

    /// The manifest of a release.
    ///
    /// # Errors
    /// When there is no such release, or it cannot be read.
    pub fn manifest(&self, id: ReleaseId) -> Result<Manifest, DepotError> {
        let found = disk::read_document(&self.release_file(id, "manifest.zst"))?;
        found.ok_or_else(|| DepotError::NoRelease { release: id, depot: self.directory.clone() })
    }

    /// An object, as it is sent.
    ///
    /// # Errors
    /// When it is not there, or was damaged; it is removed then, and building its release again brings it back.
    pub fn object(&self, hash: ContentHash) -> Result<EncodedObject, DepotError> {
        for encoding in [Encoding::Zstd, Encoding::Raw] {
            let path = self.object_path(hash, encoding);
            let Some(data) = disk::read_file(&path)? else { continue };
            let stat = rustix::fs::stat(&path).at("look at", &path)?;
            if !is_sealed(&stat, hash, data.len() as u64)
                && let Err(damage) = decode(hash, encoding, &data)
            {
                disk::remove_file(&path)?;
                return Err(damage);
            }
            return Ok(EncodedObject { encoding, data });
        }
        Err(DepotError::ObjectMissing { hash })
    }

    /// An object as its difference to another one, where both are here and that gains; else as it is.
    ///
    /// # Errors
    /// As [`Depot::object`], of the object itself.
    pub fn object_as_difference(
        &self,
        hash: ContentHash,
        base: ContentHash,
    ) -> Result<EncodedObject, DepotError> {
        let whole = self.object(hash)?;
        // A base that was pruned here, or was damaged, only costs what it would have saved.
        let Ok(before) = self.object(base) else { return Ok(whole) };
        let Ok(before) = decode(base, before.encoding, &before.data) else { return Ok(whole) };
        let data = decode(hash, whole.encoding, &whole.data)?;
        let difference = EncodedObject::encode_delta(base, &before, &data).at("compress", &self.directory)?;
        Ok(if difference.data.len() < whole.data.len() { difference } else { whole })
    }

    /// What the build of a release printed.
    #[must_use]
    pub fn log(&self, id: ReleaseId) -> PathBuf {
        self.directory.join("logs").join(format!("{id}.log"))
    }

    /// Removes every release that is not in `keep`, and the objects that no remaining one needs; returns the releases
    /// that are gone. Waits for builds that are under way.
    ///
    /// # Errors
    /// When something cannot be read or removed; what is gone by then is gone.
    pub fn prune(&self, keep: &BTreeSet<ReleaseId>) -> Result<BTreeSet<ReleaseId>, DepotError> {
        let _lock = self.lock(FlockOperation::LockExclusive)?;
        let (kept, removed): (BTreeSet<_>, BTreeSet<_>) =
            self.releases()?.into_iter().map(|release| release.id).partition(|id| keep.contains(id));
        for id in &removed {
            for extension in ["json", "manifest.zst"] {
                disk::remove_file(&self.release_file(*id, extension))?;
            }
            disk::remove_file(&self.log(*id))?;
        }
        let mut needed = HashSet::new();
        for id in &kept {
            for entry in self.manifest(*id)?.entries.into_values() {
                if let Entry::File { hash, chunks, .. } = entry {
                    match chunks.is_empty() {
                        true => drop(needed.insert(hash)),
                        false => needed.extend(chunks.into_iter().map(|(hash, _)| hash)),
                    }
                }
            }
        }
        let objects = self.directory.join("objects");
        for fan_out in disk::names(&objects)? {
            let directory = objects.join(fan_out);
            for name in disk::names(&directory)? {
                let hash = name.strip_suffix(COMPRESSED).unwrap_or(&name).parse();
                if !hash.is_ok_and(|hash| needed.contains(&hash)) {
                    disk::remove_file(&directory.join(name))?;
                }
            }
        }
        Ok(removed)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn built(&self, id: ReleaseId) -> Result<Option<Built>, DepotError> {
        disk::read_document(&self.release_file(id, "json"))
    }

    /// Begins a build: until the work is dropped, nothing is swept away.
    pub(crate) fn work(&self) -> Result<Work<'_>, DepotError> {
        let lock = self.lock(FlockOperation::LockShared)?;
        let workplace = Workplace::create(&self.directory.join("tmp"), "work-")?;
        Ok(Work { depot: self, workplace, _lock: lock })
    }

    fn lock(&self, operation: FlockOperation) -> Result<File, DepotError> {
        let path = self.directory.join("lock");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .at("open", &path)?;
        rustix::fs::flock(&file, operation).at("lock", &path)?;
        Ok(file)
    }

    fn release_file(&self, id: ReleaseId, extension: &str) -> PathBuf {
        self.directory.join("releases").join(format!("{id}.{extension}"))
    }

    fn object_path(&self, hash: ContentHash, encoding: Encoding) -> PathBuf {
        let hash = hash.to_string();
        let (fan_out, _) = hash.split_at(2);
        // A difference is never stored.
        let extension = if encoding == Encoding::Zstd { COMPRESSED } else { "" };
        self.directory.join("objects").join(fan_out).join(format!("{hash}{extension}"))
    }
}

const COMPRESSED: &str = ".zst";

/// A build under way.
pub(crate) struct Work<'a> {
    depot: &'a Depot,
    workplace: Workplace,
    _lock: File,
}

impl Work<'_> {
    /// A path in the depot that nobody has had before; gone when the work is.
    pub(crate) fn fresh(&self) -> PathBuf {
        self.workplace.fresh()
    }

    /// Keeps an object, compressed once, unless it is there.
    pub(crate) fn keep(&self, hash: ContentHash, data: &[u8]) -> Result<(), DepotError> {
        for encoding in [Encoding::Zstd, Encoding::Raw] {
            let path = self.depot.object_path(hash, encoding);
            match rustix::fs::stat(&path) {
                Ok(stat) if is_sealed(&stat, hash, size_of_stat(&stat)) => return Ok(()),
                Ok(_) | Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(error).at("look at", path),
            }
        }
        let temporary = self.fresh();
        let object = EncodedObject::encode(data).at("compress for", &temporary)?;
        let path = self.depot.object_path(hash, object.encoding);
        disk::create_directory(path.parent().unwrap_or(&path), 0o700)?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o400)
            .open(&temporary)
            .at("create", &temporary)?;
        file.write_all(&object.data).at("write", &path)?;
        set_seal(&file, hash, object.data.len() as u64).at("set the time of", &path)?;
        fs::rename(&temporary, &path).at("put in place", &path)
    }

    /// Makes a release of what was kept.
    pub(crate) fn finish(&self, built: &Built, manifest: &Manifest) -> Result<(), DepotError> {
        // The objects were written without a sync of their own.
        disk::sync_file_system(self.depot.path())?;
        let id = built.release.id;
        disk::write_document(&self.depot.release_file(id, "manifest.zst"), manifest)?;
        disk::write_document(&self.depot.release_file(id, "json"), built)
    }
}

#[cfg(test)]
mod tests;
