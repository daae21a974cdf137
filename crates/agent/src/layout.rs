//! Where things are under a service's root on a host.

use std::path::{Path, PathBuf};

use greenlight_model::id::{ProcessName, ReleaseId};

/// The paths under one service's root.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
}

impl Layout {
    pub(crate) fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The switch: a symbolic link into `releases`.
    pub(crate) fn current(&self) -> PathBuf {
        self.root.join("current")
    }

    pub(crate) fn releases(&self) -> PathBuf {
        self.root.join("releases")
    }

    pub(crate) fn release(&self, id: ReleaseId) -> PathBuf {
        self.releases().join(id.to_string())
    }

    pub(crate) fn shared(&self) -> PathBuf {
        self.root.join("shared")
    }

    /// What belongs to the agent. Traversable, so that what lies below can be given to a process's account.
    pub(crate) fn state(&self) -> PathBuf {
        self.root.join(".greenlight")
    }

    pub(crate) fn ledger(&self) -> PathBuf {
        self.state().join("ledger")
    }

    /// Held while the ledger is read, changed and written.
    pub(crate) fn ledger_lock(&self) -> PathBuf {
        self.state().join("ledger.lock")
    }

    /// Held while the instance is being changed.
    pub(crate) fn change_lock(&self) -> PathBuf {
        self.state().join("lock")
    }

    /// How each release was last run.
    pub(crate) fn runs(&self) -> PathBuf {
        self.state().join("runs")
    }

    pub(crate) fn run(&self, id: ReleaseId) -> PathBuf {
        self.runs().join(format!("{id}.json"))
    }

    /// Only the agent's account may look inside.
    pub(crate) fn secrets_directory(&self) -> PathBuf {
        self.state().join("secrets")
    }

    pub(crate) fn secrets(&self, id: ReleaseId) -> PathBuf {
        self.secrets_directory().join(format!("{id}.env"))
    }

    /// Environment files that a process's own account reads (supervisord).
    pub(crate) fn environments(&self) -> PathBuf {
        self.state().join("environment")
    }

    pub(crate) fn environment(&self, process: &ProcessName) -> PathBuf {
        self.environments().join(format!("{process}.env"))
    }

    /// What the agent's own supervision keeps of a process.
    pub(crate) fn supervised(&self, process: &ProcessName) -> PathBuf {
        self.state().join("supervised").join(process.as_str())
    }

    /// The charter of the rollout that claimed the instance last.
    pub(crate) fn charter(&self) -> PathBuf {
        self.state().join("charter.json")
    }

    /// What an armed guard needs; only the agent's account may look inside.
    pub(crate) fn guard(&self) -> PathBuf {
        self.state().join("guard")
    }

    /// What supervisord, at a boot, keeps of what went wrong with the guard.
    pub(crate) fn at_boot_log(&self) -> PathBuf {
        self.state().join("at-boot.log")
    }

    /// Outputs of a smoke start, as long as it lasts.
    pub(crate) fn smoke(&self) -> PathBuf {
        self.state().join("smoke")
    }

    /// A path that the fleet file states relative to the root, such as a log.
    pub(crate) fn under_root(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }
}
