//! After the faults: everything outside Greenlight is mended, and somebody looks after the rollout until it has ended.

use greenlight_model::rollout::OperatorRequest;
use greenlight_model::traffic::Admission;

use super::scenario::Ms;
use super::trial::{Event, Trial};

/// How long the rollout has to end once everything is mended, and again once it is aborted.
const LIVENESS_MS: Ms = 240_000;

/// How often the operator looks whether somebody has to be resumed or aborted once everything is mended.
const CARE_INTERVAL_MS: Ms = 1_000;

impl Trial<'_> {
    /// Everything outside Greenlight is mended.
    pub(super) fn mend(&mut self) {
        self.say(|_| "everything is mended".to_owned());
        self.is_mended = true;
        for index in std::mem::take(&mut self.active) {
            self.active.insert(index);
            self.fault_ends(index);
        }
        self.active.clear();
        self.ambushes.clear();
        for host in 0..self.hosts.len() {
            self.hosts[host].crashes_at_write = None;
            self.mends(host);
            if !self.hosts[host].is_up {
                self.host_returns(host);
            }
        }
        for balancer in 0..self.balancers.len() {
            for host in 0..self.hosts.len() {
                let by_hand = self.balancers[balancer].servers[host]
                    .is_some_and(|server| server.is_foreign && server.admission != Admission::Ready);
                if by_hand {
                    // Whoever took it out lets it in again.
                    self.set_by_hand(balancer, host, Admission::Ready);
                }
            }
        }
        self.restart_the_dead();
        self.deadline = self.now + LIVENESS_MS;
        self.after(CARE_INTERVAL_MS, Event::Care);
    }

    /// What a fault ended outside the rollout's reach, somebody starts again.
    fn restart_the_dead(&mut self) {
        let open = self.history.open_rollout(&self.site.environment.name).cloned();
        for host in 0..self.hosts.len() {
            for service in 0..self.scenario.services.len() {
                let Some(instance) = self.site.instances[host][service].clone() else { continue };
                let truth = &self.hosts[host].instances[service];
                let (linked, process, lock) = (truth.linked, truth.process, truth.lock);
                let is_touched = open.as_ref().is_some_and(|open| open.touched.contains(&instance));
                if let Some(linked) = linked
                    && process.is_none()
                    && lock.is_none()
                    && !is_touched
                    && self.scenario.services[service].has_process
                {
                    self.hit(host, service);
                    self.start(host, service, linked);
                }
            }
        }
    }

    /// Once everything is mended: whoever is responsible looks after the rollout until it has ended.
    pub(super) fn care(&mut self) {
        self.after(CARE_INTERVAL_MS, Event::Care);
        let Some(open) = self.history.open_rollout(&self.site.environment.name) else { return };
        let is_held = open.held.is_some();
        let is_driven = self.controllers.iter().any(|controller| controller.is_alive);
        if self.now > self.deadline {
            self.check_waits();
            if self.report.violation.is_some() {
                return;
            }
            if self.has_aborted {
                self.violation("does not end", |trial| trial.why_not_ended());
                return;
            }
            self.abort_at_last();
            return;
        }
        if is_driven {
            return;
        }
        if is_held {
            // An abort wins over every hold.
            if self.has_aborted {
                self.violation("abort", |_| "it was aborted, and is held".to_owned());
                return;
            }
            if self.resumes_left == 0 {
                self.abort_at_last();
                return;
            }
            self.resumes_left -= 1;
        }
        self.take_over(0, Some(OperatorRequest::Resume));
    }

    fn abort_at_last(&mut self) {
        self.has_aborted = true;
        self.deadline = self.now + LIVENESS_MS;
        self.take_over(0, Some(OperatorRequest::Abort));
    }
}
