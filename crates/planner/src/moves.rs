//! What one decision gathers before it is answered: steps, and waits without repetition.

use std::collections::BTreeSet;

use greenlight_model::action::Action;
use greenlight_model::decision::{Decision, Step, Wait};
use greenlight_model::id::{HostName, ServiceName};

/// Steps and waits of one decision.
#[derive(Default)]
pub(crate) struct Moves {
    pub(crate) steps: Vec<Step>,
    pub(crate) waits: Vec<Wait>,
    hosts: BTreeSet<HostName>,
    services: BTreeSet<ServiceName>,
    balancers: BTreeSet<String>,
}

impl Moves {
    pub(crate) fn step(&mut self, action: Action, why: impl Into<String>) {
        self.steps.push(Step { action, why: why.into() });
    }

    /// Adds a wait, unless the same host, floor, balancer or canary is waited for already.
    pub(crate) fn wait(&mut self, wait: Wait) {
        let is_new = match &wait {
            Wait::Unreachable { host, .. } => self.hosts.insert(host.clone()),
            Wait::Floor { service, .. } => self.services.insert(service.clone()),
            Wait::Balancer { title, .. } => self.balancers.insert(title.clone()),
            Wait::Learning { .. } => !self.waits.contains(&wait),
            _ => true,
        };
        if is_new {
            self.waits.push(wait);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.waits.is_empty()
    }

    pub(crate) fn proceed(self) -> Decision {
        Decision::Proceed { steps: self.steps, waits: self.waits }
    }
}
