//! What can go wrong with a bed, said so that a developer knows what to do now.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a bed could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Namespaces and mounts need root.
    #[error("the test bed needs root for its namespaces and mounts; run it as root, or: sudo -E {command}")]
    NotRoot {
        /// The command line of this process.
        command: String,
    },
    /// A program is not installed.
    #[error("the test bed needs {tools}; install with: apt-get install --yes {packages}")]
    MissingTools {
        /// Programs that are not on the PATH.
        tools: String,
        /// The packages that bring them.
        packages: String,
    },
    /// The machine cannot carry a bed.
    #[error("this machine cannot carry a test bed: {reason}")]
    Machine {
        /// What it lacks, and what to do.
        reason: String,
    },
    /// A name that cannot be a host name, or is taken.
    #[error("{what} {name:?} {reason}")]
    Name {
        /// What the name is for.
        what: &'static str,
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file operation failed.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// The verb: read, write, create.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program could not be started.
    #[error("cannot start {command}: {source}")]
    Start {
        /// The whole command line.
        command: String,
        /// What the system said.
        source: io::Error,
    },
    /// A program ended with an error.
    #[error("{command} failed: {status}\n{output}")]
    Failed {
        /// The whole command line.
        command: String,
        /// How it ended.
        status: String,
        /// The end of what it printed.
        output: String,
    },
    /// A host did not boot.
    #[error("host {host} did not boot: {reason}\n{console}")]
    Boot {
        /// The host.
        host: String,
        /// What happened.
        reason: String,
        /// The end of its console.
        console: String,
    },
    /// A host is not running, or runs when it should not.
    #[error("host {host} is {state}")]
    HostState {
        /// The host.
        host: String,
        /// How it is.
        state: &'static str,
    },
    /// Something did not happen in time.
    #[error("waited {} s for {what}; the last answer was: {last}", waited.as_secs())]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
        /// The last thing seen instead.
        last: String,
    },
    /// A system call on a process or namespace failed.
    #[error("cannot {doing}: {source}")]
    System {
        /// What was being done, to what.
        doing: String,
        /// What the system said.
        source: io::Error,
    },
    /// An HTTP answer could not be had.
    #[error(transparent)]
    Http(#[from] crate::http::HttpError),
}

impl Error {
    /// For `map_err` after a file operation.
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { doing, path, source }
    }

    /// For `map_err` after any other system call.
    pub(crate) fn system(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let doing = doing.into();
        move |source| Error::System { doing, source }
    }
}
