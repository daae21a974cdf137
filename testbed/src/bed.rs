//! A bed: its hosts, and the place of the controller among them.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::command::run;
use crate::host::{make_directory, write_file};
use crate::http::{Connection, Request, Response};
use crate::process::Process;
use crate::registry::Registry;
use crate::{Base, BedState, Error, Host, HostState, Init, machine, network};

/// Put before the real ssh on the controller's PATH, so that plain `ssh HOST` reads the bed's configuration
/// in place of the developer's own.
const SSH_WRAPPER: &str = "#!/bin/sh\nexec /usr/bin/ssh -F \"${0%/*}/../ssh_config\" \"$@\"\n";

/// How long one answer over HTTP may take in [`Bed::get`].
const GET_TIMEOUT: Duration = Duration::from_secs(10);

/// systemd holds several inotify instances per host; the kernel's default of 128 is enough for about ten.
const INOTIFY_INSTANCES: u32 = 4096;
const INOTIFY_INSTANCES_FILE: &str = "/proc/sys/fs/inotify/max_user_instances";

/// What is asked for, before it is booted by [`BedBuilder::up`].
#[derive(Debug)]
#[must_use]
pub struct BedBuilder {
    state: BedState,
    detached: bool,
}

impl BedBuilder {
    /// Adds a host.
    pub fn host(mut self, name: &str, init: Init) -> Self {
        self.state.hosts.push(HostState { name: name.into(), init, address: Ipv4Addr::UNSPECIFIED });
        self
    }

    /// Adds hosts of one kind.
    pub fn hosts<'a>(self, names: impl IntoIterator<Item = &'a str>, init: Init) -> Self {
        names.into_iter().fold(self, |builder, name| builder.host(name, init))
    }

    /// Lets the bed live on after this process, until [`Bed::down`] or [`crate::down_all`].
    pub fn detached(mut self) -> Self {
        self.detached = true;
        self
    }

    /// Lets the disks stay when the bed is taken down, until the next bed comes up.
    pub fn keep_disks(mut self) -> Self {
        self.state.keep = true;
        self
    }

    /// Boots the hosts and returns when every one answers. What a killed process left is cleared first. When
    /// one host fails, all are taken down again.
    pub fn up(mut self) -> Result<Bed, Error> {
        self.check_names()?;
        machine::check()?;
        self.state.base = Base::ensure()?.path().to_owned();
        self.state.owner = Some(Process::current()?);
        if self.state.hosts.iter().any(|host| host.init == Init::Systemd) {
            raise_inotify_instances()?;
        }
        let mut bed = Bed::new(Registry::lock()?.reserve(self.state, self.detached)?);
        bed.boot()?;
        if self.detached {
            bed.detach()?;
        }
        Ok(bed)
    }

    fn check_names(&self) -> Result<(), Error> {
        let hosts = &self.state.hosts;
        let names = hosts.iter().map(|host| ("host", &host.name)).chain([("bed", &self.state.name)]);
        for (index, (what, name)) in names.enumerate() {
            let refuse = |reason: &str| Err(Error::Name { what, name: name.clone(), reason: reason.into() });
            let starts = name.starts_with(|c: char| c.is_ascii_lowercase());
            let consists = name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-');
            if !starts || !consists || name.len() > 63 {
                return refuse("must be at most 63 of a-z, 0-9 and -, beginning with a letter");
            }
            if hosts.iter().take(index).any(|other| what == "host" && other.name == *name) {
                return refuse("is used twice");
            }
        }
        if hosts.len() > network::HOSTS_MAX {
            let reason = format!("has {} hosts; at most {} fit", hosts.len(), network::HOSTS_MAX);
            return Err(Error::Name { what: "bed", name: self.state.name.clone(), reason });
        }
        Ok(())
    }
}

/// Hosts that run, with the network between them. Dropped, it takes them down; with `GREENLIGHT_BED_KEEP` set
/// it stays up when a test has panicked, to be looked at with `cargo xtask bed`.
#[derive(Debug)]
pub struct Bed {
    state: BedState,
    hosts: Vec<Host>,
}

impl Bed {
    /// Begins to describe a bed. The name is for people; of detached beds it is unique on the machine.
    pub fn builder(name: &str) -> BedBuilder {
        BedBuilder {
            state: BedState {
                name: name.into(),
                number: 0,
                owner: None,
                directory: PathBuf::new(),
                base: PathBuf::new(),
                hosts: Vec::new(),
                keep: false,
            },
            detached: false,
        }
    }

    /// A bed that another process brought up.
    pub fn open(name: &str) -> Result<Self, Error> {
        machine::check()?;
        let missing = || Error::Name { what: "bed", name: name.into(), reason: "does not exist".into() };
        Ok(Self::new(Registry::lock()?.find(name)?.ok_or_else(missing)?))
    }

    fn new(state: BedState) -> Self {
        let hosts = (0..state.hosts.len()).map(|index| Host::new(&state, index)).collect();
        Self { state, hosts }
    }

    /// The name under which `cargo xtask bed` knows it.
    pub fn name(&self) -> &str {
        &self.state.name
    }

    /// Its hosts, in the order in which they were asked for.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// One host; panics when the bed has none of this name.
    #[expect(clippy::panic, reason = "a test that names a host which it did not ask for is wrong itself")]
    pub fn host(&self, name: &str) -> &Host {
        self.find_host(name).unwrap_or_else(|| panic!("bed {} has no host {name}", self.state.name))
    }

    /// One host, if the bed has it.
    pub fn find_host(&self, name: &str) -> Option<&Host> {
        self.hosts.iter().find(|host| host.name() == name)
    }

    /// The controller's address, as the hosts see it.
    pub fn hub_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 99, self.state.number, 1)
    }

    /// The bed's own directory: ssh files, the controller's home, disks.
    pub fn directory(&self) -> &Path {
        &self.state.directory
    }

    /// The ssh configuration that knows every host by name.
    pub fn ssh_config(&self) -> PathBuf {
        self.state.directory.join("ssh_config")
    }

    /// The host keys of all hosts.
    pub fn known_hosts(&self) -> PathBuf {
        self.state.directory.join("known_hosts")
    }

    /// The private key that opens every host.
    pub fn identity(&self) -> PathBuf {
        self.state.directory.join("identity")
    }

    /// The controller's home directory: empty at first, and not the developer's.
    pub fn home(&self) -> PathBuf {
        self.state.directory.join("home")
    }

    /// A command that will run in the hub, where the controller stands: it reaches the hosts and nothing else.
    /// Its environment is clean: `HOME` is [`Bed::home`], and `ssh` reads [`Bed::ssh_config`].
    pub fn hub_command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", network::path(&network::hub(self.state.number)).display()));
        self.set_environment(command.arg("--").arg(program));
        command
    }

    /// As [`Bed::hub_command`], but in the machine's own network, which does not reach the hosts: for building
    /// releases whose steps fetch packages.
    pub fn machine_command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        self.set_environment(&mut command);
        command
    }

    /// Runs a program in the hub and returns what it printed; anything but success is an error.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String, Error> {
        run(self.hub_command(program).args(arguments))
    }

    /// Runs a command on a host over ssh from the hub, as the controller would. The words are joined by the
    /// host's shell, as ssh does.
    pub fn ssh(&self, host: &str, words: &[&str]) -> Result<String, Error> {
        run(self.hub_command("ssh").args(["-o", "BatchMode=yes", host, "--"]).args(words))
    }

    /// Runs a function on a thread in the hub's network.
    pub fn in_hub<T: Send>(&self, function: impl FnOnce() -> T + Send) -> Result<T, Error> {
        let namespace = network::hub(self.state.number);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| network::enter(&namespace).map(|()| function()));
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// One request from the hub on a connection of its own.
    pub fn request(&self, address: SocketAddr, request: &Request) -> Result<Response, Error> {
        Ok(self.in_hub(|| Connection::open(address, GET_TIMEOUT)?.send(request))??)
    }

    /// Bytes that have passed between the hub and its hosts since the bed came up, both ways, with all headers.
    pub fn network_bytes(&self) -> Result<u64, Error> {
        // Where a thread stands, not where the process does, is what this file shows.
        let path = "/proc/thread-self/net/dev";
        let text = self.in_hub(|| fs::read_to_string(path))?.map_err(Error::io("read", path))?;
        network::bridge_bytes(&text)
            .ok_or_else(|| Error::Machine { reason: "the hub has no bridge to count bytes at".into() })
    }

    /// The answer to a GET from the hub.
    pub fn get(&self, address: SocketAddr, path: &str) -> Result<Response, Error> {
        self.request(address, &Request::get(path))
    }

    pub(crate) fn hub_namespace(&self) -> String {
        network::hub(self.state.number)
    }

    /// Ends and removes all that belongs to the bed.
    pub fn down(mut self) -> Result<(), Error> {
        self.tear_down()
    }

    fn tear_down(&mut self) -> Result<(), Error> {
        self.hosts.clear();
        let registry = Registry::lock()?;
        // What fails now is tried again by the next bed after this process, not by the drop that follows.
        self.state.owner = None;
        self.state.tear_down(&registry)
    }

    fn detach(&mut self) -> Result<(), Error> {
        self.state.owner = None;
        Registry::lock()?.write(&self.state)
    }

    fn boot(&self) -> Result<(), Error> {
        let directory = &self.state.directory;
        for (path, mode) in [
            (directory.clone(), 0o755),
            (directory.join("hosts"), 0o755),
            (directory.join("bin"), 0o755),
            (self.home(), 0o700),
        ] {
            make_directory(&path, mode)?;
        }
        run(Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "bed", "-f"])
            .arg(self.identity()))?;
        let public = self.identity().with_extension("pub");
        let authorized_key = fs::read_to_string(&public).map_err(Error::io("read", &public))?;
        network::create_hub(self.state.number)?;
        let mut known_hosts = String::new();
        for (index, host) in self.hosts.iter().enumerate() {
            host.create_disk(&self.state, &authorized_key)?;
            known_hosts.push_str(&host.known_hosts_line()?);
            network::create_host(self.state.number, index, host.name())?;
        }
        write_file(&self.known_hosts(), 0o644, &known_hosts)?;
        write_file(&self.ssh_config(), 0o644, &self.ssh_config_text())?;
        write_file(&directory.join("bin/ssh"), 0o755, SSH_WRAPPER)?;
        self.hosts.iter().try_for_each(Host::start)?;
        self.hosts.iter().try_for_each(Host::wait_until_ready)
    }

    fn ssh_config_text(&self) -> String {
        let hosts: String = self
            .hosts
            .iter()
            .map(|host| format!("Host {}\n    HostName {}\n", host.name(), host.address()))
            .collect();
        let (identity, known_hosts) = (self.identity(), self.known_hosts());
        format!(
            "{hosts}Host *\n    User root\n    IdentityFile \"{}\"\n    IdentitiesOnly yes\n    \
             UserKnownHostsFile \"{}\"\n    StrictHostKeyChecking yes\n    LogLevel ERROR\n",
            identity.display(),
            known_hosts.display()
        )
    }

    fn set_environment(&self, command: &mut Command) {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let own = self.state.directory.join("bin");
        let joined = std::env::join_paths(std::iter::once(own).chain(std::env::split_paths(&path)));
        command.env_clear().env("HOME", self.home()).env("LANG", "C.UTF-8").env("TERM", "dumb");
        // The cache directory was checked to be free of what separates the entries of a PATH.
        command.env("PATH", joined.unwrap_or(path));
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let is_ours = self.state.owner.is_some_and(|owner| Process::current().is_ok_and(|own| own == owner));
        if !is_ours {
            return;
        }
        let keep = std::thread::panicking() && std::env::var_os("GREENLIGHT_BED_KEEP").is_some();
        let (name, result) = (self.state.name.clone(), if keep { self.detach() } else { self.tear_down() });
        // A drop has no other way to say it, and a closed standard error no other place to say it in.
        let _ = match result {
            Err(error) => writeln!(std::io::stderr(), "bed {name} could not be taken down: {error}"),
            Ok(()) if keep => {
                writeln!(std::io::stderr(), "bed {name} stays up: cargo xtask bed --name {name} ssh HOST")
            }
            Ok(()) => Ok(()),
        };
    }
}

fn raise_inotify_instances() -> Result<(), Error> {
    let path = INOTIFY_INSTANCES_FILE;
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    if text.trim().parse::<u32>().is_ok_and(|instances| instances < INOTIFY_INSTANCES) {
        fs::write(path, INOTIFY_INSTANCES.to_string()).map_err(Error::io("write", path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_names_that_would_reach_a_command_line_as_something_else() {
        for name in ["", "Web1", "-web1", "web 1", "web1\nlink", "../x", "1web", &"a".repeat(64)] {
            let error = Bed::builder("bed").host(name, Init::None).check_names().unwrap_err();
            assert!(error.to_string().contains("must be at most 63"), "{error}");
            Bed::builder(name).check_names().unwrap_err();
        }
        let twice = Bed::builder("bed").hosts(["a", "b", "a"], Init::None).check_names().unwrap_err();
        assert!(twice.to_string().contains("used twice"), "{twice}");
        Bed::builder("a").hosts(["a", "web-1"], Init::None).check_names().unwrap();
    }
}
