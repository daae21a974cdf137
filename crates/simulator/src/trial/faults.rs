//! Faults as they begin, last and end, and what they do to whatever asks.

use greenlight_model::action::{Blame, Verb};
use greenlight_model::host::{Claim, LEDGER_VERSION, Ledger};
use greenlight_model::id::RolloutId;
use greenlight_model::rollout::OperatorRequest;

use super::controller::Doom;
use super::host::InstanceTruth;
use super::ledger::is_claim_current;
use super::scenario::{FaultKind, Ms, Strike};
use super::site::{CLAIM_MS, stamp};
use super::trial::{Event, Trial};

/// A strike that waits for the first host that is asked something.
pub(super) struct Ambush {
    verb: Verb,
    after: Ms,
    strike: Strike,
    lasts: Ms,
    name: &'static str,
}

/// A rollout of another record log.
fn foreign_rollout() -> RolloutId {
    #[expect(clippy::expect_used, reason = "letters are an id")]
    "foreign".parse().expect("an id")
}

impl Trial<'_> {
    pub(super) fn fault_begins(&mut self, index: usize) {
        let fault = &self.scenario.faults[index];
        self.say(|_| format!("fault: {:?} for {} ms", fault.kind, fault.lasts));
        let mut is_window = false;
        match fault.kind.clone() {
            FaultKind::KillController { amid, boundaries, then } => {
                let lasts = fault.lasts;
                let alive = self.controllers.iter_mut().rev().find(|controller| controller.is_alive);
                let Some(controller) = alive else { return };
                controller.doom = Some(Doom { amid, boundaries, lasts, then });
            }
            FaultKind::SecondController => {
                self.check.has_two = true;
                let machine = 1 + self.controllers.iter().map(|one| one.machine).max().unwrap_or(0);
                self.take_over(machine, Some(OperatorRequest::Resume));
            }
            FaultKind::Crash { host, keeps_disk } => self.host_crashes(host, keeps_disk, fault.lasts),
            FaultKind::CrashAtWrite { host, keeps_new } => {
                self.hosts[host].crashes_at_write = Some((fault.lasts, keeps_new));
                // It is counted when it happens.
                return;
            }
            FaultKind::Amid { verb, after, strike } => {
                // It is counted when it happens.
                self.ambushes.push(Ambush {
                    verb,
                    after,
                    strike,
                    lasts: fault.lasts,
                    name: fault.kind.name(),
                });
                return;
            }
            FaultKind::ForeignClaim { host, service } => {
                if !self.claim_for_another(host, service) {
                    return;
                }
                is_window = true;
            }
            FaultKind::RestartBalancer { balancer, has_state } => self.restart_balancer(balancer, has_state),
            FaultKind::ByHand { balancer, host, admission } => self.set_by_hand(balancer, host, admission),
            FaultKind::AgentKilled { host } => {
                self.agents_die(host, false);
                self.hit_all(host);
            }
            FaultKind::HostClock { host, by_ms } => {
                self.hosts[host].clock_ms += by_ms;
                self.check.has_clock_jumps = true;
            }
            FaultKind::ControllerClock { by_ms } => {
                self.controller_clock_ms += by_ms;
                self.check.has_clock_jumps = true;
            }
            FaultKind::ProcessDies { host, service } => {
                if let Some(process) = self.hosts[host].instances[service].process {
                    self.process_ends(host, service, process.serial);
                }
            }
            FaultKind::Asks(request) => self.operator_asks(request),
            FaultKind::Deploys { release, part } => self.deploy(0, release, part),
            FaultKind::MarksBad { release } => self.mark_bad(release),
            FaultKind::LedgerDamaged { host } => {
                self.hosts[host].instances.iter_mut().for_each(|truth| truth.is_damaged = true);
                self.hit_all(host);
                is_window = true;
            }
            FaultKind::Cut { host, .. } => {
                self.hit_all(host);
                is_window = true;
            }
            FaultKind::Messages { .. } => {
                self.check.has_weather = true;
                is_window = true;
            }
            FaultKind::DiskFull { host }
            | FaultKind::CommandFails { host, .. }
            | FaultKind::CommandHangs { host, .. } => {
                self.hit_all(host);
                is_window = true;
            }
            FaultKind::CutBalancer { .. } | FaultKind::Gate => is_window = true,
            FaultKind::BadRelease { .. } => {}
        }
        if is_window {
            self.active.insert(index);
            self.after(fault.lasts, Event::FaultEnds(index));
        }
        self.count(fault.kind.name());
    }

    pub(super) fn fault_ends(&mut self, index: usize) {
        if !self.active.remove(&index) {
            return;
        }
        match &self.scenario.faults[index].kind {
            FaultKind::LedgerDamaged { host } => {
                self.hosts[*host].instances.iter_mut().for_each(|truth| truth.is_damaged = false);
                self.hit_all(*host);
            }
            FaultKind::ForeignClaim { host, service } => self.unclaim_for_another(*host, *service),
            FaultKind::Cut { host, .. } => {
                // What was connected over it has broken.
                for controller in 0..self.controllers.len() {
                    self.connection_ends(controller, Some(*host));
                }
                self.hit_all(*host);
            }
            FaultKind::DiskFull { host } | FaultKind::CommandHangs { host, .. } => self.hit_all(*host),
            _ => {}
        }
    }

    /// A host was asked something: whoever waits for that strikes it.
    pub(super) fn ambush(&mut self, host: usize, asked: Verb) {
        let Some(place) = self.ambushes.iter().position(|ambush| ambush.verb == asked) else { return };
        let Ambush { after, strike, lasts, name, .. } = self.ambushes.remove(place);
        self.count(name);
        self.after(after, Event::Strikes { host, strike, lasts });
    }

    pub(super) fn strikes(&mut self, host: usize, strike: Strike, lasts: Ms) {
        if self.is_mended {
            return;
        }
        match strike {
            Strike::Crash { keeps_disk } => self.host_crashes(host, keeps_disk, lasts),
            Strike::Cut => {
                self.say(|trial| format!("nothing reaches {} any more", trial.site.hosts[host]));
                self.hosts[host].is_cut = true;
                self.hit_all(host);
                self.after(lasts, Event::Mends(host));
            }
        }
    }

    /// A link that was cut amid an action is there again.
    pub(super) fn mends(&mut self, host: usize) {
        if !std::mem::take(&mut self.hosts[host].is_cut) {
            return;
        }
        self.say(|trial| format!("{} is reached again", trial.site.hosts[host]));
        for controller in 0..self.controllers.len() {
            self.connection_ends(controller, Some(host));
        }
        self.hit_all(host);
    }

    /// Somebody with another record log claims an instance, as the agent lets them. False when it does not.
    fn claim_for_another(&mut self, host: usize, service: usize) -> bool {
        let now = self.host_ms(host);
        let truth = &self.hosts[host].instances[service];
        let is_there = self.site.instances[host][service].is_some() && self.hosts[host].is_up;
        if !is_there
            || truth.is_damaged
            || truth.ledger.claim.as_ref().is_some_and(|one| is_claim_current(one, now))
        {
            return false;
        }
        self.say(|trial| format!("somebody else claims {}", trial.place(host, service)));
        self.hit(host, service);
        self.hosts[host].instances[service].ledger.claim = Some(Claim {
            rollout: foreign_rollout(),
            holder: "somebody".to_owned(),
            reason: "something else".to_owned(),
            expires_at: stamp(CLAIM_MS, now),
        });
        true
    }

    fn unclaim_for_another(&mut self, host: usize, service: usize) {
        let ledger = &mut self.hosts[host].instances[service].ledger;
        if ledger.claim.as_ref().is_some_and(|claim| claim.rollout == foreign_rollout()) {
            ledger.claim = None;
            self.hit(host, service);
        }
    }

    pub(super) fn host_crashes(&mut self, host: usize, keeps_disk: bool, lasts: Ms) {
        if !self.hosts[host].is_up {
            return;
        }
        self.say(|trial| format!("{} loses power", trial.site.hosts[host]));
        self.agents_die(host, true);
        let crashed = &mut self.hosts[host];
        crashed.is_up = false;
        crashed.boots += 1;
        for truth in &mut crashed.instances {
            truth.process = None;
            truth.lock = None;
            truth.guard_serial = None;
            truth.serial += 1;
            if !keeps_disk {
                let serial = truth.serial;
                let ledger = Ledger { version: LEDGER_VERSION, ..Ledger::default() };
                *truth = InstanceTruth { ledger, serial, ..InstanceTruth::default() };
            }
        }
        for service in 0..self.scenario.services.len() {
            self.cut_sessions(host, service);
        }
        self.hit_all(host);
        self.after(lasts, Event::HostReturns(host));
    }

    pub(super) fn host_returns(&mut self, host: usize) {
        self.say(|trial| format!("{} has power again", trial.site.hosts[host]));
        self.hosts[host].is_up = true;
        self.hit_all(host);
        for service in 0..self.scenario.services.len() {
            let linked = self.hosts[host].instances[service].linked;
            if let Some(linked) = linked
                && self.scenario.starts_at_boot
                && self.scenario.services[service].has_process
            {
                self.start(host, service, linked);
            }
            if self.scenario.starts_at_boot {
                self.rearm(host, service);
            }
        }
    }

    pub(super) fn active(&self) -> impl Iterator<Item = &FaultKind> {
        self.active.iter().map(|index| &self.scenario.faults[*index].kind)
    }

    pub(super) fn is_disk_full(&self, host: usize) -> bool {
        self.active().any(|kind| matches!(kind, FaultKind::DiskFull { host: full } if *full == host))
    }

    pub(super) fn hangs(&self, host: usize, verb: Verb) -> bool {
        self.active().any(|kind| {
            matches!(kind, FaultKind::CommandHangs { host: at, verb: hanging } if *at == host && *hanging == verb)
        })
    }

    pub(super) fn command_fails(&self, host: usize, verb: Verb) -> Option<Blame> {
        self.active().find_map(|kind| match kind {
            FaultKind::CommandFails { host: at, verb: failing, blame } if *at == host && *failing == verb => {
                Some(*blame)
            }
            _ => None,
        })
    }

    pub(super) fn is_cut(&self, host: usize, inwards: bool) -> bool {
        self.hosts[host].is_cut || self.active().any(|kind| {
            matches!(kind, FaultKind::Cut { host: at, to, from } if *at == host && if inwards { *to } else { *from })
        })
    }

    pub(super) fn is_balancer_cut(&self, balancer: usize) -> bool {
        self.active().any(|kind| matches!(kind, FaultKind::CutBalancer { balancer: cut } if *cut == balancer))
    }

    pub(super) fn is_gate_amber(&self) -> bool {
        self.active().any(|kind| *kind == FaultKind::Gate)
    }

    fn weather(&self) -> (u64, u64, Ms) {
        let mut weather = (0, 0, 0);
        for kind in self.active() {
            if let FaultKind::Messages { lost, repeated, late } = kind {
                weather = (weather.0.max(*lost), weather.1.max(*repeated), weather.2.max(*late));
            }
        }
        weather
    }

    pub(super) fn is_lost(&mut self) -> bool {
        let (lost, _, _) = self.weather();
        lost > 0 && self.numbers.chance(lost)
    }

    pub(super) fn is_repeated(&mut self) -> bool {
        let (_, repeated, _) = self.weather();
        repeated > 0 && self.numbers.chance(repeated)
    }

    pub(super) fn latency(&mut self, _controller: usize) -> Ms {
        let (_, _, late) = self.weather();
        self.numbers.between(1, 15) + if late > 0 { self.numbers.below(late) } else { 0 }
    }
}
