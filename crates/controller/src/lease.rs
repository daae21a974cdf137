//! One controller per environment on this machine, by a lock that the kernel drops with the process: nothing to
//! unlock by hand, whatever killed it. Across machines the claims on the hosts decide.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;

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
        let path = directory.join(format!("controller-{environment}"));
        let failed = |source| LeaseError::File { path: path.display().to_string(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                (&mut file).take(20).read_to_string(&mut pid).map_err(failed)?;
                return Err(LeaseError::Taken {
                    environment: environment.clone(),
                    pid: pid.trim().to_owned(),
                });
            }
            Err(errno) => return Err(failed(errno.into())),
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { _file: file })
    }
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
        drop(lease);
        ControllerLease::take(directory.path(), &environment).unwrap();
    }
}
