//! A controller's looks: what it asks hosts and balancers to tell, and which of two answers it believes.

use greenlight_model::Timestamp;
use greenlight_model::action::Verb;
use greenlight_model::decision::Wait;
use greenlight_model::host::HostReport;
use greenlight_model::id::RolloutId;
use greenlight_model::traffic::BalancerReport;
use greenlight_model::world::{Observation, Unreachable, World};

use super::agent::{Purpose, Request};
use super::controller::{LEDGER_TIMEOUT_MS, OBSERVE_TIMEOUT_MS, TICK_MS};
use super::scenario::Ms;
use super::traffic::{BALANCER_TIMEOUT_MS, Command};
use super::trial::{Event, Trial};

/// Every how many ticks everything is looked at.
const LOOK_TICKS: u64 = 5;
/// The same as a duration.
pub(super) const LOOK_INTERVAL_MS: Ms = TICK_MS * LOOK_TICKS;

/// Every how many ticks claims are renewed: four times within their duration.
const RENEW_TICKS: u64 = 12;

impl Trial<'_> {
    /// Looks at everything at once, over the network as it is.
    pub(super) fn gather(&mut self, world: &mut World) {
        let now = self.controller_time();
        for host in 0..self.hosts.len() {
            let is_reached = self.hosts[host].is_up && !self.is_cut(host, true) && !self.is_cut(host, false);
            let seen = if is_reached { self.observe(host) } else { Err("connection timed out".to_owned()) };
            let observation = match seen {
                Ok(report) => Observation { report: Some((now, report)), unreachable: None },
                Err(why) => Observation { report: None, unreachable: Some(Unreachable { since: now, why }) },
            };
            world.inventory.insert(self.site.hosts[host].clone(), observation);
        }
        world
            .inventory
            .retain(|host, _| self.site.environment.hosts.values().any(|hosts| hosts.contains(host)));
        world.traffic = (0..self.balancers.len())
            .map(|balancer| match self.is_balancer_cut(balancer) {
                true => BalancerReport::Unreachable { why: "it does not answer".to_owned() },
                false => self.balancer_report(balancer),
            })
            .collect();
    }

    /// Of two looks the one that was begun later is believed.
    pub(super) fn read_was(&mut self, index: usize, balancer: usize, serial: u32, report: BalancerReport) {
        let controller = &mut self.controllers[index];
        if serial > controller.balancer_looks[balancer] {
            controller.balancer_looks[balancer] = serial;
            controller.world.traffic[balancer] = report;
        }
    }

    pub(super) fn saw(
        &mut self,
        index: usize,
        host: usize,
        serial: u32,
        mut seen: Result<HostReport, String>,
    ) {
        if serial <= self.controllers[index].host_looks[host] {
            return;
        }
        self.controllers[index].host_looks[host] = serial;
        if let Ok(report) = &mut seen {
            self.forget_ended_claims(index, host, report);
        }
        let now = self.controller_time();
        let name = &self.site.hosts[host];
        let Some(observation) = self.controllers[index].world.inventory.get_mut(name) else { return };
        match seen {
            Ok(report) => {
                observation.report = Some((now, report));
                observation.unreachable = None;
            }
            Err(why) => {
                let since = observation.unreachable.take().map_or(now, |before| before.since);
                observation.unreachable = Some(Unreachable { since, why });
            }
        }
    }

    /// Claims of rollouts that have ended hold nobody up.
    pub(super) fn forget_ended_claims(&mut self, index: usize, host: usize, report: &mut HostReport) {
        for (service, name) in self.site.names.iter().enumerate() {
            let Some(instance) = report.instances.get_mut(name) else { continue };
            let controller = &mut self.controllers[index];
            controller.ended_claims.remove(&(host, service));
            let Some(claim) = &mut instance.ledger.claim else { continue };
            // However wrong one of the two clocks is, what a claim has left there it has left here.
            claim.expires_at =
                shifted(claim.expires_at, self.controller_clock_ms - self.hosts[host].clock_ms);
            if controller.history.rollouts.get(&claim.rollout).is_some_and(|one| one.outcome.is_some()) {
                controller.ended_claims.insert((host, service), claim.rollout.clone());
                instance.ledger.claim = None;
            }
        }
    }

    pub(super) fn ended_claim(&self, index: usize, host: usize, service: usize) -> Option<RolloutId> {
        self.controllers[index].ended_claims.get(&(host, service)).cloned()
    }

    /// Begins the looks that are due.
    pub(super) fn look(&mut self, index: usize) {
        let controller = &self.controllers[index];
        let ticks = controller.ticks;
        let depends_on_traffic = controller.waits.iter().any(|wait| {
            matches!(
                wait,
                Wait::Sessions { .. }
                    | Wait::BalancerHealth { .. }
                    | Wait::Balancer { .. }
                    | Wait::Floor { .. }
            )
        });
        let is_due = ticks.is_multiple_of(LOOK_TICKS);
        if depends_on_traffic || is_due {
            for balancer in 0..self.balancers.len() {
                let controller = &mut self.controllers[index];
                if controller.reading[balancer].is_none() {
                    controller.serial += 1;
                    controller.reading[balancer] = Some(controller.serial);
                    let purpose = Purpose::Look { serial: controller.serial };
                    self.command(index, purpose, self.now, balancer, Command::Read);
                    let event = Event::BalancerTimedOut { controller: index, balancer, purpose };
                    self.after(BALANCER_TIMEOUT_MS, event);
                }
            }
        }
        if is_due {
            for host in 0..self.hosts.len() {
                if !self.controllers[index].world.inventory.contains_key(&self.site.hosts[host]) {
                    continue;
                }
                let controller = &mut self.controllers[index];
                if controller.looking[host].is_none() {
                    controller.serial += 1;
                    controller.looking[host] = Some(controller.serial);
                    let purpose = Purpose::Look { serial: controller.serial };
                    self.send(index, purpose, self.now, host, 0, Request::Observe, OBSERVE_TIMEOUT_MS);
                }
            }
        }
        if ticks.is_multiple_of(RENEW_TICKS) {
            self.renew(index);
        }
    }

    /// Renews the claims that the rollout holds.
    fn renew(&mut self, index: usize) {
        let controller = &self.controllers[index];
        let Some(rollout) = controller.history.rollouts.get(&controller.rollout) else { return };
        let mut held = Vec::new();
        for instance in rollout.plan.baseline.keys() {
            let claim = controller.world.report(instance).and_then(|report| report.ledger.claim.as_ref());
            let is_given_back = controller.world.in_flight.iter().any(|in_flight| {
                in_flight.action.verb() == Verb::Unclaim && in_flight.action.instance() == instance
            });
            if !is_given_back && claim.is_some_and(|claim| claim.rollout == controller.rollout) {
                held.push((self.site.place(instance), rollout.desired(instance).1));
            }
        }
        let rollout = controller.rollout.clone();
        for ((host, service), generation) in held {
            if std::mem::replace(&mut self.controllers[index].renewing[host][service], true) {
                continue;
            }
            let request = Request::Claim { rollout: rollout.clone(), generation, ended: None };
            let purpose = Purpose::Renew { service };
            self.send(index, purpose, self.now, host, service, request, LEDGER_TIMEOUT_MS);
        }
    }

    /// A look at a host has come back.
    pub(super) fn looked(
        &mut self,
        index: usize,
        host: usize,
        serial: u32,
        seen: Result<HostReport, String>,
    ) {
        let controller = &mut self.controllers[index];
        if !controller.is_alive || controller.looking[host] != Some(serial) {
            return;
        }
        controller.looking[host] = None;
        self.saw(index, host, serial, seen);
        self.advance(index);
    }

    /// A balancer has been read.
    pub(super) fn read(
        &mut self,
        index: usize,
        balancer: usize,
        serial: u32,
        report: Result<BalancerReport, String>,
    ) {
        let controller = &mut self.controllers[index];
        if !controller.is_alive || controller.reading[balancer] != Some(serial) {
            return;
        }
        controller.reading[balancer] = None;
        let report = report.unwrap_or_else(|why| BalancerReport::Unreachable { why });
        self.read_was(index, balancer, serial, report);
        self.advance(index);
    }

    pub(super) fn renewed(&mut self, index: usize, host: usize, service: usize) {
        if self.controllers[index].is_alive
            && std::mem::replace(&mut self.controllers[index].renewing[host][service], false)
        {
            self.advance(index);
        }
    }
}

fn shifted(moment: Timestamp, by_ms: i64) -> Timestamp {
    let shifted = moment.as_millisecond().saturating_add(by_ms);
    Timestamp::from_millisecond(shifted).unwrap_or(moment)
}
