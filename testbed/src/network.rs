//! Namespaces, the bridge and the links of a bed; what faults do to them.
//!
//! The hub namespace holds a bridge at `10.99.N.1`. Each host has a namespace with `eth0` at `10.99.N.10` and
//! up, whose other end stands on the bridge. Nothing leads out of the bed.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::command::{run, run_with_input};
use crate::process::Process;
use crate::{Error, wait};

/// The bed's number becomes the third byte of its addresses.
pub(crate) const BED_NUMBERS: std::ops::RangeInclusive<u8> = 1..=254;
/// The last byte of the first host's address; 1 is the hub's.
const FIRST_HOST: u8 = 10;
/// What the address leaves room for.
pub(crate) const HOSTS_MAX: usize = (u8::MAX - FIRST_HOST) as usize;

/// From a link that is taken up to one that carries packets; a few milliseconds.
const LINK_DEADLINE: Duration = Duration::from_secs(10);
/// Where `ip` keeps namespaces by name.
const DIRECTORY: &str = "/run/netns";

/// The hub's namespace of a bed.
pub(crate) fn hub(number: u8) -> String {
    format!("bed{number}-hub")
}

/// A host's namespace.
pub(crate) fn host(number: u8, name: &str) -> String {
    format!("bed{number}-host-{name}")
}

/// Where a namespace is kept.
pub(crate) fn path(namespace: &str) -> PathBuf {
    PathBuf::from(DIRECTORY).join(namespace)
}

/// The address of the host at a position in its bed.
pub(crate) fn address(number: u8, index: usize) -> std::net::Ipv4Addr {
    // A bed never has more than HOSTS_MAX hosts.
    let last = u8::try_from(index).map_or(u8::MAX, |index| index.saturating_add(FIRST_HOST));
    std::net::Ipv4Addr::new(10, 99, number, last)
}

/// Makes the hub with its bridge.
pub(crate) fn create_hub(number: u8) -> Result<(), Error> {
    let hub = hub(number);
    run(Command::new("ip").args(["netns", "add", &hub]))?;
    batch(
        &hub,
        &format!(
            "link set lo up\nlink add bridge0 type bridge\naddr add 10.99.{number}.1/24 dev bridge0\nlink set bridge0 up\n"
        ),
    )
}

/// Bytes received and sent at the hub's end of the bridge, from the kernel's table of devices.
pub(crate) fn bridge_bytes(table: &str) -> Option<u64> {
    let counts = table.lines().find_map(|line| line.trim_start().strip_prefix("bridge0:"))?;
    let counts: Vec<u64> = counts.split_whitespace().map_while(|count| count.parse().ok()).collect();
    // Eight columns of what was received come before those of what was sent.
    Some(counts.first()? + counts.get(8)?)
}

/// Makes a host's namespace and links it to the bridge.
pub(crate) fn create_host(number: u8, index: usize, name: &str) -> Result<(), Error> {
    let (hub, host) = (hub(number), host(number, name));
    run(Command::new("ip").args(["netns", "add", &host]))?;
    batch(
        &hub,
        &format!(
            "link add host{index} type veth peer name eth0 netns {host}\nlink set host{index} master bridge0 up\n"
        ),
    )?;
    batch(
        &host,
        &format!(
            "link set lo up\naddr add {}/24 dev eth0\nlink set eth0 up\nroute add default via 10.99.{number}.1\n",
            address(number, index)
        ),
    )
}

/// Takes a host's link down.
pub(crate) fn cut(number: u8, index: usize) -> Result<(), Error> {
    batch(&hub(number), &format!("link set host{index} down\n"))
}

/// Takes a host's link up and returns when it carries packets, and nobody in the bed remembers that the host
/// was not to be found: an address that is being looked for when the link comes up would be given up a second
/// later.
pub(crate) fn heal(number: u8, index: usize) -> Result<(), Error> {
    let (hub, device) = (hub(number), format!("host{index}"));
    batch(&hub, &format!("link set {device} up\n"))?;
    wait::until(&format!("link {device} of bed {number}"), LINK_DEADLINE, || {
        let port = run(Command::new("bridge").args(["-n", &hub, "link", "show", "dev", &device]));
        let port = port.map_err(|error| error.to_string())?;
        if port.contains("LOWER_UP") && port.contains("state forwarding") { Ok(()) } else { Err(port) }
    })?;
    for namespace in namespaces(number)? {
        run(Command::new("ip").args(["-n", &namespace, "neighbour", "flush", "all"]))?;
    }
    Ok(())
}

/// Sends what a host has for an address to a neighbour that does not exist.
pub(crate) fn mute(number: u8, name: &str, address: std::net::Ipv4Addr) -> Result<(), Error> {
    let nobody = "02:00:00:00:00:01";
    batch(
        &host(number, name),
        &format!("neighbour replace {address} lladdr {nobody} dev eth0 nud permanent\n"),
    )
}

/// Lets a host look for the neighbour again.
pub(crate) fn unmute(number: u8, name: &str, address: std::net::Ipv4Addr) -> Result<(), Error> {
    batch(&host(number, name), &format!("neighbour delete {address} dev eth0\n"))
}

/// The namespaces of a bed.
fn namespaces(number: u8) -> Result<Vec<String>, Error> {
    let prefix = format!("bed{number}-");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(DIRECTORY).map_err(Error::io("read", DIRECTORY))? {
        let name = entry.map_err(Error::io("read", DIRECTORY))?.file_name().to_string_lossy().into_owned();
        if name.starts_with(&prefix) {
            names.push(name);
        }
    }
    Ok(names)
}

/// Limits a host's link to a rate both ways; `None` takes the limit away.
pub(crate) fn set_rate(
    number: u8,
    index: usize,
    name: &str,
    kilobits_per_second: Option<u32>,
) -> Result<(), Error> {
    for (namespace, device) in
        [(hub(number), format!("host{index}")), (host(number, name), "eth0".to_owned())]
    {
        let tc =
            |arguments: &[&str]| run(Command::new("tc").args(["-n", &namespace, "qdisc"]).args(arguments));
        match kilobits_per_second {
            // A bucket of 64 KiB passes the largest offloaded frame whole; waiting longer than 50 ms drops.
            Some(rate) => tc(&[
                "replace",
                "dev",
                &device,
                "root",
                "tbf",
                "rate",
                &format!("{rate}kbit"),
                "burst",
                "64kb",
                "latency",
                "50ms",
            ])?,
            None if tc(&["show", "dev", &device])?.contains(" tbf ") => {
                tc(&["delete", "dev", &device, "root"])?
            }
            None => String::new(),
        };
    }
    Ok(())
}

/// Ends every process in a namespace and deletes it. It is no error when it does not exist.
pub(crate) fn remove(namespace: &str) -> Result<(), Error> {
    if !path(namespace).exists() {
        return Ok(());
    }
    // What is killed may have started another in between, so look until none is left.
    loop {
        let listed = run(Command::new("ip").args(["netns", "pids", namespace]))?;
        let own = std::process::id();
        let processes: Vec<_> = listed
            .lines()
            .filter_map(|line| line.trim().parse().ok())
            .filter(|id| *id != own)
            .filter_map(Process::find)
            .filter(|process| process.is_alive())
            .collect();
        if processes.is_empty() {
            break;
        }
        processes.into_iter().try_for_each(Process::kill)?;
    }
    run(Command::new("ip").args(["netns", "delete", namespace])).map(drop)
}

/// Moves the calling thread into a namespace, for good.
pub(crate) fn enter(namespace: &str) -> Result<(), Error> {
    let path = path(namespace);
    let file = File::open(&path).map_err(Error::io("open", &path))?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|errno| Error::system(format!("enter network namespace {namespace}"))(errno.into()))
}

fn batch(namespace: &str, lines: &str) -> Result<(), Error> {
    run_with_input(Command::new("ip").args(["-n", namespace, "-batch", "-"]), lines.as_bytes()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_passes_the_bridge() {
        let table = "Inter-|   Receive      |  Transmit\n face |bytes    packets |bytes    packets\n    \
                     lo: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0\nbridge0: 1200 3 0 0 0 0 0 0 34 2 0 0 0 0 0 0\n";
        assert_eq!(bridge_bytes(table), Some(1234));
        assert_eq!(bridge_bytes("lo: 1 2\n"), None);
    }
}
