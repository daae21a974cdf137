//! Names and identifiers. Each is a type of its own, so that a host cannot be passed where a service is meant.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Why a text is not a name or an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {kind}: {why}")]
pub struct InvalidId {
    /// What it was to be: "host name", "release id" …
    pub kind: &'static str,
    /// The text as given, cut at 80 characters.
    pub text: String,
    /// Which rule it breaks.
    pub why: String,
}

impl InvalidId {
    fn new(kind: &'static str, text: &str, why: impl Into<String>) -> Self {
        Self { kind, text: text.chars().take(80).collect(), why: why.into() }
    }
}

/// Names become file names, unit names and server names: no longer than what all of those allow.
pub const NAME_BYTES_MAX: usize = 63;
/// A host may be a whole domain name.
pub const HOST_NAME_BYTES_MAX: usize = 253;

fn check_name(kind: &'static str, text: &str, bytes_max: usize, extra: &str) -> Result<(), InvalidId> {
    let Some(first) = text.chars().next() else {
        return Err(InvalidId::new(kind, text, "it is empty"));
    };
    if text.len() > bytes_max {
        return Err(InvalidId::new(kind, text, format!("it is longer than {bytes_max} bytes")));
    }
    if !(first.is_ascii_alphanumeric() || first == '_' && extra.contains('_')) {
        return Err(InvalidId::new(kind, text, "it does not begin with a letter or digit"));
    }
    match text.chars().find(|c| !c.is_ascii_alphanumeric() && !extra.contains(*c)) {
        Some(bad) => Err(InvalidId::new(kind, text, format!("`{bad}` is not allowed in it"))),
        None => Ok(()),
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $kind:literal, $bytes_max:expr, $extra:literal) => {
        $(#[$doc])*
        // Worlds hold each name in many places: a clone shares the text, and is equal without looking at it.
        #[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(Arc<str>);

        impl $type {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                check_name($kind, text, $bytes_max, $extra)?;
                Ok(Self(text.into()))
            }
        }

        impl TryFrom<String> for $type {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.as_str().to_owned()
            }
        }

        impl Ord for $type {
            fn cmp(&self, other: &Self) -> Ordering {
                if Arc::ptr_eq(&self.0, &other.0) { Ordering::Equal } else { self.0.cmp(&other.0) }
            }
        }

        impl PartialOrd for $type {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

name!(
    /// A host as the fleet file names it; also what ssh is asked for unless the host states an address.
    HostName, "host name", HOST_NAME_BYTES_MAX, "._-"
);
name!(
    /// What is released: code or configuration with its processes.
    ServiceName, "service name", NAME_BYTES_MAX, "._-"
);
name!(
    /// dev, staging, production …
    EnvironmentName, "environment name", NAME_BYTES_MAX, "._-"
);
name!(
    /// One process of a service.
    ProcessName, "process name", NAME_BYTES_MAX, "._-"
);
name!(
    /// A named variation of a process: its variables and command for debugging, say.
    ProfileName, "profile name", NAME_BYTES_MAX, "._-"
);
name!(
    /// A user account on a host.
    UserName, "user name", 32, "_-."
);
name!(
    /// The environment variable under which a process reads a value or a secret.
    VariableName, "variable name", 128, "_"
);
name!(
    /// What people are to a fleet: `operator`, `database`.
    RoleName, "role", NAME_BYTES_MAX, "._-"
);
name!(
    /// A suite of tests, a tool of analysis, a command or a probe that gates ask for.
    CheckName, "name of a check", NAME_BYTES_MAX, "._-"
);
name!(
    /// Which rollout: unique over all controllers, sortable by time within an environment
    /// (`production-20261121T013000-7kx2`).
    RolloutId, "rollout id", 127, "._-"
);

macro_rules! hash {
    ($(#[$doc:meta])* $type:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type([u8; 32]);

        impl $type {
            /// Wraps a finished BLAKE3 hash.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            /// The 32 bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// The first 12 hexadecimal digits, as shown to people.
            #[must_use]
            pub fn short(&self) -> String {
                self.to_string().chars().take(12).collect()
            }
        }

        impl FromStr for $type {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let digits = text.as_bytes();
                if digits.len() != 64 {
                    return Err(InvalidId::new($kind, text, "it does not have 64 hexadecimal digits"));
                }
                let mut bytes = [0u8; 32];
                for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
                    match (hex_digit(pair[0]), hex_digit(pair[1])) {
                        (Some(high), Some(low)) => *byte = high << 4 | low,
                        _ => return Err(InvalidId::new($kind, text, "it has other than the digits 0-9 and a-f")),
                    }
                }
                Ok(Self(bytes))
            }
        }

        impl TryFrom<String> for $type {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(hash: $type) -> String {
                hash.to_string()
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut text = String::with_capacity(64);
                for byte in self.0 {
                    for digit in [byte >> 4, byte & 15] {
                        text.push(char::from(b"0123456789abcdef"[usize::from(digit)]));
                    }
                }
                f.pad(&text)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.short())
            }
        }
    };
}

hash!(
    /// Which release: the BLAKE3 hash of its manifest and of the metadata that belongs to its content.
    ReleaseId, "release id"
);
hash!(
    /// The BLAKE3 hash of some bytes: a file, or a chunk of a large one.
    ContentHash, "content hash"
);
hash!(
    /// What an approval binds to: the hash of a plan.
    PlanDigest, "plan digest"
);

fn hex_digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

/// The number that fences: a host refuses an older one, and the same one with other content.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One service on one host: what a rollout changes step by step.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Instance {
    /// The host it runs on.
    pub host: HostName,
    /// The service.
    pub service: ServiceName,
}

impl Instance {
    /// The instance of `service` on `host`.
    #[must_use]
    pub fn new(host: HostName, service: ServiceName) -> Self {
        Self { host, service }
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.service)
    }
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Instance> for String {
    fn from(instance: Instance) -> String {
        instance.to_string()
    }
}

impl TryFrom<String> for Instance {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, InvalidId> {
        let Some((host, service)) = text.split_once('/') else {
            return Err(InvalidId::new("instance", &text, "it is not written HOST/SERVICE"));
        };
        Ok(Self { host: host.parse()?, service: service.parse()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_one_way_in() {
        for good in ["web", "ol-web3", "px1.example.org", "3scale"] {
            assert_eq!(good.parse::<HostName>().unwrap().as_str(), good);
        }
        for (bad, why) in [
            ("", "empty"),
            ("-rf", "begin"),
            ("../etc", "begin"),
            ("a/b", "`/`"),
            ("a b", "` `"),
            ("a\n", "not allowed"),
            ("wéb", "`é`"),
        ] {
            let error = bad.parse::<HostName>().unwrap_err();
            assert!(error.why.contains(why), "{bad}: {error}");
        }
        assert!("a".repeat(64).parse::<ServiceName>().is_err());
        assert!("_HIDDEN".parse::<VariableName>().is_ok());
        assert!("WITH-DASH".parse::<VariableName>().is_err());
    }

    #[test]
    fn hashes_round_trip_and_refuse() {
        let text = "0123456789abcdef".repeat(4);
        let id: ReleaseId = text.parse().unwrap();
        assert_eq!(id.to_string(), text);
        assert_eq!(id.short(), "0123456789ab");
        assert!(text.to_uppercase().parse::<ReleaseId>().is_err());
        assert!(text[1..].parse::<ReleaseId>().is_err());
        assert!("é".repeat(32).parse::<ReleaseId>().is_err());
    }

    #[test]
    fn an_instance_is_a_map_key_in_json() {
        let instance = Instance::new("px1".parse().unwrap(), "web".parse().unwrap());
        let map = std::collections::BTreeMap::from([(instance, 1)]);
        let json = serde_json::to_string(&map).unwrap();
        assert_eq!(json, r#"{"px1/web":1}"#);
        assert_eq!(serde_json::from_str::<std::collections::BTreeMap<Instance, i32>>(&json).unwrap(), map);
    }
}
