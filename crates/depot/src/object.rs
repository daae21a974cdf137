//! Objects: the bytes of a file, or of a chunk of a large one, by their hash; how they are encoded for disk and wire, and
//! how a stored one is known to be untouched without reading it.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::{SystemTime, UNIX_EPOCH};

use greenlight_model::id::ContentHash;
use rustix::fs::{Stat, Timespec, Timestamps};
use serde::{Deserialize, Serialize};

use crate::error::DepotError;

/// Most bytes of one object, before compression: the largest chunk that [`crate::manifest::scan`] cuts.
pub const OBJECT_BYTES_MAX: usize = 4 * 1024 * 1024;
/// zstd's own default: above it, time grows faster than what it saves on a LAN.
pub(crate) const COMPRESSION_LEVEL: i32 = 3;
/// What a difference may reach back over: the object that it refers to and what was decoded of its own, 8 MiB.
const DELTA_WINDOW_LOG: u32 = 23;
/// Bytes of a hash, which stands before a difference.
const HASH_BYTES: usize = 32;
/// A difference is made of objects up to here by zstd's usual search; of larger ones it would see only the end.
const DELTA_USUAL_BYTES_MAX: usize = 1 << 20;

/// How an object's bytes are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Encoding {
    /// As they are.
    Raw,
    /// One zstd frame.
    Zstd,
    /// The hash of another object, then a zstd frame that refers to that one's bytes. Only for the wire.
    Delta,
    /// Many objects in one run, as [`crate::pack`] has it.
    Pack,
}

/// An object as it is stored by the controller and travels to hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedObject {
    /// How the bytes are written.
    pub encoding: Encoding,
    /// The bytes, so written.
    pub data: Vec<u8>,
}

/// The hash that names these bytes.
#[must_use]
pub fn content_hash(data: &[u8]) -> ContentHash {
    ContentHash::from_bytes(*blake3::hash(data).as_bytes())
}

impl EncodedObject {
    /// Compresses the bytes, unless that gains less than a twentieth: content that is already compressed is better sent
    /// as it is.
    ///
    /// # Errors
    /// When zstd fails, which means that memory ran out.
    pub fn encode(data: &[u8]) -> std::io::Result<Self> {
        let compressed = zstd::bulk::compress(data, COMPRESSION_LEVEL)?;
        if compressed.len() < data.len() - data.len() / 20 {
            return Ok(Self { encoding: Encoding::Zstd, data: compressed });
        }
        Ok(Self { encoding: Encoding::Raw, data: data.to_vec() })
    }
}

impl EncodedObject {
    /// The bytes as their difference to those of another object.
    ///
    /// # Errors
    /// When zstd fails, which means that memory ran out.
    pub fn encode_delta(base: ContentHash, base_data: &[u8], data: &[u8]) -> std::io::Result<Self> {
        let mut encoder = zstd::stream::write::Encoder::with_ref_prefix(
            base.as_bytes().to_vec(),
            COMPRESSION_LEVEL,
            base_data,
        )?;
        encoder.window_log(DELTA_WINDOW_LOG)?;
        encoder.long_distance_matching(base_data.len() > DELTA_USUAL_BYTES_MAX)?;
        encoder.write_all(data)?;
        Ok(Self { encoding: Encoding::Delta, data: encoder.finish()? })
    }
}

/// The bytes of an object that stands by itself, checked against its hash; see [`decode_with`].
///
/// # Errors
/// As [`decode_with`], and when it is a difference to another.
pub fn decode(hash: ContentHash, encoding: Encoding, data: &[u8]) -> Result<Vec<u8>, DepotError> {
    decode_with(hash, encoding, data, |_| Ok(None))
}

/// The bytes of an object, checked against its hash; never more than [`OBJECT_BYTES_MAX`] are made of whatever arrives.
/// `base` gives the bytes that a difference refers to, which need not be checked before.
///
/// # Errors
/// When they cannot be decoded, are too many, or are not those that the hash names.
pub fn decode_with(
    hash: ContentHash,
    encoding: Encoding,
    data: &[u8],
    base: impl FnOnce(ContentHash) -> Result<Option<Vec<u8>>, DepotError>,
) -> Result<Vec<u8>, DepotError> {
    let damaged = |why: String| DepotError::ObjectDamaged { hash, why };
    let undecoded = |error: std::io::Error| damaged(format!("it cannot be decompressed: {error}"));
    let bytes = match encoding {
        Encoding::Raw => data.to_vec(),
        Encoding::Zstd => {
            let decoder = zstd::stream::read::Decoder::with_buffer(data);
            decoder.and_then(unpacked).map_err(undecoded)?
        }
        Encoding::Delta => {
            let (name, frame) = data
                .split_first_chunk::<HASH_BYTES>()
                .ok_or_else(|| damaged("it does not name what it differs from".to_owned()))?;
            let name = ContentHash::from_bytes(*name);
            let base = base(name)?.ok_or_else(|| {
                damaged(format!("it is the difference to {}, which is not here", name.short()))
            })?;
            let decoder = zstd::stream::read::Decoder::with_ref_prefix(frame, &base);
            decoder.and_then(unpacked).map_err(undecoded)?
        }
        Encoding::Pack => return Err(damaged("it is a pack of objects, not one".to_owned())),
    };
    if bytes.len() > OBJECT_BYTES_MAX {
        return Err(DepotError::ObjectTooLarge { hash });
    }
    let found = content_hash(&bytes);
    if found != hash {
        return Err(damaged(format!("its bytes have the hash {found}")));
    }
    Ok(bytes)
}

fn unpacked(decoder: zstd::stream::read::Decoder<'_, &[u8]>) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    decoder.take(OBJECT_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Marks a finished object as untouched: the nanoseconds of its time of change are a function of the seconds, the hash
/// and the size. A write sets that time anew and breaks the seal, whoever writes and through whichever link. (The
/// seconds stay true, so web servers that answer by time of change go on working.)
///
/// Guards against accidents, not against somebody who restores the time on purpose.
pub(crate) fn set_seal(file: impl AsFd, hash: ContentHash, size: u64) -> rustix::io::Result<()> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let time = Timespec { tv_sec: seconds.cast_signed(), tv_nsec: seal_ns(hash, size, seconds) };
    rustix::fs::futimens(file, &Timestamps { last_access: time, last_modification: time })
}

/// Whether the seal is whole. On file systems that keep no nanoseconds it never is; contents are compared then.
pub(crate) fn is_sealed(stat: &Stat, hash: ContentHash, size: u64) -> bool {
    let seconds = u64::try_from(stat.st_mtime).unwrap_or(0);
    let ns = i64::try_from(stat.st_mtime_nsec).unwrap_or(-1);
    size_of_stat(stat) == size && ns == seal_ns(hash, size, seconds)
}

/// A file's size in bytes, which the system gives as a signed number.
pub(crate) fn size_of_stat(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

fn seal_ns(hash: ContentHash, size: u64, seconds: u64) -> i64 {
    let mut bytes = [0u8; 48];
    bytes[..32].copy_from_slice(hash.as_bytes());
    bytes[32..40].copy_from_slice(&size.to_le_bytes());
    bytes[40..].copy_from_slice(&seconds.to_le_bytes());
    let digest = blake3::hash(&bytes);
    let (head, _) = digest.as_bytes().split_at(4);
    let number = head.iter().fold(0u32, |number, byte| number << 8 | u32::from(*byte));
    // Never 0: that is what a file system without nanoseconds gives.
    i64::from(number % 999_999_999) + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoding_round_trips_and_gains_or_leaves() {
        let text = b"the same line again\n".repeat(1000);
        let mut noise = vec![0u8; 50_000];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        for (data, encoding) in [(text, Encoding::Zstd), (noise, Encoding::Raw), (Vec::new(), Encoding::Raw)]
        {
            let object = EncodedObject::encode(&data).unwrap();
            assert_eq!(object.encoding, encoding);
            assert_eq!(decode(content_hash(&data), object.encoding, &object.data).unwrap(), data);
        }
    }

    #[test]
    fn a_difference_is_small_and_verified() {
        let mut noise = vec![0u8; 3 << 20];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        for size in [0, 100, 100_000, noise.len()] {
            let before = &noise[..size];
            let mut after = before.to_vec();
            after.splice(size / 2..size / 2, *b"a line more");
            let object = EncodedObject::encode_delta(content_hash(before), before, &after).unwrap();
            assert!(object.data.len() < 1000, "{size}: {} bytes", object.data.len());
            let hash = content_hash(&after);
            let read = |base: Option<&[u8]>| {
                decode_with(hash, Encoding::Delta, &object.data, |name| {
                    assert_eq!(name, content_hash(before));
                    Ok(base.map(<[u8]>::to_vec))
                })
            };
            assert_eq!(read(Some(before)).unwrap(), after);
            assert!(read(None).unwrap_err().to_string().contains("is not here"));
            if size > 0 {
                // What it refers to was changed meanwhile, or is shorter.
                let mut other = before.to_vec();
                other[0] ^= 1;
                assert!(matches!(read(Some(&other)), Err(DepotError::ObjectDamaged { .. })));
                assert!(matches!(read(Some(&before[1..])), Err(DepotError::ObjectDamaged { .. })));
            }
        }
        for short in [&b""[..], b"x", &[7; 31], &[7; 32]] {
            let error = decode_with(content_hash(b""), Encoding::Delta, short, |_| Ok(Some(Vec::new())));
            assert!(matches!(error, Err(DepotError::ObjectDamaged { .. })), "{short:?}: {error:?}");
        }
    }

    #[test]
    fn what_arrives_is_bounded_and_verified() {
        let bomb = zstd::bulk::compress(&vec![0u8; OBJECT_BYTES_MAX + 1], 19).unwrap();
        assert!(bomb.len() < 1000);
        let hash = content_hash(b"x");
        let refused = |encoding, data: &[u8]| decode(hash, encoding, data).unwrap_err().to_string();
        assert!(refused(Encoding::Zstd, &bomb).contains("larger than the limit"));
        assert!(refused(Encoding::Raw, &vec![0; OBJECT_BYTES_MAX + 1]).contains("larger than the limit"));
        assert!(refused(Encoding::Raw, b"y").contains("have the hash"));
        assert!(refused(Encoding::Zstd, b"no frame").contains("decompressed"));
        let whole = zstd::bulk::compress(b"x", 3).unwrap();
        assert!(refused(Encoding::Zstd, &whole[..whole.len() - 1]).contains("damaged"));
    }
}
