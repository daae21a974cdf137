//! The charter of the rollout that claimed an instance last: kept for a controller that has no records of it.
//!
//! Guarantees: what is kept is whole or not there; it is the claim's rollout's, or an older one's, which whoever reads it
//! tells by its id.

use greenlight_model::charter::Charter;

use crate::failure::{OrHost as _, Outcome};
use crate::files;
use crate::layout::Layout;

/// Some hundred bytes for each instance of a rollout.
const CHARTER_BYTES_MAX: u64 = 64 * 1024 * 1024;

pub(crate) fn keep(layout: &Layout, charter: &Charter) -> Outcome<()> {
    let path = layout.charter();
    let bytes = serde_json::to_vec(charter).or_host(|| "write the rollout's charter as JSON".to_owned())?;
    files::write_atomically(&path, &bytes, 0o600, None)
        .or_host(|| format!("write the rollout's charter {}", path.display()))
}

pub(crate) fn load(layout: &Layout) -> Outcome<Option<Box<Charter>>> {
    let path = layout.charter();
    let read = files::read_if_there(&path, CHARTER_BYTES_MAX)
        .or_host(|| format!("read the rollout's charter {}", path.display()))?;
    read.map(|bytes| serde_json::from_slice(&bytes))
        .transpose()
        .or_host(|| format!("understand the rollout's charter {}", path.display()))
}
