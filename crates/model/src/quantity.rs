//! Quantities as people write them: shares and sizes. Durations are `std::time::Duration`, stored in milliseconds.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is not a quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {kind}")]
pub struct InvalidQuantity {
    /// The text as given.
    pub text: String,
    /// What it was to be, with an example.
    pub kind: &'static str,
}

/// A whole share of something, 0 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Percent(u8);

impl Percent {
    /// The share, 0 to 100.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// How many of `whole` this share is, rounded up: 25 % of 3 hosts is one host.
    #[must_use]
    pub fn of_rounded_up(self, whole: usize) -> usize {
        (whole * usize::from(self.0)).div_ceil(100)
    }
}

impl TryFrom<u8> for Percent {
    type Error = InvalidQuantity;
    fn try_from(value: u8) -> Result<Self, InvalidQuantity> {
        if value <= 100 {
            Ok(Self(value))
        } else {
            Err(InvalidQuantity { text: value.to_string(), kind: "a share between 0% and 100%" })
        }
    }
}

impl From<Percent> for u8 {
    fn from(percent: Percent) -> u8 {
        percent.0
    }
}

impl FromStr for Percent {
    type Err = InvalidQuantity;
    fn from_str(text: &str) -> Result<Self, InvalidQuantity> {
        let invalid = || InvalidQuantity { text: text.to_owned(), kind: "a share such as 25%" };
        let digits = text.strip_suffix('%').ok_or_else(invalid)?;
        digits.trim_end().parse::<u8>().map_err(|_| invalid()).and_then(Self::try_from)
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

/// A size in bytes. Written with binary (`2GiB`) or decimal (`2GB`) units.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

const BYTE_UNITS: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

impl FromStr for ByteSize {
    type Err = InvalidQuantity;
    fn from_str(text: &str) -> Result<Self, InvalidQuantity> {
        let invalid = || InvalidQuantity { text: text.to_owned(), kind: "a size such as 2GiB or 500MB" };
        let (number, unit) = BYTE_UNITS
            .iter()
            .find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit)))
            .ok_or_else(invalid)?;
        let number = number.trim_end().parse::<u64>().map_err(|_| invalid())?;
        number.checked_mul(unit).map(Self).ok_or_else(invalid)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = &BYTE_UNITS[..4];
        match units.iter().rev().find(|(_, unit)| self.0 >= *unit) {
            // One decimal is enough for people; the exact number is in the JSON.
            Some((suffix, unit)) => write!(f, "{}.{} {suffix}", self.0 / unit, (self.0 % unit) * 10 / unit),
            None => write!(f, "{} B", self.0),
        }
    }
}

/// Durations in stored and wire types: whole milliseconds, as a number. Use with `#[serde(with = "duration_ms")]`.
pub mod duration_ms {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// Writes whole milliseconds.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).serialize(serializer)
    }

    /// Reads whole milliseconds.
    ///
    /// # Errors
    /// When it is not a whole number.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_millis)
    }
}

/// As [`duration_ms`], for one that may be absent. Use with `#[serde(default, with = "optional_duration_ms")]`.
pub mod optional_duration_ms {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// Writes whole milliseconds, or nothing.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        duration.map(|duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)).serialize(serializer)
    }

    /// Reads whole milliseconds, or nothing.
    ///
    /// # Errors
    /// When it is something else.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(deserializer)?.map(Duration::from_millis))
    }
}

/// A duration as people read it: `450ms`, `2.5s`, `3m 10s`, `2h 5m`, `3d 4h`.
#[must_use]
pub fn human_duration(duration: std::time::Duration) -> String {
    let ms = duration.as_millis();
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{ms}ms"),
        1..=59 => format!("{}.{}s", seconds, (ms % 1000) / 100),
        60..=3599 => format!("{}m {}s", seconds / 60, seconds % 60),
        3600..=86_399 => format!("{}h {}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d {}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// Reads a duration as people write it: `500ms`, `30s`, `10m`, `2h`, `3d`.
///
/// # Errors
/// When the text is not a whole number followed by one of those units.
pub fn parse_duration(text: &str) -> Result<std::time::Duration, InvalidQuantity> {
    let invalid =
        || InvalidQuantity { text: text.to_owned(), kind: "a duration such as 500ms, 30s, 10m, 2h or 3d" };
    let (number, unit_ms) = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)]
        .iter()
        .find_map(|(suffix, unit_ms)| Some((text.strip_suffix(suffix)?.parse::<u64>().ok()?, *unit_ms)))
        .ok_or_else(invalid)?;
    number.checked_mul(unit_ms).map(std::time::Duration::from_millis).ok_or_else(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn quantities_are_read_and_shown() {
        assert_eq!("2GiB".parse::<ByteSize>().unwrap(), ByteSize(2 << 30));
        assert_eq!("500MB".parse::<ByteSize>().unwrap(), ByteSize(500_000_000));
        assert_eq!(ByteSize(1_610_612_736).to_string(), "1.5 GiB");
        assert_eq!("25%".parse::<Percent>().unwrap().of_rounded_up(3), 1);
        for bad in ["2", "GiB", "-1B", "999999999999TiB"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
        for bad in ["101%", "25", "%", "-5%"] {
            assert!(bad.parse::<Percent>().is_err(), "{bad}");
        }
        for (text, seconds) in [("30s", 30), ("10m", 600), ("3d", 259_200)] {
            assert_eq!(parse_duration(text).unwrap(), Duration::from_secs(seconds));
        }
        for bad in ["5", "s", "1.5s", "1w", "99999999999999999d"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
        assert_eq!(human_duration(Duration::from_millis(2_540)), "2.5s");
    }
}
