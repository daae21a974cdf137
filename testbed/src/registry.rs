//! Which beds exist on this machine, so that names and addresses do not meet, and what a killed process left
//! behind is found and cleared.
//!
//! One file per bed below `/run`, which is emptied at a boot of the machine exactly like the processes and
//! namespaces that the files speak of. All changes are made under one lock.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::host::Init;
use crate::process::Process;
use crate::{Error, base, cgroup, machine, network};

const DIRECTORY: &str = "/run/greenlight-bed";

/// A bed as the machine knows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BedState {
    /// The name it was given.
    pub name: String,
    /// Its number on this machine, the third byte of its addresses.
    pub number: u8,
    /// The process that it ends with; `None` for one that stays until it is taken down.
    pub(crate) owner: Option<Process>,
    /// Disks, keys and ssh configuration.
    pub directory: PathBuf,
    /// The base root that its hosts stand on.
    pub base: PathBuf,
    /// Its hosts, in the order of their addresses.
    pub hosts: Vec<HostState>,
    /// Whether the directory stays when the bed is taken down.
    pub keep: bool,
}

/// A host as its bed was asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostState {
    /// Its name, unique in the bed.
    pub name: String,
    /// What runs as process 1.
    pub init: Init,
    /// Where it answers.
    pub address: Ipv4Addr,
}

impl BedState {
    /// Whether nothing will take this bed down any more.
    fn is_abandoned(&self) -> bool {
        self.owner.is_some_and(|owner| !owner.is_alive())
    }

    /// Whether the bed stays until it is taken down by name.
    pub fn is_detached(&self) -> bool {
        self.owner.is_none()
    }

    /// Ends and removes all that belongs to the bed, its entry last. What is gone already is no error.
    pub(crate) fn tear_down(&self, registry: &Registry) -> Result<(), Error> {
        for host in &self.hosts {
            network::remove(&network::host(self.number, &host.name))?;
            cgroup::remove(&control_group(self.number, &host.name))?;
        }
        network::remove(&network::hub(self.number))?;
        if !self.keep {
            base::remove(&self.directory)?;
        }
        registry.remove(self.number)
    }
}

/// The name of a host's control group.
pub(crate) fn control_group(number: u8, host: &str) -> String {
    format!("{number}-{host}")
}

/// All beds on this machine.
pub fn states() -> Result<Vec<BedState>, Error> {
    Registry::lock()?.states()
}

/// Takes down every bed that stays until then, and what killed processes left. Beds whose process runs still
/// are left alone. Returns the names of what was taken down.
pub fn down_all() -> Result<Vec<String>, Error> {
    machine::check()?;
    let registry = Registry::lock()?;
    let mut names = Vec::new();
    for state in registry.states()?.into_iter().filter(|state| state.is_detached() || state.is_abandoned()) {
        BedState { keep: false, ..state.clone() }.tear_down(&registry)?;
        names.push(state.name);
    }
    registry.remove_stray_disks()?;
    Ok(names)
}

/// The registry, locked against other processes for as long as this value lives.
pub(crate) struct Registry {
    _lock: File,
}

impl Registry {
    pub(crate) fn lock() -> Result<Self, Error> {
        fs::create_dir_all(DIRECTORY).map_err(Error::io("create", DIRECTORY))?;
        let path = Path::new(DIRECTORY).join("lock");
        let lock = File::create(&path).map_err(Error::io("create", &path))?;
        lock.lock().map_err(Error::io("lock", &path))?;
        Ok(Self { _lock: lock })
    }

    pub(crate) fn states(&self) -> Result<Vec<BedState>, Error> {
        let mut states = Vec::new();
        for entry in fs::read_dir(DIRECTORY).map_err(Error::io("read", DIRECTORY))? {
            let path = entry.map_err(Error::io("read", DIRECTORY))?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
                let state: BedState =
                    serde_json::from_slice(&bytes).map_err(|error| Error::io("read", &path)(error.into()))?;
                states.push(state);
            }
        }
        states.sort_by_key(|state| state.number);
        Ok(states)
    }

    pub(crate) fn find(&self, name: &str) -> Result<Option<BedState>, Error> {
        Ok(self.states()?.into_iter().find(|state| state.name == name))
    }

    pub(crate) fn write(&self, state: &BedState) -> Result<(), Error> {
        let (path, written) = (entry(state.number), entry(state.number).with_extension("new"));
        let text =
            serde_json::to_vec_pretty(state).map_err(|error| Error::io("write", &path)(error.into()))?;
        fs::write(&written, text).map_err(Error::io("write", &written))?;
        fs::rename(&written, &path).map_err(Error::io("rename", &written))
    }

    /// Clears what killed processes left, then enters a new bed under the next free number. One that ends
    /// with its process gets the number behind its name: tests of one name run side by side.
    pub(crate) fn reserve(&self, mut state: BedState, detached: bool) -> Result<BedState, Error> {
        for abandoned in self.states()?.iter().filter(|state| state.is_abandoned()) {
            abandoned.tear_down(self)?;
        }
        self.remove_stray_disks()?;
        let states = self.states()?;
        let taken =
            |reason: &str| Error::Name { what: "bed", name: state.name.clone(), reason: reason.into() };
        if detached && states.iter().any(|other| other.name == state.name) {
            return Err(taken(
                "exists already; see cargo xtask bed status, end it with cargo xtask bed down",
            ));
        }
        let last = self.last_number();
        let after = network::BED_NUMBERS.filter(|number| *number > last);
        state.number = after
            .chain(network::BED_NUMBERS)
            .find(|number| states.iter().all(|other| other.number != *number))
            .ok_or_else(|| taken("finds no free number; 254 beds run at once"))?;
        if !detached {
            state.name = format!("{}-{}", state.name, state.number);
        }
        state.directory = beds_directory().join(state.number.to_string());
        for (index, host) in state.hosts.iter_mut().enumerate() {
            host.address = network::address(state.number, index);
        }
        base::remove(&state.directory)?;
        self.write(&state)?;
        let path = last_number_file();
        fs::write(&path, state.number.to_string()).map_err(Error::io("write", &path))?;
        Ok(state)
    }

    /// The number given last. They go round, so that what speaks of a bed that is gone does not speak of the next.
    fn last_number(&self) -> u8 {
        fs::read_to_string(last_number_file()).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    fn remove(&self, number: u8) -> Result<(), Error> {
        let path = entry(number);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", &path)(error))
            }
            _ => Ok(()),
        }
    }

    /// Disks without an entry: kept ones, and those of beds that ended with the machine.
    fn remove_stray_disks(&self) -> Result<(), Error> {
        let known: Vec<_> = self.states()?.into_iter().map(|state| state.directory).collect();
        let beds = beds_directory();
        let entries = match fs::read_dir(&beds) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(Error::io("read", &beds))?,
        };
        for entry in entries {
            let path = entry.map_err(Error::io("read", &beds))?.path();
            if !known.contains(&path) {
                base::remove(&path)?;
            }
        }
        Ok(())
    }
}

fn entry(number: u8) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{number}.json"))
}

fn last_number_file() -> PathBuf {
    Path::new(DIRECTORY).join("last")
}

fn beds_directory() -> PathBuf {
    machine::cache_directory().join("beds")
}
