//! Room on the disk: how much a change needs, and what to tell whoever finds none.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use greenlight_link::message::{AgentError, Request};
use greenlight_model::host::InstanceSpec;
use greenlight_model::quantity::ByteSize;

use crate::layout::Layout;
use crate::observe;

/// What a switch writes is a ledger, a run, units and first lines of logs: some hundred kilobytes.
pub(crate) const FREE_BYTES_MIN: u64 = 1024 * 1024;

/// Adds to a change that failed, on a file system without the room for it, which one that is and how room is made there.
pub(crate) fn explain(request: &Request, error: AgentError) -> AgentError {
    let spec: &InstanceSpec = match request {
        Request::Claim { spec, .. }
        | Request::Unclaim { spec, .. }
        | Request::Migrate { spec, .. }
        | Request::Confirm { spec, .. } => spec,
        Request::Activate { desired, .. } => &desired.spec,
        // What is staged says itself what it has no room for; the others change nothing.
        _ => return error,
    };
    let layout = Layout::new(&spec.root);
    match observe::free_bytes(layout.root()) {
        Ok(free) if free < FREE_BYTES_MIN => {
            AgentError { message: format!("{}; {}", error.message, why(&layout, free)), ..error }
        }
        // There is room, or nobody can say: it failed for what it says.
        _ => error,
    }
}

/// Which file system is full, and what can be removed from it. Completes a sentence.
fn why(layout: &Layout, free: u64) -> String {
    let releases = fs::read_dir(layout.releases()).map_or(0, |entries| entries.flatten().count());
    format!(
        "the file system {} is full ({} free, a change needs {}): make room there and try again. {} has {releases} releases, of which a \
         rollout that ends well leaves the last `keep_releases`",
        mount_point(layout.root()).display(),
        ByteSize(free),
        ByteSize(FREE_BYTES_MIN),
        layout.releases().display(),
    )
}

/// Where the file system begins that a path is, or will be, on.
fn mount_point(path: &Path) -> &Path {
    let device = |path: &Path| fs::metadata(path).ok().map(|metadata| metadata.dev());
    let existing = observe::existing_ancestor(path);
    let own = device(existing);
    existing.ancestors().take_while(|ancestor| device(ancestor) == own).last().unwrap_or(existing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_is_named_by_where_it_begins() {
        assert_eq!(mount_point(Path::new("/proc/self/none/such")), Path::new("/proc"));
        assert_eq!(mount_point(Path::new("/")), Path::new("/"));
    }
}
