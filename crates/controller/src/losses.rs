//! What the migrations of a plan take away, read from the releases in the depot: what is new in their files since the releases
//! that hosts run now. Reading is done here; what a file says is judged by `migration`.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_depot::{Depot, DepotError};
use greenlight_migration::{Finding, findings, new_findings};
use greenlight_model::fleet::Migration;
use greenlight_model::id::{ReleaseId, ServiceName};
use greenlight_model::migration::{Loss, MigrationPhase};

/// What a release's migration takes away from a database on which the releases of `before` ran; where none did, all that its
/// files say.
///
/// # Errors
/// When the release cannot be read. An earlier one that is not in the depot any more is taken for none.
pub fn losses(
    depot: &Depot,
    service: &ServiceName,
    migration: &Migration,
    release: ReleaseId,
    before: &BTreeSet<ReleaseId>,
) -> Result<Vec<Loss>, DepotError> {
    let mut found = Vec::new();
    for phase in MigrationPhase::ALL {
        let patterns = migration.files(phase);
        if patterns.is_empty() {
            // Taking away is what this part is for; what it does in this release nobody has said.
            found.extend(migration.contract.iter().filter(|_| phase == MigrationPhase::Contract).map(
                |argv| Loss {
                    service: service.clone(),
                    phase,
                    place: "contract".to_owned(),
                    statement: argv.join(" "),
                    what: "takes away what older code needs; `contract_files` could say what".to_owned(),
                },
            ));
            continue;
        }
        let mut former = Vec::new();
        for id in before.iter().filter(|id| **id != release) {
            match depot.texts(*id, patterns) {
                Ok(texts) => former.push(texts),
                Err(DepotError::NoRelease { .. }) => former.push(BTreeMap::new()),
                Err(error) => return Err(error),
            }
        }
        if former.is_empty() && !before.is_empty() {
            continue;
        }
        for (path, text) in depot.texts(release, patterns)? {
            let text = match text {
                Ok(text) => text,
                Err(why) => {
                    let statement = "the file cannot be read".to_owned();
                    let place = path.clone();
                    found.push(Loss { service: service.clone(), phase, place, statement, what: why });
                    continue;
                }
            };
            let mut new: BTreeMap<(usize, String), Finding> = BTreeMap::new();
            let mut note = |all: Vec<Finding>| {
                new.extend(
                    all.into_iter().map(|finding| ((finding.line, finding.statement.clone()), finding)),
                );
            };
            if former.is_empty() {
                note(findings(&path, &text));
            }
            for texts in &former {
                match texts.get(&path) {
                    Some(Ok(before)) => note(new_findings(&path, before, &text)),
                    Some(Err(_)) | None => note(findings(&path, &text)),
                }
            }
            found.extend(new.into_values().map(|Finding { line, statement, what }| Loss {
                service: service.clone(),
                phase,
                place: format!("{path}:{line}"),
                statement,
                what,
            }));
        }
    }
    Ok(found)
}
