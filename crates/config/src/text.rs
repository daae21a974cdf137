//! Values of the language that are written as text: durations, commands, paths, hosts. Each has one way in.

use std::time::Duration;

use greenlight_model::fleet::{BecomeRoot, ManagerKind, OnFailure};
use greenlight_model::id::{
    CheckName, EnvironmentName, HostName, InvalidId, ProcessName, ProfileName, RoleName, ServiceName,
    UserName, VariableName,
};
use greenlight_model::quantity::{ByteSize, parse_duration};

use crate::range::expand_range;
use crate::read::{Refusal, Text};

/// Longest duration: longer is surely a slip, and sums of times stay far from overflow.
const DURATION_MAX: Duration = Duration::from_secs(366 * 86_400);

impl Text for String {
    const EXPECTED: &'static str = "a string";
    fn from_text(text: &str) -> Result<Self, Refusal> {
        Ok(text.to_owned())
    }
}

macro_rules! names {
    ($($type:ty, $expected:literal, $pattern:literal;)*) => { $(
        impl Text for $type {
            const EXPECTED: &'static str = $expected;
            const PATTERN: Option<&'static str> = Some($pattern);
            fn from_text(text: &str) -> Result<Self, Refusal> {
                text.parse().map_err(|error: InvalidId| {
                    Refusal::new(format!("`{}` is not {}: {}", error.text, $expected, error.why))
                })
            }
        }
    )* };
}

names! {
    HostName, "a host name", "^[A-Za-z0-9_][A-Za-z0-9._-]*$";
    ServiceName, "the name of a service", "^[A-Za-z0-9_][A-Za-z0-9._-]*$";
    EnvironmentName, "the name of an environment", "^[A-Za-z0-9_][A-Za-z0-9._-]*$";
    ProcessName, "the name of a process", "^[A-Za-z0-9_][A-Za-z0-9._-]*$";
    ProfileName, "the name of a profile", "^[A-Za-z0-9_][A-Za-z0-9._-]*$";
    UserName, "the name of a user", "^[A-Za-z0-9_][A-Za-z0-9._-]*$";
    RoleName, "a role", "^[A-Za-z0-9_][A-Za-z0-9._-]*$";
    CheckName, "the name of a check", "^[A-Za-z0-9_][A-Za-z0-9._-]*$";
    VariableName, "the name of a variable", "^[A-Za-z0-9_]+$";
}

/// Declares a text that is one of a few words.
macro_rules! choice {
    ($type:ty, $expected:literal, { $($word:literal => $value:expr,)* }) => {
        impl Text for $type {
            const EXPECTED: &'static str = $expected;
            const CHOICES: &'static [&'static str] = &[$($word),*];
            fn from_text(text: &str) -> Result<Self, Refusal> {
                match text {
                    $($word => Ok($value),)*
                    _ => Err(Refusal {
                        message: format!("`{text}` is not {}", $expected),
                        help: crate::problem::suggest(text, "choose one of", Self::CHOICES.iter().copied()),
                    }),
                }
            }
        }
    };
}

choice!(ManagerKind, "a manager of processes", {
    "auto" => Self::Auto,
    "systemd" => Self::Systemd,
    "systemd-user" => Self::SystemdUser,
    "supervisord" => Self::Supervisord,
    "agent" => Self::Agent,
});
choice!(BecomeRoot, "a way to become root", {
    "auto" => Self::Auto,
    "sudo" => Self::Sudo,
    "never" => Self::Never,
});
choice!(OnFailure, "a reaction to failure", {
    "turn-back" => Self::TurnBack,
    "hold" => Self::Hold,
});

/// How a host is reached, before its other keys are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    Ssh,
    Local,
}
choice!(Link, "a link to a host", {
    "ssh" => Self::Ssh,
    "local" => Self::Local,
});

/// A strategy's kind, before its other keys are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StrategyKind {
    Rolling,
    BlueGreen,
    Halves,
    Canary,
}
choice!(StrategyKind, "a strategy", {
    "rolling" => Self::Rolling,
    "blue-green" => Self::BlueGreen,
    "halves" => Self::Halves,
    "canary" => Self::Canary,
});

impl Text for Duration {
    const EXPECTED: &'static str = "a duration";
    const PATTERN: Option<&'static str> = Some("^[0-9]+(ms|s|m|h|d)$");
    fn from_text(text: &str) -> Result<Self, Refusal> {
        let duration = parse_duration(text).map_err(|error| Refusal::new(error.to_string()))?;
        if duration > DURATION_MAX {
            return Err(Refusal::new(format!("`{text}` is longer than a year")));
        }
        Ok(duration)
    }
}

/// A time limit: a duration of which something remains.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limit(pub(crate) Duration);

impl Text for Limit {
    const EXPECTED: &'static str = "a duration";
    const PATTERN: Option<&'static str> = Duration::PATTERN;
    fn from_text(text: &str) -> Result<Self, Refusal> {
        let duration = Duration::from_text(text)?;
        if duration.is_zero() {
            return Err(Refusal::new(format!("`{text}` leaves no time at all: this would always fail")));
        }
        Ok(Self(duration))
    }
}

/// How long a claim holds without being renewed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lease(pub(crate) Duration);

/// It is renewed four times within its duration, and a renewal may take a slow host some seconds.
const LEASE_MIN: Duration = Duration::from_secs(10);
/// Hosts grant none that is longer: one whose controller died would be held that long.
const LEASE_MAX: Duration = Duration::from_secs(3600);

impl Text for Lease {
    const EXPECTED: &'static str = "a duration";
    const PATTERN: Option<&'static str> = Duration::PATTERN;
    fn from_text(text: &str) -> Result<Self, Refusal> {
        let duration = Duration::from_text(text)?;
        if duration < LEASE_MIN || duration > LEASE_MAX {
            return Err(Refusal::new(format!("`{text}` is not between 10s and 1h")));
        }
        Ok(Self(duration))
    }
}

impl Text for ByteSize {
    const EXPECTED: &'static str = "a size";
    const PATTERN: Option<&'static str> = Some("^[0-9]+ *(KiB|MiB|GiB|TiB|kB|MB|GB|TB|B)$");
    fn from_text(text: &str) -> Result<Self, Refusal> {
        text.parse()
            .map_err(|error: greenlight_model::quantity::InvalidQuantity| Refusal::new(error.to_string()))
    }
}

/// A host or a range of hosts.
#[derive(Debug, Clone)]
pub(crate) struct HostPattern(pub(crate) Vec<HostName>);

impl Text for HostPattern {
    const EXPECTED: &'static str = "a host or a range of hosts";
    fn from_text(text: &str) -> Result<Self, Refusal> {
        expand_range(text).map(Self).map_err(|error| Refusal::help(error.message, error.help))
    }
}

/// A program and its arguments, split as a shell splits words; nothing else of a shell happens to it.
#[derive(Debug, Clone)]
pub(crate) struct Command(pub(crate) Vec<String>);

impl Text for Command {
    const EXPECTED: &'static str = "a command in one string";
    fn from_text(text: &str) -> Result<Self, Refusal> {
        let argv = shell_words::split(text).map_err(|_| {
            Refusal::help("a quote in this command is not closed", "close it, or escape it with `\\`")
        })?;
        if argv.is_empty() {
            return Err(Refusal::new("this command is empty"));
        }
        Ok(Self(argv))
    }
}

impl Command {
    /// Words in braces that look like placeholders: `{port}`. `${HOME}` is left to a shell that is called by name, but
    /// `${port}` is one too, since the agent replaces it.
    pub(crate) fn placeholders(&self) -> impl Iterator<Item = &str> {
        self.0.iter().flat_map(|word| {
            word.match_indices('{').filter_map(|(at, _)| {
                let name = word[at + 1..].split_once('}')?.0;
                let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic())
                    && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
                (is_name && (name == "port" || !word[..at].ends_with('$'))).then_some(name)
            })
        })
    }

    /// A word that only a shell would understand, when no shell is called.
    pub(crate) fn shell_word(&self) -> Option<&str> {
        let program = self.0.first().map_or("", |program| program.rsplit('/').next().unwrap_or(program));
        if matches!(program, "sh" | "bash" | "dash" | "zsh" | "ksh" | "env" | "find") {
            return None;
        }
        let operators = ["&&", "||", "|", ">", ">>", "<", ";", "&", "2>&1"];
        self.0.iter().map(String::as_str).find(|word| operators.contains(word) || word.starts_with("${"))
    }
}

/// A script for `sh -e`.
#[derive(Debug, Clone)]
pub(crate) struct Script(pub(crate) String);

impl Text for Script {
    const EXPECTED: &'static str = "a script in one string";
    fn from_text(text: &str) -> Result<Self, Refusal> {
        if text.trim().is_empty() {
            return Err(Refusal::new("this step is empty"));
        }
        Ok(Self(text.to_owned()))
    }
}

/// A path below a directory that something else names, without `.`, `..` and doubled slashes; a trailing slash stays.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RelativePath(pub(crate) String);

impl Text for RelativePath {
    const EXPECTED: &'static str = "a relative path";
    const PATTERN: Option<&'static str> = Some("^[^/]");
    fn from_text(text: &str) -> Result<Self, Refusal> {
        if text.starts_with('/') {
            return Err(Refusal::help(
                format!("`{text}` is an absolute path"),
                "write it relative, without the `/` in front",
            ));
        }
        if text.chars().any(char::is_control) {
            return Err(Refusal::new(format!("`{}` holds a control character", text.escape_debug())));
        }
        let parts: Vec<&str> = text.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        if parts.contains(&"..") {
            return Err(Refusal::help(
                format!("`{text}` leaves its directory by `..`"),
                "name a place inside the directory",
            ));
        }
        if parts.is_empty() {
            return Err(Refusal::new(format!("`{text}` names nothing")));
        }
        let slash = if text.ends_with('/') { "/" } else { "" };
        Ok(Self(format!("{}{slash}", parts.join("/"))))
    }
}

/// A file below the service's root that is ours to write: not in a directory that Greenlight itself keeps there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LogPath(pub(crate) String);

impl Text for LogPath {
    const EXPECTED: &'static str = "a relative path";
    const PATTERN: Option<&'static str> = RelativePath::PATTERN;
    fn from_text(text: &str) -> Result<Self, Refusal> {
        let RelativePath(path) = RelativePath::from_text(text)?;
        if path.ends_with('/') {
            return Err(Refusal::new(format!("`{text}` is a directory; a log is a file")));
        }
        let first = path.split('/').next().unwrap_or_default();
        if ["releases", "current", "shared", ".greenlight"].contains(&first) {
            return Err(Refusal::help(
                format!("`{text}` lies in `{first}`, which releases are kept and switched in"),
                "put logs elsewhere in the service's root, such as `logs/`",
            ));
        }
        Ok(Self(path))
    }
}

/// A pattern of paths inside the release.
#[derive(Debug, Clone)]
pub(crate) struct Glob(pub(crate) String);

impl Text for Glob {
    const EXPECTED: &'static str = "a pattern of paths";
    const PATTERN: Option<&'static str> = RelativePath::PATTERN;
    fn from_text(text: &str) -> Result<Self, Refusal> {
        RelativePath::from_text(text)?;
        globset::Glob::new(text)
            .map_err(|error| Refusal::new(format!("`{text}` is not a pattern of paths: {}", error.kind())))?;
        Ok(Self(text.to_owned()))
    }
}

/// An absolute path other than `/`, without `..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AbsolutePath(pub(crate) String);

impl Text for AbsolutePath {
    const EXPECTED: &'static str = "an absolute path";
    const PATTERN: Option<&'static str> = Some("^/");
    fn from_text(text: &str) -> Result<Self, Refusal> {
        let Some(relative) = text.strip_prefix('/') else {
            return Err(Refusal::new(format!("`{text}` is not an absolute path")));
        };
        let RelativePath(path) = RelativePath::from_text(relative.trim_start_matches('/'))
            .map_err(|_| Refusal::new(format!("`{text}` does not name a directory below `/`")))?;
        Ok(Self(format!("/{}", path.trim_end_matches('/'))))
    }
}

/// The path of a URL on a process's own port.
#[derive(Debug, Clone)]
pub(crate) struct UrlPath(pub(crate) String);

impl Text for UrlPath {
    const EXPECTED: &'static str = "a path such as \"/health\"";
    const PATTERN: Option<&'static str> = Some("^/[!-~]*$");
    fn from_text(text: &str) -> Result<Self, Refusal> {
        if text.contains("://") {
            let message =
                format!("`{text}` is a whole address; only the path on the process's own port is asked");
            return Err(Refusal::new(message));
        }
        if !text.starts_with('/') || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Refusal::new(format!("`{text}` is not a path that begins with `/`")));
        }
        Ok(Self(text.to_owned()))
    }
}

/// A word that ends up as an argument of `git` or `ssh`: without blanks, and never an option.
#[derive(Debug, Clone)]
pub(crate) struct Word(pub(crate) String);

impl Text for Word {
    const EXPECTED: &'static str = "a string";
    const PATTERN: Option<&'static str> = Some(r"^[^-\s][^\s]*$");
    fn from_text(text: &str) -> Result<Self, Refusal> {
        if text.is_empty() {
            return Err(Refusal::new("this is empty"));
        }
        if text.starts_with('-') {
            return Err(Refusal::new(format!("`{text}` begins with `-` and would be taken for an option")));
        }
        if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(Refusal::new(format!("`{}` holds a blank", text.escape_debug())));
        }
        Ok(Self(text.to_owned()))
    }
}

/// A text that says something: not empty, not an option, one line.
#[derive(Debug, Clone)]
pub(crate) struct Line(pub(crate) String);

impl Text for Line {
    const EXPECTED: &'static str = "a string";
    const PATTERN: Option<&'static str> = Some("^[^-]");
    fn from_text(text: &str) -> Result<Self, Refusal> {
        if text.trim().is_empty() {
            return Err(Refusal::new("this is empty"));
        }
        if text.starts_with('-') {
            return Err(Refusal::new(format!("`{text}` begins with `-` and would be taken for an option")));
        }
        if text.chars().any(char::is_control) {
            return Err(Refusal::new(format!("`{}` holds a control character", text.escape_debug())));
        }
        Ok(Self(text.to_owned()))
    }
}

/// Where something listens: a name or an IP address, without a port.
#[derive(Debug, Clone)]
pub(crate) struct Address(pub(crate) String);

impl Text for Address {
    const EXPECTED: &'static str = "a name or an IP address";
    fn from_text(text: &str) -> Result<Self, Refusal> {
        if text.parse::<core::net::IpAddr>().is_ok() || text.parse::<HostName>().is_ok() {
            return Ok(Self(text.to_owned()));
        }
        Err(Refusal::help(
            format!("`{text}` is neither a name nor an IP address"),
            "write the address alone, such as `10.0.0.3`; ports are the processes' own",
        ))
    }
}

/// Which versions of a runtime will do: `>=3.11`, `>=3.11, <4`, `20`.
#[derive(Debug, Clone)]
pub(crate) struct VersionRequirement(pub(crate) String);

impl Text for VersionRequirement {
    const EXPECTED: &'static str = "a version requirement such as \">=3.11\"";
    fn from_text(text: &str) -> Result<Self, Refusal> {
        let is_valid = text.split(',').all(|part| {
            let part = part.trim();
            let version = [">=", "<=", "==", "!=", ">", "<", "="]
                .iter()
                .find_map(|operator| part.strip_prefix(operator))
                .unwrap_or(part)
                .trim_start();
            version.split('.').all(|number| {
                !number.is_empty() && number.len() <= 9 && number.bytes().all(|byte| byte.is_ascii_digit())
            })
        });
        if is_valid {
            return Ok(Self(text.to_owned()));
        }
        Err(Refusal::help(
            format!("`{text}` is not a version requirement"),
            "write `>=3.11`, `>=3.11, <4` or, for all 20.x, `20`",
        ))
    }
}

/// A Debian package.
#[derive(Debug, Clone)]
pub(crate) struct PackageName(pub(crate) String);

impl Text for PackageName {
    const EXPECTED: &'static str = "the name of a Debian package";
    const PATTERN: Option<&'static str> = Some("^[a-z0-9][a-z0-9+.:-]*$");
    fn from_text(text: &str) -> Result<Self, Refusal> {
        let is_valid = text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+.:-".contains(c));
        if is_valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(Refusal::new(format!("`{text}` is not the name of a Debian package")))
        }
    }
}

/// A socket on a host: `ol-www1:/run/haproxy/admin.sock`.
#[derive(Debug, Clone)]
pub(crate) struct SocketPlace {
    pub(crate) host: HostName,
    pub(crate) path: String,
}

impl Text for SocketPlace {
    const EXPECTED: &'static str = "a socket on a host, as in \"HOST:/path\"";
    fn from_text(text: &str) -> Result<Self, Refusal> {
        let Some((host, path)) = text.split_once(":/") else {
            return Err(Refusal::new(format!("`{text}` is not a socket on a host, written `HOST:/path`")));
        };
        let AbsolutePath(path) = AbsolutePath::from_text(&format!("/{path}"))?;
        Ok(Self { host: HostName::from_text(host)?, path })
    }
}

/// HAProxy's runtime API: a socket on a host, or an address.
#[derive(Debug, Clone)]
pub(crate) enum HaproxyPlace {
    Socket(SocketPlace),
    Tcp(String),
}

impl Text for HaproxyPlace {
    const EXPECTED: &'static str = "a socket on a host, as in \"HOST:/path\", or \"tcp://ADDRESS:PORT\"";
    fn from_text(text: &str) -> Result<Self, Refusal> {
        let Some(address) = text.strip_prefix("tcp://") else {
            return SocketPlace::from_text(text).map(Self::Socket);
        };
        let bare = |host: &str| host.trim_start_matches('[').trim_end_matches(']').to_owned();
        match address.rsplit_once(':') {
            Some((host, port))
                if port.parse::<u16>().is_ok_and(|port| port > 0)
                    && Address::from_text(&bare(host)).is_ok() =>
            {
                Ok(Self::Tcp(address.to_owned()))
            }
            _ => Err(Refusal::new(format!("`{text}` is not written `tcp://ADDRESS:PORT`"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Text>(good: &[&str], bad: &[&str]) {
        for text in good {
            assert!(T::from_text(text).is_ok(), "{text}");
        }
        for text in bad {
            assert!(T::from_text(text).is_err(), "{text}");
        }
    }

    #[test]
    fn texts_have_one_way_in() {
        check::<Duration>(&["0s", "3d", "366d"], &["367d", "-1s", "1.5s", ""]);
        check::<Limit>(&["1ms"], &["0s"]);
        check::<RelativePath>(&["a", "./a//b/", "a..b"], &["/a", "a/../b", "..", "", ".", "a\nb"]);
        check::<LogPath>(&["logs/web.stdout"], &["logs/", "current/x", "./releases/x", "/dev/null"]);
        check::<Glob>(&["**", "tests/**", "*.{js,css}"], &["a[", "/a", "../a"]);
        check::<AbsolutePath>(&["/srv", "/srv/"], &["srv", "/", "/srv/../etc"]);
        check::<UrlPath>(&["/", "/health?deep=1"], &["health", "http://x/health", "/a b", ""]);
        check::<Word>(&["main", "git@example.org:web.git"], &["-oProxyCommand=x", "a b", ""]);
        check::<Line>(&[".", "/home/some one/web"], &["--upload-pack=x", " ", "a\nb"]);
        check::<Address>(&["10.0.0.3", "fd00::1", "web.example.org"], &["10.0.0.3:80", "a b", ""]);
        check::<VersionRequirement>(&[">=3.11", "20", ">= 3.11, <4"], &["latest", ">=", "", "3..1", "^3"]);
        check::<PackageName>(&["libpq5", "g++"], &["--purge", "Libpq", ""]);
        check::<HaproxyPlace>(
            &["ol-www1:/run/haproxy/admin.sock", "tcp://10.0.0.1:9999", "tcp://[fd00::1]:9999"],
            &["ol-www1", "tcp://10.0.0.1", "tcp://10.0.0.1:0", "a b:/x", "ol-www1:/"],
        );
        check::<Command>(&["a 'b c'"], &["a 'b", "", "  "]);
    }

    #[test]
    fn paths_are_normalised() {
        assert_eq!(RelativePath::from_text("./var//uploads/").unwrap().0, "var/uploads/");
        assert_eq!(AbsolutePath::from_text("//srv/./web/").unwrap().0, "/srv/web");
    }

    #[test]
    fn placeholders_are_words_in_braces() {
        let placeholders = |text: &str| -> Vec<String> {
            Command::from_text(text).unwrap().placeholders().map(str::to_owned).collect()
        };
        assert_eq!(
            placeholders("x :{port} {a}{b} '{\"json\": 1}' ${HOME} ${port} {} {1}"),
            ["port", "a", "b", "port"]
        );
    }
}
