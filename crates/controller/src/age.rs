//! Reads files that `age` encrypted to X25519 recipients: what `age-keygen` and `age -r age1…` make.
//!
//! It only reads, and only that: no passphrases, ssh keys, plugins or post-quantum recipients. The `age` crate does all
//! of them, with more packages than fit into our limit for a build; the tests hold this reader against it. Every
//! primitive comes from a crate of its own; here are the format and its checks.
//! No byte of content is given back before its chunk is authenticated and the end of the file was seen.
//!
//! Source of the format: <https://c2sp.org/age@v1.0.0>.

use base64ct::{Base64, Base64Unpadded, Encoding};
use bech32::primitives::decode::CheckedHrpstring;
use chacha20poly1305::aead::{Aead, KeyInit};
use chacha20poly1305::{ChaCha20Poly1305, Key, Nonce};
use ed25519_compact::x25519::{PublicKey, SecretKey};
use hkdf::Hkdf;
use hmac::{Hmac, Mac};
use sha2::Sha256;

const FIRST_LINE: &str = "age-encryption.org/v1";
const ARMOR_BEGIN: &str = "-----BEGIN AGE ENCRYPTED FILE-----";
const ARMOR_END: &str = "-----END AGE ENCRYPTED FILE-----";
/// Columns of a line in an armoured file and in the body of a stanza.
const LINE_COLUMNS: usize = 64;
const FILE_KEY_BYTES: usize = 16;
const PAYLOAD_NONCE_BYTES: usize = 16;
const CHUNK_BYTES: usize = 64 << 10;
const TAG_BYTES: usize = 16;
/// Most recipients that a file may name.
const STANZAS_MAX: usize = 1000;

/// Why a file was not opened. Nothing of a key or of the content is in here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AgeError {
    /// The identity file has no key, or a line that is none.
    #[error("line {line} of the identity file is not an age key (AGE-SECRET-KEY-1…); `age-keygen` makes one")]
    NotAnIdentity {
        /// Counted from one.
        line: usize,
    },
    /// The identity file is empty or all comments.
    #[error("the identity file has no key; `age-keygen` makes one")]
    NoIdentity,
    /// It does not begin as an age file does.
    #[error("it is not an age file")]
    NotAge,
    /// It begins as one and goes on otherwise.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    /// None of the identities is among its recipients.
    #[error("none of its recipients ({recipients}) has a key in the identity file")]
    NoMatch {
        /// The kinds of recipients that the file names.
        recipients: String,
    },
}

/// A key that opens files.
pub(crate) struct Identity(SecretKey);

/// The keys of an identity file: one a line, empty lines and `#` comments between them.
pub(crate) fn identities(text: &str) -> Result<Vec<Identity>, AgeError> {
    let mut keys = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        keys.push(identity(line).ok_or(AgeError::NotAnIdentity { line: index + 1 })?);
    }
    if keys.is_empty() { Err(AgeError::NoIdentity) } else { Ok(keys) }
}

fn identity(line: &str) -> Option<Identity> {
    let decoded = CheckedHrpstring::new::<bech32::Bech32>(line).ok()?;
    if !decoded.hrp().as_str().eq_ignore_ascii_case("age-secret-key-") {
        return None;
    }
    let bytes: Vec<u8> = decoded.byte_iter().collect();
    SecretKey::from_slice(&bytes).ok().map(Identity)
}

/// The content of an encrypted file, armoured or not.
pub(crate) fn decrypt(file: &[u8], identities: &[Identity]) -> Result<Vec<u8>, AgeError> {
    let unarmored;
    let file = match std::str::from_utf8(file) {
        Ok(text) if text.trim_start().starts_with(ARMOR_BEGIN) => {
            unarmored = unarmor(text.trim())?;
            unarmored.as_slice()
        }
        _ => file,
    };
    let (header, payload) = Header::read(file)?;
    let file_key = header.file_key(identities)?;
    header.check(&file_key)?;
    open(&file_key, payload)
}

/// What stands before the payload.
struct Header<'a> {
    stanzas: Vec<Stanza<'a>>,
    /// From the first byte to the three dashes.
    authenticated: &'a [u8],
    tag: Vec<u8>,
}

struct Stanza<'a> {
    kind: &'a str,
    arguments: Vec<&'a str>,
    body: Vec<u8>,
}

impl<'a> Header<'a> {
    /// The header, and the payload behind it.
    fn read(file: &'a [u8]) -> Result<(Self, &'a [u8]), AgeError> {
        let mut rest = file;
        if line(&mut rest) != Some(FIRST_LINE) {
            return Err(AgeError::NotAge);
        }
        let mut stanzas = Vec::new();
        loop {
            let before = file.len() - rest.len();
            let start = line(&mut rest).ok_or(AgeError::Damaged("its header has no end"))?;
            if let Some(tag) = start.strip_prefix("--- ") {
                let tag = Base64Unpadded::decode_vec(tag)
                    .map_err(|_| AgeError::Damaged("its header's seal is not base64"))?;
                // "---" is sealed too, the space behind it is not.
                let authenticated =
                    file.get(..before + 3).ok_or(AgeError::Damaged("its header has no end"))?;
                return Ok((Self { stanzas, authenticated, tag }, rest));
            }
            if stanzas.len() == STANZAS_MAX {
                return Err(AgeError::Damaged("it names more than 1000 recipients"));
            }
            stanzas.push(Stanza::read(start, &mut rest)?);
        }
    }

    /// The key of the file, from the first recipient that one of the identities is.
    fn file_key(&self, identities: &[Identity]) -> Result<Vec<u8>, AgeError> {
        for stanza in self.stanzas.iter().filter(|stanza| stanza.kind == "X25519") {
            let share = match &stanza.arguments[..] {
                [share] if stanza.body.len() == FILE_KEY_BYTES + TAG_BYTES => share,
                _ => return Err(AgeError::Damaged("a recipient is not as X25519 recipients are")),
            };
            let share = Base64Unpadded::decode_vec(share)
                .ok()
                .and_then(|share| PublicKey::from_slice(&share).ok())
                .ok_or(AgeError::Damaged("a recipient's share is not a key"))?;
            for identity in identities {
                if let Some(key) = unwrap_key(&share, &stanza.body, identity)? {
                    return Ok(key);
                }
            }
        }
        let mut kinds: Vec<&str> = self.stanzas.iter().map(|stanza| stanza.kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        Err(AgeError::NoMatch { recipients: kinds.join(", ") })
    }

    fn check(&self, file_key: &[u8]) -> Result<(), AgeError> {
        let key = derive(&[], file_key, b"header");
        let changed = AgeError::Damaged("its header was changed after it was encrypted");
        let mut mac = <Hmac<Sha256> as Mac>::new_from_slice(&key).map_err(|_| changed.clone())?;
        mac.update(self.authenticated);
        mac.verify_slice(&self.tag).map_err(|_| changed)
    }
}

impl<'a> Stanza<'a> {
    /// One recipient: `-> KIND ARGUMENT…`, then base64 in full lines and one that is shorter, perhaps empty.
    fn read(start: &'a str, rest: &mut &'a [u8]) -> Result<Self, AgeError> {
        let damaged = AgeError::Damaged("a line of its header is not as in an age file");
        let mut words = start.strip_prefix("-> ").ok_or(damaged.clone())?.split(' ');
        let kind = words.next().filter(|kind| !kind.is_empty()).ok_or(damaged.clone())?;
        let mut text = String::new();
        loop {
            let part = line(rest).ok_or(damaged.clone())?;
            text.push_str(part);
            match part.len() {
                LINE_COLUMNS => {}
                0..LINE_COLUMNS => break,
                _ => return Err(damaged),
            }
        }
        let body = Base64Unpadded::decode_vec(&text).map_err(|_| damaged)?;
        Ok(Self { kind, arguments: words.collect(), body })
    }
}

/// The next line of printable ASCII, without its end; `None` where there is none.
fn line<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    let end = rest.iter().position(|byte| *byte == b'\n')?;
    let (line, after) = rest.split_at(end);
    *rest = after.get(1..)?;
    let printable = line.iter().all(|byte| (b' '..=b'~').contains(byte));
    std::str::from_utf8(line).ok().filter(|_| printable)
}

/// The file key out of one recipient's body, when this identity is the recipient.
fn unwrap_key(share: &PublicKey, body: &[u8], identity: &Identity) -> Result<Option<Vec<u8>>, AgeError> {
    let weak = AgeError::Damaged("a recipient's share is a weak key");
    let shared = share.dh(&identity.0).map_err(|_| weak.clone())?;
    let own = identity.0.recover_public_key().map_err(|_| weak)?;
    let salt = [&share[..], &own[..]].concat();
    let key = derive(&salt, &shared[..], b"age-encryption.org/v1/X25519");
    Ok(ChaCha20Poly1305::new(Key::from_slice(&key)).decrypt(Nonce::from_slice(&[0; 12]), body).ok())
}

fn derive(salt: &[u8], secret: &[u8], purpose: &[u8]) -> [u8; 32] {
    let mut key = [0; 32];
    #[expect(clippy::expect_used, reason = "HKDF-SHA-256 gives up to 8,160 bytes")]
    Hkdf::<Sha256>::new(Some(salt), secret).expand(purpose, &mut key).expect("32 bytes are few enough");
    key
}

/// The content: chunks of 64 KiB, each sealed with its number and with whether it is the last.
fn open(file_key: &[u8], payload: &[u8]) -> Result<Vec<u8>, AgeError> {
    let (nonce, mut sealed) =
        payload.split_at_checked(PAYLOAD_NONCE_BYTES).ok_or(AgeError::Damaged("its content is missing"))?;
    let cipher = ChaCha20Poly1305::new(Key::from_slice(&derive(nonce, file_key, b"payload")));
    let mut content = Vec::with_capacity(sealed.len());
    let mut number = 0_u64;
    loop {
        let (chunk, rest) = sealed.split_at(sealed.len().min(CHUNK_BYTES + TAG_BYTES));
        let last = rest.is_empty();
        let mut nonce = [0; 12];
        nonce[3..11].copy_from_slice(&number.to_be_bytes());
        nonce[11] = u8::from(last);
        let opened = cipher
            .decrypt(Nonce::from_slice(&nonce), chunk)
            .map_err(|_| AgeError::Damaged("its content was cut short or changed"))?;
        // Only an empty file ends with an empty chunk.
        if last && opened.is_empty() && number > 0 {
            return Err(AgeError::Damaged("its content ends with an empty part"));
        }
        content.extend_from_slice(&opened);
        if last {
            return Ok(content);
        }
        sealed = rest;
        number += 1;
    }
}

/// The bytes of an armoured file.
fn unarmor(text: &str) -> Result<Vec<u8>, AgeError> {
    let damaged = AgeError::Damaged("its armour is not as in an age file");
    let mut lines = text.lines();
    let mut base64 = String::with_capacity(text.len());
    if lines.next() != Some(ARMOR_BEGIN) {
        return Err(damaged);
    }
    let mut short = false;
    for line in lines.by_ref() {
        if line == ARMOR_END {
            return match lines.next() {
                None => Base64::decode_vec(&base64).map_err(|_| damaged),
                Some(_) => Err(damaged),
            };
        }
        // Every line but the last is full.
        if short || line.is_empty() || line.len() > LINE_COLUMNS {
            return Err(damaged);
        }
        short = line.len() < LINE_COLUMNS;
        base64.push_str(line);
    }
    Err(damaged)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use age::secrecy::ExposeSecret;

    use super::*;

    fn ours(of: &age::x25519::Identity) -> Vec<Identity> {
        identities(of.to_string().expose_secret()).unwrap()
    }

    fn sealed(content: &[u8], to: &[&age::x25519::Identity], armored: bool) -> Vec<u8> {
        let recipients: Vec<_> = to.iter().map(|identity| identity.to_public()).collect();
        let encryptor =
            age::Encryptor::with_recipients(recipients.iter().map(|one| one as &dyn age::Recipient)).unwrap();
        let mut file = Vec::new();
        let format = if armored { age::armor::Format::AsciiArmor } else { age::armor::Format::Binary };
        let armor = age::armor::ArmoredWriter::wrap_output(&mut file, format).unwrap();
        let mut writer = encryptor.wrap_output(armor).unwrap();
        writer.write_all(content).unwrap();
        writer.finish().and_then(|armor| armor.finish()).unwrap();
        file
    }

    #[test]
    fn what_age_writes_is_read_in_every_length() {
        let key = age::x25519::Identity::generate();
        for length in [0, 1, 47, 48, 49, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES] {
            let content: Vec<u8> = (0..length).map(|index| (index % 251) as u8).collect();
            for armored in [false, true] {
                let file = sealed(&content, &[&key], armored);
                assert_eq!(decrypt(&file, &ours(&key)), Ok(content.clone()), "{length} bytes");
            }
        }
    }

    #[test]
    fn any_of_its_recipients_opens_it_and_nobody_else() {
        let [one, two, other] = std::array::from_fn(|_| age::x25519::Identity::generate());
        let file = sealed(b"A=1", &[&one, &two], false);
        for key in [&one, &two] {
            let both = [ours(&other), ours(key)].into_iter().flatten().collect::<Vec<_>>();
            assert_eq!(decrypt(&file, &both), Ok(b"A=1".to_vec()));
        }
        let refused = decrypt(&file, &ours(&other)).unwrap_err();
        assert!(
            matches!(&refused, AgeError::NoMatch { recipients } if recipients.contains("X25519")),
            "{refused}"
        );
    }

    #[test]
    fn no_changed_or_missing_byte_is_taken() {
        let key = age::x25519::Identity::generate();
        let file = sealed(&[7; CHUNK_BYTES + 3], &[&key], false);
        let step = |at: usize| if at < 400 { 1 } else { 997 };
        let mut at = 0;
        while at < file.len() {
            let mut changed = file.clone();
            changed[at] ^= 1;
            assert!(decrypt(&changed, &ours(&key)).is_err(), "byte {at} changed");
            assert!(decrypt(&file[..at], &ours(&key)).is_err(), "cut at {at}");
            at += step(at);
        }
        // Whole chunks cut off the end, which leaves every other seal intact.
        let chunk = file.len() - (3 + TAG_BYTES);
        assert!(decrypt(&file[..chunk], &ours(&key)).is_err());
    }

    #[test]
    fn a_changed_line_of_armour_is_refused() {
        let key = age::x25519::Identity::generate();
        let file = String::from_utf8(sealed(b"A=1\nB=2\n", &[&key], true)).unwrap();
        assert!(decrypt(format!("\n{file}\n\n").as_bytes(), &ours(&key)).is_ok(), "blank lines around it");
        let broken = [
            file.replace(ARMOR_END, ""),
            format!("{file}more"),
            file.replacen('\n', "\n\n", 2),
            file.replace(ARMOR_END, &format!("====\n{ARMOR_END}")),
        ];
        for text in broken {
            assert!(decrypt(text.as_bytes(), &ours(&key)).is_err(), "{text}");
        }
    }

    #[test]
    fn an_identity_file_says_which_line_is_none() {
        let key = age::x25519::Identity::generate();
        let text = format!("# created\n\n{}\n", key.to_string().expose_secret());
        assert_eq!(identities(&text).unwrap().len(), 1);
        let wrong = |text: &str| identities(text).err();
        assert_eq!(wrong("# nothing\n"), Some(AgeError::NoIdentity));
        assert_eq!(wrong(&key.to_public().to_string()), Some(AgeError::NotAnIdentity { line: 1 }));
        let cut = &text[..text.len() - 2];
        assert_eq!(wrong(cut), Some(AgeError::NotAnIdentity { line: 3 }));
    }

    #[test]
    fn what_is_not_age_is_said_to_be_none() {
        let key = ours(&age::x25519::Identity::generate());
        assert_eq!(decrypt(b"DATABASE_URL=plain\n", &key), Err(AgeError::NotAge));
        assert_eq!(decrypt(b"", &key), Err(AgeError::NotAge));
        assert_eq!(
            decrypt(b"age-encryption.org/v1\n", &key),
            Err(AgeError::Damaged("its header has no end"))
        );
    }
}
