//! A host as it truly is: what is on its disk, what runs, and who is changing it.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_model::host::{
    Answer, HostFacts, HostReport, InstanceReport, Ledger, ProcessReport, ProcessState,
};
use greenlight_model::id::{Generation, ReleaseId};

use super::scenario::Ms;
use super::site::stamp;
use super::trial::Trial;

/// One host.
pub(super) struct Host {
    pub(super) is_up: bool,
    /// Counts starts, so that what was begun before one is known to be gone.
    pub(super) boots: u32,
    /// By how much its clock is off.
    pub(super) clock_ms: i64,
    /// Nothing reaches it or comes from it, since it was struck amid an action.
    pub(super) is_cut: bool,
    /// What happens at its next ledger write: it loses power for so long, and whether the new ledger is there then.
    pub(super) crashes_at_write: Option<(Ms, bool)>,
    /// By service.
    pub(super) instances: Vec<InstanceTruth>,
}

/// One service on one host.
#[derive(Default)]
pub(super) struct InstanceTruth {
    pub(super) ledger: Ledger,
    pub(super) linked: Option<ReleaseId>,
    pub(super) staged: BTreeSet<ReleaseId>,
    /// Releases that were run here: how to run them is known.
    pub(super) runs: BTreeSet<ReleaseId>,
    pub(super) is_damaged: bool,
    pub(super) process: Option<ProcessTruth>,
    /// Whether what is switched to was proven since it was switched to.
    pub(super) is_proven: bool,
    /// The task that changes it.
    pub(super) lock: Option<u32>,
    /// Counts what is started and armed (a guard's `armed_at_ms`), so that what is meant for an earlier one is known.
    pub(super) serial: u32,
    pub(super) guard_serial: Option<u32>,
    /// When a fault last touched it.
    pub(super) hit_at: Option<Ms>,
    /// How often its host truly went back by itself from a generation, the latest one.
    pub(super) gone_back: (Generation, u32),
    /// The highest generation that its disk has had.
    pub(super) generation_seen: Generation,
}

/// A process that lives.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProcessTruth {
    pub(super) release: ReleaseId,
    pub(super) started_at: Ms,
    /// Whether it answers.
    pub(super) is_ready: bool,
    /// Whether it was asked to end.
    pub(super) is_stopping: bool,
    pub(super) serial: u32,
    /// Requests that it survives.
    pub(super) requests_left: Option<u8>,
}

impl InstanceTruth {
    /// Whether it answers as a release that it has proven since it was switched to.
    pub(super) fn proves(&self, release: ReleaseId, has_process: bool) -> bool {
        let answers = !has_process
            || self.process.is_some_and(|process| process.is_ready && process.release == release);
        self.linked == Some(release) && self.is_proven && answers
    }

    pub(super) fn answers(&self) -> bool {
        self.process.is_some_and(|process| process.is_ready)
    }
}

impl Trial<'_> {
    /// What the agent of a host says of it, or why it cannot. A guard whose timer is gone gets its time again by that.
    pub(super) fn observe(&mut self, host: usize) -> Result<HostReport, String> {
        for service in 0..self.scenario.services.len() {
            self.rearm(host, service);
        }
        let mut instances = BTreeMap::new();
        for (service, instance) in self.site.instances[host].iter().enumerate() {
            if instance.is_none() {
                continue;
            }
            let truth = &self.hosts[host].instances[service];
            if truth.is_damaged {
                return Err("the ledger is damaged".to_owned());
            }
            instances.insert(self.site.names[service].clone(), self.report(host, service));
        }
        Ok(HostReport { facts: facts(), instances })
    }

    pub(super) fn report(&self, host: usize, service: usize) -> InstanceReport {
        let truth = &self.hosts[host].instances[service];
        let mut processes = BTreeMap::new();
        if self.scenario.services[service].has_process {
            let report = match truth.process {
                Some(process) => ProcessReport {
                    state: ProcessState::Running {
                        pid: process.serial,
                        started_at: stamp(process.started_at, self.hosts[host].clock_ms),
                    },
                    answer: match (process.is_ready, truth.ledger.active) {
                        (false, _) => Answer::None { why: "it does not answer".to_owned() },
                        (true, None) => Answer::None { why: "no release was activated here".to_owned() },
                        (true, Some(_)) => Answer::Release { release: process.release, proof: String::new() },
                    },
                    profile: None,
                },
                None => ProcessReport {
                    state: ProcessState::Stopped,
                    answer: Answer::None { why: "it does not run".to_owned() },
                    profile: None,
                },
            };
            processes.insert(self.main.clone(), report);
        }
        let mut ledger = truth.ledger.clone();
        if let Some(guard) = &mut ledger.guard
            && truth.guard_serial != Some(u32::try_from(guard.armed_at_ms).unwrap_or(0))
        {
            guard.lost = Some("the machine was started anew since it was armed".to_owned());
        }
        InstanceReport {
            ledger,
            linked: truth.linked,
            staged: truth.staged.clone(),
            processes,
            disk_free_bytes: 0,
        }
    }

    /// Whether clients of a service get answers from this host.
    pub(super) fn serves(&self, host: usize, service: usize) -> bool {
        let truth = &self.hosts[host].instances[service];
        let mut is_balanced = false;
        let mut is_sent_to = false;
        for (index, _) in self.balancers_of(service) {
            is_balanced = true;
            is_sent_to = is_sent_to || self.balancers[index].sends_to(host);
        }
        let lives = !self.scenario.services[service].has_process || truth.answers();
        // As a look would see it: it answers as what it is switched to.
        let is_itself = truth.linked.is_some()
            && (!self.scenario.services[service].has_process
                || truth.process.is_some_and(|process| Some(process.release) == truth.linked));
        let is_proven = is_balanced || is_itself;
        self.hosts[host].is_up && lives && is_proven && (is_sent_to || !is_balanced)
    }

    /// A fault has touched an instance.
    pub(super) fn hit(&mut self, host: usize, service: usize) {
        self.hosts[host].instances[service].hit_at = Some(self.now);
    }

    pub(super) fn hit_all(&mut self, host: usize) {
        for service in 0..self.scenario.services.len() {
            self.hit(host, service);
        }
    }
}

fn facts() -> HostFacts {
    HostFacts {
        hostname: String::new(),
        os: String::new(),
        architecture: String::new(),
        machine_id: None,
        user: String::new(),
        is_root: true,
        managers: Vec::new(),
        agent_version: String::new(),
    }
}
