//! Removing what nothing needs any more.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::time::SystemTime;

use greenlight_model::id::{ContentHash, ReleaseId};
use greenlight_model::manifest::Entry;

use super::{HostDepot, object_name};
use crate::disk;
use crate::error::{At, DepotError};

impl HostDepot {
    /// Removes the releases that are neither in `keep`, nor behind the `current` link, nor among the `keep_newest` most
    /// recently staged of the others; then the objects that no remaining release consists of. Returns the releases that
    /// are gone. What a killed stage left counts as a release that was never complete, and is removed unless kept.
    ///
    /// # Errors
    /// When something cannot be read or removed; what is gone by then is gone, and the next call goes on. When the
    /// manifest of a remaining release cannot be read, no object is removed.
    pub fn prune(
        &self,
        keep: &BTreeSet<ReleaseId>,
        keep_newest: usize,
    ) -> Result<BTreeSet<ReleaseId>, DepotError> {
        let mut keep = keep.clone();
        keep.extend(self.current());
        let staged = self.staged()?;
        let mut others = Vec::new();
        for id in staged.difference(&keep) {
            others.push((self.staged_at(*id)?, *id));
        }
        others.sort_unstable_by(|a, b| b.cmp(a));
        keep.extend(others.into_iter().take(keep_newest).map(|(_, id)| id));

        let mut removed = BTreeSet::new();
        let markers = disk::names(&self.staged_directory())?;
        let markers = markers.iter().filter_map(|name| name.split('.').next()?.parse().ok());
        let trees = disk::names(&self.releases())?;
        let trees = trees.iter().filter_map(|name| name.parse().ok());
        let known: BTreeSet<ReleaseId> = markers.chain(trees).collect();
        for id in known.difference(&keep) {
            // The marker first: from then on the release does not count, however far its removal comes.
            disk::remove_file(&self.document(*id, "json"))?;
            disk::sync_directory(&self.staged_directory())?;
            disk::remove_tree(&self.release_directory(*id))?;
            disk::remove_file(&self.document(*id, "manifest.zst"))?;
            disk::remove_file(&self.document(*id, "tree.zst"))?;
            if staged.contains(id) {
                removed.insert(*id);
            }
        }
        self.sweep()?;
        Ok(removed)
    }

    /// Removes what is here of a release that is not complete, and the objects that no complete one consists of. One that is
    /// complete, or behind the `current` link, is left alone.
    ///
    /// # Errors
    /// As [`HostDepot::prune`].
    pub fn discard(&self, id: ReleaseId) -> Result<(), DepotError> {
        if !self.staged()?.contains(&id) && self.current() != Some(id) {
            disk::remove_tree(&self.release_directory(id))?;
            disk::remove_file(&self.document(id, "manifest.zst"))?;
            disk::remove_file(&self.document(id, "tree.zst"))?;
        }
        self.sweep()
    }

    /// Removes the objects that no complete release consists of.
    fn sweep(&self) -> Result<(), DepotError> {
        let mut needed = HashSet::new();
        let mut large = HashSet::<ContentHash>::new();
        for id in self.staged()? {
            let manifest = self.manifest(id)?.unwrap_or_default();
            for entry in manifest.entries.values() {
                if let Entry::File { hash, executable, chunks, .. } = entry {
                    needed.insert(object_name(*hash, *executable));
                    if !chunks.is_empty() {
                        large.insert(*hash);
                    }
                }
            }
        }
        for fan_out in disk::names(&self.objects)? {
            for name in disk::names(&self.objects.join(&fan_out))? {
                let name = format!("{fan_out}/{name}");
                if !needed.contains(&name) {
                    disk::remove_file(&self.objects.join(name))?;
                }
            }
        }
        for name in disk::names(&self.large_directory())? {
            if !name.parse().is_ok_and(|hash| large.contains(&hash)) {
                disk::remove_file(&self.large_directory().join(name))?;
            }
        }
        Ok(())
    }

    /// The release behind `current`. The caller should have it in `keep`; this is the second lock on that door.
    pub(super) fn current(&self) -> Option<ReleaseId> {
        let target = fs::read_link(self.root.join("current")).ok()?;
        target.file_name()?.to_str()?.parse().ok()
    }

    pub(super) fn staged_at(&self, id: ReleaseId) -> Result<SystemTime, DepotError> {
        let path = self.document(id, "json");
        fs::metadata(&path).and_then(|metadata| metadata.modified()).at("look at", &path)
    }
}
