//! The loop of one rollout: absorb what came in, decide, perform what is permitted, wait for something to happen.
//!
//! Everything that arrives (an action's end, a look at a host, a balancer's answer, an operator's record, a signal)
//! comes through one channel or one tick and is absorbed by one task, which owns the log and the world. A look that
//! was begun before the last one that was taken in is thrown away when it arrives: it would show the past. A record that was
//! decided upon is written only where the log still ends as it did then; else it is decided anew.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use greenlight_interlock::Interlock;
use greenlight_link::message::Request;
use greenlight_model::action::{Action, Verb};
use greenlight_model::canary::Judgement;
use greenlight_model::decision::{Decision, Outcome, Running, Step, Wait};
use greenlight_model::fleet::{Environment, Fleet};
use greenlight_model::host::HostReport;
use greenlight_model::id::{Generation, HostName, Instance, ReleaseId, RolloutId, ServiceName};
use greenlight_model::manifest::Release;
use greenlight_model::record::RecordBody;
use greenlight_model::rollout::{Note, OperatorRequest, Rollout};
use greenlight_model::sample::HostSample;
use greenlight_model::traffic::BalancerReport;
use greenlight_model::world::{InFlight, Unreachable, World};
use greenlight_store::{Log, StoreError};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use crate::append::{append, append_decision};
use crate::claims;
use crate::clock;
use crate::gather::{Gathered, Gatherer, Look};
use crate::hosts::{HostError, Hosts};
use crate::judging::{Counted, EvidenceFileError, Judging};
use crate::objects::Shipments;
use crate::perform::{Artifacts, Performed, Performer, Standing};
use crate::prepare::{release_facts, rollout_gates};
use crate::progress::{Progress, ProgressSink};
use crate::releases::{charter, known_releases};
use crate::takeover;

mod canary;

/// How often the log is read for what operators ask, and balancers while a wait depends on them.
const TICK: Duration = Duration::from_millis(200);
/// Every how many ticks all hosts and balancers are looked at, so that a crash after the proof is noticed.
const LOOK_TICKS: u64 = 10;
/// How often claims are renewed within their duration, so that all but one may get lost.
const RENEWALS: u128 = 4;

/// How many ticks a controller that takes over waits for the one before it to read that, and for what it had sent to arrive.
const TAKEOVER_TICKS: usize = 3;

/// What a signal asks of the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupt {
    /// Finish what is under way, then stop: `^C` once, SIGTERM.
    Hold,
    /// Stop now; hosts are left as they are and the records say how far it is: `^C` twice.
    Detach,
}

/// How the loop ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The rollout is over.
    Outcome(Outcome),
    /// It waits for a person; nothing is under way.
    Held(Vec<Wait>),
    /// The loop was told to let go, with this under way.
    Detached(Vec<InFlight>),
}

/// Why the loop had to stop. The rollout is open; `resume` goes on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The record log cannot be read or written.
    #[error("the record log failed, so nothing more is done; `greenlight resume` goes on when it is mended")]
    Store(#[from] StoreError),
    /// The depot cannot be read.
    #[error("the depot failed: {0}")]
    Depot(String),
    /// The evidence of a canary cannot be kept.
    #[error(
        "the evidence of the canary cannot be kept, so nothing more is done; `greenlight resume` goes on when it is mended"
    )]
    Evidence(#[from] EvidenceFileError),
    /// Another controller drives the rollout now.
    #[error(
        "{by} has taken rollout {rollout} over from another machine, so this controller has let go: what it had begun ends by itself. \
         Follow it with `greenlight status`"
    )]
    TakenOver {
        /// Who: `user@machine`.
        by: String,
        /// Which.
        rollout: RolloutId,
    },
    /// There is no such rollout.
    #[error("rollout {0} is not in the record log")]
    Unknown(RolloutId),
    /// The environment of the rollout is gone.
    #[error("rollout {rollout} goes to {environment}, which is not in greenlight.toml any more")]
    NoEnvironment {
        /// The rollout.
        rollout: RolloutId,
        /// The environment's name.
        environment: String,
    },
}

/// Drives one rollout.
pub struct Controller {
    fleet: Fleet,
    environment: Environment,
    rollout: RolloutId,
    log: Log,
    by: String,
    gatherer: Arc<Gatherer>,
    performer: Arc<Performer>,
    releases: Vec<Release>,
    progress: ProgressSink,
    gathered: Gathered,
    in_flight: Vec<InFlight>,
    last_looks: LastLooks,
    /// The record up to which it is known who drives.
    read_up_to: u64,
    looking: BTreeSet<HostName>,
    reading: BTreeSet<usize>,
    renewing: BTreeSet<Instance>,
    last_waits: Vec<Wait>,
    /// The judges of the canary, where there is one.
    judging: Option<Judging>,
    /// What judging it has come to.
    judgement: Option<Judgement>,
    counting: BTreeSet<usize>,
    /// Who gives samples of each host of the canary.
    sampling: BTreeMap<HostName, canary::Sampling>,
    arrivals: (mpsc::UnboundedSender<Arrival>, mpsc::UnboundedReceiver<Arrival>),
}

/// Something that came in. The channel is unbounded because what can be in it is bounded by what was begun: one end
/// per action in flight, one look per host and balancer, one reading of counts per balancer, one renewal per instance, and
/// what comes each second from a host of a canary.
enum Arrival {
    Performed { action: Action, performed: Box<Performed> },
    Looked { host: HostName, look: Box<Look<Result<HostReport, HostError>>> },
    Read { index: usize, look: Look<BalancerReport> },
    Renewed { instance: Instance, failed: Option<String> },
    Counted(Box<Counted>),
    Sampled { host: HostName, sample: Box<Result<HostSample, String>> },
}

/// The number of the look at each host and balancer that was taken in last.
#[derive(Default)]
struct LastLooks {
    hosts: BTreeMap<HostName, u64>,
    balancers: BTreeMap<usize, u64>,
}

/// Whether a look is newer than what is there, which it then is.
fn is_newer<K: Ord>(known: &mut BTreeMap<K, u64>, key: K, number: u64) -> bool {
    let last = known.entry(key).or_default();
    let is_newer = number > *last;
    *last = number.max(*last);
    is_newer
}

impl Controller {
    /// A controller for a rollout that is in the log.
    ///
    /// # Errors
    /// When the rollout or its environment is not there, or the depot cannot be read.
    #[expect(clippy::too_many_arguments, reason = "each is a different thing that only the caller has")]
    pub fn new(
        fleet: Fleet,
        rollout: RolloutId,
        log: Log,
        by: String,
        hosts: Arc<Hosts>,
        artifacts: Artifacts,
        gathered: Gathered,
        progress: ProgressSink,
    ) -> Result<Self, RunError> {
        let folded =
            log.history().rollouts.get(&rollout).ok_or_else(|| RunError::Unknown(rollout.clone()))?;
        let plan = folded.plan.clone();
        let Some(environment) = fleet.environments.get(&plan.environment).cloned() else {
            return Err(RunError::NoEnvironment { rollout, environment: plan.environment.to_string() });
        };
        let gatherer = Arc::new(Gatherer::new(&environment, &fleet.services, log.history(), hosts));
        let releases = known_releases(&artifacts.depot, log.history())
            .map_err(|error| RunError::Depot(error.to_string()))?;
        let charter = charter(folded, &releases, log.history());
        let performer = Arc::new(Performer {
            plan,
            charter,
            environment: environment.clone(),
            releases: releases.iter().map(|release| (release.id, release.clone())).collect(),
            shipments: Shipments::new(Arc::clone(&artifacts.depot)),
            artifacts,
            progress: Arc::clone(&progress),
        });
        let judging = Judging::new(&performer.plan, &environment, &performer.artifacts.evidence_directory);
        let read_up_to = log.history().last_seq;
        Ok(Self {
            fleet,
            environment,
            rollout,
            log,
            by,
            gatherer,
            performer,
            releases,
            progress,
            gathered,
            in_flight: Vec::new(),
            last_looks: LastLooks::default(),
            read_up_to,
            looking: BTreeSet::new(),
            reading: BTreeSet::new(),
            renewing: BTreeSet::new(),
            last_waits: Vec::new(),
            judging,
            judgement: None,
            counting: BTreeSet::new(),
            sampling: BTreeMap::new(),
            arrivals: mpsc::unbounded_channel(),
        })
    }

    /// Runs until the rollout ends, holds with nothing under way, or is let go.
    ///
    /// # Errors
    /// When the record log fails; what is not recorded is not begun.
    pub async fn run(mut self, mut interrupts: mpsc::Receiver<Interrupt>) -> Result<Ended, RunError> {
        let mut ticks = tokio::time::interval_at(Instant::now() + TICK, TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tick: u64 = 0;
        if takeover::was_driven_elsewhere(&self.log.read_from(1)?, &self.rollout, &self.by) {
            for _ in 0..TAKEOVER_TICKS {
                ticks.tick().await;
            }
            self.gathered = self.gatherer.gather().await;
        }
        loop {
            if let Some(ended) = self.advance()? {
                return Ok(ended);
            }
            tokio::select! {
                Some(arrival) = self.arrivals.1.recv() => {
                    self.absorb(arrival)?;
                    while let Ok(arrival) = self.arrivals.1.try_recv() {
                        self.absorb(arrival)?;
                    }
                }
                Some(interrupt) = interrupts.recv() => match interrupt {
                    Interrupt::Detach => return Ok(Ended::Detached(std::mem::take(&mut self.in_flight))),
                    Interrupt::Hold => self.hold()?,
                },
                _ = ticks.tick() => {
                    tick += 1;
                    self.log.refresh()?;
                    self.look(tick);
                    self.count(tick);
                    self.sample(tick);
                }
            }
        }
    }

    /// Records that the rollout is held from here, and says what ends before it stands still.
    fn hold(&mut self) -> Result<(), RunError> {
        self.append(&RecordBody::OperatorAsked {
            rollout: self.rollout.clone(),
            request: OperatorRequest::Hold,
            why: "interrupted".to_owned(),
        })?;
        (self.progress)(Progress::Holding(self.in_flight.clone()));
        Ok(())
    }

    /// Lets go when somebody drives the rollout from another machine by now.
    fn check_taken_over(&mut self) -> Result<(), RunError> {
        let last = self.log.history().last_seq;
        if last == self.read_up_to {
            return Ok(());
        }
        let records = self.log.read_from(self.read_up_to + 1)?;
        self.read_up_to = last;
        match takeover::taker(&records, &self.rollout, &self.by) {
            Some(by) => Err(RunError::TakenOver { by: by.to_owned(), rollout: self.rollout.clone() }),
            None => Ok(()),
        }
    }

    /// Decides until there is nothing more to begin. Some when the loop is over.
    fn advance(&mut self) -> Result<Option<Ended>, RunError> {
        loop {
            self.check_taken_over()?;
            let world = self.world()?;
            if let Some(outcome) = &world.rollout.outcome {
                // Another controller brought it to its end.
                return Ok(Some(Ended::Outcome(outcome.clone())));
            }
            match greenlight_planner::decide(&world) {
                Decision::Note(note) => {
                    let body = RecordBody::Noted { rollout: self.rollout.clone(), note: note.clone() };
                    if self.append_decision(&body)? {
                        (self.progress)(Progress::Note(note));
                    }
                }
                Decision::End(outcome) => {
                    let body = RecordBody::RolloutEnded {
                        rollout: self.rollout.clone(),
                        outcome: outcome.clone(),
                        running: self.running(&world),
                    };
                    if !self.append_decision(&body)? {
                        continue;
                    }
                    (self.progress)(Progress::Ended(outcome.clone()));
                    return Ok(Some(Ended::Outcome(outcome)));
                }
                Decision::Proceed { steps, waits } => {
                    let is_held = waits.iter().any(|wait| matches!(wait, Wait::Held { .. }));
                    if steps.is_empty() && is_held && self.in_flight.is_empty() {
                        (self.progress)(Progress::Waits(waits.clone()));
                        return Ok(Some(Ended::Held(waits)));
                    }
                    if !self.begin(&world, steps)? {
                        continue;
                    }
                    if waits != self.last_waits {
                        (self.progress)(Progress::Waits(waits.clone()));
                        self.last_waits = waits;
                    }
                    return Ok(None);
                }
            }
        }
    }

    /// Begins every step that the interlock permits. A refusal means that planner and interlock disagree, which only
    /// a person can settle: the rollout holds and says so. False when somebody else wrote to the log meanwhile, so that it
    /// is to be decided anew.
    fn begin(&mut self, world: &World, steps: Vec<Step>) -> Result<bool, RunError> {
        let mut interlock = Interlock::new(world);
        for Step { action, why } in steps {
            if let Err(violation) = interlock.permit(&action) {
                let sentence = violation.to_string();
                (self.progress)(Progress::Interlock { action: action.clone(), sentence: sentence.clone() });
                let why =
                    format!("the interlock refused to {} {}: {sentence}", action.verb(), action.instance());
                self.append(&RecordBody::Noted { rollout: self.rollout.clone(), note: Note::Hold { why } })?;
                return Ok(true);
            }
            if action.verb() == Verb::Unclaim && self.renewing.contains(action.instance()) {
                // A renewal that the host takes up after it would claim it anew. It is decided again when that has ended.
                continue;
            }
            let body = RecordBody::ActionStarted {
                rollout: self.rollout.clone(),
                action: action.clone(),
                why: why.clone(),
            };
            if !self.append_decision(&body)? {
                return Ok(false);
            }
            interlock.begin(&action);
            (self.progress)(Progress::Started { action: action.clone(), why });
            self.in_flight.push(InFlight { action: action.clone(), since: clock::now() });
            self.spawn(action);
        }
        Ok(true)
    }

    /// The generation that the rollout uses on an instance now: another one when it goes back.
    fn generation(&self, instance: &Instance) -> Generation {
        let rollout = self.log.history().rollouts.get(&self.rollout);
        rollout.map_or(self.performer.plan.generation, |rollout| rollout.desired(instance).1)
    }

    fn spawn(&self, action: Action) {
        let instance = action.instance();
        let report = self.gathered.report(instance);
        let rollout = self.log.history().rollouts.get(&self.rollout);
        let standing = Standing {
            release: rollout.and_then(|rollout| rollout.desired(instance).0),
            generation: self.generation(instance),
            is_touched: rollout.is_some_and(|rollout| rollout.touched.contains(instance)),
            ended: report.and_then(|report| claims::ended_holder(report, self.log.history())),
        };
        let (performer, gatherer) = (Arc::clone(&self.performer), Arc::clone(&self.gatherer));
        let (arrivals, mut known) = (self.arrivals.0.clone(), self.known(action.host()));
        if let Action::Activate { instance, release, .. } = &action {
            known.insert(instance.service.clone(), *release);
        }
        tokio::spawn(async move {
            let performed = Box::new(performer.perform(&gatherer, &action, &known, standing).await);
            // The receiver is gone only when the loop let go.
            let _ = arrivals.send(Arrival::Performed { action, performed });
        });
    }

    fn absorb(&mut self, arrival: Arrival) -> Result<(), RunError> {
        match arrival {
            Arrival::Performed { action, performed } => self.finish(action, *performed),
            Arrival::Looked { host, look } => {
                self.looking.remove(&host);
                self.saw(&host, *look);
                Ok(())
            }
            Arrival::Read { index, look } => {
                self.reading.remove(&index);
                self.read(index, look);
                Ok(())
            }
            Arrival::Counted(counted) => self.counted(*counted),
            Arrival::Sampled { host, sample } => self.sampled(&host, &sample),
            Arrival::Renewed { instance, failed } => {
                self.renewing.remove(&instance);
                if let Some(why) = failed {
                    (self.progress)(Progress::NotRenewed { instance, why });
                }
                Ok(())
            }
        }
    }

    fn finish(&mut self, action: Action, performed: Performed) -> Result<(), RunError> {
        self.in_flight.retain(|in_flight| in_flight.action != action);
        if let Some(look) = performed.host {
            self.saw(action.host(), look);
        }
        for (index, look) in performed.traffic {
            self.read(index, look);
        }
        self.append(&RecordBody::ActionFinished {
            rollout: self.rollout.clone(),
            action: action.clone(),
            result: performed.result.clone(),
            detail: performed.detail.clone(),
        })?;
        (self.progress)(Progress::Finished {
            action,
            result: performed.result,
            took_ms: performed.detail.took_ms,
            output: performed.detail.output,
        });
        Ok(())
    }

    fn read(&mut self, index: usize, look: Look<BalancerReport>) {
        if is_newer(&mut self.last_looks.balancers, index, look.number) {
            self.gathered.traffic[index] = look.seen;
        }
    }

    fn saw(&mut self, host: &HostName, look: Look<Result<HostReport, HostError>>) {
        if !is_newer(&mut self.last_looks.hosts, host.clone(), look.number) {
            return;
        }
        let observation = self.gathered.inventory.entry(host.clone()).or_default();
        let was_reachable = observation.unreachable.is_none();
        match look.seen {
            Ok(report) => {
                observation.report = Some((clock::now(), report));
                observation.unreachable = None;
                if !was_reachable {
                    (self.progress)(Progress::Host { host: host.clone(), unreachable: None });
                }
            }
            Err(error) => {
                let since = observation.unreachable.take().map_or_else(clock::now, |before| before.since);
                observation.unreachable = Some(Unreachable { since, why: error.why.clone() });
                if was_reachable {
                    (self.progress)(Progress::Host { host: host.clone(), unreachable: Some(error.why) });
                }
            }
        }
    }

    /// Begins the looks that are due: balancers each tick while a wait depends on them, everything now and then.
    fn look(&mut self, tick: u64) {
        let depends_on_traffic = self.last_waits.iter().any(|wait| {
            matches!(
                wait,
                Wait::Sessions { .. }
                    | Wait::BalancerHealth { .. }
                    | Wait::Balancer { .. }
                    | Wait::Floor { .. }
            )
        });
        if depends_on_traffic || tick.is_multiple_of(LOOK_TICKS) {
            for index in 0..self.gatherer.balancers().len() {
                if self.reading.insert(index) {
                    let (gatherer, arrivals) = (Arc::clone(&self.gatherer), self.arrivals.0.clone());
                    tokio::spawn(async move {
                        let look = gatherer.look_at_balancer(index).await;
                        let _ = arrivals.send(Arrival::Read { index, look });
                    });
                }
            }
        }
        if tick.is_multiple_of(LOOK_TICKS) {
            for host in self.environment.service_hosts() {
                if self.looking.insert(host.clone()) {
                    let (gatherer, arrivals) = (Arc::clone(&self.gatherer), self.arrivals.0.clone());
                    let known = self.known(&host);
                    tokio::spawn(async move {
                        let look = Box::new(gatherer.look_at_host(&host, &known).await);
                        let _ = arrivals.send(Arrival::Looked { host, look });
                    });
                }
            }
        }
        let renew_after = self.environment.timeouts.claim.as_millis() / RENEWALS;
        if u128::from(tick).is_multiple_of((renew_after / TICK.as_millis()).max(1)) {
            self.renew();
        }
    }

    /// Renews the claims that this rollout holds.
    fn renew(&mut self) {
        let held: Vec<Instance> = self
            .performer
            .plan
            .baseline
            .keys()
            .filter(|instance| {
                let claim = self.gathered.report(instance).and_then(|report| report.ledger.claim.as_ref());
                claim.is_some_and(|claim| claim.rollout == self.rollout) && !self.is_given_back(instance)
            })
            .cloned()
            .collect();
        for instance in held {
            let Some(spec) = self.gatherer.spec(&instance, None) else { continue };
            if !self.renewing.insert(instance.clone()) {
                continue;
            }
            let claim = self.performer.claim_request(self.generation(&instance));
            let request = Request::Claim { spec, claim, charter: None };
            let (hosts, arrivals) = (Arc::clone(self.gatherer.hosts()), self.arrivals.0.clone());
            tokio::spawn(async move {
                let renewed = hosts.call(&instance.host, request, TICK * 50, |_| {}).await;
                let failed = renewed.err().map(|error| error.why);
                let _ = arrivals.send(Arrival::Renewed { instance, failed });
            });
        }
    }

    fn world(&self) -> Result<World, RunError> {
        let history = self.log.history();
        let rollout: &Rollout =
            history.rollouts.get(&self.rollout).ok_or_else(|| RunError::Unknown(self.rollout.clone()))?;
        let now = clock::now();
        let plan = &rollout.plan;
        Ok(World {
            now,
            environment: self.environment.clone(),
            services: self
                .fleet
                .services
                .keys()
                .filter_map(|name| {
                    let target = plan.targets.get(name).copied();
                    Some((name.clone(), self.gatherer.service(name, target)?.clone()))
                })
                .collect(),
            releases: release_facts(&self.releases, history),
            rollout: rollout.clone(),
            inventory: claims::without_ended(&self.gathered.inventory, history),
            traffic: self.gathered.traffic.clone(),
            gates: rollout_gates(
                &self.fleet,
                &self.environment,
                history,
                rollout,
                &self.releases,
                &self.gathered.traffic,
                now,
            ),
            judgement: self.judgement.clone(),
            in_flight: self.in_flight.clone(),
        })
    }

    /// What each service of a host was last seen to run.
    fn known(&self, host: &HostName) -> BTreeMap<ServiceName, ReleaseId> {
        let report = self.gathered.inventory.get(host).and_then(|observation| observation.report.as_ref());
        let instances = report.into_iter().flat_map(|(_, report)| &report.instances);
        instances.filter_map(|(service, instance)| Some((service.clone(), instance.linked?))).collect()
    }

    fn running(&self, world: &World) -> Running {
        let linked = |instance: &Instance| self.gathered.report(instance).and_then(|report| report.linked);
        world.rollout.plan.baseline.keys().map(|instance| (instance.clone(), linked(instance))).collect()
    }

    /// Whether the claim of an instance is being given back.
    fn is_given_back(&self, instance: &Instance) -> bool {
        let mut begun = self.in_flight.iter().map(|in_flight| &in_flight.action);
        begun.any(|action| action.verb() == Verb::Unclaim && action.instance() == instance)
    }

    fn append_decision(&mut self, body: &RecordBody) -> Result<bool, RunError> {
        Ok(append_decision(&mut self.log, &self.by, body)?)
    }

    fn append(&mut self, body: &RecordBody) -> Result<(), RunError> {
        Ok(append(&mut self.log, &self.by, body)?)
    }
}
