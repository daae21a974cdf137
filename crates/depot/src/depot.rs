//! The controller's side: every release that was built, with its manifest, its objects and its build log.
//!
//! ```text
//! releases/ID.json, ID.manifest.zst    written last: what has no ID.json is no release
//! packs/HASH                           small objects, many in each, as they are sent
//! objects/ab/HASH, HASH.zst            larger ones, as they are sent: raw, or compressed once for all hosts
//! logs/ID.log                          what the build printed; failed-*.log of builds that failed
//! git/…                                copies of remote repositories
//! tmp/                                 work under way
//! ```
//!
//! Guarantees: several processes may build at once; an object is named only after it was written whole; removing and
//! building exclude each other, so nothing that a build counts on is swept away.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use greenlight_model::fleet::Service;
use greenlight_model::id::{ContentHash, ReleaseId, ServiceName};
use greenlight_model::manifest::{Entry, Manifest, Release};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::disk::{self, Workplace};
use crate::error::{At, DepotError};
use crate::index::Index;
use crate::object::{EncodedObject, Encoding, content_hash, decode, is_sealed, set_seal, size_of_stat};
use crate::pack::{self, PACKED_BYTES_MAX, Packer};

/// Every release that was built here.
#[derive(Debug, Clone)]
pub struct Depot {
    directory: PathBuf,
    /// Tags that move along with what has gone out: no release is called by one.
    pub(crate) moving_tags: Vec<String>,
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
        for path in ["", "releases", "packs", "objects", "logs", "git", "tmp"] {
            disk::create_directory(&directory.join(path), 0o700)?;
        }
        Ok(Self { directory: directory.to_owned(), moving_tags: Vec::new() })
    }

    /// The same, which knows these tags to move: no release that it builds is called by one.
    #[must_use]
    pub fn with_moving_tags(mut self, tags: Vec<String>) -> Self {
        self.moving_tags = tags;
        self
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

    /// An object, as it is sent when it is sent alone.
    ///
    /// # Errors
    /// When it is not there, or was damaged; it is removed then, with all that lies in the same file, and building its
    /// release again brings it back.
    pub fn object(&self, hash: ContentHash) -> Result<EncodedObject, DepotError> {
        self.object_in(&self.index()?, hash)
    }

    /// As [`Depot::object`], with an index at hand. What was packed anew since the index was read is found all the same.
    pub(crate) fn object_in(&self, index: &Index, hash: ContentHash) -> Result<EncodedObject, DepotError> {
        if let Some(Found { file, encoding, .. }) = self.open_object(hash)? {
            let path = self.object_path(hash, encoding);
            return Ok(EncodedObject { encoding, data: read_all(file, &path)? });
        }
        let data = match self.packed(index, hash)? {
            Some(data) => Some(data),
            None => self.packed(&self.index()?, hash)?,
        };
        let data = data.ok_or(DepotError::ObjectMissing { hash })?;
        EncodedObject::encode(&data).at("compress", &self.directory)
    }

    /// The bytes of an object that lies in a pack.
    fn packed(&self, index: &Index, hash: ContentHash) -> Result<Option<Vec<u8>>, DepotError> {
        let Some(pack) = index.find(hash).and_then(|number| index.pack(number)) else { return Ok(None) };
        let Some((file, _)) = self.open_pack(pack.name)? else { return Ok(None) };
        let data = read_all(file, &self.pack_path(pack.name))?;
        pack::read(pack.name, &data)?.object(hash)
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
        self.difference(&self.index()?, hash, base)
    }

    pub(crate) fn difference(
        &self,
        index: &Index,
        hash: ContentHash,
        base: ContentHash,
    ) -> Result<EncodedObject, DepotError> {
        let whole = self.object_in(index, hash)?;
        // A base that was pruned here, or was damaged, only costs what it would have saved.
        let Ok(before) = self.object_in(index, base) else { return Ok(whole) };
        let Ok(before) = decode(base, before.encoding, &before.data) else { return Ok(whole) };
        let data = decode(hash, whole.encoding, &whole.data)?;
        let difference = EncodedObject::encode_delta(base, &before, &data).at("compress", &self.directory)?;
        Ok(if difference.data.len() < whole.data.len() { difference } else { whole })
    }

    /// An object that lies in a file of its own. One that was damaged is removed, and an error.
    pub(crate) fn open_object(&self, hash: ContentHash) -> Result<Option<Found>, DepotError> {
        for encoding in [Encoding::Zstd, Encoding::Raw] {
            let path = self.object_path(hash, encoding);
            let is_right = |data: &[u8]| decode(hash, encoding, data).map(drop);
            if let Some((file, bytes)) = open_sound(&path, hash, is_right)? {
                return Ok(Some(Found { file, encoding, bytes }));
            }
        }
        Ok(None)
    }

    /// A pack, with its size in bytes; none when it is gone. One that was damaged is removed, and an error.
    pub(crate) fn open_pack(&self, name: ContentHash) -> Result<Option<(File, u64)>, DepotError> {
        open_sound(&self.pack_path(name), name, |data| match content_hash(data) == name {
            true => Ok(()),
            false => {
                let why = "it is a pack of objects whose bytes were changed in the depot".to_owned();
                Err(DepotError::ObjectDamaged { hash: name, why })
            }
        })
    }

    /// The manifest of a release as it lies here, and its size in bytes.
    pub(crate) fn open_manifest(&self, id: ReleaseId) -> Result<(File, u64), DepotError> {
        let path = self.release_file(id, "manifest.zst");
        let file = disk::absent_is_none(File::open(&path)).at("open", &path)?;
        let file =
            file.ok_or_else(|| DepotError::NoRelease { release: id, depot: self.directory.clone() })?;
        let bytes = file.metadata().at("look at", &path)?.len();
        Ok((file, bytes))
    }

    /// Where packed objects are, as of now.
    pub(crate) fn index(&self) -> Result<Index, DepotError> {
        Index::load(&self.directory.join("packs"))
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
        self.sweep_packs(&needed)?;
        Ok(removed)
    }

    /// Removes the packs that nothing needs, and puts what is needed of those that are mostly waste into new ones.
    fn sweep_packs(&self, needed: &HashSet<ContentHash>) -> Result<(), DepotError> {
        let index = self.index()?;
        let mut used = vec![0u64; index.packs.len()];
        // What is needed and empty counts as well.
        for (pack, bytes) in needed.iter().filter_map(|hash| index.locate(*hash)) {
            if let Some(used) = used.get_mut(pack as usize) {
                *used += u64::from(bytes) + 1;
            }
        }
        let is_waste = |number: usize| used[number] * 2 < index.packs[number].object_bytes;
        let mut moved = HashSet::new();
        let mut packer = Packer::default();
        let write = |full: Option<Packer>| full.map_or(Ok(()), |full| self.write_pack(full, &self.scratch()));
        for number in (0..used.len()).filter(|number| used[*number] > 0 && is_waste(*number)) {
            let Some((file, _)) = self.open_pack(index.packs[number].name)? else { continue };
            let data = read_all(file, &self.pack_path(index.packs[number].name))?;
            let is_moved = |hash: &ContentHash| needed.contains(hash) && moved.insert(*hash);
            pack::read(index.packs[number].name, &data)?
                .each(is_moved, |hash, data| write(packer.add(hash, data)))?;
        }
        write(packer.rest())?;
        disk::sync_file_system(&self.directory)?;
        for number in (0..used.len()).filter(|number| used[*number] == 0 || is_waste(*number)) {
            disk::remove_file(&self.pack_path(index.packs[number].name))?;
        }
        Ok(())
    }

    /// Writes a pack, by way of `temporary`.
    fn write_pack(&self, pack: Packer, temporary: &Path) -> Result<(), DepotError> {
        let data = pack.finish().at("compress for", temporary)?;
        let name = content_hash(&data);
        let path = self.pack_path(name);
        write_sealed(&path, temporary, name, &data)
    }

    /// A path for something half-done that no build has.
    fn scratch(&self) -> PathBuf {
        self.directory.join("tmp").join(format!("pruning-{}", std::process::id()))
    }

    fn pack_path(&self, name: ContentHash) -> PathBuf {
        self.directory.join("packs").join(name.to_string())
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
        let packed = self.packed_soundly()?;
        let packing = Mutex::new(Packing { packer: Packer::default(), packed });
        Ok(Work { depot: self, workplace, packing, _lock: lock })
    }

    /// Every object that lies in a pack. One that was damaged is removed.
    fn packed_soundly(&self) -> Result<HashSet<ContentHash>, DepotError> {
        let index = self.index()?;
        let mut is_sound = Vec::with_capacity(index.packs.len());
        for pack in &index.packs {
            is_sound.push(match self.open_pack(pack.name) {
                Ok(found) => found.is_some(),
                Err(DepotError::ObjectDamaged { .. }) => false,
                Err(error) => return Err(error),
            });
        }
        let in_sound = |pack: u32| is_sound.get(pack as usize).copied().unwrap_or(false);
        Ok(index.objects().filter(|(_, pack)| in_sound(*pack)).map(|(hash, _)| hash).collect())
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
        // A difference is never stored, and packs lie elsewhere.
        let extension = if encoding == Encoding::Zstd { COMPRESSED } else { "" };
        self.directory.join("objects").join(fan_out).join(format!("{hash}{extension}"))
    }
}

const COMPRESSED: &str = ".zst";

/// An object in a file of its own.
pub(crate) struct Found {
    pub(crate) file: File,
    pub(crate) encoding: Encoding,
    /// As encoded.
    pub(crate) bytes: u64,
}

/// Opens a file of the depot with its size in bytes; none when it is not there. One that is not as it was written is looked
/// at by its bytes, and removed when they are wrong.
fn open_sound(
    path: &Path,
    name: ContentHash,
    is_right: impl FnOnce(&[u8]) -> Result<(), DepotError>,
) -> Result<Option<(File, u64)>, DepotError> {
    let Some(file) = disk::absent_is_none(File::open(path)).at("open", path)? else { return Ok(None) };
    let stat = rustix::fs::fstat(&file).at("look at", path)?;
    let bytes = size_of_stat(&stat);
    if !is_sealed(&stat, name, bytes) {
        if let Err(damage) = disk::read_file(path).and_then(|data| is_right(&data.unwrap_or_default())) {
            disk::remove_file(path)?;
            return Err(damage);
        }
        // A copied depot is no damage: its bytes need not be looked at again.
        set_seal(&file, name, bytes).at("set the time of", path)?;
    }
    Ok(Some((file, bytes)))
}

fn read_all(mut file: File, path: &Path) -> Result<Vec<u8>, DepotError> {
    let mut data = Vec::new();
    file.read_to_end(&mut data).at("read", path)?;
    Ok(data)
}

/// Writes a file that is known to be untouched by its seal.
fn write_sealed(path: &Path, temporary: &Path, name: ContentHash, data: &[u8]) -> Result<(), DepotError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o400)
        .open(temporary)
        .at("create", temporary)?;
    file.write_all(data).at("write", path)?;
    set_seal(&file, name, data.len() as u64).at("set the time of", path)?;
    fs::rename(temporary, path).at("put in place", path)
}

/// A build under way.
pub(crate) struct Work<'a> {
    depot: &'a Depot,
    workplace: Workplace,
    packing: Mutex<Packing>,
    _lock: File,
}

struct Packing {
    packer: Packer,
    /// What is in a pack, or on its way into one.
    packed: HashSet<ContentHash>,
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
        if data.len() > PACKED_BYTES_MAX {
            return self.keep_alone(hash, data);
        }
        let full = {
            let mut packing = self.packing();
            if !packing.packed.insert(hash) {
                return Ok(());
            }
            packing.packer.add(hash, data)
        };
        // Compressed and written by the thread that has made it full, while the others go on with the next.
        full.map_or(Ok(()), |full| self.depot.write_pack(full, &self.fresh()))
    }

    fn packing(&self) -> std::sync::MutexGuard<'_, Packing> {
        // A panic while it is held ends the build.
        self.packing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep_alone(&self, hash: ContentHash, data: &[u8]) -> Result<(), DepotError> {
        let temporary = self.fresh();
        let object = EncodedObject::encode(data).at("compress for", &temporary)?;
        let path = self.depot.object_path(hash, object.encoding);
        disk::create_directory(path.parent().unwrap_or(&path), 0o700)?;
        write_sealed(&path, &temporary, hash, &object.data)
    }

    /// Writes the last pack, which need not be full.
    pub(crate) fn finish_packs(&self) -> Result<(), DepotError> {
        let rest = self.packing().packer.rest();
        rest.map_or(Ok(()), |rest| self.depot.write_pack(rest, &self.fresh()))
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
