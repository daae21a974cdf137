//! The operator: deploys, holds, resumes, aborts, from this machine or another.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_model::id::{Generation, HostName, Instance, RolloutId, ServiceName};
use greenlight_model::record::{Record, RecordBody};
use greenlight_model::rollout::{Direction, OperatorRequest, Plan, Rollout};
use greenlight_model::world::World;

use super::scenario::Part;
use super::site::{release, stamp};
use super::trial::{Event, Trial};

/// How long a controller that takes over waits for the one before it: three ticks.
const TAKEOVER_MS: u64 = 1_200;

impl Trial<'_> {
    /// `deploy` (or `rollback`, for the first rollout of a scenario that goes back): a look, a plan, a record, a controller.
    pub(super) fn deploy(&mut self, machine: usize, number: usize, part: Part) {
        let name = self.site.environment.name.clone();
        let is_first = self.history.order.is_empty();
        let direction = if is_first { self.scenario.direction } else { Direction::Forward };
        let number = if direction == Direction::Back { 0 } else { number };
        let services = if is_first { self.site.names.len() } else { 1 };
        let targets: BTreeMap<_, _> = (0..services)
            .map(|service| (self.site.names[service].clone(), release(service, number)))
            .collect();
        let is_bad = targets.values().any(|release| self.history.bad.contains_key(release));
        let is_leased = self.controllers.iter().any(|one| one.is_alive && one.machine == machine);
        if self.history.open_rollout(&name).is_some() || is_bad || is_leased || self.is_gate_amber() {
            return;
        }
        let wanted: BTreeSet<ServiceName> = targets.keys().cloned().collect();
        let only: BTreeSet<HostName> =
            self.scenario.only.iter().map(|host| self.site.hosts[*host].clone()).collect();
        let hosts = (0..self.hosts.len()).filter(|host| part.contains(*host));
        let part: BTreeSet<HostName> = hosts.map(|host| self.site.hosts[host].clone()).collect();
        let only = if is_first { only } else { part };
        let is_wanted = |host: &HostName| only.is_empty() || only.contains(host);
        let mut world = self.empty_world(direction);
        self.gather(&mut world);
        let instances: Vec<Instance> = self
            .site
            .environment
            .instances()
            .filter(|instance| wanted.contains(&instance.service) && is_wanted(&instance.host))
            .collect();
        if instances.is_empty() {
            return;
        }
        let mut waves = greenlight_planner::waves(&self.site.environment, &wanted, direction);
        waves.iter_mut().for_each(|wave| wave.instances.retain(|instance| is_wanted(&instance.host)));
        waves.retain(|wave| !wave.instances.is_empty());
        let report = |instance: &Instance| world.report(instance);
        let highest = instances.iter().filter_map(|one| Some(report(one)?.ledger.generation)).max();
        let plan = Plan {
            id: rollout_id(self.history.order.len()),
            environment: name,
            direction,
            targets,
            baseline: instances
                .iter()
                .map(|instance| (instance.clone(), report(instance).and_then(|report| report.linked)))
                .collect(),
            waves,
            generation: next_even(highest.unwrap_or_default()),
            started_by: String::new(),
            digest: None,
            is_partial: !only.is_empty() && only.len() < self.hosts.len(),
            overrides: BTreeMap::new(),
            losses: Vec::new(),
        };
        let rollout = plan.id.clone();
        self.ask_record(machine, RecordBody::RolloutStarted { plan, services: BTreeMap::new() });
        self.begin_controller(machine, rollout);
    }

    fn empty_world(&self, direction: Direction) -> World {
        let plan = Plan {
            id: rollout_id(0),
            environment: self.site.environment.name.clone(),
            direction,
            targets: BTreeMap::new(),
            baseline: BTreeMap::new(),
            waves: Vec::new(),
            generation: Generation(0),
            started_by: String::new(),
            digest: None,
            is_partial: false,
            overrides: BTreeMap::new(),
            losses: Vec::new(),
        };
        World {
            now: stamp(self.now, 0),
            environment: self.site.environment.clone(),
            services: BTreeMap::new(),
            releases: BTreeMap::new(),
            rollout: Rollout::new(plan, stamp(0, 0)),
            inventory: BTreeMap::new(),
            traffic: Vec::new(),
            gates: Vec::new(),
            judgement: None,
            in_flight: Vec::new(),
        }
    }

    /// `hold` leaves a record; `resume` and `abort` become the controller where this machine has none.
    pub(super) fn operator_asks(&mut self, request: OperatorRequest) {
        if request == OperatorRequest::Hold {
            if let Some(rollout) = self.open_rollout() {
                self.ask_record(0, RecordBody::OperatorAsked { rollout, request, why: String::new() });
            }
            return;
        }
        self.take_over(0, Some(request));
    }

    /// Somebody on a machine takes the open rollout over.
    pub(super) fn take_over(&mut self, machine: usize, asks: Option<OperatorRequest>) {
        let Some(rollout) = self.open_rollout() else { return };
        if let Some(request) = asks {
            let rollout = rollout.clone();
            self.ask_record(machine, RecordBody::OperatorAsked { rollout, request, why: String::new() });
        }
        if self.controllers.iter().any(|one| one.is_alive && one.machine == machine) {
            return;
        }
        if asks.is_some() && self.controllers.iter().any(|one| one.is_alive) {
            // The one before lets go when it reads this, and what it had sent arrives.
            self.after(TAKEOVER_MS, Event::Begins { machine, asks: None });
            return;
        }
        self.begin_controller(machine, rollout);
    }

    pub(super) fn mark_bad(&mut self, number: usize) {
        let bad = Some("somebody says so".to_owned());
        self.ask_record(0, RecordBody::ReleaseMarked { release: release(0, number), bad });
    }

    fn open_rollout(&self) -> Option<RolloutId> {
        self.history.open_rollout(&self.site.environment.name).map(|open| open.plan.id.clone())
    }

    fn ask_record(&mut self, machine: usize, body: RecordBody) {
        let by = format!("operator@m{machine}");
        let record = Record { seq: self.history.last_seq + 1, at: self.controller_time(), by, body };
        self.write(record);
    }
}

fn rollout_id(index: usize) -> RolloutId {
    #[expect(clippy::expect_used, reason = "a letter and digits are an id")]
    format!("r{index:03}").parse().expect("an id")
}

/// A rollout uses two generations, so the next one begins two on.
fn next_even(highest: Generation) -> Generation {
    Generation(highest.0 / 2 * 2 + 2)
}
