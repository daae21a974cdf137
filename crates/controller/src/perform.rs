//! Performing one action for real, and looking at what it touched afterwards, so that the next decision sees it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use greenlight_depot::Depot;
use greenlight_drivers::canary::Share;
use greenlight_link::message::{Event, Reply, Request, SecretValue};
use greenlight_model::action::{Action, ActionDetail, ActionResult, Blame, OUTPUT_LINES_MAX};
use greenlight_model::charter::{CHARTER_COPIES_MAX, Charter};
use greenlight_model::check::{Check, CheckOutcome};
use greenlight_model::fleet::{Environment, Process, Service};
use greenlight_model::host::{ClaimRequest, Desired, HostReport, InstanceSpec, ReleaseMark};
use greenlight_model::id::{Generation, HostName, Instance, ReleaseId, RolloutId, ServiceName, VariableName};
use greenlight_model::manifest::Release;
use greenlight_model::rollout::{Direction, Plan};
use greenlight_model::traffic::BalancerReport;

use crate::gather::{Gatherer, Look};
use crate::hosts::HostError;
use crate::objects::Shipments;
use crate::preflight;
use crate::progress::{Progress, ProgressSink};
use crate::spec::mark;

/// How long a request that only touches the ledger may take.
const LEDGER_TIMEOUT: Duration = Duration::from_secs(20);

/// What actions are performed with.
#[derive(Clone)]
pub struct Artifacts {
    /// The releases and their bytes.
    pub depot: Arc<Depot>,
    /// The values of the secrets that the environment's services read.
    pub secrets: BTreeMap<VariableName, SecretValue>,
    /// Where the evidence of canaries is kept.
    pub evidence_directory: PathBuf,
}

/// How long a canary's share is lent without being renewed, where the balancer can lend: so long it goes on when its
/// controller has died.
pub(crate) const LEASE: Duration = Duration::from_secs(10);

/// Everything an action needs, fixed for one rollout.
pub(crate) struct Performer {
    pub(crate) plan: Plan,
    pub(crate) charter: Charter,
    pub(crate) environment: Environment,
    pub(crate) releases: BTreeMap<ReleaseId, Release>,
    pub(crate) artifacts: Artifacts,
    pub(crate) shipments: Arc<Shipments>,
    pub(crate) progress: ProgressSink,
}

/// How an action ended, and what was seen of the world right after it.
pub(crate) struct Performed {
    pub(crate) result: ActionResult,
    pub(crate) detail: ActionDetail,
    /// The host as it is now, or why it cannot be seen.
    pub(crate) host: Option<Look<Result<HostReport, HostError>>>,
    /// Balancers as they are now, by index.
    pub(crate) traffic: Vec<(usize, Look<BalancerReport>)>,
}

/// What happened inside an action: its checks and its output, kept for the record.
#[derive(Default)]
struct Inside {
    checks: Vec<Check>,
    output: VecDeque<String>,
}

/// What the records say of the instance that an action is about.
pub(crate) struct Standing {
    /// What it is to run now.
    pub(crate) release: Option<ReleaseId>,
    /// Under which generation.
    pub(crate) generation: Generation,
    /// Whether the rollout has begun to switch it.
    pub(crate) is_touched: bool,
    /// The ended rollout whose claim it still has.
    pub(crate) ended: Option<RolloutId>,
}

impl Performer {
    /// Performs one action. `known` is what each service on the host was last seen to run.
    ///
    /// Before an instance is let in it is looked at once more: what it proved may be long ago.
    pub(crate) async fn perform(
        &self,
        gatherer: &Gatherer,
        action: &Action,
        known: &BTreeMap<ServiceName, ReleaseId>,
        standing: Standing,
    ) -> Performed {
        let began = tokio::time::Instant::now();
        let inside = Arc::new(Mutex::new(Inside::default()));
        let before = match action {
            Action::Admit { .. } => Some(gatherer.look_at_host(action.host(), known).await),
            _ => None,
        };
        let objection =
            before.as_ref().and_then(|look| why_not_admitted(action.instance(), &look.seen, &standing));
        let done = match objection {
            Some(why) => Err(HostError { blame: Blame::Passing, ..host_failed(why) }),
            None => self.act(gatherer, action, known, standing, &inside).await,
        };
        let mut inside = std::mem::take(&mut *inside.lock().unwrap_or_else(PoisonError::into_inner));
        let result = match done {
            Ok(()) => ActionResult::Succeeded,
            Err(error) => {
                inside.output.extend(error.output);
                ActionResult::Failed { why: error.why, blame: error.blame }
            }
        };
        let (host, traffic) = match action {
            Action::Drain { instance } | Action::Admit { instance } | Action::Share { instance, .. } => {
                (before, self.read_balancers(gatherer, instance).await)
            }
            _ => (Some(gatherer.look_at_host(action.host(), known).await), Vec::new()),
        };
        let excess = inside.output.len().saturating_sub(OUTPUT_LINES_MAX);
        let detail = ActionDetail {
            took_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
            checks: inside.checks,
            output: inside.output.into_iter().skip(excess).collect(),
        };
        Performed { result, detail, host, traffic }
    }

    async fn act(
        &self,
        gatherer: &Gatherer,
        action: &Action,
        known: &BTreeMap<ServiceName, ReleaseId>,
        standing: Standing,
        inside: &Arc<Mutex<Inside>>,
    ) -> Result<(), HostError> {
        let Standing { generation, ended, .. } = standing;
        let hosts = gatherer.hosts();
        let instance = action.instance();
        let host = &instance.host;
        let rollout = self.plan.id.clone();
        let spec = |release: Option<ReleaseId>| {
            gatherer
                .spec(instance, release)
                .ok_or_else(|| host_failed(format!("{instance} is not in the fleet file any more")))
        };
        let watch = self.watch(instance, inside);
        let timeouts = self.environment.timeouts;
        match action {
            Action::Preflight { release, .. } => {
                let service = self.service(gatherer, instance, Some(*release))?;
                let question = preflight::Question {
                    environment: &self.environment,
                    instance,
                    service,
                    release: self.release(*release)?,
                    plan: &self.plan,
                    secrets: &self.artifacts.secrets,
                };
                let checks = preflight::look(hosts, &question, watch).await?;
                let failed = failed_checks(host, &checks);
                inside.lock().unwrap_or_else(PoisonError::into_inner).checks = checks;
                failed.map_or(Ok(()), |why| Err(host_failed(why)))
            }
            Action::Claim { .. } => {
                if let Some(rollout) = ended {
                    // Another one that came first keeps its own.
                    let request = Request::Unclaim { spec: spec(None)?, rollout };
                    hosts.call(host, request, LEDGER_TIMEOUT, |_| {}).await?;
                }
                let claim = self.claim_request(generation);
                let keeps = self.plan.baseline.keys().take(CHARTER_COPIES_MAX).any(|one| one == instance);
                let charter = keeps.then(|| Box::new(self.charter.clone()));
                let request = Request::Claim { spec: spec(None)?, claim, charter };
                hosts.call(host, request, LEDGER_TIMEOUT, watch).await.map(drop)
            }
            Action::Unclaim { .. } => {
                let request = Request::Unclaim { spec: spec(None)?, rollout };
                hosts.call(host, request, LEDGER_TIMEOUT, watch).await.map(drop)
            }
            Action::Stage { release, .. } => self.stage(gatherer, instance, *release, watch).await,
            Action::Smoke { release, .. } => {
                let spec = spec(Some(*release))?;
                let timeout = timeouts.activate + switching(&spec);
                let request = Request::Smoke { release: self.mark(*release)?, spec };
                hosts.call(host, request, timeout, watch).await.map(drop)
            }
            Action::Migrate { release, .. } | Action::Contract { release, .. } => {
                let service = self.service(gatherer, instance, Some(*release))?;
                let Some(migration) = service.migrate.clone() else { return Ok(()) };
                // What shows and what keeps a copy may take as long.
                let timeout = migration.timeout * 3 + LEDGER_TIMEOUT;
                let phase = action.migration_phase().unwrap_or_default();
                let is_lossy = self
                    .plan
                    .losses
                    .iter()
                    .any(|loss| loss.service == instance.service && loss.phase == phase);
                let request = Request::Migrate {
                    spec: spec(Some(*release))?,
                    release: self.mark(*release)?,
                    migration,
                    phase,
                    is_lossy,
                    rollout,
                };
                hosts.call(host, request, timeout, watch).await.map(drop)
            }
            Action::Activate { release, generation, .. } => {
                let desired = self.desired(spec(Some(*release))?, Some(self.mark(*release)?), *generation);
                let timeout = timeouts.activate + switching(&desired.spec) * 2;
                // The way back is never undone by a timer, and no host goes back by itself to code whose tables are gone.
                let is_lossy = self
                    .plan
                    .losses
                    .iter()
                    .any(|loss| loss.service == instance.service && loss.phase.is_expand());
                let is_guarded = self.plan.direction == Direction::Forward
                    && *generation == self.plan.generation
                    && !is_lossy;
                let guard = is_guarded.then(|| timeouts.guard(desired.spec.processes.values()));
                hosts.call(host, Request::Activate { desired, guard }, timeout, watch).await.map(drop)
            }
            Action::Deactivate { generation, .. } => {
                // What has to be stopped is what the present release runs.
                let desired = self.desired(spec(known.get(&instance.service).copied())?, None, *generation);
                let timeout = timeouts.activate + switching(&desired.spec) * 2;
                hosts.call(host, Request::Activate { desired, guard: None }, timeout, watch).await.map(drop)
            }
            Action::Confirm { release, generation, .. } => {
                hosts.fresh(host).await?;
                let known = BTreeMap::from([(instance.service.clone(), *release)]);
                let report = gatherer.observe(host, &known).await?;
                let seen = report.instances.get(&instance.service);
                if let Some(entry) = seen.and_then(|seen| seen.ledger.went_back()) {
                    // The release did nothing wrong: it may be activated again.
                    let why = format!("{instance} went back by itself: {}", entry.detail);
                    return Err(HostError { blame: Blame::Passing, ..host_failed(why) });
                }
                if let Some(why) = seen.and_then(|seen| seen.why_not_proven(*release)) {
                    let why = format!(
                        "{instance}, seen over a fresh connection, does not prove the release: {why}"
                    );
                    return Err(HostError { blame: Blame::Release, ..host_failed(why) });
                }
                let (release, generation) = (*release, *generation);
                let request = Request::Confirm { spec: spec(Some(release))?, release, generation, rollout };
                hosts.call(host, request, LEDGER_TIMEOUT, watch).await.map(drop)
            }
            Action::Prune { keep, .. } => {
                let request = Request::Prune {
                    spec: spec(None)?,
                    keep: keep.clone(),
                    keep_releases: self.service(gatherer, instance, None)?.keep_releases,
                    rollout,
                };
                hosts.call(host, request, timeouts.stage, watch).await.map(drop)
            }
            Action::Drain { .. } | Action::Admit { .. } | Action::Share { .. } => {
                let runs = known.get(&instance.service).and_then(|release| self.releases.get(release));
                self.balance(gatherer, action, runs.map(|release| release.label.as_str())).await
            }
        }
    }

    async fn stage(
        &self,
        gatherer: &Gatherer,
        instance: &Instance,
        release: ReleaseId,
        watch: impl FnMut(Event) + Send,
    ) -> Result<(), HostError> {
        let spec = gatherer
            .spec(instance, Some(release))
            .ok_or_else(|| host_failed(format!("{instance} is not in the fleet file any more")))?;
        let request = Request::Stage {
            release: self.mark(release)?,
            secrets: self.secrets_of(&spec.secrets),
            spec,
            rollout: self.plan.id.clone(),
        };
        let progress = Arc::clone(&self.progress);
        let (sent_to, timeout) = (instance.clone(), self.environment.timeouts.stage);
        let source = self.shipments.of(release);
        let report = move |sent: greenlight_link::connection::StageProgress| {
            progress(Progress::Sent {
                instance: sent_to.clone(),
                objects: sent.objects_sent,
                objects_total: sent.objects_total,
                bytes: sent.bytes_sent,
                bytes_total: sent.bytes_total,
            });
        };
        gatherer.hosts().stage(&instance.host, request, source, timeout, report, watch).await.map(drop)
    }

    /// Drains or admits at every balancer of the service, one after the other.
    async fn balance(
        &self,
        gatherer: &Gatherer,
        action: &Action,
        runs: Option<&str>,
    ) -> Result<(), HostError> {
        let instance = action.instance();
        for (_, driver) in self.balancers_of(gatherer, instance) {
            let changed = match action {
                Action::Drain { .. } => driver.drain(&instance.host).await,
                Action::Share { canaries, share: Some(share), .. } => {
                    let release = self.label(&instance.service);
                    driver.lend(&Share { release, hosts: canaries, share: *share, lease: LEASE }).await
                }
                Action::Share { share: None, .. } => driver.conclude().await,
                _ => driver.admit(&instance.host, runs).await,
            };
            changed.map_err(|error| HostError {
                why: error.to_string(),
                blame: Blame::Passing,
                is_unreachable: false,
                output: Vec::new(),
            })?;
        }
        Ok(())
    }

    /// What people call the release that the rollout brings to a service.
    pub(crate) fn label(&self, service: &ServiceName) -> &str {
        let target = self.plan.targets.get(service).and_then(|target| self.releases.get(target));
        target.map_or("", |release| release.label.as_str())
    }

    async fn read_balancers(
        &self,
        gatherer: &Gatherer,
        instance: &Instance,
    ) -> Vec<(usize, Look<BalancerReport>)> {
        let mut reports = Vec::new();
        for (index, _) in self.balancers_of(gatherer, instance) {
            reports.push((index, gatherer.look_at_balancer(index).await));
        }
        reports
    }

    fn balancers_of<'a>(
        &'a self,
        gatherer: &'a Gatherer,
        instance: &'a Instance,
    ) -> impl Iterator<Item = (usize, &'a Arc<greenlight_drivers::balancer::BalancerDriver>)> + 'a {
        let of_service = |index: &usize| self.environment.balancers[*index].service == instance.service;
        let indices = (0..self.environment.balancers.len()).filter(of_service);
        indices.collect::<Vec<_>>().into_iter().map(|index| (index, &gatherer.balancers()[index]))
    }

    /// What a claim is asked for with, or renewed: under the generation that the rollout uses on the instance now. A host
    /// that was turned back has seen the one after the plan's, and refuses the plan's own from then on.
    pub(crate) fn claim_request(&self, generation: Generation) -> ClaimRequest {
        let targets: Vec<String> = self
            .plan
            .targets
            .iter()
            .map(|(service, release)| {
                let title = self.releases.get(release).map_or_else(|| release.short(), Release::title);
                format!("{service} {title}")
            })
            .collect();
        ClaimRequest {
            rollout: self.plan.id.clone(),
            holder: self.plan.started_by.clone(),
            reason: format!("{} to {}", targets.join(", "), self.plan.environment),
            duration: self.environment.timeouts.claim,
            generation,
        }
    }

    fn desired(&self, spec: InstanceSpec, release: Option<ReleaseMark>, generation: Generation) -> Desired {
        Desired { generation, rollout: self.plan.id.clone(), release, spec }
    }

    fn service<'a>(
        &self,
        gatherer: &'a Gatherer,
        instance: &Instance,
        release: Option<ReleaseId>,
    ) -> Result<&'a Service, HostError> {
        gatherer
            .service(&instance.service, release)
            .ok_or_else(|| host_failed(format!("{} is not in the fleet file any more", instance.service)))
    }

    fn release(&self, id: ReleaseId) -> Result<&Release, HostError> {
        self.releases.get(&id).ok_or_else(|| {
            let why = format!("release {} is not in this project's depot; build it here first", id.short());
            HostError { blame: Blame::Host, ..host_failed(why) }
        })
    }

    fn mark(&self, id: ReleaseId) -> Result<ReleaseMark, HostError> {
        self.release(id).map(mark)
    }

    fn secrets_of(&self, names: &BTreeSet<VariableName>) -> BTreeMap<VariableName, SecretValue> {
        let value = |name: &VariableName| Some((name.clone(), self.artifacts.secrets.get(name)?.clone()));
        names.iter().filter_map(value).collect()
    }

    fn watch(&self, instance: &Instance, inside: &Arc<Mutex<Inside>>) -> impl FnMut(Event) + Send + use<> {
        let (progress, instance, inside) = (Arc::clone(&self.progress), instance.clone(), Arc::clone(inside));
        move |event| {
            if let Event::Line { text, .. } = &event {
                let mut inside = inside.lock().unwrap_or_else(PoisonError::into_inner);
                inside.output.push_back(text.clone());
                if inside.output.len() > OUTPUT_LINES_MAX {
                    inside.output.pop_front();
                }
            }
            progress(Progress::Inside { instance: instance.clone(), event });
        }
    }
}

/// What the processes of an instance may take to stop and start, one after the other. An activation takes it twice: first
/// one may be under way of which the controller is gone, or the host may be going back by itself.
fn switching(spec: &InstanceSpec) -> Duration {
    spec.processes.values().map(Process::switching).sum()
}

/// Why an instance that has just been looked at is not let in. A balancer is reached without the instance's host: one that
/// this rollout has not switched runs what it ran before, whether its host answers or not.
fn why_not_admitted(
    instance: &Instance,
    seen: &Result<HostReport, HostError>,
    standing: &Standing,
) -> Option<String> {
    match seen {
        Err(error) if standing.is_touched => {
            Some(format!("{instance} could not be looked at before it is let in: {}", error.why))
        }
        Err(_) => None,
        Ok(report) => {
            let why = report.instances.get(&instance.service)?.why_not_proven(standing.release?)?;
            Some(format!("{instance}, looked at before it is let in, does not prove its release: {why}"))
        }
    }
}

/// The failed checks in one sentence each, or nothing when all passed.
fn failed_checks(host: &HostName, checks: &[Check]) -> Option<String> {
    let failed: Vec<String> = checks
        .iter()
        .filter(|check| check.outcome == CheckOutcome::Failed)
        .map(|check| {
            let Check { name, expected, found, mend, .. } = check;
            format!("{host}: {name}: expected {expected}, found {found}. {mend}")
        })
        .collect();
    (!failed.is_empty()).then(|| failed.join("\n"))
}

pub(crate) fn host_failed(why: String) -> HostError {
    HostError { why, blame: Blame::Host, is_unreachable: false, output: Vec::new() }
}

pub(crate) fn unexpected(host: &HostName, reply: &Reply) -> HostError {
    HostError { blame: Blame::Passing, ..host_failed(format!("{host}: unexpected answer {reply:?}")) }
}
