//! What somebody wrote into the active release: edits that a deployment would undo, and data that it would lose.

use std::collections::BTreeSet;

use greenlight_depot::host::{ChangeKind, HostDepot, LocalChange};
use greenlight_model::check::Check;
use greenlight_model::id::ReleaseId;

use super::{Found, conclude, wrong};
use crate::failure::{OrHost as _, Outcome};
use crate::layout::Layout;
use crate::ledger;
use crate::observe;

/// How many paths a message names.
const PATHS_SHOWN_MAX: usize = 5;

/// What somebody wrote into the active release: data that the next release would not have, and edits that would be lost.
pub(crate) fn local_changes(layout: &Layout) -> Vec<Check> {
    let changes = (|| {
        let active = match ledger::load(layout)?.active {
            Some(active) => Some(active),
            None => observe::linked(layout)?,
        };
        match (active, observe::depot(layout)?) {
            (Some(active), Some(depot)) => changes_in(&depot, active),
            _ => Ok(Vec::new()),
        }
    })();
    let changes = match changes {
        Ok(changes) => changes,
        Err(error) => return vec![conclude("data", Err(error))],
    };
    let (added, edited): (Vec<_>, Vec<_>) =
        changes.into_iter().partition(|change| change.kind == ChangeKind::Added);
    let data = match added.is_empty() {
        true => Ok("none".to_owned()),
        false => Err(wrong(
            format!(
                "{} were written into the active release and would be missing in the next one",
                listed(&added)
            ),
            format!(
                "keep them outside of releases: shared = [{}] in the fleet file, and move them to {} on this host",
                shared_paths(&added),
                layout.shared().display()
            ),
        )),
    };
    let edits = match edited.is_empty() {
        true => Ok("none".to_owned()),
        false => Err(wrong(
            format!("{} differ from what was released", listed(&edited)),
            "take the edits over into the repository, or undo them on this host",
        )),
    };
    vec![
        conclude("data", Ok(Found::new("no data inside the active release", data))),
        conclude("local edits", Ok(Found::new("the active release as it was staged", edits))),
    ]
}

fn changes_in(depot: &HostDepot, active: ReleaseId) -> Outcome<Vec<LocalChange>> {
    depot.local_changes(active).or_host(|| "compare the active release with what was staged".to_owned())
}

fn listed(changes: &[LocalChange]) -> String {
    let shown: Vec<&str> = changes.iter().take(PATHS_SHOWN_MAX).map(|change| change.path.as_str()).collect();
    match changes.len().saturating_sub(PATHS_SHOWN_MAX) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// The paths as the fleet file would name them; what lies in a directory that was added is covered by it.
fn shared_paths(added: &[LocalChange]) -> String {
    let all: BTreeSet<&str> = added.iter().map(|change| change.path.as_str()).collect();
    let is_covered = |path: &str| path.match_indices('/').any(|(at, _)| all.contains(&path[..at]));
    let has_more_below = |path: &str| {
        all.iter().any(|other| other.strip_prefix(path).is_some_and(|rest| rest.starts_with('/')))
    };
    let shown = all.iter().filter(|path| !is_covered(path)).take(PATHS_SHOWN_MAX);
    shown
        .map(|path| format!("\"{path}{}\"", if has_more_below(path) { "/" } else { "" }))
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_proposed_as_the_fleet_file_names_them() {
        let change = |path: &str| LocalChange { path: path.to_owned(), kind: ChangeKind::Added };
        let added = ["app.db", "var", "var/a", "var/b", "x/y"].map(change);
        assert_eq!(shared_paths(&added), r#""app.db", "var/", "x/y""#);
    }
}
