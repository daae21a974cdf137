//! What the machine must bring: root, a few programs, Debian's package sources.

use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::Error;

/// Program, the package that brings it.
const TOOLS: [(&str, &str); 9] = [
    ("mmdebstrap", "mmdebstrap"),
    ("ip", "iproute2"),
    ("bridge", "iproute2"),
    ("tc", "iproute2"),
    ("ssh", "openssh-client"),
    ("ssh-keygen", "openssh-client"),
    ("nsenter", "util-linux"),
    ("unshare", "util-linux"),
    ("git", "git"),
];

/// Where the machine's Debian sources may stand; the first that exists is what the base is built from.
const SOURCES: [&str; 2] = ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"];

/// Packages the machine lacks for a bed; empty when it has all.
pub fn required_packages() -> Vec<&'static str> {
    let mut packages: Vec<_> = missing().map(|(_, package)| package).collect();
    packages.dedup();
    packages
}

/// Where base roots and the disks of hosts are kept: `GREENLIGHT_BED`, else `greenlight-bed` in the user's
/// cache directory.
pub fn cache_directory() -> PathBuf {
    let named = |variable| env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    named("GREENLIGHT_BED").unwrap_or_else(|| {
        let cache = named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")));
        cache.unwrap_or_else(|| PathBuf::from("/var/cache")).join("greenlight-bed")
    })
}

/// Refuses what would fail later with a worse message.
pub(crate) fn check() -> Result<(), Error> {
    if !rustix::process::geteuid().is_root() {
        let words: Vec<_> = env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
        return Err(Error::NotRoot { command: words.join(" ") });
    }
    let tools: Vec<_> = missing().map(|(tool, _)| tool).collect();
    if !tools.is_empty() {
        return Err(Error::MissingTools { tools: tools.join(", "), packages: required_packages().join(" ") });
    }
    let cache = cache_directory();
    if cache.to_str().is_none_or(|path| !path.starts_with('/') || path.contains([',', ':', '\\', '"', '\n']))
    {
        // These separate the options of an overlay mount.
        return Err(Error::Machine {
            reason: format!(
                "the cache directory {} must be absolute and free of , : \\ and quotes; set GREENLIGHT_BED to another",
                cache.display()
            ),
        });
    }
    Ok(())
}

/// The Debian release of the machine, and the file with its package sources.
pub(crate) fn distribution() -> Result<(String, &'static Path), Error> {
    let path = "/etc/os-release";
    let release = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let (id, codename) = (field(&release, "ID"), field(&release, "VERSION_CODENAME"));
    let sources = SOURCES
        .iter()
        .map(Path::new)
        .find(|path| fs::metadata(path).is_ok_and(|metadata| metadata.len() > 0));
    match (id, codename, sources) {
        (Some("debian"), Some(codename), Some(sources)) => Ok((codename.to_owned(), sources)),
        (Some("debian"), _, None) => {
            Err(Error::Machine { reason: format!("no package sources in {}", SOURCES.join(" or ")) })
        }
        (id, ..) => Err(Error::Machine {
            reason: format!(
                "its hosts are built from Debian's own sources, and it is {}",
                id.unwrap_or("unknown")
            ),
        }),
    }
}

fn missing() -> impl Iterator<Item = (&'static str, &'static str)> {
    TOOLS.into_iter().filter(|(tool, _)| find(tool).is_none())
}

/// A program on the PATH, or where Debian keeps those of root.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix('=')?.trim_matches('"')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_os_release() {
        let text = "ID_LIKE=x\nID=debian\nVERSION_CODENAME=\"bookworm\"\n";
        assert_eq!(field(text, "ID"), Some("debian"));
        assert_eq!(field(text, "VERSION_CODENAME"), Some("bookworm"));
        assert_eq!(field(text, "VERSION"), None);
    }
}
