//! The loop's part in a canary: counts are read each second, its share is lent again, and a verdict is acted on at once.

use std::collections::BTreeSet;
use std::sync::Arc;

use greenlight_model::action::Verb;
use greenlight_model::id::{HostName, ServiceName};

use super::{Arrival, Controller, RunError};
use crate::clock;
use crate::judging::{Counted, Phase};
use crate::perform::LEASE;

/// Every how many ticks the balancers' counts are read.
const COUNT_TICKS: u64 = 5;

impl Controller {
    /// Begins to read the counts that are due, and lends the canary its share for longer.
    pub(super) fn count(&mut self, tick: u64) {
        let Some(judging) = &self.judging else { return };
        if !tick.is_multiple_of(COUNT_TICKS) {
            return;
        }
        let is_lent = matches!(self.canary_phase(), Phase::Judged { .. });
        let judged: BTreeSet<&ServiceName> = judging.services().collect();
        let balancers = self.environment.balancers.iter().enumerate();
        let due: Vec<usize> =
            balancers.filter(|(_, one)| judged.contains(&one.service)).map(|(index, _)| index).collect();
        for index in due {
            if !self.counting.insert(index) {
                continue;
            }
            let release = self.performer.label(&self.environment.balancers[index].service).to_owned();
            let (gatherer, arrivals) = (Arc::clone(&self.gatherer), self.arrivals.0.clone());
            tokio::spawn(async move {
                let driver = &gatherer.balancers()[index];
                if is_lent {
                    // One that has lapsed, or was never lent, shows in the next look at the balancer, and is set again.
                    let _ = driver.renew(&release, LEASE).await;
                }
                let counts = driver.counts().await.map_err(|error| error.to_string());
                let _ =
                    arrivals.send(Arrival::Counted(Box::new(Counted { index, at: clock::now(), counts })));
            });
        }
    }

    /// Puts a reading to the judge.
    pub(super) fn counted(&mut self, counted: Counted) -> Result<(), RunError> {
        self.counting.remove(&counted.index);
        let phase = self.canary_phase();
        let canaries = self.canary_hosts();
        let service = self.environment.balancers[counted.index].service.clone();
        let balancers = self.environment.balancers.iter().enumerate();
        let of_service: Vec<usize> =
            balancers.filter(|(_, one)| one.service == service).map(|(index, _)| index).collect();
        let Some(judging) = &mut self.judging else { return Ok(()) };
        judging.take(&service, &of_service, counted, &phase, &canaries)?;
        self.judgement = judging.judgement(&phase);
        Ok(())
    }

    fn canary_phase(&self) -> Phase {
        let is_sharing = self.in_flight.iter().any(|in_flight| in_flight.action.verb() == Verb::Share);
        match (&self.judging, self.log.history().rollouts.get(&self.rollout)) {
            (Some(judging), Some(rollout)) => judging.phase(rollout, is_sharing),
            _ => Phase::Between,
        }
    }

    /// The hosts of every canary wave: none of them is compared with itself.
    fn canary_hosts(&self) -> BTreeSet<HostName> {
        let waves = self.performer.plan.waves.iter().filter(|wave| !wave.steps.is_empty());
        waves.flat_map(|wave| wave.instances.iter().map(|instance| instance.host.clone())).collect()
    }
}
