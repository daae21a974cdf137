//! How each release was last run on this host. Processes are stopped as they were started, whatever the fleet file says by then; and
//! going back to a release runs it as it ran.

use std::path::Path;

use greenlight_model::fleet::ManagerKind;
use greenlight_model::host::Desired;
use greenlight_model::id::{ContentHash, ReleaseId};
use serde::{Deserialize, Serialize};

use crate::environment::ENVIRONMENT_BYTES_MAX;
use crate::failure::{OrHost as _, Outcome, host};
use crate::files;
use crate::layout::Layout;

/// The version of the form that this build writes.
const RUN_VERSION: u32 = 1;
/// A desired state has some kilobytes.
const RUN_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// How a release was last run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Run {
    version: u32,
    /// The whole desired state.
    pub(crate) desired: Desired,
    /// What ran the processes: never `Auto`.
    pub(crate) manager: ManagerKind,
    /// The hash of the secrets' file, so that changed secrets are noticed.
    pub(crate) secrets: Option<ContentHash>,
}

impl Run {
    pub(crate) fn new(desired: Desired, manager: ManagerKind, secrets: Option<ContentHash>) -> Self {
        Self { version: RUN_VERSION, desired, manager, secrets }
    }

    /// Whether running `other` would be the same: only the numbers that fence may differ.
    pub(crate) fn is_same_as(&self, other: &Self) -> bool {
        self.desired.release == other.desired.release
            && self.desired.spec == other.desired.spec
            && self.manager == other.manager
            && self.secrets == other.secrets
    }

    /// How the release was last run here; none when it never was.
    pub(crate) fn load(layout: &Layout, release: ReleaseId) -> Outcome<Option<Self>> {
        Self::load_from(&layout.run(release))
    }

    /// The same from a file.
    pub(crate) fn load_from(path: &Path) -> Outcome<Option<Self>> {
        let read =
            files::read_if_there(path, RUN_BYTES_MAX).or_host(|| format!("read {}", path.display()))?;
        let Some(bytes) = read else { return Ok(None) };
        let run: Self = serde_json::from_slice(&bytes).map_err(|error| {
            host(format!("{} is damaged or of a newer greenlight: {error}", path.display()))
        })?;
        if run.version > RUN_VERSION {
            let known = RUN_VERSION;
            return Err(host(format!(
                "{} was written by a newer greenlight (version {}; this one knows {known})",
                path.display(),
                run.version
            )));
        }
        Ok(Some(run))
    }

    /// Keeps it, for its release.
    pub(crate) fn store(&self, layout: &Layout, release: ReleaseId) -> Outcome<()> {
        let directory = layout.runs();
        files::create_directory(&directory, 0o700).or_host(|| format!("create {}", directory.display()))?;
        self.store_at(&layout.run(release))
    }

    /// The same in a file.
    pub(crate) fn store_at(&self, path: &Path) -> Outcome<()> {
        let bytes = serde_json::to_vec(self).or_host(|| "write the desired state as JSON".to_owned())?;
        files::write_atomically(path, &bytes, 0o600, None).or_host(|| format!("write {}", path.display()))
    }
}

/// The hash of a release's secrets as they are on this host now.
pub(crate) fn secrets_hash(layout: &Layout, release: ReleaseId) -> Outcome<Option<ContentHash>> {
    let path = layout.secrets(release);
    let bytes =
        files::read_if_there(&path, ENVIRONMENT_BYTES_MAX).or_host(|| format!("read {}", path.display()))?;
    Ok(bytes.map(|bytes| ContentHash::from_bytes(*blake3::hash(&bytes).as_bytes())))
}
