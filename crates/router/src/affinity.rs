//! What of a request decides where it goes, besides chance: the key that makes it sticky, and the mark of a tester.
//!
//! A key is hashed, never stored and never logged. The hash is the same on every core, in every router and after a restart,
//! so that several routers send one user to the same place.

use hyper::header::{self, HeaderMap, HeaderName};
use serde::{Deserialize, Serialize};

/// Longest name of a cookie or header, in bytes: it is looked for in every request.
pub const MAX_KEY_NAME_BYTES: usize = 64;
/// Longest value that marks a tester, in bytes.
pub const MAX_TESTER_VALUE_BYTES: usize = 128;

/// Which part of a request is looked at: `{"cookie":"NAME"}` or `{"header":"NAME"}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RequestKey {
    /// The value of a cookie. Names of cookies are compared as they are.
    Cookie(String),
    /// The value of a header line; of several lines of this name, the first.
    Header(String),
}

/// Which requests are a tester's. It is a mark, not a secret: whoever knows it sees the candidate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TesterSpec {
    /// Where the mark stands.
    pub by: RequestKey,
    /// What it must be, exactly.
    pub value: String,
}

impl RequestKey {
    /// Whether the name can be one. The text says what is wrong.
    pub(crate) fn validate(&self) -> Result<(), String> {
        let (Self::Cookie(name) | Self::Header(name)) = self;
        // Cookies have the same alphabet as header names: tokens of RFC 9110.
        if name.len() > MAX_KEY_NAME_BYTES || HeaderName::from_bytes(name.as_bytes()).is_err() {
            return Err(format!(
                "{name:?} cannot be the name of a cookie or header: up to {MAX_KEY_NAME_BYTES} letters, digits and \
                 !#$%&'*+-.^_`|~"
            ));
        }
        Ok(())
    }
}

impl TesterSpec {
    /// Whether name and value can occur. The text says what is wrong.
    pub(crate) fn validate(&self) -> Result<(), String> {
        self.by.validate()?;
        let value = self.value.as_bytes();
        // What a cookie's value may hold (RFC 6265), which is less than a header's.
        let is_fit = |byte: &u8| byte.is_ascii_graphic() && !matches!(byte, b'"' | b',' | b';' | b'\\');
        if value.is_empty() || value.len() > MAX_TESTER_VALUE_BYTES || !value.iter().all(is_fit) {
            return Err(format!(
                "the mark of a tester is 1 to {MAX_TESTER_VALUE_BYTES} printable characters without blanks, quotes, commas, \
                 semicolons and backslashes"
            ));
        }
        Ok(())
    }
}

/// What a request says about its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Wish {
    /// The hash of its key, when there is one.
    pub(crate) key: Option<u64>,
    pub(crate) is_tester: bool,
}

/// Reads wishes from requests.
#[derive(Debug, Default)]
pub(crate) struct Affinity {
    sticky: Option<Place>,
    tester: Option<(Place, Box<[u8]>)>,
}

#[derive(Debug)]
enum Place {
    Cookie(Box<[u8]>),
    Header(HeaderName),
}

impl Affinity {
    /// From settings that were validated; a name that is none is never found.
    pub(crate) fn new(sticky: Option<&RequestKey>, tester: Option<&TesterSpec>) -> Self {
        Self {
            sticky: sticky.and_then(Place::of),
            tester: tester.and_then(|tester| Some((Place::of(&tester.by)?, tester.value.as_bytes().into()))),
        }
    }

    pub(crate) fn wish(&self, headers: &HeaderMap) -> Wish {
        Wish {
            key: self.sticky.as_ref().and_then(|place| place.find(headers)).map(hash),
            is_tester: self.tester.as_ref().is_some_and(|(place, value)| place.find(headers) == Some(value)),
        }
    }
}

impl Place {
    fn of(key: &RequestKey) -> Option<Self> {
        match key {
            RequestKey::Cookie(name) => Some(Self::Cookie(name.as_bytes().into())),
            RequestKey::Header(name) => HeaderName::from_bytes(name.as_bytes()).ok().map(Self::Header),
        }
    }

    /// The value; an empty one is none, or every user without a session would be one user.
    fn find<'a>(&self, headers: &'a HeaderMap) -> Option<&'a [u8]> {
        let value = match self {
            Self::Header(name) => headers.get(name).map(|value| value.as_bytes().trim_ascii()),
            Self::Cookie(name) => headers
                .get_all(header::COOKIE)
                .into_iter()
                .flat_map(|line| line.as_bytes().split(|&byte| byte == b';'))
                .find_map(|pair| pair.trim_ascii().strip_prefix(&**name)?.strip_prefix(b"=")),
        };
        value.filter(|value| !value.is_empty())
    }
}

/// FNV-1a, mixed: the same everywhere. Whoever chooses keys on purpose only chooses his own place.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    let sum = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    mix(sum)
}

/// The finishing steps of splitmix64: every bit of the value depends on every bit of the input.
pub(crate) fn mix(value: u64) -> u64 {
    let mixed = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect()
    }

    #[test]
    fn keys_are_found_where_they_stand() {
        let affinity = Affinity::new(
            Some(&RequestKey::Cookie("sid".to_owned())),
            Some(&TesterSpec { by: RequestKey::Header("X-Preview".to_owned()), value: "v2".to_owned() }),
        );
        let key = Some(hash(b"abc"));
        let cases: [(&[(&'static str, &str)], Wish); 8] = [
            (&[("cookie", "sid=abc")], Wish { key, is_tester: false }),
            (&[("cookie", "a=1; sid=abc; b=2")], Wish { key, is_tester: false }),
            (&[("cookie", "a=1"), ("cookie", "sid=abc")], Wish { key, is_tester: false }),
            (&[("cookie", "xsid=abc; sid2=abc; SID=abc")], Wish::default()),
            (&[("cookie", "sid=")], Wish::default()),
            (&[("cookie", "sid=abc"), ("x-preview", "v2")], Wish { key, is_tester: true }),
            (&[("x-preview", "v22")], Wish::default()),
            (&[], Wish::default()),
        ];
        for (lines, expected) in cases {
            assert_eq!(affinity.wish(&headers(lines)), expected, "{lines:?}");
        }
    }

    #[test]
    fn hashes_are_what_they_were() {
        // FNV-1a of "a" is af63dc4c8601ec8c, from its authors' table; a changed hash moves every user.
        assert_eq!(hash(b"a"), mix(0xaf63_dc4c_8601_ec8c));
        // The first value of splitmix64 with seed 0, from its authors' text.
        assert_eq!(mix(0x9e37_79b9_7f4a_7c15), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn names_and_marks_that_cannot_occur_are_refused() {
        let named = |name: &str| RequestKey::Cookie(name.to_owned());
        assert!(named("sid").validate().is_ok());
        let long = "x".repeat(MAX_KEY_NAME_BYTES + 1);
        for bad in ["", "a b", "a=b", "a;b", "a\n", long.as_str()] {
            assert!(named(bad).validate().is_err(), "{bad:?}");
        }
        for bad in ["", "a b", "a;b", "\"a\"", "a\n"] {
            let tester = TesterSpec { by: named("sid"), value: bad.to_owned() };
            assert!(tester.validate().is_err(), "{bad:?}");
        }
    }
}
