//! What a host must have before a release may go there, as the fleet file states it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::id::{UserName, VariableName};
use crate::quantity::ByteSize;

/// What a host must have before a release may go there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Requirements {
    /// Free disk under the service's root.
    pub disk: Option<ByteSize>,
    /// Memory that can be had without swapping, as the kernel estimates it.
    pub memory: Option<ByteSize>,
    /// Version requirement per runtime: `python = ">=3.11"`.
    pub runtimes: BTreeMap<String, String>,
    /// Debian packages that must be installed, at the same version on every host of the service.
    pub packages: Vec<String>,
    /// Python packages that must be in `venv`, at the same version on every host of the service.
    pub pip: Vec<String>,
    /// Where `pip` looks: an absolute path, or one inside the release.
    pub venv: Option<String>,
    /// Accounts that must exist.
    pub users: Vec<UserName>,
    /// Files and directories that must be there, and readable by the accounts of the service's processes.
    pub paths: Vec<String>,
    /// Directories that those accounts must be able to write to.
    pub writable: Vec<String>,
    /// Outside services that must let a host log in, by what people call them.
    pub reach: BTreeMap<String, Reach>,
    /// Jobs that must not be running: words of their command line, one after another.
    pub not_running: Vec<Vec<String>>,
}

impl Requirements {
    /// The secrets without which its outside services cannot be asked.
    #[must_use]
    pub fn secrets(&self) -> BTreeSet<VariableName> {
        self.reach.values().filter_map(Reach::secret).cloned().collect()
    }
}

/// An outside service: where it is, and where the credentials for it come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "by")]
pub enum Reach {
    /// An address that may be read by anybody, with a password apart from it.
    Url {
        /// As [`ServiceUrl`] reads it, without a password.
        url: String,
        /// The secret that is the password; none logs in without one.
        password: Option<VariableName>,
    },
    /// An address that is a secret as a whole, such as `DATABASE_URL`.
    Secret {
        /// The secret.
        secret: VariableName,
    },
}

impl Reach {
    /// The secret that it needs, when it needs one.
    #[must_use]
    pub fn secret(&self) -> Option<&VariableName> {
        match self {
            Self::Url { password, .. } => password.as_ref(),
            Self::Secret { secret } => Some(secret),
        }
    }
}

/// The protocols in which an outside service is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// It accepts a connection.
    Tcp,
    /// It answers a GET with 2xx or 3xx.
    Http,
    /// It lets the user log in to the database.
    Postgresql,
    /// It lets the user log in and answers PING.
    Redis,
    /// AMQP 0-9-1: it lets the user log in to the virtual host.
    Amqp,
}

impl Protocol {
    /// What URLs of it may begin with, and the port that is meant when none is stated.
    const ALL: [(&str, Self, Option<u16>); 6] = [
        ("tcp", Self::Tcp, None),
        ("http", Self::Http, Some(80)),
        ("postgresql", Self::Postgresql, Some(5432)),
        ("postgres", Self::Postgresql, Some(5432)),
        ("redis", Self::Redis, Some(6379)),
        ("amqp", Self::Amqp, Some(5672)),
    ];
}

/// The address of an outside service. Its `Debug` does not show the password.
#[derive(Clone, PartialEq, Eq)]
pub struct ServiceUrl {
    /// How it is asked.
    pub protocol: Protocol,
    /// The user to log in as.
    pub user: Option<String>,
    /// The password.
    pub password: Option<String>,
    /// Its name or address; one of IPv6 without brackets.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// What follows the slash, without a query: a database, a virtual host, a path; none when there is no slash. Percent
    /// signs are decoded, except in a path of HTTP, whose query stays.
    pub path: Option<String>,
}

impl std::fmt::Debug for ServiceUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.shown())
    }
}

impl ServiceUrl {
    /// Reads one such as `postgresql://web@db1:5432/web`. The reason why it cannot be read never holds the text, which may
    /// be secret.
    ///
    /// # Errors
    /// When it has no scheme that is known, no host, or a port that is none.
    pub fn parse(text: &str) -> Result<Self, String> {
        let known = || Protocol::ALL.map(|(scheme, ..)| format!("{scheme}://")).join(", ");
        let (scheme, rest) =
            text.split_once("://").ok_or_else(|| format!("it begins with none of {}", known()))?;
        let scheme = scheme.split('+').next().unwrap_or(scheme);
        if let "https" | "rediss" | "amqps" = scheme {
            return Err(format!(
                "{scheme}:// is encrypted, which this check does not speak; tcp://HOST:PORT asks whether it is there"
            ));
        }
        let (_, protocol, usual_port) = Protocol::ALL
            .into_iter()
            .find(|(known, ..)| *known == scheme)
            .ok_or_else(|| format!("it begins with none of {}", known()))?;
        let (authority, path) = match rest.find(['/', '?']) {
            Some(at) if rest.as_bytes()[at] == b'/' => (&rest[..at], Some(&rest[at + 1..])),
            Some(at) => (&rest[..at], None),
            None => (rest, None),
        };
        let (login, place) = match authority.rsplit_once('@') {
            Some((login, place)) => (Some(login), place),
            None => (None, authority),
        };
        let (user, password) = match login.map(|login| login.split_once(':').unwrap_or((login, ""))) {
            Some((user, password)) => (decoded(user)?, decoded(password)?),
            None => (String::new(), String::new()),
        };
        let (host, port) = host_and_port(place)?;
        let path = match (protocol, path) {
            (_, None) => None,
            (Protocol::Http, Some(path)) => Some(path.to_owned()),
            (_, Some(path)) => Some(decoded(path.split('?').next().unwrap_or(path))?),
        };
        let port = port.or(usual_port).ok_or("it states no port")?;
        let stated = |text: String| (!text.is_empty()).then_some(text);
        Ok(Self { protocol, user: stated(user), password: stated(password), host, port, path })
    }

    /// It without its password, for people.
    #[must_use]
    pub fn shown(&self) -> String {
        let scheme = Protocol::ALL.iter().find(|(_, protocol, _)| *protocol == self.protocol);
        let scheme = scheme.map_or("", |(scheme, ..)| scheme);
        let user = self.user.as_ref().map(|user| format!("{user}@")).unwrap_or_default();
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        // The query of an HTTP address may hold a token.
        let path = self.path.as_ref().map(|path| path.split('?').next().unwrap_or(path));
        let path = path.map(|path| format!("/{path}")).unwrap_or_default();
        format!("{scheme}://{user}{host}:{}{path}", self.port)
    }
}

fn host_and_port(place: &str) -> Result<(String, Option<u16>), String> {
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or("a bracket of its host is not closed")?;
            (host, rest.strip_prefix(':'))
        }
        None => match place.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (place, None),
        },
    };
    if host.is_empty() || host.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err("it names no host".to_owned());
    }
    let port = match port {
        Some(port) => {
            Some(port.parse().ok().filter(|port| *port > 0).ok_or("its port is no number from 1 to 65535")?)
        }
        None => None,
    };
    Ok((host.to_owned(), port))
}

/// Percent signs decoded.
fn decoded(text: &str) -> Result<String, String> {
    let refused = || "a percent sign in it is not followed by two hexadecimal digits of UTF-8".to_owned();
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
        let (high, low) = (digit(rest.next()), digit(rest.next()));
        let value = high.zip(low).and_then(|(high, low)| u8::try_from(high * 16 + low).ok());
        bytes.push(value.ok_or_else(refused)?);
    }
    String::from_utf8(bytes).map_err(|_| refused())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_shown_without_their_password() {
        for (text, shown, password) in [
            ("postgresql://web@db1/web", "postgresql://web@db1:5432/web", None),
            (
                "postgres://web:s%40c%3Aret@db1:15432/web?sslmode=disable",
                "postgresql://web@db1:15432/web",
                Some("s@c:ret"),
            ),
            ("postgresql+psycopg2://web:p@db1/web", "postgresql://web@db1:5432/web", Some("p")),
            ("redis://cache1", "redis://cache1:6379", None),
            ("redis://:p@[2001:db8::1]:6380/2", "redis://[2001:db8::1]:6380/2", Some("p")),
            ("amqp://sarra:a:b@mq1/%2F", "amqp://sarra@mq1:5672//", Some("a:b")),
            ("http://api.test/health?token=x", "http://api.test:80/health", None),
            ("tcp://smtp.test:25", "tcp://smtp.test:25", None),
        ] {
            let url = ServiceUrl::parse(text).unwrap();
            assert_eq!((url.shown().as_str(), url.password.as_deref()), (shown, password), "{text}");
            assert_eq!(format!("{url:?}"), shown);
        }
    }

    #[test]
    fn what_cannot_be_asked_is_refused_without_being_shown() {
        for (text, why) in [
            ("db1:5432", "begins with none of tcp://"),
            ("mysql://db1:pw@db", "begins with none of tcp://"),
            ("https://user:pw@api.test", "is encrypted"),
            ("tcp://smtp.test", "no port"),
            ("tcp://:pw", "no host"),
            ("redis://cache1:pw", "its port"),
            ("redis://cache1:0", "its port"),
            ("redis://:%zz@cache1", "percent"),
            ("redis://:%e9@cache1", "percent"),
            ("redis://[::1", "bracket"),
        ] {
            let error = ServiceUrl::parse(text).unwrap_err();
            assert!(error.contains(why) && !error.contains("pw"), "{text}: {error}");
        }
    }
}
