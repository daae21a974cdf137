//! One balancer of an environment: reading its servers, draining one, admitting one.
//!
//! A server in maintenance was taken out by a person or by the configuration. Greenlight does not overrule that: draining
//! leaves it as it is (it takes nothing already), admitting is refused with what to do.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use greenlight_link::message::Lease;
use greenlight_model::fleet::{Balancer, BalancerKind};
use greenlight_model::id::HostName;
use greenlight_model::traffic::{Admission, Server, weights};

use crate::canary::{Counts, Share};
use crate::transport::{Transport, TransportError};
use crate::{haproxy, router};

/// More than it takes to set weights.
const RESET_LIMIT: Duration = Duration::from_secs(30);

/// A balancer and the way to it.
pub struct BalancerDriver {
    title: String,
    kind: Kind,
    backend: String,
    /// What the balancer calls each host that is behind it.
    servers: BTreeMap<HostName, String>,
    transport: Arc<dyn Transport>,
}

#[derive(Clone, Copy)]
enum Kind {
    Haproxy,
    Router,
}

/// Why a balancer could not be read or changed: which one, what happened, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{balancer}: {problem}")]
pub struct DriverError {
    /// The balancer's title.
    pub balancer: String,
    /// What is wrong.
    pub problem: DriverProblem,
}

/// What can be wrong with a balancer.
#[derive(Debug, thiserror::Error)]
pub enum DriverProblem {
    /// It did not answer.
    #[error("{0}")]
    Unreachable(#[from] TransportError),
    /// A name would break the command it is put in.
    #[error("`{name}` cannot be the name of a {kind}: only letters, digits and `. : _ -` are allowed in it")]
    BadName {
        /// "backend" or "server".
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// It has no such backend.
    #[error("it has no backend `{backend}`; it has {}", list(known))]
    UnknownBackend {
        /// The backend asked for.
        backend: String,
        /// Those it has.
        known: Vec<String>,
    },
    /// It has no such server.
    #[error(
        "it has no server `{server}` for host {host}; it has {}. Name the server in the fleet file when it is not called \
         as the host",
        list(known)
    )]
    UnknownServer {
        /// The host.
        host: HostName,
        /// What its server should be called.
        server: String,
        /// Those it has.
        known: Vec<String>,
    },
    /// The host is not behind it.
    #[error("host {host} is not behind it")]
    NotBehind {
        /// The host.
        host: HostName,
    },
    /// The socket may only be read.
    #[error(
        "its socket does not allow changes; give it `level admin` in HAProxy's configuration (`stats socket … level admin`)"
    )]
    NotAdmin,
    /// It refused a command.
    #[error("it refused `{command}`: {said}")]
    Refused {
        /// The command.
        command: String,
        /// Its answer.
        said: String,
    },
    /// Its answer is not what its documentation promises.
    #[error("its answer could not be understood: {why}")]
    Malformed {
        /// What is wrong with it.
        why: String,
    },
    /// Somebody took the server out.
    #[error(
        "server `{server}` is in maintenance: somebody took it out by hand, or its configuration did. Greenlight does not \
         overrule that; when it may serve again, set it to `drain` or `ready` there, and resume"
    )]
    InMaintenance {
        /// The server.
        server: String,
    },
    /// The weight was accepted and is not there.
    #[error(
        "the weight of server `{server}` was set to {expected} and is {found}; something else may be changing it too"
    )]
    WeightNotAsSet {
        /// The server.
        server: String,
        /// What it was set to.
        expected: u32,
        /// What was read back.
        found: u32,
    },
    /// The change was accepted and is not there.
    #[error(
        "server `{server}` was set to {} and is {}; somebody or something else (an agent check, a script, a reload) may \
         be changing it too",
        word(*expected),
        word(*found)
    )]
    NotAsSet {
        /// The server.
        server: String,
        /// What it was set to.
        expected: Admission,
        /// What was read back.
        found: Admission,
    },
}

impl BalancerDriver {
    /// A driver for a balancer of the fleet file, with the hosts behind it and the way to reach it.
    #[must_use]
    pub fn new(balancer: &Balancer, hosts: &[HostName], transport: Arc<dyn Transport>) -> Self {
        let kind = match &balancer.kind {
            BalancerKind::HaproxySocket { .. } | BalancerKind::HaproxyTcp { .. } => Kind::Haproxy,
            BalancerKind::Router { .. } => Kind::Router,
        };
        let servers = hosts.iter().map(|host| (host.clone(), balancer.server(host).to_owned())).collect();
        Self { title: balancer.title(), kind, backend: balancer.backend.clone(), servers, transport }
    }

    /// How people recognise it.
    #[must_use]
    pub fn title(&self) -> &str {
        &self.title
    }

    /// What each host behind it is to the balancer now.
    ///
    /// # Errors
    /// When it cannot be read, or lacks one of them.
    pub async fn read(&self) -> Result<BTreeMap<HostName, Server>, DriverError> {
        self.read_servers().await.map_err(|problem| self.error(problem))
    }

    /// Stops new requests to a host; those under way go on. To wait for their end, read its sessions.
    ///
    /// # Errors
    /// When it cannot be changed, or is not drained afterwards.
    pub async fn drain(&self, host: &HostName) -> Result<(), DriverError> {
        self.change(host, Admission::Drain, None).await.map_err(|problem| self.error(problem))
    }

    /// Lets a host take requests again, which run `release` by then, where that is known: the built-in router names it
    /// in its access log. Whether the host is up, the next reading tells.
    ///
    /// # Errors
    /// When it cannot be changed, is in maintenance, or is not admitted afterwards.
    pub async fn admit(&self, host: &HostName, release: Option<&str>) -> Result<(), DriverError> {
        self.change(host, Admission::Ready, release).await.map_err(|problem| self.error(problem))
    }

    /// Lends a share of the traffic to the hosts of a release, whether they are admitted yet or not. See [`crate::canary`] for
    /// what each balancer can, and [`weights`] for what is read back afterwards.
    ///
    /// # Errors
    /// When it cannot be changed, shares otherwise afterwards, or an alert holds the canary there.
    pub async fn lend(&self, share: &Share<'_>) -> Result<(), DriverError> {
        self.lend_share(share).await.map_err(|problem| self.error(problem))
    }

    async fn lend_share(&self, share: &Share<'_>) -> Result<(), DriverProblem> {
        let wanted = weights(&self.read_servers().await?, share.hosts, share.share);
        match self.kind {
            Kind::Router => {
                let hosts = self.servers.iter().filter(|(host, _)| share.hosts.contains(*host));
                let names: Vec<&str> = hosts.map(|(_, server)| server.as_str()).collect();
                router::lend(&*self.transport, &names, share).await?;
            }
            Kind::Haproxy => {
                // Whoever takes it back is told first.
                self.begin_lease(share.hosts, share.lease).await?;
                self.weigh(&wanted).await?;
            }
        }
        for (host, found) in &self.read_servers().await? {
            let expected = wanted.get(host).copied().unwrap_or(found.normal_weight);
            if found.weight != expected {
                let server = self.servers.get(host).cloned().unwrap_or_default();
                return Err(DriverProblem::WeightNotAsSet { server, expected, found: found.weight });
            }
        }
        Ok(())
    }

    /// Lets the agent on HAProxy's host take back what these hosts are about to be lent.
    async fn begin_lease(&self, canaries: &BTreeSet<HostName>, lasts: Duration) -> Result<(), DriverProblem> {
        let of = |host: &HostName| self.servers.get(host).map(String::as_str);
        let names = canaries.iter().filter_map(of).collect();
        let input = haproxy::to_stable(&self.backend, &names, self.servers.values())?;
        self.transport.lease(&self.backend, Lease::Begin { input, lasts }).await?;
        Ok(())
    }

    /// Every server gets its usual weight. What the lease would take back comes to the same meanwhile, so that it may lapse.
    async fn reset(&self) -> Result<(), DriverProblem> {
        self.begin_lease(&BTreeSet::new(), RESET_LIMIT).await?;
        haproxy::reset_weights(&*self.transport, &self.backend, self.servers.values()).await?;
        self.transport.lease(&self.backend, Lease::End).await?;
        Ok(())
    }

    async fn weigh(&self, weights: &BTreeMap<HostName, u32>) -> Result<(), DriverProblem> {
        let weights =
            weights.iter().filter_map(|(host, weight)| Some((self.servers.get(host)?.clone(), *weight)));
        haproxy::set_weights(&*self.transport, &self.backend, &weights.collect()).await
    }

    /// Lends the present share for longer. HAProxy has no lease: the agent on its host takes the share back, where the way there is
    /// an agent's, and nothing else does.
    ///
    /// # Errors
    /// When it cannot be changed, or the lease has ended.
    pub async fn renew(&self, release: &str, lease: Duration) -> Result<(), DriverError> {
        match self.kind {
            Kind::Router => router::renew(&*self.transport, release, lease).await,
            Kind::Haproxy => {
                let renewed = self.transport.lease(&self.backend, Lease::Renew { lasts: lease }).await;
                renewed.map(drop).map_err(DriverProblem::from)
            }
        }
        .map_err(|problem| self.error(problem))
    }

    /// Ends the trial, where there is one: all servers share the traffic by their own weights again.
    ///
    /// # Errors
    /// When it cannot be changed, or an alert holds the canary there.
    pub async fn conclude(&self) -> Result<(), DriverError> {
        match self.kind {
            Kind::Router => router::conclude(&*self.transport).await,
            Kind::Haproxy => self.reset().await,
        }
        .map_err(|problem| self.error(problem))
    }

    /// Sends all following requests to stable. The built-in router holds the canary there until [`Self::enable`]; of
    /// HAProxy's servers those of `hosts` get no weight, and the hold is the caller's.
    ///
    /// # Errors
    /// When it cannot be changed.
    pub async fn alert(&self, hosts: &BTreeSet<HostName>, reason: &str, by: &str) -> Result<(), DriverError> {
        match self.kind {
            Kind::Router => router::alert(&*self.transport, reason, by).await,
            Kind::Haproxy => self.weigh(&hosts.iter().map(|host| (host.clone(), 0)).collect()).await,
        }
        .map_err(|problem| self.error(problem))
    }

    /// Lets a canary be lent a share again, as `by` decided. HAProxy holds none: nothing is done.
    ///
    /// # Errors
    /// When it cannot be changed.
    pub async fn enable(&self, by: &str) -> Result<(), DriverError> {
        match self.kind {
            Kind::Router => router::enable(&*self.transport, by).await,
            Kind::Haproxy => Ok(()),
        }
        .map_err(|problem| self.error(problem))
    }

    /// What it counted about the hosts behind it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn counts(&self) -> Result<Counts, DriverError> {
        let host = |server: &str| {
            self.servers.iter().find(|(_, name)| name.as_str() == server).map(|(host, _)| host.clone())
        };
        match self.kind {
            Kind::Router => router::counts(&*self.transport, host).await,
            Kind::Haproxy => haproxy::counts(&*self.transport, &self.backend, host).await,
        }
        .map_err(|problem| self.error(problem))
    }

    async fn change(
        &self,
        host: &HostName,
        wanted: Admission,
        release: Option<&str>,
    ) -> Result<(), DriverProblem> {
        let Some(server) = self.servers.get(host) else {
            return Err(DriverProblem::NotBehind { host: host.clone() });
        };
        let before = self.read_servers().await?;
        match before.get(host).map(|server| server.admission) {
            Some(Admission::Maintenance) if wanted == Admission::Ready => {
                return Err(DriverProblem::InMaintenance { server: server.clone() });
            }
            Some(Admission::Maintenance) => return Ok(()),
            Some(now) if now == wanted && release.is_none() => return Ok(()),
            _ => {}
        }
        match self.kind {
            Kind::Haproxy => haproxy::set(&*self.transport, &self.backend, server, wanted).await?,
            Kind::Router => router::set(&*self.transport, server, wanted, release).await?,
        }
        let after = self.read_servers().await?;
        match after.get(host).map(|server| server.admission) {
            Some(found) if found != wanted => {
                Err(DriverProblem::NotAsSet { server: server.clone(), expected: wanted, found })
            }
            _ => Ok(()),
        }
    }

    async fn read_servers(&self) -> Result<BTreeMap<HostName, Server>, DriverProblem> {
        let found = match self.kind {
            Kind::Haproxy => haproxy::read(&*self.transport, &self.backend).await?,
            Kind::Router => router::read(&*self.transport).await?,
        };
        self.servers
            .iter()
            .map(|(host, name)| match found.get(name) {
                Some(server) => Ok((host.clone(), *server)),
                None => Err(DriverProblem::UnknownServer {
                    host: host.clone(),
                    server: name.clone(),
                    known: found.keys().cloned().collect(),
                }),
            })
            .collect()
    }

    fn error(&self, problem: DriverProblem) -> DriverError {
        DriverError { balancer: self.title.clone(), problem }
    }
}

/// The state's word, as HAProxy and the router have it.
pub(crate) fn word(admission: Admission) -> &'static str {
    match admission {
        Admission::Ready => "ready",
        Admission::Drain => "drain",
        Admission::Maintenance => "maintenance",
    }
}

fn list(names: &[String]) -> String {
    /// More would hide the message; whoever needs them all asks the balancer.
    const SHOWN_MAX: usize = 20;
    match names {
        [] => "none".to_owned(),
        names if names.len() > SHOWN_MAX => {
            format!("{} and {} more", names[..SHOWN_MAX].join(", "), names.len() - SHOWN_MAX)
        }
        names => names.join(", "),
    }
}
