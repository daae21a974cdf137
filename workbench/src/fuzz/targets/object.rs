//! An object as it arrives: never more bytes than one may have, and only those that its hash names.
//!
//! The first byte of the input says how the rest is encoded; the hash is that of a known text.

use greenlight_depot::{Encoding, OBJECT_BYTES_MAX, content_hash, decode_with};

use super::{Target, demand};

pub(super) const TARGET: Target = Target {
    name: "object",
    about: "the bytes of a file on their way to a host",
    words: &["hello", "\x28\u{b5}\x2f"],
    make: None,
    mend: None,
    feed,
    // What one object may have, while the buffer for it grows, and zstd's window.
    bytes_fixed: 4 * OBJECT_BYTES_MAX as u64 + (16 << 20),
    bytes_per_byte: 4,
};

const KNOWN: &[u8] = b"hello\n";

fn feed(input: &[u8]) -> Result<bool, String> {
    let Some((first, data)) = input.split_first() else { return Ok(false) };
    let encoding = match first % 3 {
        0 => Encoding::Raw,
        1 => Encoding::Zstd,
        _ => Encoding::Delta,
    };
    let hash = content_hash(KNOWN);
    // Whatever a difference refers to, this is what is there.
    match decode_with(hash, encoding, data, |_| Ok(Some(KNOWN.to_vec()))) {
        Ok(bytes) => demand(bytes == KNOWN, || format!("{bytes:?} passed for {KNOWN:?}")).map(|()| true),
        Err(error) => {
            demand(!error.to_string().is_empty(), || "refused without a word".to_owned()).map(|()| false)
        }
    }
}
