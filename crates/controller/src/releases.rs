//! The releases that can be named: those of the depot, and those of rollouts that were taken over from elsewhere.

use std::collections::BTreeMap;

use greenlight_depot::{Depot, DepotError};
use greenlight_model::charter::Charter;
use greenlight_model::history::History;
use greenlight_model::id::ReleaseId;
use greenlight_model::manifest::Release;
use greenlight_model::rollout::Rollout;

/// Every release that the depot or the records know.
///
/// # Errors
/// When the depot cannot be read.
pub fn known_releases(depot: &Depot, history: &History) -> Result<Vec<Release>, DepotError> {
    let mut releases = depot.releases()?;
    for (id, release) in &history.releases {
        if !releases.iter().any(|known| known.id == *id) {
            releases.push(release.clone());
        }
    }
    Ok(releases)
}

/// What a rollout's hosts are to keep of it.
pub(crate) fn charter(rollout: &Rollout, releases: &[Release], history: &History) -> Charter {
    let plan = rollout.plan.clone();
    let needed = plan.targets.values().chain(plan.baseline.values().flatten()).copied();
    let needed: std::collections::BTreeSet<ReleaseId> = needed.collect();
    let of_rollout = releases.iter().filter(|release| needed.contains(&release.id));
    let releases: BTreeMap<ReleaseId, Release> =
        of_rollout.map(|release| (release.id, release.clone())).collect();
    let definition = |release: &ReleaseId| {
        let service = history.definitions.get(&(plan.environment.clone(), *release))?;
        Some((*release, service.clone()))
    };
    let definitions = needed.iter().filter_map(definition).collect();
    Charter { started_at: rollout.started_at, releases, definitions, plan }
}
