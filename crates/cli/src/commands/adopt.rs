//! Taking over a rollout that a controller elsewhere began: its records are not here, its hosts know what it is.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use greenlight_controller::adopt::{self, Elsewhere};
use greenlight_controller::{Gathered, Gatherer, clock};
use greenlight_model::fleet::Environment;
use greenlight_model::id::RolloutId;
use greenlight_model::quantity::human_duration;
use greenlight_model::rollout::OperatorRequest;
use greenlight_store::Log;
use jiff::SignedDuration;

use crate::commands::operate::append;
use crate::failure::{Exit, Failure};
use crate::printer::Printer;
use crate::project::Connected;

/// Finds the rollout that holds the environment's hosts, waits until its controller cannot be at work any more, and
/// writes to the record log how far it is. None when nothing holds them.
pub(crate) fn take_over(
    connected: &Connected<'_>,
    log: &mut Log,
    request: OperatorRequest,
    printer: &Printer,
) -> Result<Option<RolloutId>, Failure> {
    let failed = |error: adopt::AdoptError| Failure::from_error(Exit::Failed, &error);
    let Connected { project, environment, .. } = connected;
    let (gatherer, gathered) = connected.block_on(connected.gather(log));
    let Some(first) = only(environment, log, &gathered)? else { return Ok(None) };
    let gathered = connected.block_on(outlive(environment, &gatherer, &first, printer));
    let Some(elsewhere) = only(environment, log, &gathered)?.filter(|now| now.rollout == first.rollout)
    else {
        return Err(Failure::new(Exit::Failed, format!("{} ended meanwhile, elsewhere", first.rollout))
            .help(format!("see what runs: greenlight status {}", environment.name)));
    };
    // A claim that was renewed lasts longer by far more than two looks at the same one can differ.
    let renewed = environment.timeouts.claim / 8;
    if elsewhere.ends_at().duration_since(first.ends_at())
        > SignedDuration::try_from(renewed).unwrap_or_default()
    {
        return Err(Failure::new(
            Exit::Held,
            format!(
                "{} is driven elsewhere: its claims were renewed while this command waited; nothing was changed",
                elsewhere.rollout
            ),
        )
        .help("hold or abort it where it was begun"));
    }
    let charter = connected.block_on(adopt::charter(&gatherer, &elsewhere)).map_err(failed)?;
    if request == OperatorRequest::Resume {
        let depot = project.depot()?;
        let releases = depot.releases().map_err(|error| Failure::from_error(Exit::Failed, &error))?;
        let built: BTreeSet<_> = releases.iter().map(|release| release.id).collect();
        adopt::can_go_forward(&charter, &built, &gathered).map_err(failed)?;
    }
    append(project, log, &adopt::adoption(charter, environment, &gathered))?;
    printer.progress(format!("{} is taken over from where it was begun", elsewhere.rollout));
    Ok(Some(elsewhere.rollout))
}

/// Looks again when every claim that was seen has ended and a living controller would have renewed one.
async fn outlive(
    environment: &Environment,
    gatherer: &Arc<Gatherer>,
    seen: &Elsewhere,
    printer: &Printer,
) -> Gathered {
    // Hosts' clocks may differ from ours: however long ago the claims seem to have ended, a renewal gets its time.
    let renewal = environment.timeouts.claim / 3;
    let left = Duration::try_from(seen.ends_at().duration_since(clock::now())).unwrap_or_default();
    let wait = left.max(renewal);
    printer.progress(format!(
        "{} was begun elsewhere {}, and its records are not here. Its controller may still be at work, so this waits {} for its \
         claims to end; ^C leaves everything as it is",
        seen.rollout,
        seen.title(),
        human_duration(wait)
    ));
    tokio::time::sleep(wait).await;
    gatherer.gather().await
}

/// The one rollout from elsewhere that holds hosts of the environment.
fn only(environment: &Environment, log: &Log, gathered: &Gathered) -> Result<Option<Elsewhere>, Failure> {
    let mut all = adopt::elsewhere(environment, log.history(), gathered);
    if all.len() > 1 {
        let names: Vec<String> = all.iter().map(|one| format!("{} {}", one.rollout, one.title())).collect();
        return Err(Failure::new(
            Exit::Failed,
            format!("hosts of {} are claimed by several rollouts: {}", environment.name, names.join("; ")),
        )
        .help("go on with each where it was begun"));
    }
    Ok(all.pop())
}
