//! Judges what a rollout did by what clients would have seen and what hosts hold. Shares no code with planner or
//! interlock: it reads raw reports and counts for itself.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_model::Timestamp;
use greenlight_model::action::Action;
use greenlight_model::decision::Outcome;
use greenlight_model::host::{Answer, ProcessState};
use greenlight_model::id::{Instance, ReleaseId, ServiceName};
use greenlight_model::rollout::Direction;
use greenlight_model::traffic::{Admission, BalancerReport, Server, ServerHealth};
use greenlight_model::world::World;
use greenlight_simulator::Turn;

/// Remembers what is needed to judge the next turn.
pub(crate) struct Checker {
    initial: World,
    /// Instances whose taking out is under way.
    leaving: BTreeSet<Instance>,
    drained_at: BTreeMap<Instance, Timestamp>,
    migrated: BTreeSet<ServiceName>,
    switched: BTreeSet<Instance>,
}

impl Checker {
    pub(crate) fn new(world: &World) -> Self {
        Self {
            initial: world.clone(),
            leaving: BTreeSet::new(),
            drained_at: BTreeMap::new(),
            migrated: BTreeSet::new(),
            switched: BTreeSet::new(),
        }
    }

    pub(crate) fn judge(&mut self, before: &World, after: &World, turn: &Turn) -> Result<(), String> {
        match turn {
            Turn::Began(steps) => {
                let actions: Vec<&Action> = steps.iter().map(|step| &step.action).collect();
                self.began(before, &actions)
            }
            Turn::Passed(ended) => {
                for (action, _) in ended {
                    self.leaving.remove(action.instance());
                }
                Ok(())
            }
            Turn::Noted(_) => Ok(()),
            Turn::Ended(outcome) => self.ended(after, outcome),
            Turn::Stopped(waits) if waits.is_empty() => Err("it stopped without a reason".to_owned()),
            Turn::Stopped(_) => Ok(()),
        }
    }

    fn began(&mut self, world: &World, actions: &[&Action]) -> Result<(), String> {
        let mut seen = BTreeSet::new();
        for action in actions {
            let instance = action.instance();
            let is_busy = world.in_flight.iter().any(|begun| begun.action.instance() == instance);
            if is_busy || !seen.insert(instance) {
                return Err(format!("two actions at once on {instance}"));
            }
            self.one(world, action)?;
        }
        self.capacity(world, actions)
    }

    fn one(&mut self, world: &World, action: &Action) -> Result<(), String> {
        let instance = action.instance();
        match action {
            Action::Drain { .. } => {
                self.drained_at.insert(instance.clone(), world.now);
            }
            Action::Migrate { .. } => {
                if !self.migrated.insert(instance.service.clone()) {
                    return Err(format!("a second migration of {}", instance.service));
                }
                if world.rollout.plan.direction == Direction::Back || world.rollout.is_turning_back() {
                    return Err("a migration on the way back".to_owned());
                }
                if let Some(switched) = self.switched.iter().find(|other| other.service == instance.service) {
                    return Err(format!("a migration after {switched} was switched"));
                }
            }
            Action::Activate { release, .. } => {
                self.no_sessions(world, instance)?;
                self.no_red_wave(world, instance)?;
                let is_bad = world.releases.get(release).is_some_and(|facts| facts.bad.is_some());
                if is_bad && !goes_back(world, instance) {
                    return Err(format!("a bad release is activated on {instance}"));
                }
                if Some(*release) != wanted(world, instance) {
                    return Err(format!("{instance} is to run something else"));
                }
                self.switched.insert(instance.clone());
            }
            Action::Deactivate { .. } => {
                self.no_sessions(world, instance)?;
                self.switched.insert(instance.clone());
            }
            Action::Admit { .. } if answers(world, instance).is_none() => {
                return Err(format!("{instance} is admitted and proves nothing"));
            }
            Action::Admit { .. } if answers(world, instance) != wanted(world, instance) => {
                return Err(format!("{instance} is admitted with another release than wanted"));
            }
            _ => {}
        }
        Ok(())
    }

    fn no_sessions(&self, world: &World, instance: &Instance) -> Result<(), String> {
        for server in servers(world, instance) {
            if server.admission == Admission::Ready {
                return Err(format!("{instance} is switched while it gets requests"));
            }
            let until = self.drained_at.get(instance).map(|at| *at + world.environment.timeouts.drain);
            if server.sessions > 0 && until.is_none_or(|until| world.now < until) {
                return Err(format!("{} sessions of {instance} are cut", server.sessions));
            }
        }
        Ok(())
    }

    /// Going forward, everything in earlier waves runs its target and gets requests.
    fn no_red_wave(&self, world: &World, instance: &Instance) -> Result<(), String> {
        if goes_back(world, instance) {
            return Ok(());
        }
        let waves = &world.rollout.plan.waves;
        let own = waves.iter().position(|wave| wave.instances.contains(instance)).unwrap();
        for earlier in waves[..own].iter().flat_map(|wave| &wave.instances) {
            let is_fine = world.rollout.left_out.contains_key(earlier)
                || answers(world, earlier) == wanted(world, earlier)
                    && servers(world, earlier).iter().all(|server| server.admission == Admission::Ready);
            if !is_fine {
                return Err(format!(
                    "{instance} is switched while {earlier} of an earlier wave is not proven"
                ));
            }
        }
        Ok(())
    }

    /// What serves once these have left must not be under the floor, where they did serve.
    fn capacity(&mut self, world: &World, actions: &[&Action]) -> Result<(), String> {
        let going: BTreeSet<Instance> = actions
            .iter()
            .filter(|action| {
                matches!(action, Action::Drain { .. } | Action::Activate { .. } | Action::Deactivate { .. })
            })
            .map(|action| action.instance().clone())
            .collect();
        self.leaving.extend(going.iter().cloned());
        let floors = going
            .iter()
            .filter(|gone| serves(world, gone))
            .map(|gone| (gone.service.clone(), floor(world, gone)));
        let mut lowest: BTreeMap<ServiceName, usize> = BTreeMap::new();
        for (service, floor) in floors {
            let known = lowest.entry(service).or_insert(floor);
            *known = floor.min(*known);
        }
        for (service, floor) in lowest {
            let all = world.rollout.plan.baseline.keys().filter(|instance| instance.service == service);
            let left = all.filter(|one| !self.leaving.contains(*one) && serves(world, one)).count();
            if left < floor {
                return Err(format!("{left} instances of {service} serve, and the floor is {floor}"));
            }
        }
        Ok(())
    }

    fn ended(&self, world: &World, outcome: &Outcome) -> Result<(), String> {
        if let Some(begun) = world.in_flight.first() {
            return Err(format!("ended with {} under way", begun.action.verb()));
        }
        let rollout = &world.rollout.plan.id;
        for instance in world.rollout.plan.baseline.keys() {
            let claim = world.report(instance).and_then(|report| report.ledger.claim.as_ref());
            let is_ours = claim.is_some_and(|claim| claim.rollout == *rollout);
            let failed = world.rollout.failures.iter().any(
                |failure| matches!(&failure.action, Action::Unclaim { instance: other } if other == instance),
            );
            if is_ours && !failed && world.unreachable(&instance.host).is_none() {
                return Err(format!("the claim of {instance} was not given back"));
            }
            match outcome {
                Outcome::Done { left_out } if left_out.contains_key(instance) => {}
                Outcome::Done { .. } => self.is_at(world, instance, target(world, instance))?,
                Outcome::Refused { .. } => self.is_untouched(world, instance)?,
                Outcome::TurnedBack { .. } => self.is_back(world, instance)?,
                Outcome::Stuck { instances, .. } if instances.is_empty() => {
                    return Err("stuck, and nothing is named".to_owned());
                }
                Outcome::Stuck { instances, .. } if instances.contains_key(instance) => {}
                Outcome::Stuck { .. } => self.is_back(world, instance)?,
            }
        }
        Ok(())
    }

    fn is_back(&self, world: &World, instance: &Instance) -> Result<(), String> {
        let before = world.rollout.plan.baseline[instance];
        match before {
            None if self.switched.contains(instance) => {
                let is_off = world
                    .report(instance)
                    .is_some_and(|report| report.linked.is_none() && !report.is_running());
                if is_off { Ok(()) } else { Err(format!("{instance} still runs something")) }
            }
            None => self.is_untouched_host(world, instance),
            Some(_) if answers(&self.initial, instance) == before => self.is_at(world, instance, before),
            Some(_) => Ok(()),
        }
    }

    fn is_at(&self, world: &World, instance: &Instance, release: Option<ReleaseId>) -> Result<(), String> {
        if answers(world, instance) != release {
            return Err(format!("{instance} does not answer as what the outcome says"));
        }
        if servers(world, instance).iter().any(|server| server.admission != Admission::Ready) {
            return Err(format!("{instance} is not in traffic"));
        }
        let report = world.report(instance).unwrap();
        if report.ledger.last_good != release {
            return Err(format!("{instance} was not confirmed"));
        }
        Ok(())
    }

    fn is_untouched(&self, world: &World, instance: &Instance) -> Result<(), String> {
        if servers(world, instance) != servers(&self.initial, instance) {
            return Err(format!("refused, and the traffic of {instance} has changed"));
        }
        self.is_untouched_host(world, instance)
    }

    fn is_untouched_host(&self, world: &World, instance: &Instance) -> Result<(), String> {
        let state = |world: &World| {
            let report = world.report(instance).unwrap();
            (report.linked, report.ledger.active, report.processes.clone())
        };
        if state(world) == state(&self.initial) {
            return Ok(());
        }
        Err(format!("{instance} is not as it was"))
    }
}

/// What all processes of an instance answer as, while they run.
fn answers(world: &World, instance: &Instance) -> Option<ReleaseId> {
    let report = world.report(instance)?;
    let linked = report.linked?;
    let all = report.processes.values().all(|process| {
        matches!(process.state, ProcessState::Running { .. })
            && matches!(process.answer, Answer::Release { release, .. } if release == linked)
    });
    all.then_some(linked)
}

fn servers(world: &World, instance: &Instance) -> Vec<Server> {
    let reports = world.environment.balancers.iter().zip(&world.traffic);
    let of_service = reports.filter(|(balancer, _)| balancer.service == instance.service);
    of_service
        .filter_map(|(_, report)| match report {
            BalancerReport::Servers(servers) => servers.get(&instance.host).copied(),
            BalancerReport::Unreachable { .. } => None,
        })
        .collect()
}

/// Whether clients get answers from it now.
pub(crate) fn serves(world: &World, instance: &Instance) -> bool {
    if !world.environment.balancers.iter().any(|balancer| balancer.service == instance.service) {
        return answers(world, instance).is_some() && world.unreachable(&instance.host).is_none();
    }
    servers(world, instance)
        .iter()
        .any(|server| server.admission == Admission::Ready && server.health == ServerHealth::Up)
}

fn goes_back(world: &World, instance: &Instance) -> bool {
    world.rollout.is_turning_back() || world.rollout.left_out.contains_key(instance)
}

fn target(world: &World, instance: &Instance) -> Option<ReleaseId> {
    world.rollout.plan.targets.get(&instance.service).copied()
}

fn wanted(world: &World, instance: &Instance) -> Option<ReleaseId> {
    if goes_back(world, instance) { world.rollout.plan.baseline[instance] } else { target(world, instance) }
}

/// What the environment asks for; on the way back no more than what ran something before.
pub(crate) fn floor(world: &World, instance: &Instance) -> usize {
    let of_service = world.rollout.plan.baseline.iter().filter(|(one, _)| one.service == instance.service);
    let (mut all, mut ran) = (0, 0);
    for (_, before) in of_service {
        all += 1;
        ran += usize::from(before.is_some());
    }
    let floor = if all <= 1 { 0 } else { world.environment.floor.of(all) };
    if goes_back(world, instance) { floor.min(ran) } else { floor }
}
