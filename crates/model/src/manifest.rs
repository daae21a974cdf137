//! A release and the tree it consists of.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::Timestamp;
use crate::id::{ContentHash, ReleaseId, ServiceName};

/// Most entries a manifest may have: beyond that a tree is a mistake, and a hostile count is refused early.
pub const MANIFEST_ENTRIES_MAX: usize = 2_000_000;
/// The longest path inside a release, as Linux has it.
pub const PATH_BYTES_MAX: usize = 4_096;

/// The tree of a release: every path with what is there, in byte order of the paths.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Entry by path, relative to the release's directory, `/` between components, never `..`, never absolute.
    pub entries: BTreeMap<String, Entry>,
}

impl Manifest {
    /// The objects that the files consist of, each once with its size in bytes, in the order in which they come first. An object's
    /// place here is its number wherever controller and host speak of a release.
    #[must_use]
    pub fn objects(&self) -> Vec<(ContentHash, u32)> {
        let mut seen = HashSet::new();
        let mut objects = Vec::new();
        for entry in self.entries.values() {
            let Entry::File { size, hash, chunks, .. } = entry else { continue };
            // A file that was not cut is far smaller than what 32 bits hold.
            let whole = [(*hash, u32::try_from(*size).unwrap_or(u32::MAX))];
            let parts = if chunks.is_empty() { &whole[..] } else { chunks };
            objects.extend(parts.iter().filter(|(hash, _)| seen.insert(*hash)));
        }
        objects
    }
}

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Entry {
    /// A directory; listed so that empty ones exist.
    Directory,
    /// A regular file.
    File {
        /// Its size in bytes.
        size: u64,
        /// Whether it may be executed. Other permission bits do not belong to a release.
        executable: bool,
        /// The hash of the whole content.
        hash: ContentHash,
        /// The chunks of a file that was cut, in order, with their sizes in bytes; empty when the file is one object.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        chunks: Vec<(ContentHash, u32)>,
    },
    /// A symbolic link.
    Symlink {
        /// What it points to, as it stands in the link; it stays inside the release.
        target: String,
    },
}

/// A release: immutable, content-addressed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// The hash of manifest, service, commit and build steps.
    pub id: ReleaseId,
    /// The service it is a release of.
    pub service: ServiceName,
    /// What people call it: `v42`, `1.4.0-3-gabc1234`.
    pub label: String,
    /// The full commit hash it was built from.
    pub commit: String,
    /// The branch it was built from, when known.
    pub branch: Option<String>,
    /// The commit's first line.
    pub subject: String,
    /// When it was built.
    pub built_at: Timestamp,
    /// Who built it.
    pub built_by: String,
    /// Files in it.
    pub files: u64,
    /// Bytes in it.
    pub bytes: u64,
}

impl Release {
    /// How people see it: `v42 (3f9a1c20b7aa)`.
    #[must_use]
    pub fn title(&self) -> String {
        format!("{} ({})", self.label, self.id.short())
    }
}
