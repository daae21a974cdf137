//! One controller per environment on this machine, by a lock that the kernel drops with the process: nothing to
//! unlock by hand, whatever killed it. Across machines the claims on the hosts decide.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use greenlight_model::id::EnvironmentName;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// The right to drive an environment's rollout from this machine; it ends with the value or the process.
#[derive(Debug)]
pub struct ControllerLease {
    _file: File,
}

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// Another controller on this machine drives the environment.
    #[error("another controller on this machine (process {pid}) drives {environment}")]
    Taken {
        /// The environment.
        environment: EnvironmentName,
        /// Its process id, as it wrote it.
        pid: String,
    },
    /// The lease's file could not be used.
    #[error("cannot use {path}")]
    File {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl ControllerLease {
    /// Takes the lease, or says who has it.
    ///
    /// # Errors
    /// When another process has it, or the file under `directory` cannot be written.
    pub fn take(directory: &Path, environment: &EnvironmentName) -> Result<Self, LeaseError> {
        let path = path(directory, environment);
        let failed = |source| LeaseError::File { path: path.display().to_string(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        while !try_lock(&file, FlockOperation::NonBlockingLockExclusive).map_err(failed)? {
            // One who only looks holds it shared, for a moment; one who drives the environment lets nobody share it.
            if !try_lock(&file, FlockOperation::NonBlockingLockShared).map_err(failed)? {
                let pid = written(&mut file).map_err(failed)?;
                return Err(LeaseError::Taken { environment: environment.clone(), pid });
            }
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { _file: file })
    }

    /// The process id of the controller of this machine that drives the environment now, when one does.
    ///
    /// # Errors
    /// When the file under `directory` cannot be read.
    pub fn holder(directory: &Path, environment: &EnvironmentName) -> Result<Option<String>, LeaseError> {
        let path = path(directory, environment);
        let failed = |source| LeaseError::File { path: path.display().to_string(), source };
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        match try_lock(&file, FlockOperation::NonBlockingLockShared).map_err(failed)? {
            true => Ok(None),
            false => written(&mut file).map(Some).map_err(failed),
        }
    }
}

fn path(directory: &Path, environment: &EnvironmentName) -> PathBuf {
    directory.join(format!("controller-{environment}"))
}

fn try_lock(file: &File, operation: FlockOperation) -> std::io::Result<bool> {
    match flock(file, operation) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// The process id in the file, as its holder wrote it.
fn written(file: &mut File) -> std::io::Result<String> {
    let mut pid = String::new();
    file.take(20).read_to_string(&mut pid)?;
    Ok(pid.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_controller_is_told_who_the_first_is() {
        let directory = tempfile::tempdir().unwrap();
        let environment = "production".parse().unwrap();
        let lease = ControllerLease::take(directory.path(), &environment).unwrap();
        let refused = ControllerLease::take(directory.path(), &environment).unwrap_err();
        assert!(matches!(refused, LeaseError::Taken { pid, .. } if pid == std::process::id().to_string()));
        let holder = || ControllerLease::holder(directory.path(), &environment).unwrap();
        assert_eq!(holder(), Some(std::process::id().to_string()));
        drop(lease);
        assert_eq!(holder(), None);
        ControllerLease::take(directory.path(), &environment).unwrap();
        assert_eq!(
            ControllerLease::holder(directory.path(), &"other".parse().unwrap()).unwrap(),
            None,
            "nobody ever drove it"
        );
    }
}
