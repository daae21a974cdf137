//! Packs: many small objects in one compressed run.
//!
//! Small files of one release resemble each other: compressed together they take a fifth less than one by one, and a file,
//! a frame and a call for each thousandth of them. A pack lies in the depot exactly as it travels:
//!
//! ```text
//! "greenpk1"  count u32  (hash, bytes u32) × count  encoding u8 (0 raw, 1 zstd)  the bytes of all, one after the other
//! ```
//!
//! Numbers are big-endian. Guarantees: whatever the bytes are, reading gives the objects of the pack, each of which has its
//! hash, or a typed error; never more than [`OBJECT_BYTES_MAX`] are made of whatever arrives.

use std::io::{self, Read};

use greenlight_model::id::ContentHash;

use crate::error::DepotError;
use crate::object::{COMPRESSION_LEVEL, OBJECT_BYTES_MAX, content_hash};

/// Objects of up to so many bytes are packed; of larger ones, each gains nothing from its neighbours.
pub(crate) const PACKED_BYTES_MAX: usize = 128 << 10;
/// A pack that has so many bytes, before compression, is full: a few dozen files, as much as zstd looks back over.
const FULL_BYTES: usize = 1 << 20;
/// A pack that has so many objects is full.
pub(crate) const PACK_OBJECTS_MAX: usize = 16_384;
const MAGIC: &[u8; 8] = b"greenpk1";
/// Bytes before the list of objects.
const START_BYTES: usize = MAGIC.len() + 4;
/// Bytes of one of the list.
const ITEM_BYTES: usize = 32 + 4;

/// Objects that are to become a pack.
#[derive(Debug, Default)]
pub(crate) struct Packer {
    objects: Vec<(ContentHash, u32)>,
    bytes: Vec<u8>,
}

impl Packer {
    /// Takes an object of at most [`PACKED_BYTES_MAX`]; the pack, when that has made it full.
    pub(crate) fn add(&mut self, hash: ContentHash, data: &[u8]) -> Option<Self> {
        debug_assert!(data.len() <= PACKED_BYTES_MAX);
        self.objects.push((hash, u32::try_from(data.len()).unwrap_or(u32::MAX)));
        self.bytes.extend_from_slice(data);
        let is_full = self.bytes.len() >= FULL_BYTES || self.objects.len() >= PACK_OBJECTS_MAX;
        is_full.then(|| std::mem::take(self))
    }

    /// The pack, unless there is nothing in it.
    pub(crate) fn rest(&mut self) -> Option<Self> {
        (!self.objects.is_empty()).then(|| std::mem::take(self))
    }

    /// The bytes of the pack; compressed unless that gains less than a twentieth.
    pub(crate) fn finish(self) -> io::Result<Vec<u8>> {
        let mut pack = Vec::with_capacity(START_BYTES + self.objects.len() * ITEM_BYTES);
        pack.extend_from_slice(MAGIC);
        pack.extend_from_slice(&u32::try_from(self.objects.len()).map_err(io::Error::other)?.to_be_bytes());
        for (hash, bytes) in &self.objects {
            pack.extend_from_slice(hash.as_bytes());
            pack.extend_from_slice(&bytes.to_be_bytes());
        }
        let compressed = zstd::bulk::compress(&self.bytes, COMPRESSION_LEVEL)?;
        if compressed.len() < self.bytes.len() - self.bytes.len() / 20 {
            pack.push(1);
            pack.extend_from_slice(&compressed);
        } else {
            pack.push(0);
            pack.extend_from_slice(&self.bytes);
        }
        Ok(pack)
    }
}

/// Reads what a pack consists of, without its bytes; nothing more is read than that.
pub(crate) fn contents(mut reader: impl Read) -> io::Result<Vec<(ContentHash, u32)>> {
    let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    let mut start = [0u8; START_BYTES];
    reader.read_exact(&mut start)?;
    let (magic, count) = start.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(bad("it is no pack"));
    }
    let count = count.iter().fold(0usize, |count, byte| count << 8 | usize::from(*byte));
    if count > PACK_OBJECTS_MAX {
        return Err(bad("it has too many objects"));
    }
    let mut list = vec![0u8; count * ITEM_BYTES];
    reader.read_exact(&mut list)?;
    let mut total = 0u64;
    let mut objects = Vec::with_capacity(count);
    for item in list.chunks_exact(ITEM_BYTES) {
        let (hash, bytes) = item.split_at(32);
        let hash = <[u8; 32]>::try_from(hash).map_err(io::Error::other)?;
        let bytes = bytes.iter().fold(0u32, |bytes, byte| bytes << 8 | u32::from(*byte));
        total += u64::from(bytes);
        objects.push((ContentHash::from_bytes(hash), bytes));
    }
    if total > OBJECT_BYTES_MAX as u64 {
        return Err(bad("its objects are too large"));
    }
    Ok(objects)
}

/// A pack that was read.
#[derive(Debug)]
pub(crate) struct Unpacked {
    objects: Vec<(ContentHash, u32)>,
    bytes: Vec<u8>,
}

impl Unpacked {
    /// Reads a pack; its objects are not verified yet.
    pub(crate) fn read(pack: &[u8]) -> io::Result<Self> {
        let objects = contents(pack)?;
        let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
        let total: usize = objects.iter().map(|(_, bytes)| *bytes as usize).sum();
        // The list was read from there, so it is that long.
        let rest = pack.get(START_BYTES + objects.len() * ITEM_BYTES..).unwrap_or_default();
        let bytes = match rest.split_first() {
            Some((0, raw)) => raw.to_vec(),
            Some((1, frame)) => {
                let mut bytes = Vec::with_capacity(total);
                zstd::stream::read::Decoder::with_buffer(frame)?
                    .take(total as u64 + 1)
                    .read_to_end(&mut bytes)?;
                bytes
            }
            Some(_) => return Err(bad("its encoding is not known")),
            None => return Err(bad("it ends before its bytes")),
        };
        if bytes.len() != total {
            return Err(bad("it has not the bytes that its list says"));
        }
        Ok(Self { objects, bytes })
    }

    /// Each object of which `is_wanted`, verified.
    ///
    /// # Errors
    /// When one has not the hash that it is said to have; those before it were given.
    pub(crate) fn each(
        &self,
        mut is_wanted: impl FnMut(&ContentHash) -> bool,
        mut give: impl FnMut(ContentHash, &[u8]) -> Result<(), DepotError>,
    ) -> Result<(), DepotError> {
        let mut rest = self.bytes.as_slice();
        for (hash, bytes) in &self.objects {
            // All sizes together are what there is.
            let (data, after) = rest.split_at(*bytes as usize);
            rest = after;
            if !is_wanted(hash) {
                continue;
            }
            let found = content_hash(data);
            if found != *hash {
                let why = format!("its bytes in a pack have the hash {found}");
                return Err(DepotError::ObjectDamaged { hash: *hash, why });
            }
            give(*hash, data)?;
        }
        Ok(())
    }

    /// One of the objects, verified; none when it is not in there.
    pub(crate) fn object(&self, wanted: ContentHash) -> Result<Option<Vec<u8>>, DepotError> {
        let mut found = None;
        self.each(
            |hash| *hash == wanted,
            |_, data| {
                found = Some(data.to_vec());
                Ok(())
            },
        )?;
        Ok(found)
    }
}

/// As [`Unpacked::read`], of a pack by this name.
pub(crate) fn read(pack: ContentHash, data: &[u8]) -> Result<Unpacked, DepotError> {
    Unpacked::read(data).map_err(|error| DepotError::ObjectDamaged { hash: pack, why: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    fn pack(objects: &[&[u8]]) -> Vec<u8> {
        let mut packer = Packer::default();
        for data in objects {
            assert!(packer.add(content_hash(data), data).is_none());
        }
        packer.finish().unwrap()
    }

    fn all(pack: &[u8]) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        let unpacked = Unpacked::read(pack).unwrap();
        unpacked
            .each(
                |_| true,
                |hash, data| {
                    assert_eq!(content_hash(data), hash);
                    found.push(data.to_vec());
                    Ok(())
                },
            )
            .unwrap();
        found
    }

    #[test]
    fn packs_give_back_what_went_in() {
        let (text, noise) = (b"the same line again\n".repeat(100), noise(1, 50_000));
        for objects in [&[][..], &[b"".as_slice()], &[&text, b"", &text, b"x"], &[&noise, b"x"]] {
            let packed = pack(objects);
            assert_eq!(all(&packed), objects);
            assert_eq!(contents(packed.as_slice()).unwrap().len(), objects.len());
        }
        assert!(pack(&[&text]).len() < 200);
        let wanted = Unpacked::read(&pack(&[&text, &noise])).unwrap();
        assert_eq!(wanted.object(content_hash(&noise)).unwrap().as_deref(), Some(noise.as_slice()));
        assert_eq!(wanted.object(content_hash(b"other")).unwrap(), None);
    }

    #[test]
    fn a_pack_is_full_in_time() {
        let mut packer = Packer::default();
        let data = noise(1, PACKED_BYTES_MAX);
        let full = (0..100).find_map(|_| packer.add(content_hash(&data), &data)).unwrap();
        assert!((FULL_BYTES..FULL_BYTES + PACKED_BYTES_MAX).contains(&full.bytes.len()));
        assert!(packer.rest().is_none());
        let full = (0..=PACK_OBJECTS_MAX).find_map(|_| packer.add(content_hash(b""), b"")).unwrap();
        assert_eq!(full.objects.len(), PACK_OBJECTS_MAX);
    }

    #[test]
    fn what_is_no_pack_is_an_error_and_never_large() {
        let good = pack(&[&b"the same line again\n".repeat(100), b"x"]);
        for length in 0..good.len() {
            assert!(Unpacked::read(&good[..length]).is_err(), "{length}");
        }
        for position in 0..good.len() {
            let mut bad = good.clone();
            bad[position] ^= 0x41;
            let read = Unpacked::read(&bad).map_err(drop);
            let given = read.and_then(|unpacked| unpacked.each(|_| true, |_, _| Ok(())).map_err(drop));
            assert!(given.is_err(), "{position}");
        }
        // A frame that has more than the list says, and a list that says too much.
        let bomb = zstd::bulk::compress(&vec![0u8; 64 << 20], 19).unwrap();
        let head = START_BYTES + 2 * ITEM_BYTES + 1;
        assert!(Unpacked::read(&[&good[..head], &bomb].concat()).is_err());
        let mut long = good;
        long[START_BYTES + 32] = 0xff;
        assert!(contents(long.as_slice()).unwrap_err().to_string().contains("too large"));
        long[MAGIC.len()] = 0xff;
        assert!(contents(long.as_slice()).unwrap_err().to_string().contains("too many"));
    }
}
