//! A control group per host, in the unified hierarchy: systemd as process 1 wants one of its own.
//!
//! Works where the unified hierarchy is the only one, and where it is mounted beside those of version 1.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use crate::{Error, wait};

/// How long a group may stay busy after the last of its processes was killed.
const EMPTY_DEADLINE: Duration = Duration::from_secs(10);

/// The group under which those of all beds stand.
const PARENT: &str = "greenlight-bed";

/// The group of one host, which need not exist.
pub(crate) fn path(name: &str) -> Result<PathBuf, Error> {
    Ok(mount_point()?.join(PARENT).join(name))
}

/// Processor time that the processes of a group, and of those below it, have taken.
pub(crate) fn processor_time(name: &str) -> Result<Duration, Error> {
    let path = path(name)?.join("cpu.stat");
    let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    usage(&text).ok_or_else(|| Error::Machine {
        reason: format!("{} does not say how much processor time was taken", path.display()),
    })
}

fn usage(text: &str) -> Option<Duration> {
    let taken = text.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
    taken.parse().ok().map(Duration::from_micros)
}

/// A control group for whatever a bench starts, and what it costs.
#[derive(Debug)]
pub struct Group {
    name: String,
    path: PathBuf,
}

impl Group {
    /// Makes a group of this name, which no other process uses at the same time.
    ///
    /// # Errors
    /// When the unified hierarchy is not mounted, or the group cannot be made.
    pub fn create(name: &str) -> Result<Self, Error> {
        let path = path(name)?;
        fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        Ok(Self { name: name.to_owned(), path })
    }

    /// The file that a process writes its id (or 0) to in order to join.
    #[must_use]
    pub fn processes_file(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// Processor time that all of its processes have taken, those that have ended too.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn processor_time(&self) -> Result<Duration, Error> {
        processor_time(&self.name)
    }

    /// Bytes of memory that its processes have resident now. What several of them share is counted for each.
    ///
    /// # Errors
    /// When the kernel does not say which processes it has.
    pub fn resident_bytes(&self) -> Result<u64, Error> {
        let path = self.processes_file();
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let page = u64::try_from(rustix::param::page_size()).unwrap_or(4096);
        let resident = text.lines().filter_map(|id| {
            // One that has ended meanwhile has none.
            let statm = fs::read_to_string(format!("/proc/{id}/statm")).ok()?;
            statm.split(' ').nth(1)?.parse::<u64>().ok()
        });
        Ok(resident.sum::<u64>() * page)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // One that is still busy stays, empty of meaning; the next bench uses it again.
        let _ = remove_tree(&self.path);
    }
}

/// Removes a group with all below it. Its processes must have been killed.
pub(crate) fn remove(name: &str) -> Result<(), Error> {
    let path = path(name)?;
    wait::until(&format!("control group {} to be empty", path.display()), EMPTY_DEADLINE, || {
        remove_tree(&path).map_err(|error| error.to_string())
    })?;
    if let Some(parent) = path.parent() {
        // Stays while another bed has groups in it.
        let _ = fs::remove_dir(parent);
    }
    Ok(())
}

fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

fn mount_point() -> Result<PathBuf, Error> {
    let path = "/proc/self/mounts";
    let mounts = fs::read_to_string(path).map_err(Error::io("read", path))?;
    unified(&mounts).map(PathBuf::from).ok_or_else(|| Error::Machine {
        reason: "no unified control group hierarchy is mounted; try: mount -t cgroup2 none /sys/fs/cgroup"
            .into(),
    })
}

fn unified(mounts: &str) -> Option<&str> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (path, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2").then_some(path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_was_taken() {
        let text = "usage_usec 2309257\nuser_usec 1929771\nsystem_usec 379486\n";
        assert_eq!(usage(text), Some(Duration::from_micros(2_309_257)));
        assert_eq!(usage("user_usec 1\n"), None);
    }

    #[test]
    fn finds_the_unified_hierarchy() {
        let pure = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        let hybrid =
            "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(unified(pure), Some("/sys/fs/cgroup"));
        assert_eq!(unified(hybrid), Some("/sys/fs/cgroup/unified"));
        assert_eq!(unified("proc /proc proc rw 0 0\n"), None);
    }
}
