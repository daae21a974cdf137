//! PostgreSQL's protocol 3.0 as far as a login goes: the start-up message, the password in the way that the server asks for (SCRAM-SHA-256
//! of RFC 5802 and 7677, MD5, plain), and the end. No query is sent.

use base64ct::{Base64, Encoding as _};
use greenlight_model::requirements::ServiceUrl;
use hmac::{Hmac, Mac as _};
use md5::Md5;
use sha2::{Digest as _, Sha256};

use super::{Connection, said};

/// Protocol 3.0.
const VERSION: u32 = 196_608;
/// Longest message that is taken; errors and greetings are far shorter.
const MESSAGE_BYTES_MAX: u32 = 64 * 1024;
/// A server asks for 4096 rounds; one that asks for more than this only wants to keep us busy.
const ROUNDS_MAX: u32 = 1_000_000;

pub(super) fn log_in(mut on: Connection, url: &ServiceUrl) -> Result<String, String> {
    let user = url.user.as_deref().ok_or("the address names no user to log in as")?;
    let database = url.path.as_deref().filter(|path| !path.is_empty()).unwrap_or(user);
    let mut parameters = Vec::new();
    for text in ["user", user, "database", database, "application_name", "greenlight preflight", ""] {
        if text.contains('\0') {
            return Err("a name in the address holds a zero byte".to_owned());
        }
        parameters.extend(text.bytes());
        parameters.push(0);
    }
    let mut start = Vec::from(VERSION.to_be_bytes());
    start.extend(parameters);
    on.send(&counted(&start)?)?;
    let password = || url.password.as_deref().ok_or("it asks for a password, and the fleet file names none");
    let mut scram: Option<Scram> = None;
    loop {
        let (kind, body) = message(&mut on)?;
        match (kind, body.as_slice()) {
            (b'E', fields) => return Err(format!("it refuses: {}", refusal(fields))),
            // Ready for a query: logged in.
            (b'Z', _) => break,
            (b'R', [0, 0, 0, 0, ..]) => {}
            (b'R', [0, 0, 0, 3, ..]) => answer(&mut on, &terminated(password()?))?,
            (b'R', [0, 0, 0, 5, salt @ ..]) => {
                let inner = hexadecimal(&Md5::new().chain_update(password()?).chain_update(user).finalize());
                let outer = hexadecimal(&Md5::new().chain_update(inner).chain_update(salt).finalize());
                answer(&mut on, &terminated(&format!("md5{outer}")))?;
            }
            (b'R', [0, 0, 0, 10, mechanisms @ ..]) => {
                if !mechanisms.split(|byte| *byte == 0).any(|name| name == b"SCRAM-SHA-256") {
                    return Err("it asks for a way to log in that this check does not know".to_owned());
                }
                let begun = Scram::begin()?;
                let mut first = terminated("SCRAM-SHA-256");
                let text = format!("n,,{}", begun.first);
                let length = u32::try_from(text.len()).map_err(|_| "a message is too long".to_owned())?;
                first.extend(length.to_be_bytes());
                first.extend(text.bytes());
                answer(&mut on, &first)?;
                scram = Some(begun);
            }
            (b'R', [0, 0, 0, 11, challenge @ ..]) => {
                let begun = scram.as_mut().ok_or("it goes on with a login that was not begun")?;
                let text = begun.prove(challenge, password()?)?;
                answer(&mut on, text.as_bytes())?;
            }
            (b'R', [0, 0, 0, 12, signature @ ..]) => {
                let begun = scram.as_ref().ok_or("it ends a login that was not begun")?;
                begun.verify(signature)?;
            }
            (b'R', _) => return Err("it asks for a way to log in that this check does not know".to_owned()),
            // Parameters, the key for cancelling, notices.
            (b'S' | b'K' | b'N', _) => {}
            _ => return Err("it does not speak PostgreSQL's protocol".to_owned()),
        }
    }
    on.send(&[b'X', 0, 0, 0, 4])?;
    Ok("it does".to_owned())
}

fn message(on: &mut Connection) -> Result<(u8, Vec<u8>), String> {
    let kind = on.read(1)?[0];
    let length = on.read_u32()?;
    if !(4..=MESSAGE_BYTES_MAX).contains(&length) {
        return Err("it does not speak PostgreSQL's protocol".to_owned());
    }
    let body = on.read(usize::try_from(length - 4).map_err(|_| "its message is too long".to_owned())?)?;
    Ok((kind, body))
}

fn answer(on: &mut Connection, content: &[u8]) -> Result<(), String> {
    let mut bytes = vec![b'p'];
    bytes.extend(counted(content)?);
    on.send(&bytes)
}

/// With its length in front, which counts itself.
fn counted(content: &[u8]) -> Result<Vec<u8>, String> {
    let length = u32::try_from(content.len() + 4).map_err(|_| "a message is too long".to_owned())?;
    let mut bytes = Vec::from(length.to_be_bytes());
    bytes.extend(content);
    Ok(bytes)
}

fn terminated(text: &str) -> Vec<u8> {
    text.bytes().chain([0]).collect()
}

/// Of the fields of an error, its message.
fn refusal(fields: &[u8]) -> String {
    let message = fields.split(|byte| *byte == 0).find_map(|field| field.strip_prefix(b"M"));
    message.map_or("it does not say why".to_owned(), said)
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A login by SCRAM-SHA-256, without channel binding.
struct Scram {
    first: String,
    nonce: String,
    /// What the server must sign to show that it knows the password too.
    expected: Option<Vec<u8>>,
}

impl Scram {
    fn begin() -> Result<Self, String> {
        let mut random = [0_u8; 18];
        let mut filled = 0;
        while filled < random.len() {
            match rustix::rand::getrandom(&mut random[filled..], rustix::rand::GetRandomFlags::empty()) {
                Ok(more) => filled += more,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(format!("the kernel gives no random bytes: {error}")),
            }
        }
        let nonce = Base64::encode_string(&random);
        // The user is the one of the start-up message.
        Ok(Self { first: format!("n=,r={nonce}"), nonce, expected: None })
    }

    fn prove(&mut self, challenge: &[u8], password: &str) -> Result<String, String> {
        let challenge = std::str::from_utf8(challenge).map_err(|_| "its challenge is no text".to_owned())?;
        let part = |key: &str| challenge.split(',').find_map(|part| part.strip_prefix(key));
        let (Some(nonce), Some(salt), Some(rounds)) = (part("r="), part("s="), part("i=")) else {
            return Err("its challenge lacks something".to_owned());
        };
        if !nonce.starts_with(&self.nonce) {
            return Err("its challenge answers somebody else".to_owned());
        }
        let salt = Base64::decode_vec(salt).map_err(|_| "its salt is no Base64".to_owned())?;
        let rounds = rounds
            .parse()
            .ok()
            .filter(|rounds| (1..=ROUNDS_MAX).contains(rounds))
            .ok_or("it asks for a number of rounds that is none, or absurd")?;
        let salted = salted(password.as_bytes(), &salt, rounds);
        let client_key = signed(&salted, b"Client Key");
        let bare = format!("c=biws,r={nonce}");
        let exchange = format!("{},{challenge},{bare}", self.first);
        let signature = signed(&Sha256::digest(&client_key), exchange.as_bytes());
        let proof: Vec<u8> = client_key.iter().zip(signature).map(|(key, mask)| key ^ mask).collect();
        self.expected = Some(signed(&signed(&salted, b"Server Key"), exchange.as_bytes()));
        Ok(format!("{bare},p={}", Base64::encode_string(&proof)))
    }

    fn verify(&self, signature: &[u8]) -> Result<(), String> {
        let given = std::str::from_utf8(signature)
            .ok()
            .and_then(|text| text.split(',').find_map(|part| part.strip_prefix("v=")))
            .and_then(|text| Base64::decode_vec(text).ok());
        match (given, &self.expected) {
            (Some(given), Some(expected)) if given == *expected => Ok(()),
            _ => Err("it does not prove that it knows the password: it may be another server".to_owned()),
        }
    }
}

/// PBKDF2 with HMAC-SHA-256, one block.
fn salted(password: &[u8], salt: &[u8], rounds: u32) -> Vec<u8> {
    let mut block = signed(password, &[salt, &[0, 0, 0, 1]].concat());
    let mut result = block.clone();
    for _ in 1..rounds {
        block = signed(password, &block);
        result.iter_mut().zip(&block).for_each(|(all, one)| *all ^= one);
    }
    result
}

fn signed(key: &[u8], text: &[u8]) -> Vec<u8> {
    // Padded by hand where it is longer than a block, since a key of any length will do for HMAC.
    let key = if key.len() > 64 { Sha256::digest(key).to_vec() } else { key.to_vec() };
    let mut padded = [0_u8; 64];
    padded[..key.len()].copy_from_slice(&key);
    let mut mac = Hmac::<Sha256>::new(&padded.into());
    mac.update(text);
    mac.finalize().into_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 7677.
    #[test]
    fn scram_is_as_its_standard_shows_it() {
        let mut scram = Scram {
            first: "n=user,r=rOprNGfwEbeRWgbNEkqO".to_owned(),
            nonce: "rOprNGfwEbeRWgbNEkqO".to_owned(),
            expected: None,
        };
        let challenge =
            b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
        let proven = scram.prove(challenge, "pencil").unwrap();
        assert_eq!(
            proven,
            "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
        );
        scram.verify(b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=").unwrap();
        assert!(scram.verify(b"v=7rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=").is_err());
        assert!(scram.prove(b"r=somebody,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096", "pencil").is_err());
        assert!(
            scram
                .prove(b"r=rOprNGfwEbeRWgbNEkqOx,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4294967295", "pencil")
                .is_err()
        );
    }
}
