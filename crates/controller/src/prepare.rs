//! From what was asked for to a plan with its preview: the same for `plan`, which stops there, and `deploy`.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_gates::{Asked, PlanNow, gates};
use greenlight_model::Timestamp;
use greenlight_model::check::CheckPattern;
use greenlight_model::fleet::{Environment, Fleet, Service};
use greenlight_model::history::History;
use greenlight_model::id::{
    EnvironmentName, Generation, HostName, Instance, PlanDigest, ReleaseId, RolloutId, ServiceName,
};
use greenlight_model::manifest::Release;
use greenlight_model::migration::Loss;
use greenlight_model::rollout::{Direction, Plan, Rollout};
use greenlight_model::traffic::BalancerReport;
use greenlight_model::world::{Gate, ReleaseFacts, World};
use greenlight_simulator::{Preview, preview};

use crate::claims;
use crate::gather::Gathered;

/// What an operator asks for.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Where.
    pub environment: EnvironmentName,
    /// Forward or back.
    pub direction: Direction,
    /// Which release of each service.
    pub targets: BTreeMap<ServiceName, ReleaseId>,
    /// Only these hosts; all when empty.
    pub hosts: BTreeSet<HostName>,
    /// The checks that do not stop it though they fail, each with the reason.
    pub overrides: BTreeMap<CheckPattern, String>,
    /// What its migrations take away from the database; see [`crate::losses`].
    pub losses: Vec<Loss>,
    /// Who asks: `user@machine`.
    pub by: String,
    /// Whether they ask for the rollout; else they only look, and it will be somebody else's.
    pub asks: bool,
}

/// A plan that could start now.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The plan, its digest included.
    pub plan: Plan,
    /// The services' definitions that it goes by.
    pub services: BTreeMap<ServiceName, Service>,
    /// The world it was made for.
    pub world: World,
    /// What it will do.
    pub preview: Preview,
    /// Services whose settings in the fleet file are not those that hosts run this very release with. A release that
    /// runs is not switched to again, so they come with the next one.
    pub unapplied: BTreeSet<ServiceName>,
}

/// Why there can be no plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrepareError {
    /// The fleet file has no such environment.
    #[error("there is no environment {0} in greenlight.toml")]
    NoEnvironment(EnvironmentName),
    /// The environment does not run this service.
    #[error("{environment} has no hosts for {service}; add hosts.{service} to [environment.{environment}]")]
    NoHosts {
        /// The environment.
        environment: EnvironmentName,
        /// The service.
        service: ServiceName,
    },
    /// The release is marked bad.
    #[error(
        "release {title} is marked bad: {why}. If that is mended, say so: greenlight releases mark {short} --good"
    )]
    Bad {
        /// The release as people see it.
        title: String,
        /// Why it is bad.
        why: String,
        /// Its short id.
        short: String,
    },
    /// A migration took away what the release may need.
    #[error(
        "{title} cannot be gone back to with the code alone: since it ran, a migration in {rollout} took away from the database \
         what it may need: {loss}. Go forward with a release that mends it; or put the database back from its backup, and then \
         `greenlight rollback {environment} --database-restored REASON`"
    )]
    Lost {
        /// The release as people see it.
        title: String,
        /// The environment.
        environment: EnvironmentName,
        /// The rollout that migrated.
        rollout: RolloutId,
        /// What it took away.
        loss: String,
    },
    /// A canary is compared with all others.
    #[error(
        "{0} has a canary, which is compared with all other hosts, so `--host` cannot be used there; leave it out, or choose \
         another strategy"
    )]
    PartOfCanary(EnvironmentName),
    /// Another rollout has not ended.
    #[error(
        "rollout {rollout} of {environment} has not ended; `greenlight resume {environment}` or `greenlight abort {environment}`"
    )]
    Busy {
        /// The environment.
        environment: EnvironmentName,
        /// The open rollout.
        rollout: RolloutId,
    },
}

/// Makes the plan and previews it.
///
/// # Errors
/// When what is asked for is not possible whatever the hosts say.
pub fn prepare(
    fleet: &Fleet,
    history: &History,
    releases: &[Release],
    gathered: &Gathered,
    wanted: &Wanted,
    id: RolloutId,
    now: Timestamp,
) -> Result<Prepared, PrepareError> {
    let environment = fleet
        .environments
        .get(&wanted.environment)
        .ok_or_else(|| PrepareError::NoEnvironment(wanted.environment.clone()))?;
    if let Some(open) = history.open_rollout(&environment.name) {
        return Err(PrepareError::Busy {
            environment: environment.name.clone(),
            rollout: open.plan.id.clone(),
        });
    }
    let facts = release_facts(releases, history);
    for (service, release) in &wanted.targets {
        if environment.hosts.get(service).is_none_or(Vec::is_empty) {
            let (environment, service) = (environment.name.clone(), service.clone());
            return Err(PrepareError::NoHosts { environment, service });
        }
        if let Some(why) = history.bad.get(release) {
            let title = facts.get(release).map_or_else(|| release.short(), |facts| facts.title.clone());
            return Err(PrepareError::Bad { title, why: why.clone(), short: release.short() });
        }
        if let Some((rollout, loss)) = history.lost_since(&environment.name, service, *release)
            && has_run(history, &environment.name, service, *release)
        {
            return Err(PrepareError::Lost {
                title: facts.get(release).map_or_else(|| release.short(), |facts| facts.title.clone()),
                environment: environment.name.clone(),
                rollout: rollout.clone(),
                loss: loss.to_string(),
            });
        }
    }
    let wanted_services: BTreeSet<ServiceName> = wanted.targets.keys().cloned().collect();
    let is_wanted = |host: &HostName| wanted.hosts.is_empty() || wanted.hosts.contains(host);
    let instances: Vec<_> = environment
        .instances()
        .filter(|instance| wanted_services.contains(&instance.service) && is_wanted(&instance.host))
        .collect();
    let mut waves = greenlight_planner::waves(environment, &wanted_services, wanted.direction);
    for wave in &mut waves {
        wave.instances.retain(|instance| is_wanted(&instance.host));
    }
    waves.retain(|wave| !wave.instances.is_empty());
    if !wanted.hosts.is_empty() && waves.iter().any(|wave| !wave.steps.is_empty()) {
        return Err(PrepareError::PartOfCanary(environment.name.clone()));
    }
    let highest = instances
        .iter()
        .filter_map(|instance| Some(gathered.report(instance)?.ledger.generation))
        .max()
        .unwrap_or_default();
    let plan = Plan {
        id,
        environment: environment.name.clone(),
        direction: wanted.direction,
        targets: wanted.targets.clone(),
        baseline: instances
            .iter()
            .map(|instance| (instance.clone(), gathered.report(instance).and_then(|report| report.linked)))
            .collect(),
        waves,
        generation: next_even(highest),
        started_by: wanted.by.clone(),
        digest: None,
        is_partial: !wanted.hosts.is_empty(),
        overrides: wanted.overrides.clone(),
        losses: wanted.losses.clone(),
    };
    let mut unapplied = BTreeSet::new();
    let mut services: BTreeMap<ServiceName, Service> = BTreeMap::new();
    for (name, release) in &wanted.targets {
        let known = history.definitions.get(&(environment.name.clone(), *release));
        let written = fleet.services.get(name);
        let keeps = |(instance, now): (&Instance, &Option<ReleaseId>)| {
            (instance.service == *name).then_some(*now == Some(*release))
        };
        let is_kept_somewhere = plan.baseline.iter().filter_map(keeps).any(|keeps| keeps);
        let is_kept = is_kept_somewhere && plan.baseline.iter().filter_map(keeps).all(|keeps| keeps);
        let is_forward = wanted.direction == Direction::Forward;
        if is_forward && is_kept_somewhere && known.is_some() && known != written {
            unapplied.insert(name.clone());
        }
        // Going back runs a release as it was run; going forward, as the fleet file says now, unless nothing is switched.
        let service = if is_forward && !is_kept { written } else { known.or(written) };
        services.extend(service.map(|service| (name.clone(), service.clone())));
    }
    let mut world = World {
        now,
        environment: environment.clone(),
        services: fleet.services.iter().map(|(name, service)| (name.clone(), service.clone())).collect(),
        releases: facts,
        rollout: history.begun(&plan, now),
        inventory: claims::without_ended(&gathered.inventory, history),
        traffic: gathered.traffic.clone(),
        gates: Vec::new(),
        judgement: None,
        in_flight: Vec::new(),
    };
    world.services.extend(services.clone());
    let mut preview = preview(&world);
    let text = preview.digest_text();
    let digest = PlanDigest::from_bytes(*blake3::hash(text.as_bytes()).as_bytes());
    // Lights depend on what is shown, and never the other way round.
    world.gates = gates(&Asked {
        fleet,
        environment,
        history,
        targets: &wanted.targets,
        direction: wanted.direction,
        releases,
        plan: Some(PlanNow { digest, text: Some(&text) }),
        asked_by: wanted.asks.then_some(&wanted.by),
        losses: &wanted.losses,
        traffic: &gathered.traffic,
        now,
        begun: None,
    });
    preview.stop_at(&world.gates);
    let plan = Plan { digest: Some(digest), ..plan };
    world.rollout.plan = plan.clone();
    Ok(Prepared { plan, services, world, preview, unapplied })
}

/// Whether a release went out to the environment before: what is new there does not lack what was taken away.
fn has_run(
    history: &History,
    environment: &EnvironmentName,
    service: &ServiceName,
    release: ReleaseId,
) -> bool {
    history
        .of_environment(environment)
        .any(|rollout| rollout.is_whole() && rollout.plan.targets.get(service) == Some(&release))
}

/// The lights of a rollout that was begun.
#[must_use]
pub fn rollout_gates(
    fleet: &Fleet,
    environment: &Environment,
    history: &History,
    rollout: &Rollout,
    releases: &[Release],
    traffic: &[BalancerReport],
    now: Timestamp,
) -> Vec<Gate> {
    gates(&Asked {
        fleet,
        environment,
        history,
        targets: &rollout.plan.targets,
        direction: rollout.plan.direction,
        releases,
        plan: rollout.plan.digest.map(|digest| PlanNow { digest, text: None }),
        asked_by: Some(&rollout.plan.started_by),
        losses: &rollout.plan.losses,
        traffic,
        now,
        begun: Some(rollout.started_at),
    })
}

/// What deciding needs to know of each release.
#[must_use]
pub(crate) fn release_facts(releases: &[Release], history: &History) -> BTreeMap<ReleaseId, ReleaseFacts> {
    releases
        .iter()
        .map(|release| {
            let facts = ReleaseFacts {
                title: release.title(),
                service: release.service.clone(),
                bad: history.bad.get(&release.id).cloned(),
            };
            (release.id, facts)
        })
        .collect()
}

/// A rollout uses two generations, one to go forward and the next to turn back; so the next rollout begins two on.
fn next_even(highest: Generation) -> Generation {
    Generation(highest.0 / 2 * 2 + 2)
}
