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
    fn finds_the_unified_hierarchy() {
        let pure = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        let hybrid =
            "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(unified(pure), Some("/sys/fs/cgroup"));
        assert_eq!(unified(hybrid), Some("/sys/fs/cgroup/unified"));
        assert_eq!(unified("proc /proc proc rw 0 0\n"), None);
    }
}
