//! Manifests: what a tree consists of, and the ids that follow from it.
//!
//! Guarantees: [`digest`] and [`release_id`] are functions of content alone; times, owners, the order of directories and
//! the way in which files are cut do not enter. Their encoding is versioned: another one gives other ids.

use std::path::Path;

use greenlight_model::id::{ContentHash, ReleaseId, ServiceName};
use greenlight_model::manifest::{Entry, Manifest};

use crate::disk;
use crate::error::DepotError;

pub use crate::check::{ManifestError, RELEASE_BYTES_MAX, check};
pub use crate::scan::{CUT_BYTES_MIN, Refusal, scan};

/// The hash of a manifest. How a large file is cut is a matter of transport and left out.
#[must_use]
pub fn digest(manifest: &Manifest) -> ContentHash {
    let mut encoder = Encoder::new("greenlight manifest 1");
    encoder.number(manifest.entries.len() as u64);
    for (path, entry) in &manifest.entries {
        encoder.text(path);
        match entry {
            Entry::Directory => encoder.text("directory"),
            Entry::File { size, executable, hash, chunks: _ } => {
                encoder.text(if *executable { "executable" } else { "file" });
                encoder.number(*size);
                encoder.bytes(hash.as_bytes());
            }
            Entry::Symlink { target } => {
                encoder.text("symlink");
                encoder.text(target);
            }
        }
    }
    ContentHash::from_bytes(encoder.finish())
}

/// The id of the release that this service's commit and build steps gave, with this tree.
#[must_use]
pub fn release_id(service: &ServiceName, commit: &str, steps: &[String], manifest: &Manifest) -> ReleaseId {
    let mut encoder = Encoder::new("greenlight release 1");
    encoder.text(service.as_str());
    encoder.text(commit);
    encoder.number(steps.len() as u64);
    for step in steps {
        encoder.text(step);
    }
    encoder.bytes(digest(manifest).as_bytes());
    ReleaseId::from_bytes(encoder.finish())
}

/// Reads a manifest as a depot keeps and sends it.
///
/// # Errors
/// When it cannot be read, is too large, or was written by a newer build.
pub fn decode(data: &[u8]) -> Result<Manifest, DepotError> {
    disk::decode_document(Path::new("the manifest that was sent"), data, true)
}

/// Hashes fields so that no two different lists of them run together: each text is preceded by its length.
struct Encoder(blake3::Hasher);

impl Encoder {
    fn new(form: &str) -> Self {
        let mut encoder = Self(blake3::Hasher::new());
        encoder.text(form);
        encoder
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.update(bytes);
    }

    fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    fn number(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    fn finish(self) -> [u8; 32] {
        *self.0.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(executable: bool, cut: bool) -> Entry {
        let hash = ContentHash::from_bytes([1; 32]);
        let chunks = if cut { vec![(hash, 3)] } else { Vec::new() };
        Entry::File { size: 3, executable, hash, chunks }
    }

    fn manifest(entries: &[(&str, Entry)]) -> Manifest {
        Manifest {
            entries: entries.iter().map(|(path, entry)| ((*path).to_owned(), entry.clone())).collect(),
        }
    }

    fn id(service: &str, commit: &str, steps: &[&str], entries: &[(&str, Entry)]) -> ReleaseId {
        let steps: Vec<String> = steps.iter().map(|step| (*step).to_owned()).collect();
        release_id(&service.parse().unwrap(), commit, &steps, &manifest(entries))
    }

    #[test]
    fn every_part_of_the_content_and_nothing_else_makes_the_id() {
        let base = id("web", "c1", &["a", "b"], &[("x", file(false, false))]);
        assert_eq!(base, id("web", "c1", &["a", "b"], &[("x", file(false, true))]));
        let others = [
            id("api", "c1", &["a", "b"], &[("x", file(false, false))]),
            id("web", "c2", &["a", "b"], &[("x", file(false, false))]),
            id("web", "c1", &["ab"], &[("x", file(false, false))]),
            id("web", "c1", &["ab", ""], &[("x", file(false, false))]),
            id("web", "c1", &["a", "b"], &[("y", file(false, false))]),
            id("web", "c1", &["a", "b"], &[("x", file(true, false))]),
            id("web", "c1", &["a", "b"], &[("x", Entry::Directory)]),
            id("web", "c1", &["a", "b"], &[("x", Entry::Symlink { target: "y".to_owned() })]),
            id("web", "c1", &["a", "b"], &[]),
        ];
        let all: std::collections::BTreeSet<_> = others.iter().chain([&base]).collect();
        assert_eq!(all.len(), others.len() + 1);
    }

    /// Ids stand in logs and ledgers that people have: this one must never change.
    #[test]
    fn the_id_of_version_1_stays() {
        let entries = [
            ("bin/run", file(true, false)),
            ("empty", Entry::Directory),
            ("now", Entry::Symlink { target: "bin".to_owned() }),
        ];
        let found = id("web", "3f9a1c20b7aa", &["make"], &entries).to_string();
        assert_eq!(found, "6d13f51628c8c3562a96acb4fc0feaaf98fa9177fabb513f241ff7c9e6059964");
    }
}
