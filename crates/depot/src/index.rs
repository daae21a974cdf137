//! Where the packed objects of a depot are.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use greenlight_model::id::ContentHash;

use crate::disk;
use crate::error::{At, DepotError};
use crate::object::size_of_stat;
use crate::pack;

/// A pack as it lies on the disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packed {
    /// Its name: the hash of the file.
    pub(crate) name: ContentHash,
    /// Its bytes as a file.
    pub(crate) file_bytes: u64,
    /// The bytes of its objects.
    pub(crate) object_bytes: u64,
}

/// Every pack with what it consists of. 40 bytes for each object.
#[derive(Debug, Default)]
pub(crate) struct Index {
    pub(crate) packs: Vec<Packed>,
    /// In order of the hashes: which pack each is in, and its size in bytes.
    objects: Vec<(ContentHash, u32, u32)>,
}

impl Index {
    /// Reads the beginnings of all packs in a directory. A pack that cannot be read counts for nothing: what was in it is
    /// missing then, and building its release again brings it back.
    pub(crate) fn load(directory: &Path) -> Result<Self, DepotError> {
        let mut index = Self::default();
        for name in disk::names(directory)? {
            let Ok(name) = name.parse::<ContentHash>() else { continue };
            let path = directory.join(name.to_string());
            let Some(file) = disk::absent_is_none(File::open(&path)).at("open", &path)? else { continue };
            let stat = rustix::fs::fstat(&file).at("look at", &path)?;
            let Ok(contents) = pack::contents(BufReader::new(file)) else { continue };
            let number = u32::try_from(index.packs.len()).unwrap_or(u32::MAX);
            let object_bytes = contents.iter().map(|(_, bytes)| u64::from(*bytes)).sum();
            index.objects.extend(contents.into_iter().map(|(hash, bytes)| (hash, number, bytes)));
            index.packs.push(Packed { name, file_bytes: size_of_stat(&stat), object_bytes });
        }
        index.objects.sort_unstable_by_key(|(hash, ..)| *hash);
        index.objects.dedup_by_key(|(hash, ..)| *hash);
        index.objects.shrink_to_fit();
        Ok(index)
    }

    /// The number of the pack that an object is in.
    pub(crate) fn find(&self, hash: ContentHash) -> Option<u32> {
        self.locate(hash).map(|(pack, _)| pack)
    }

    /// The number of the pack that an object is in, and the object's size in bytes.
    pub(crate) fn locate(&self, hash: ContentHash) -> Option<(u32, u32)> {
        let found = self.objects.binary_search_by_key(&hash, |(hash, ..)| *hash).ok()?;
        self.objects.get(found).map(|(_, pack, bytes)| (*pack, *bytes))
    }

    pub(crate) fn pack(&self, number: u32) -> Option<&Packed> {
        self.packs.get(number as usize)
    }

    /// Every object with the number of its pack.
    pub(crate) fn objects(&self) -> impl Iterator<Item = (ContentHash, u32)> + '_ {
        self.objects.iter().map(|(hash, pack, _)| (*hash, *pack))
    }
}
