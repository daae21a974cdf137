//! What clients get: what answers them, what is cut, how much serves.

use greenlight_model::id::ReleaseId;
use greenlight_model::record::RecordBody;
use greenlight_model::rollout::Note;
use greenlight_model::traffic::Admission;

use super::super::scenario::Ms;
use super::super::site::{TIMEOUTS, of_release};
use super::super::trial::Trial;
use super::KNOWN_AFTER_MS;

impl Trial<'_> {
    /// A process is about to be stopped by us.
    pub(in crate::trial) fn check_stop(&mut self, host: usize, service: usize) {
        let instance = self.site.instances[host][service].clone();
        let mut complaint = None;
        for (index, balancer) in self.balancers_of(service) {
            let Some(server) = balancer.servers[host] else { continue };
            if server.admission == Admission::Ready && !server.is_foreign {
                complaint = Some(format!("it is stopped while balancer {index} sends it requests"));
            }
        }
        let sessions = self.sessions(host, service);
        if complaint.is_none() && sessions > 0 && !self.check.has_clock_jumps {
            let drain = Ms::try_from(TIMEOUTS.drain.as_millis()).unwrap_or(Ms::MAX);
            let drained_at = instance.as_ref().and_then(|instance| {
                self.check.rollouts.values().rev().find_map(|seen| seen.drained_at.get(instance).copied())
            });
            let is_time_up = drained_at.is_some_and(|at| at + drain <= self.now);
            if !is_time_up && !self.was_hit_within(host, service, KNOWN_AFTER_MS) {
                complaint = Some(format!("{sessions} sessions are cut before their time is up"));
            }
        }
        if let Some(what) = complaint {
            self.violation("drain", |trial| format!("{}: {what}", trial.place(host, service)));
        }
    }

    /// A server is about to be admitted by us.
    pub(in crate::trial) fn check_admission(&mut self, host: usize, service: usize, began: Ms) {
        let truth = &self.hosts[host].instances[service];
        let has_process = self.scenario.services[service].has_process;
        let is_proven = truth.is_proven && (!has_process || truth.answers());
        let latest = self.check.rollouts.values().next_back();
        let is_switched = self.site.instances[host][service]
            .as_ref()
            .is_some_and(|instance| latest.is_some_and(|seen| seen.touched.contains(instance)));
        // One that was switched is looked at first, and not let in when that fails. One that was not runs what it ran before,
        // and is let in also while its host is silent: what its clients got is judged apart.
        let is_silent = !self.hosts[host].is_up
            || self.is_cut(host, true)
            || self.is_cut(host, false)
            || truth.is_damaged
            || self.check.has_weather;
        if !is_proven && (is_switched || !is_silent) && truth.hit_at.is_none_or(|hit| hit < began) {
            self.violation("admission", |trial| {
                format!("{} is admitted and proves nothing", trial.place(host, service))
            });
            return;
        }
        let linked = truth.linked;
        let is_bad = linked.is_some_and(|linked| self.history.bad.contains_key(&linked));
        let is_wanted = self.site.instances[host][service].as_ref().is_some_and(|instance| {
            self.check
                .rollouts
                .values()
                .any(|seen| seen.plan.baseline.get(instance).copied().flatten() == linked)
        });
        if is_bad && !is_wanted && !self.is_recent_mark() {
            self.violation("bad release", |trial| {
                format!("{} is admitted with a bad release", trial.place(host, service))
            });
        }
    }

    fn is_recent_mark(&self) -> bool {
        // A mark that was written while the admission was on its way could not be known.
        self.log.iter().rev().any(|record| {
            matches!(
                &record.body,
                RecordBody::ReleaseMarked { .. } | RecordBody::Noted { note: Note::TurnBack { .. }, .. }
            ) && record.at
                >= super::super::site::stamp(
                    self.now.saturating_sub(KNOWN_AFTER_MS),
                    self.controller_clock_ms,
                )
        })
    }

    /// A client has been answered.
    pub(in crate::trial) fn check_answer(
        &mut self,
        balancer: usize,
        host: usize,
        service: usize,
        release: ReleaseId,
    ) {
        let truth = &self.hosts[host].instances[service];
        let is_foreign = self.balancers[balancer].servers[host].is_some_and(|server| server.is_foreign);
        let is_proven = truth.is_proven && truth.linked == Some(release);
        if !is_proven && !is_foreign {
            let number = of_release(release).1;
            self.violation("answers", |trial| {
                format!(
                    "clients of {} are answered by v{number}, which is not proven there",
                    trial.place(host, service)
                )
            });
        }
    }

    /// An instance that served has just been taken out by us.
    pub(in crate::trial) fn check_floor(&mut self, host: usize, service: usize, began: Ms, goes_back: bool) {
        let members = &self.scenario.services[service].hosts;
        let all = members.len();
        let mut floor = if all <= 1 { 0 } else { self.scenario.floor.of(all) };
        if goes_back {
            let latest = self.check.rollouts.values().next_back();
            let ran_before = latest.and_then(|seen| seen.ran_before.get(&self.site.names[service]));
            floor = floor.min(ran_before.copied().unwrap_or(0));
        }
        let since = began.saturating_sub(KNOWN_AFTER_MS);
        if self.hosts[host].instances[service].hit_at.is_some_and(|hit| hit >= since) {
            // That it serves again could not be known.
            return;
        }
        let counts = |other: &&usize| {
            let truth = &self.hosts[**other].instances[service];
            **other != host && (self.serves(**other, service) || truth.hit_at.is_some_and(|hit| hit >= since))
        };
        let serving = members.iter().filter(counts).count();
        if serving < floor {
            self.violation("floor", |trial| {
                let place = trial.place(host, service);
                format!("without {place}, {serving} serve, and the floor is {floor}")
            });
        }
    }
}
