//! Facts about the machine.

use std::fs;

use greenlight_model::host::HostFacts;

use crate::account::{self, Account};
use crate::failure::{OrHost as _, Outcome};
use crate::manager;

/// What is known of this machine without changing anything.
pub(crate) fn gather() -> Outcome<HostFacts> {
    let system = rustix::system::uname();
    let account = Account::own()?;
    Ok(HostFacts {
        hostname: system.nodename().to_string_lossy().into_owned(),
        os: os()?,
        architecture: system.machine().to_string_lossy().into_owned(),
        machine_id: fs::read_to_string("/etc/machine-id")
            .ok()
            .map(|id| id.trim().to_owned())
            .filter(|id| !id.is_empty()),
        user: account.name,
        is_root: account::is_root(),
        managers: manager::found(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

fn os() -> Outcome<String> {
    for path in ["/etc/os-release", "/usr/lib/os-release"] {
        match fs::read_to_string(path) {
            Ok(text) => return Ok(pretty_name(&text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).or_host(|| format!("read {path}")),
        }
    }
    Ok("Linux".to_owned())
}

fn pretty_name(text: &str) -> String {
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let name = value("PRETTY_NAME").or_else(|| value("NAME")).unwrap_or("Linux");
    name.trim_matches(['"', '\'']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_is_named() {
        assert_eq!(
            pretty_name("NAME=\"Debian\"\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n"),
            "Debian GNU/Linux 12 (bookworm)"
        );
        assert_eq!(pretty_name("NAME=Alpine"), "Alpine");
        assert_eq!(pretty_name(""), "Linux");
        let facts = gather().unwrap();
        assert!(!facts.hostname.is_empty() && !facts.architecture.is_empty());
        assert_eq!(facts.managers.last(), Some(&greenlight_model::fleet::ManagerKind::Agent));
    }
}
