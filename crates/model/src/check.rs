//! What was found by looking at a host, before anything changes or between two rollouts.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::id::{HostName, Instance, ServiceName};

/// One result of looking at an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Which check: "disk", "data", "port 8000", "runtime python", "package libpq5", "manager" …
    pub name: String,
    /// Whether the rollout may go on.
    pub outcome: CheckOutcome,
    /// What was expected.
    pub expected: String,
    /// What was found.
    pub found: String,
    /// How to mend it; empty when it passed.
    pub mend: String,
    /// What was found, where every host of the service must have the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// How a check ended. What could not be read has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckOutcome {
    /// As expected.
    Passed,
    /// Not as expected, or unreadable.
    Failed,
    /// It failed, and somebody lets the rollout go on all the same; who and why stands in its plan.
    Overridden,
}

/// Which checks somebody overrides: `disk`, `package libpq5`, `web2:local edits`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckPattern {
    /// Only this host's; every host's when absent.
    pub host: Option<HostName>,
    /// The check's name.
    pub check: String,
}

impl CheckPattern {
    /// Whether it is about this check.
    #[must_use]
    pub fn covers(&self, host: &HostName, check: &str) -> bool {
        self.check == check && self.host.as_ref().is_none_or(|only| only == host)
    }
}

impl FromStr for CheckPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (host, check) = match text.split_once(':') {
            Some((host, check)) => {
                let host = host
                    .trim()
                    .parse()
                    .map_err(|error| format!("before the colon stands a host: {error}"))?;
                (Some(host), check.trim())
            }
            None => (None, text.trim()),
        };
        if check.is_empty() || check.chars().any(char::is_control) {
            return Err("this names no check; `greenlight preflight` shows their names".to_owned());
        }
        Ok(Self { host, check: check.to_owned() })
    }
}

impl fmt::Display for CheckPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Some(host) => write!(f, "{host}:{}", self.check),
            None => f.write_str(&self.check),
        }
    }
}

impl Serialize for CheckPattern {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CheckPattern {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Something that two hosts of a service have at different versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uneven {
    /// Of which service.
    pub service: ServiceName,
    /// The check's name.
    pub check: String,
    /// Each version with the hosts that have it, the version of most hosts first.
    pub versions: Vec<(String, BTreeSet<HostName>)>,
}

impl Uneven {
    /// The hosts that do not have what most have.
    pub fn odd_ones(&self) -> impl Iterator<Item = (&HostName, &str)> {
        self.versions
            .iter()
            .skip(1)
            .flat_map(|(version, hosts)| hosts.iter().map(|host| (host, version.as_str())))
    }

    /// What most hosts have.
    #[must_use]
    pub fn usual(&self) -> &str {
        self.versions.first().map_or("", |(version, _)| version)
    }
}

impl fmt::Display for Uneven {
    /// Such as `package libpq5: 15.1 on web1, web3; 15.0 on web2`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.check)?;
        for (index, (version, hosts)) in self.versions.iter().enumerate() {
            let hosts: Vec<&str> = hosts.iter().map(HostName::as_str).collect();
            let separator = if index == 0 { "" } else { ";" };
            write!(f, "{separator} {version} on {}", hosts.join(", "))?;
        }
        Ok(())
    }
}

/// What the hosts of a service have at different versions: `versions` says what each check found on each instance.
#[must_use]
pub fn uneven(versions: &BTreeMap<Instance, BTreeMap<String, String>>) -> Vec<Uneven> {
    let mut by_check: BTreeMap<(&ServiceName, &str), BTreeMap<&str, BTreeSet<HostName>>> = BTreeMap::new();
    for (instance, found) in versions {
        for (check, version) in found {
            let of_check = by_check.entry((&instance.service, check)).or_default();
            of_check.entry(version).or_default().insert(instance.host.clone());
        }
    }
    let is_uneven = by_check.into_iter().filter(|(_, found)| found.len() > 1);
    is_uneven
        .map(|((service, check), found)| {
            let mut versions: Vec<_> =
                found.into_iter().map(|(version, hosts)| (version.to_owned(), hosts)).collect();
            // Of two that equally many have, the one of the first host.
            versions.sort_by(|(_, one), (_, other)| other.len().cmp(&one.len()).then_with(|| one.cmp(other)));
            Uneven { service: service.clone(), check: check.to_owned(), versions }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_names_a_check_and_maybe_one_host() {
        let host = |name: &str| name.parse::<HostName>().unwrap();
        let (all, one): (CheckPattern, CheckPattern) =
            ("package libpq5".parse().unwrap(), "web2: local edits".parse().unwrap());
        assert!(all.covers(&host("web1"), "package libpq5") && !all.covers(&host("web1"), "package"));
        assert!(one.covers(&host("web2"), "local edits") && !one.covers(&host("web1"), "local edits"));
        assert_eq!(one.to_string(), "web2:local edits");
        assert_eq!(serde_json::to_string(&one).unwrap(), "\"web2:local edits\"");
        for bad in ["", "web2:", "a b:disk"] {
            assert!(bad.parse::<CheckPattern>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_most_have_comes_first_and_services_are_apart() {
        let found = |instance: &str, version: &str| {
            let (host, service) = instance.split_once('/').unwrap();
            let instance = Instance::new(host.parse().unwrap(), service.parse().unwrap());
            (instance, BTreeMap::from([("package x".to_owned(), version.to_owned())]))
        };
        let versions =
            [found("a/web", "1"), found("b/web", "2"), found("c/web", "2"), found("a/db", "7")].into();
        let uneven = uneven(&versions);
        assert_eq!(uneven.len(), 1);
        assert_eq!(uneven[0].to_string(), "package x: 2 on b, c; 1 on a");
        assert_eq!(
            uneven[0].odd_ones().map(|(host, at)| (host.as_str(), at)).collect::<Vec<_>>(),
            [("a", "1")]
        );
    }
}
