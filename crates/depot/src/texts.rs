//! Text files of a release, read here rather than on a host.

use std::collections::BTreeMap;

use globset::GlobSetBuilder;
use greenlight_model::id::{ContentHash, ReleaseId};
use greenlight_model::manifest::Entry;

use crate::depot::Depot;
use crate::error::DepotError;
use crate::object::decode;
use crate::scan;

/// A text file of more bytes is not read: nobody wrote that by hand.
const TEXT_BYTES_MAX: u64 = 16 << 20;

/// A file's content, or why it is not read.
pub type Text = Result<String, String>;

impl Depot {
    /// The files of a release that match one of the patterns, which are as those of `include`.
    ///
    /// # Errors
    /// When the release is not here, or an object of it cannot be read.
    pub fn texts(&self, id: ReleaseId, patterns: &[String]) -> Result<BTreeMap<String, Text>, DepotError> {
        let mut set = GlobSetBuilder::new();
        // The fleet file's own reader has refused what is no pattern.
        patterns.iter().filter_map(|pattern| scan::glob(pattern).ok()).for_each(|glob| {
            set.add(glob);
        });
        let Ok(set) = set.build() else { return Ok(BTreeMap::new()) };
        let mut found = BTreeMap::new();
        for (path, entry) in self.manifest(id)?.entries {
            let Entry::File { size, hash, chunks, .. } = entry else { continue };
            if !set.is_match(&path) {
                continue;
            }
            let text = if size > TEXT_BYTES_MAX {
                Err(format!("it has {size} bytes, and no more than {TEXT_BYTES_MAX} are read"))
            } else {
                let bytes = self.content(hash, &chunks)?;
                String::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())
            };
            found.insert(path, text);
        }
        Ok(found)
    }

    fn content(&self, hash: ContentHash, chunks: &[(ContentHash, u32)]) -> Result<Vec<u8>, DepotError> {
        let parts = match chunks {
            [] => vec![hash],
            cut => cut.iter().map(|(hash, _)| *hash).collect(),
        };
        let mut bytes = Vec::new();
        for part in parts {
            let object = self.object(part)?;
            bytes.extend(decode(part, object.encoding, &object.data)?);
        }
        Ok(bytes)
    }
}
