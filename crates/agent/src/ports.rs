//! Who listens on a TCP port, as the kernel's tables say.

use std::collections::BTreeSet;
use std::fs;

use crate::failure::{OrHost as _, Outcome};
use crate::process;

/// A port that somebody listens on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listener {
    /// The processes that hold it, as far as the agent's account may see them.
    pub(crate) pids: Vec<u32>,
}

impl Listener {
    /// Who it is, for people.
    pub(crate) fn who(&self) -> String {
        match self.pids.as_slice() {
            [] => "a process that the agent's account may not see".to_owned(),
            [pid, ..] => format!("process {pid} ({})", process::command_line(*pid)),
        }
    }
}

/// Who listens on the port on any address; none when nobody does.
pub(crate) fn listener(port: u16) -> Outcome<Option<Listener>> {
    let mut sockets = BTreeSet::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        match fs::read_to_string(table) {
            Ok(text) => sockets.extend(text.lines().filter_map(|line| listening(line, port))),
            // A host without IPv6 has no such table.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).or_host(|| format!("read {table}")),
        }
    }
    if sockets.is_empty() {
        return Ok(None);
    }
    let processes = process::all().or_host(|| "look at processes".to_owned())?;
    let pids = processes.iter().map(|stat| stat.pid).filter(|pid| holds(*pid, &sockets)).collect();
    Ok(Some(Listener { pids }))
}

/// Whether a process belongs to another: is it, descends from it, or is in the group that it leads.
pub(crate) fn belongs(pid: u32, main: u32) -> bool {
    let mut at = pid;
    // No chain of parents is longer than this; one that loops by a reused id ends too.
    for _ in 0..64 {
        let Some(stat) = process::Stat::of(at) else { return false };
        if at == main || stat.group == main {
            return true;
        }
        at = stat.parent;
    }
    false
}

/// The socket's number, when the line of the table is one that listens on the port.
fn listening(line: &str, port: u16) -> Option<String> {
    const LISTEN: &str = "0A";
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (_, digits) = fields.get(1)?.rsplit_once(':')?;
    let is_it = u16::from_str_radix(digits, 16).ok()? == port && *fields.get(3)? == LISTEN;
    is_it.then(|| fields.get(9).map(|number| format!("socket:[{number}]")))?
}

fn holds(pid: u32, sockets: &BTreeSet<String>) -> bool {
    // A process of another account, or one that has ended, cannot be looked into; it is then not named.
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    descriptors
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .any(|target| target.to_str().is_some_and(|target| sockets.contains(target)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_found_with_its_process() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let found = listener(port).unwrap().unwrap();
        assert_eq!(found.pids, [std::process::id()]);
        assert!(belongs(found.pids[0], std::process::id()));
        assert!(!belongs(found.pids[0], u32::MAX));
        drop(socket);
        assert_eq!(listener(port).unwrap(), None);
    }
}
