//! `migration`: what takes something away from a database needs a copy of it and somebody who agrees. Nothing states this gate: it
//! is there where a migration does so.

use std::collections::BTreeSet;

use greenlight_model::evidence::Fact;
use greenlight_model::id::ServiceName;
use greenlight_model::migration::{Loss, MigrationPhase};
use greenlight_model::world::{Gate, Light};

use crate::{Asked, some};

pub(crate) fn gates(asked: &Asked<'_>) -> Vec<Gate> {
    let open: Vec<&Loss> = asked.losses.iter().filter(|loss| !is_done(asked, loss)).collect();
    let services: BTreeSet<&ServiceName> = open.iter().map(|loss| &loss.service).collect();
    let of = |service: &ServiceName| {
        open.iter().copied().filter(|loss| loss.service == *service).collect::<Vec<_>>()
    };
    services
        .into_iter()
        .map(|service| Gate {
            name: format!("migration ({service})"),
            light: light(asked, service, &of(service)),
        })
        .collect()
}

/// What was taken away cannot be taken away again.
fn is_done(asked: &Asked<'_>, loss: &Loss) -> bool {
    let Some(release) = asked.targets.get(&loss.service) else { return true };
    let key = (asked.environment.name.clone(), *release, loss.phase);
    asked.history.migrations.get(&key).is_some_and(|former| former.is_done)
}

fn light(asked: &Asked<'_>, service: &ServiceName, losses: &[&Loss]) -> Light {
    let shown: Vec<String> = losses.iter().map(ToString::to_string).collect();
    let mut what = format!("it takes away what older code may need: {}", some(&shown));
    if losses.iter().any(|loss| loss.phase == MigrationPhase::Expand) {
        what.push_str(
            "; from its migration on, no release of before can be gone back to with the code alone",
        );
    }
    let migration = asked.fleet.services.get(service).and_then(|service| service.migrate.as_ref());
    if migration.is_none_or(|migration| migration.backup.is_none()) {
        return Light::Red {
            why: format!("{what}; a copy must be kept first: state `backup` in [service.{service}.migrate]"),
        };
    }
    let agreed = asked.latest_here(
        |fact| matches!(fact, Fact::Losses { losses, .. } if shown.iter().all(|one| losses.contains(one))),
    );
    match agreed {
        Some(recorded) => Light::Green {
            why: format!("{}: {}; a copy is kept before", recorded.by, recorded.fact().summary()),
        },
        None => Light::Red {
            why: format!(
                "{what}; agree to it with: greenlight confirm {} {} --reason WHY",
                asked.environment.name,
                asked.arguments()
            ),
        },
    }
}
