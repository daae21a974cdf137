//! What can go wrong with releases on a disk, said so that the reader knows what to do.

use std::io;
use std::path::{Path, PathBuf};

use greenlight_model::id::ContentHash;

use crate::check::ManifestError;
use crate::object::OBJECT_BYTES_MAX;
use crate::scan::Refusal;

/// Why a depot could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum DepotError {
    /// The operating system refused.
    #[error("cannot {doing} {path}: {source}")]
    Io {
        /// What was tried, as a verb: "read", "create".
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No space, or no quota, left. What was half-written is removed.
    #[error(
        "the disk is full: no room for {path} ({} MiB are free there); free some space, or prune releases, and try again",
        free_bytes / (1 << 20)
    )]
    DiskFull {
        /// What was being written.
        path: PathBuf,
        /// What is left for us on that file system, in bytes.
        free_bytes: u64,
    },
    /// A manifest is not one that may be placed.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A tree holds what cannot be part of a release. All of it is listed.
    #[error("{directory} cannot become a release:{}", listed(refusals))]
    Refused {
        /// The tree.
        directory: PathBuf,
        /// Everything that is wrong with it.
        refusals: Vec<Refusal>,
    },
    /// An object is needed that is not there, or was found damaged and removed: fetch it again.
    #[error("object {hash} is missing here or was damaged and has been removed; it must be sent again")]
    ObjectMissing {
        /// Which.
        hash: ContentHash,
    },
    /// Bytes that arrived, or that were read, are not those that their hash names.
    #[error("object {hash} is damaged: {why}")]
    ObjectDamaged {
        /// Which.
        hash: ContentHash,
        /// In what way.
        why: String,
    },
    /// An object is larger than any that a depot makes.
    #[error("object {hash} is larger than the limit of {OBJECT_BYTES_MAX} bytes")]
    ObjectTooLarge {
        /// Which.
        hash: ContentHash,
    },
    /// A file was written by a newer build.
    #[error(
        "{path} has version {found}, this greenlight knows up to {known}; use the newer greenlight that wrote it"
    )]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version that this build knows.
        known: u32,
    },
    /// A file of the depot does not say what it should.
    #[error("{path} is damaged: {why}; build or stage the release again")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// In what way.
        why: String,
    },
    /// A release is here already, with another tree than the one given.
    #[error(
        "release {release} is complete on this host with another tree; an id never stands for two, so the sender is wrong"
    )]
    OtherTree {
        /// Which.
        release: greenlight_model::id::ReleaseId,
    },
    /// A host asks for an object that the release does not have.
    #[error("the host asks for object number {number}, which release {} does not have", release.short())]
    NotInRelease {
        /// The number.
        number: u32,
        /// Of which release.
        release: greenlight_model::id::ReleaseId,
    },
    /// There is no such release in the depot.
    #[error("release {release} is not in the depot {depot}; build it again")]
    NoRelease {
        /// Which.
        release: greenlight_model::id::ReleaseId,
        /// Where it was looked for.
        depot: PathBuf,
    },
}

/// How many refusals are printed; a tree full of sockets need not fill the terminal.
const REFUSALS_SHOWN_MAX: usize = 20;

fn listed(refusals: &[Refusal]) -> String {
    let mut text: String =
        refusals.iter().take(REFUSALS_SHOWN_MAX).map(|refusal| format!("\n  {refusal}")).collect();
    if refusals.len() > REFUSALS_SHOWN_MAX {
        text.push_str(&format!("\n  … and {} more", refusals.len() - REFUSALS_SHOWN_MAX));
    }
    text
}

/// Says for an operating system's error what was tried on what.
pub(crate) trait At<T> {
    fn at(self, doing: &'static str, path: impl AsRef<Path>) -> Result<T, DepotError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, doing: &'static str, path: impl AsRef<Path>) -> Result<T, DepotError> {
        self.map_err(|error| {
            let (source, path) = (error.into(), path.as_ref().to_owned());
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    let free_bytes = free_bytes(&path);
                    DepotError::DiskFull { path, free_bytes }
                }
                _ => DepotError::Io { doing, path, source },
            }
        })
    }
}

/// What the file system of `path`, which need not exist, has left for us.
fn free_bytes(path: &Path) -> u64 {
    let found = path.ancestors().find_map(|ancestor| rustix::fs::statvfs(ancestor).ok());
    found.map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_apart() {
        for errno in [rustix::io::Errno::NOSPC, rustix::io::Errno::DQUOT] {
            let error = Err::<(), _>(errno).at("write", "/proc/none/such").unwrap_err();
            let DepotError::DiskFull { path, .. } = &error else { panic!("{error}") };
            assert_eq!(path, Path::new("/proc/none/such"));
            assert!(error.to_string().contains("MiB are free there"), "{error}");
        }
        let error = Err::<(), _>(rustix::io::Errno::ACCESS).at("write", "/x").unwrap_err();
        assert!(error.to_string().starts_with("cannot write /x: "), "{error}");
    }
}
