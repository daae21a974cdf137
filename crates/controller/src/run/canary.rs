//! The loop's part in a canary: counts are read each second, its share is lent again, what its hosts use is sampled where there
//! are guards, and a verdict is acted on at once.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use greenlight_link::message::{Event, Request};
use greenlight_model::action::Verb;
use greenlight_model::id::{HostName, Instance, ServiceName};
use greenlight_model::sample::HostSample;
use tokio::task::JoinHandle;

use super::{Arrival, Controller, RunError};
use crate::clock;
use crate::judging::{Counted, Phase};
use crate::perform::LEASE;

/// Every how many ticks the balancers' counts are read.
const COUNT_TICKS: u64 = 5;
/// How often hosts of a canary are looked at for its guards.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// For how long samples are asked for at once: so long a host goes on when nobody listens any more and its connection stays.
const SAMPLING_TIME: Duration = Duration::from_secs(60);

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
        let service = self.environment.balancers[counted.index].service.clone();
        let balancers = self.environment.balancers.iter().enumerate();
        let of_service: Vec<usize> =
            balancers.filter(|(_, one)| one.service == service).map(|(index, _)| index).collect();
        let Some(judging) = &mut self.judging else { return Ok(()) };
        judging.take(&service, &of_service, counted, &phase)?;
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

    /// Begins to take samples of hosts of the canary that give none, and ends it while they are changed.
    pub(super) fn sample(&mut self, tick: u64) {
        let Some(judging) = &self.judging else { return };
        if !tick.is_multiple_of(COUNT_TICKS) {
            return;
        }
        if matches!(self.canary_phase(), Phase::Between) {
            self.sampling.clear();
            return;
        }
        self.sampling.retain(|_, sampling| !sampling.0.is_finished());
        for host in judging.guarded() {
            if self.sampling.contains_key(host) {
                continue;
            }
            let instances = judging.services().map(|service| Instance::new(host.clone(), service.clone()));
            let instances = instances.filter(|instance| self.performer.plan.baseline.contains_key(instance));
            let specs = instances.filter_map(|instance| self.gatherer.spec(&instance, None)).collect();
            let request = Request::Sample { specs, every: SAMPLE_INTERVAL, during: SAMPLING_TIME };
            let (hosts, arrivals) = (Arc::clone(self.gatherer.hosts()), self.arrivals.0.clone());
            let called = host.clone();
            let task = tokio::spawn(async move {
                let arrived = |sample| {
                    let _ =
                        arrivals.send(Arrival::Sampled { host: called.clone(), sample: Box::new(sample) });
                };
                let ended = hosts.call(&called, request, SAMPLING_TIME * 2, |event| {
                    if let Event::Sampled(sample) = event {
                        arrived(Ok(*sample));
                    }
                });
                if let Err(error) = ended.await {
                    arrived(Err(error.why));
                }
            });
            self.sampling.insert(host.clone(), Sampling(task));
        }
    }

    /// Puts a sample to the guards.
    pub(super) fn sampled(
        &mut self,
        host: &HostName,
        sample: &Result<HostSample, String>,
    ) -> Result<(), RunError> {
        let phase = self.canary_phase();
        let Some(judging) = &mut self.judging else { return Ok(()) };
        judging.sampled(host, clock::now(), sample, &phase)?;
        self.judgement = judging.judgement(&phase);
        Ok(())
    }
}

/// Samples of one host that are being taken. Dropped, they end.
pub(super) struct Sampling(JoinHandle<()>);

impl Drop for Sampling {
    fn drop(&mut self) {
        self.0.abort();
    }
}
