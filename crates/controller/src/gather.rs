//! Gathering the world: every host and every balancer asked at once, partial failure kept as data.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use greenlight_drivers::balancer::BalancerDriver;
use greenlight_drivers::transport::{BoxFuture, TcpTransport, Transport, TransportError};
use greenlight_link::message::{Reply, Request};
use greenlight_model::Timestamp;
use greenlight_model::fleet::{Balancer, BalancerKind, Environment, Service};
use greenlight_model::history::History;
use greenlight_model::host::{HostReport, InstanceReport, InstanceSpec};
use greenlight_model::id::{HostName, Instance, ReleaseId, ServiceName};
use greenlight_model::traffic::BalancerReport;
use greenlight_model::world::{Observation, Unreachable};
use tokio::task::JoinSet;

use crate::hosts::{AgentSocket, HostError, Hosts};
use crate::spec::instance_spec;
use crate::{boundary, clock};

/// How long a look at one host may take once it is connected.
const OBSERVE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a balancer may take to answer one command.
const BALANCER_TIMEOUT: Duration = Duration::from_secs(5);

/// What hosts and balancers said.
#[derive(Debug, Clone, Default)]
pub struct Gathered {
    /// By host.
    pub inventory: BTreeMap<HostName, Observation>,
    /// By balancer, in the environment's order.
    pub traffic: Vec<BalancerReport>,
}

impl Gathered {
    /// The last report of an instance, if its host ever made one.
    #[must_use]
    pub fn report(&self, instance: &Instance) -> Option<&InstanceReport> {
        let (_, report) = self.inventory.get(&instance.host)?.report.as_ref()?;
        report.instances.get(&instance.service)
    }
}

/// Asks hosts and balancers of one environment.
pub struct Gatherer {
    environment: Environment,
    services: BTreeMap<ServiceName, Service>,
    definitions: BTreeMap<ReleaseId, Service>,
    hosts: Arc<Hosts>,
    balancers: Vec<Arc<BalancerDriver>>,
    looks: AtomicU64,
}

/// What was seen, and the number of the look, which grows with the moment at which it was begun. A look shows every change
/// that had ended by then; so of two, the one that was begun later is believed, whichever comes back first.
pub(crate) struct Look<T> {
    pub(crate) number: u64,
    pub(crate) seen: T,
}

impl Gatherer {
    /// A gatherer for an environment with the services of the fleet file and those that the records know.
    #[must_use]
    pub fn new(
        environment: &Environment,
        services: &BTreeMap<ServiceName, Service>,
        history: &History,
        hosts: Arc<Hosts>,
    ) -> Self {
        let balancers = environment
            .balancers
            .iter()
            .map(|balancer| {
                let behind = environment.hosts.get(&balancer.service).cloned().unwrap_or_default();
                Arc::new(BalancerDriver::new(balancer, &behind, transport(balancer, &hosts)))
            })
            .collect();
        Self {
            environment: environment.clone(),
            services: services.clone(),
            definitions: definitions(history, environment),
            hosts,
            balancers,
            looks: AtomicU64::new(0),
        }
    }

    /// A look at a host; see [`Gatherer::observe`].
    pub(crate) async fn look_at_host(
        &self,
        host: &HostName,
        known: &BTreeMap<ServiceName, ReleaseId>,
    ) -> Look<Result<HostReport, HostError>> {
        let number = self.looks.fetch_add(1, Ordering::Relaxed) + 1;
        Look { number, seen: self.observe(host, known).await }
    }

    /// A look at a balancer; see [`Gatherer::read_balancer`].
    pub(crate) async fn look_at_balancer(&self, index: usize) -> Look<BalancerReport> {
        let number = self.looks.fetch_add(1, Ordering::Relaxed) + 1;
        Look { number, seen: self.read_balancer(index).await }
    }

    /// Takes in what the records know by now.
    pub fn learn(&mut self, history: &History) {
        self.definitions = definitions(history, &self.environment);
    }

    /// The hosts.
    #[must_use]
    pub fn hosts(&self) -> &Arc<Hosts> {
        &self.hosts
    }

    /// The balancers, in the environment's order.
    #[must_use]
    pub fn balancers(&self) -> &[Arc<BalancerDriver>] {
        &self.balancers
    }

    /// How an instance is laid out and run when it runs this release: as it was defined when the release last went to
    /// this environment, else as the fleet file says now.
    #[must_use]
    pub fn spec(&self, instance: &Instance, release: Option<ReleaseId>) -> Option<InstanceSpec> {
        let service = self.service(&instance.service, release)?;
        instance_spec(service, &self.environment, instance)
    }

    /// A service as it was defined with a release, else as the fleet file says now.
    #[must_use]
    pub fn service(&self, name: &ServiceName, release: Option<ReleaseId>) -> Option<&Service> {
        release.and_then(|release| self.definitions.get(&release)).or_else(|| self.services.get(name))
    }

    /// Asks every host that runs a service and every balancer, all at once.
    pub async fn gather(self: &Arc<Self>) -> Gathered {
        let mut looks = JoinSet::new();
        for host in self.environment.service_hosts() {
            let this = Arc::clone(self);
            looks.spawn(async move {
                let result = this.observe(&host, &BTreeMap::new()).await;
                (host, result)
            });
        }
        let mut reads = JoinSet::new();
        for index in 0..self.balancers.len() {
            let this = Arc::clone(self);
            reads.spawn(async move { (index, this.read_balancer(index).await) });
        }
        let mut gathered = Gathered::default();
        for (host, result) in looks.join_all().await {
            let observation = match result {
                Ok(report) => Observation { report: Some((clock::now(), report)), unreachable: None },
                Err(error) => {
                    let unreachable = Unreachable { since: clock::now(), why: error.why };
                    Observation { report: None, unreachable: Some(unreachable) }
                }
            };
            gathered.inventory.insert(host, observation);
        }
        let mut traffic = reads.join_all().await;
        traffic.sort_by_key(|(index, _)| *index);
        gathered.traffic = traffic.into_iter().map(|(_, report)| report).collect();
        gathered
    }

    /// What a host is. `known` says which release each service was last seen to run, so that it is judged by that
    /// release's definition; where that turns out to be another one, the host is asked again.
    ///
    /// # Errors
    /// When the host cannot be reached or cannot say.
    pub async fn observe(
        &self,
        host: &HostName,
        known: &BTreeMap<ServiceName, ReleaseId>,
    ) -> Result<HostReport, HostError> {
        let mut assumed = known.clone();
        let services: Vec<&ServiceName> = self
            .environment
            .hosts
            .iter()
            .filter(|(_, hosts)| hosts.contains(host))
            .map(|(name, _)| name)
            .collect();
        loop {
            let specs = services
                .iter()
                .filter_map(|service| {
                    let instance = Instance::new(host.clone(), (*service).clone());
                    self.spec(&instance, assumed.get(*service).copied())
                })
                .collect();
            let reply = self.hosts.call(host, Request::Observe { specs }, OBSERVE_TIMEOUT, |_| {}).await?;
            let Reply::Observed { at, mut report } = reply else {
                return Err(HostError {
                    why: format!("{host}: unexpected answer to a look: {reply:?}"),
                    blame: greenlight_model::action::Blame::Passing,
                    is_unreachable: false,
                    output: Vec::new(),
                });
            };
            by_our_clock(&mut report, at, clock::now());
            let seen: BTreeMap<ServiceName, ReleaseId> = report
                .instances
                .iter()
                .filter_map(|(service, instance)| Some((service.clone(), instance.linked?)))
                .collect();
            let is_judged_rightly = services.iter().all(|service| {
                let by = self.service(service, assumed.get(*service).copied());
                by == self.service(service, seen.get(*service).copied())
            });
            if is_judged_rightly {
                return Ok(*report);
            }
            assumed = seen;
        }
    }

    /// What a balancer says.
    pub async fn read_balancer(&self, index: usize) -> BalancerReport {
        match self.balancers[index].read().await {
            Ok(servers) => BalancerReport::Servers(servers),
            Err(error) => BalancerReport::Unreachable { why: error.problem.to_string() },
        }
    }
}

/// Puts the ends of claims, which a host keeps by its own clock, into ours: however wrong one of the two is, a claim that
/// has a minute left there has a minute left here.
fn by_our_clock(report: &mut HostReport, at: Timestamp, now: Timestamp) {
    for instance in report.instances.values_mut() {
        if let Some(claim) = &mut instance.ledger.claim {
            let left = claim.expires_at.duration_since(at);
            claim.expires_at = now.saturating_add(left).unwrap_or(claim.expires_at);
        }
    }
}

fn definitions(history: &History, environment: &Environment) -> BTreeMap<ReleaseId, Service> {
    history
        .definitions
        .iter()
        .filter(|((name, _), _)| *name == environment.name)
        .map(|((_, release), service)| (*release, service.clone()))
        .collect()
}

fn transport(balancer: &Balancer, hosts: &Arc<Hosts>) -> Arc<dyn Transport> {
    match &balancer.kind {
        BalancerKind::HaproxySocket { host, path } | BalancerKind::Router { host, path } => {
            Arc::new(AgentSocket {
                hosts: Arc::clone(hosts),
                host: host.clone(),
                path: path.clone(),
                timeout: BALANCER_TIMEOUT,
            })
        }
        BalancerKind::HaproxyTcp { address } => {
            Arc::new(Bounded(TcpTransport::new(address.clone(), BALANCER_TIMEOUT), balancer.title()))
        }
    }
}

/// A balancer that is asked without an agent, by its title, with a step boundary on either side of each exchange.
struct Bounded(TcpTransport, String);

impl Transport for Bounded {
    fn exchange<'a>(&'a self, input: &'a str) -> BoxFuture<'a, Result<String, TransportError>> {
        Box::pin(async move {
            let Self(transport, title) = self;
            boundary::pass(format_args!("before asking {title}"));
            let answer = transport.exchange(input).await;
            boundary::pass(format_args!("after the answer from {title}"));
            answer
        })
    }
}
