//! User accounts of the host.

use std::fs;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::command;
use crate::failure::{OrHost as _, Outcome, host};

/// A user account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Account {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) home: String,
}

/// How long a directory service may take to answer for an account that is not in the file.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);

impl Account {
    /// The account with this name; none when the host has none.
    pub(crate) fn named(name: &str) -> Outcome<Option<Self>> {
        Self::find(name, |account| account.name == name)
    }

    /// The account that the agent works under.
    pub(crate) fn own() -> Outcome<Self> {
        let uid = rustix::process::geteuid().as_raw();
        let found = Self::find(&uid.to_string(), |account| account.uid == uid)?;
        // An account without a name (a container's number) can work all the same.
        Ok(found.unwrap_or_else(|| Self {
            name: uid.to_string(),
            uid,
            gid: rustix::process::getegid().as_raw(),
            home: "/".to_owned(),
        }))
    }

    fn find(key: &str, is_it: impl Fn(&Self) -> bool) -> Outcome<Option<Self>> {
        let text = fs::read_to_string("/etc/passwd").or_host(|| "read /etc/passwd".to_owned())?;
        if let Some(account) = text.lines().filter_map(Self::parse).find(&is_it) {
            return Ok(Some(account));
        }
        // Accounts of a directory service are not in the file. A host without `getent` has none.
        match command::capture(&["getent", "passwd", key], LOOKUP_TIMEOUT) {
            Ok(captured) => Ok(captured.stdout.lines().filter_map(Self::parse).find(is_it)),
            Err(command::RunError::NotStarted { .. }) => Ok(None),
            Err(error) => Err(host(format!("cannot look up the account {key}: {error}"))),
        }
    }

    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, ..] = fields.as_slice() else { return None };
        Some(Self {
            name: (*name).to_owned(),
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            home: (*home).to_owned(),
        })
    }
}

/// Whether the agent may act for every account.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_found_or_not() {
        let root = Account::named("root").unwrap().unwrap();
        assert_eq!((root.uid, root.gid), (0, 0));
        assert_eq!(Account::named("no-such-account").unwrap(), None);
        assert_eq!(Account::own().unwrap().uid, rustix::process::geteuid().as_raw());
        assert_eq!(Account::parse("short:x:1"), None);
    }
}
