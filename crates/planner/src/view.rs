//! The world arranged for one decision: what is known of each instance, looked up once.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::iter::Peekable;
use std::time::Duration;

use greenlight_model::Timestamp;
use greenlight_model::action::{Blame, Verb};
use greenlight_model::decision::Wait;
use greenlight_model::host::{Claim, InstanceReport};
use greenlight_model::id::{Generation, HostName, Instance, ReleaseId, ServiceName};
use greenlight_model::rollout::{Failure, Rollout, Wave};
use greenlight_model::traffic::BalancerReport;
use greenlight_model::world::{InFlight, Traffic, Unreachable, World, is_partly_admitted};

use crate::canary::{self, Share};

/// The world, arranged by instance.
pub(crate) struct View<'a> {
    pub(crate) world: &'a World,
    /// Every instance of the plan, in order of their names.
    pub(crate) facts: Vec<Facts<'a>>,
    /// For each wave where its instances are in `facts`.
    waves: Vec<Vec<usize>>,
    failures: BTreeMap<(&'a Instance, Verb), Vec<&'a Failure>>,
    /// The hosts of each service of the plan in the fleet file, in order of their names.
    pub(crate) hosts: BTreeMap<&'a ServiceName, Vec<&'a HostName>>,
    /// What canaries are to get of the traffic, where the balancers show something else.
    pub(crate) shares: BTreeMap<&'a ServiceName, Share>,
}

/// What is known of one instance.
pub(crate) struct Facts<'a> {
    pub(crate) instance: &'a Instance,
    /// Its last report, which may be older than the loss of its host.
    pub(crate) report: Option<&'a InstanceReport>,
    /// The release that the report proves: looked at once, because in a large fleet every look is a miss of the caches.
    pub(crate) proven: Option<ReleaseId>,
    /// Why it cannot be acted on through its host's agent, when it cannot.
    pub(crate) unreachable: Option<Unreachable>,
    pub(crate) traffic: Traffic,
    pub(crate) serves: bool,
    /// Some balancers admit it and others do not.
    pub(crate) is_partly_admitted: bool,
    pub(crate) in_flight: Option<&'a InFlight>,
    /// What it ran before the rollout.
    pub(crate) baseline: Option<ReleaseId>,
    /// What it is to run now; none takes the service off the host.
    pub(crate) release: Option<ReleaseId>,
    /// Under which generation.
    pub(crate) generation: Generation,
    /// Whether it passed its preflight.
    pub(crate) is_checked: bool,
    /// Whether this rollout has begun to switch it.
    pub(crate) is_touched: bool,
    pub(crate) is_left_out: bool,
    /// Whether it was told to drain and has not been admitted since, by what the records say. A balancer that shows it
    /// admitted all the same may yet come to know of the drain.
    pub(crate) is_drained: bool,
}

impl<'a> View<'a> {
    pub(crate) fn new(world: &'a World) -> Self {
        let rollout = &world.rollout;
        let mut hosts: BTreeMap<&ServiceName, Vec<&HostName>> = BTreeMap::new();
        for service in rollout.plan.targets.keys() {
            let mut names: Vec<&HostName> =
                world.environment.hosts.get(service).into_iter().flatten().collect();
            names.sort();
            hosts.insert(service, names);
        }
        let mut failures: BTreeMap<(&Instance, Verb), Vec<&Failure>> = BTreeMap::new();
        for failure in &rollout.failures {
            failures.entry((failure.action.instance(), failure.action.verb())).or_default().push(failure);
        }
        let facts = all_facts(world, &hosts);
        let by_instance: HashMap<&Instance, usize> =
            facts.iter().enumerate().map(|(index, facts)| (facts.instance, index)).collect();
        let places = |wave: &Wave| {
            wave.instances.iter().filter_map(|instance| by_instance.get(instance).copied()).collect()
        };
        let waves: Vec<Vec<usize>> = rollout.plan.waves.iter().map(places).collect();
        let shares = canary::shares(world, &facts, &waves);
        Self { world, facts, waves, failures, hosts, shares }
    }

    pub(crate) fn rollout(&self) -> &'a Rollout {
        &self.world.rollout
    }

    /// The instances of one wave, by its index.
    pub(crate) fn wave<'v>(&'v self, index: usize) -> impl Iterator<Item = &'v Facts<'a>> + use<'v, 'a> {
        self.waves.get(index).into_iter().flatten().filter_map(|place| self.facts.get(*place))
    }

    /// Whether this rollout has changed anything that clients or hosts would notice. Staged bytes and claims are not such a
    /// change.
    pub(crate) fn has_changed(&self) -> bool {
        let rollout = self.rollout();
        !(rollout.touched.is_empty()
            && rollout.drained_at.is_empty()
            && rollout.admitted_at.is_empty()
            && rollout.migrations.is_empty())
    }

    /// Why this kind of action is not tried again on the instance: it failed for good, or too often.
    pub(crate) fn spent(&self, instance: &Instance, verb: Verb) -> Option<String> {
        let failures = self.failures.get(&(instance, verb))?;
        let retries = usize::try_from(self.world.environment.retries).unwrap_or(usize::MAX);
        let failure = failures
            .iter()
            .find(|failure| self.is_final(failure))
            .or_else(|| failures.last().filter(|_| failures.len() > retries))?;
        let tries = match failures.len() {
            1 => String::new(),
            count => format!(" ({count} times)"),
        };
        Some(format!("{verb} failed{tries}: {}", failure.why))
    }

    /// Whether trying again makes no sense. What an instance goes back to did run there, and there is nothing else to go back
    /// to: one bad start does not make it guilty.
    fn is_final(&self, failure: &Failure) -> bool {
        match failure.blame {
            Blame::Passing => false,
            Blame::Release => !self.rollout().goes_back(failure.action.instance()),
            Blame::Host => true,
        }
    }

    /// Why an activation failed in a way that a later good report does not mend.
    pub(crate) fn refused(&self, instance: &Instance, verb: Verb) -> Option<String> {
        let failures = self.failures.get(&(instance, verb))?;
        let failure = failures.iter().find(|failure| self.is_final(failure))?;
        Some(format!("{verb} failed: {}", failure.why))
    }

    /// The first balancer of the instance's service that cannot be read or does not know it.
    pub(crate) fn balancer_wait(&self, instance: &Instance) -> Option<Wait> {
        let world = self.world;
        world.environment.balancers.iter().enumerate().find_map(|(index, balancer)| {
            if balancer.service != instance.service {
                return None;
            }
            let why = match world.traffic.get(index) {
                None => "it has not been read yet".to_owned(),
                Some(BalancerReport::Unreachable { why }) => why.clone(),
                Some(BalancerReport::Servers(servers)) if !servers.contains_key(&instance.host) => {
                    format!("it has no server {}", balancer.server(&instance.host))
                }
                Some(BalancerReport::Servers(_)) => return None,
            };
            Some(Wait::Balancer { title: balancer.title(), why })
        })
    }

    pub(crate) fn title(&self, release: ReleaseId) -> String {
        self.world.title(release)
    }
}

/// Every instance with what is known of it, in one pass: what is looked up is ordered by host as the instances are, so
/// each place is found from the one before it.
fn all_facts<'a>(world: &'a World, hosts: &BTreeMap<&'a ServiceName, Vec<&'a HostName>>) -> Vec<Facts<'a>> {
    let rollout = &world.rollout;
    let plan = &rollout.plan;
    let mut in_flight: Vec<(&Instance, &InFlight)> =
        world.in_flight.iter().map(|in_flight| (in_flight.action.instance(), in_flight)).collect();
    in_flight.sort_by_key(|(instance, _)| *instance);
    let mut in_flight = Cursor::new(in_flight.into_iter());
    let mut in_fleet: BTreeMap<&ServiceName, _> = hosts
        .iter()
        .map(|(service, hosts)| (*service, Cursor::new(hosts.iter().map(|host| (*host, ())))))
        .collect();
    let mut inventory = Cursor::new(world.inventory.iter());
    let mut checked = Cursor::new(rollout.checked.iter().map(|instance| (instance, ())));
    let mut touched = Cursor::new(rollout.touched.iter().map(|instance| (instance, ())));
    let mut left_out = Cursor::new(rollout.left_out.iter());
    let mut drained = Cursor::new(rollout.drained_at.iter());
    let mut all = Vec::with_capacity(plan.baseline.len());
    for (instance, baseline) in &plan.baseline {
        let observation = inventory.seek(&instance.host);
        let is_in_fleet =
            in_fleet.get_mut(&instance.service).is_some_and(|hosts| hosts.seek(&instance.host).is_some());
        let report = observation
            .and_then(|observation| observation.report.as_ref())
            .and_then(|(_, report)| report.instances.get(&instance.service));
        let proven = report.and_then(InstanceReport::proven);
        let unreachable = if is_in_fleet {
            observation.and_then(|observation| observation.unreachable.clone())
        } else {
            let why = format!("the fleet file no longer has it in {}", world.environment.name);
            Some(Unreachable { since: rollout.started_at, why })
        };
        let traffic = traffic(world, instance);
        let serves = is_in_fleet
            && match &traffic {
                Traffic::Known { admitted, up, .. } => *admitted && *up,
                Traffic::Unknown { .. } => false,
                Traffic::None => unreachable.is_none() && proven.is_some(),
            };
        let is_left_out = left_out.seek(instance).is_some();
        let (release, generation) = if rollout.is_turning_back() || is_left_out {
            (*baseline, plan.generation.next())
        } else {
            (plan.targets.get(&instance.service).copied(), plan.generation)
        };
        all.push(Facts {
            instance,
            report,
            proven,
            unreachable,
            traffic,
            serves,
            is_partly_admitted: is_partly_admitted(&world.environment, &world.traffic, instance),
            in_flight: in_flight.seek(instance),
            baseline: *baseline,
            release,
            generation,
            is_checked: checked.seek(instance).is_some(),
            is_touched: touched.seek(instance).is_some(),
            is_left_out,
            is_drained: drained.seek(instance).is_some(),
        });
    }
    all
}

/// A place in an ordered map or set that only moves on.
struct Cursor<I: Iterator>(Peekable<I>);

impl<'a, K: Ord + 'a, V: Copy, I: Iterator<Item = (&'a K, V)>> Cursor<I> {
    fn new(entries: I) -> Self {
        Self(entries.peekable())
    }

    /// What is at a key that is not before the last one asked for.
    fn seek(&mut self, key: &K) -> Option<V> {
        while let Some((known, value)) = self.0.peek() {
            match (*known).cmp(key) {
                Ordering::Less => {
                    self.0.next();
                }
                Ordering::Equal => return Some(*value),
                Ordering::Greater => return None,
            }
        }
        None
    }
}

impl<'a> Facts<'a> {
    /// The wait for the action that is under way on it.
    pub(crate) fn in_flight_wait(&self) -> Option<Wait> {
        self.in_flight.map(|in_flight| Wait::Action {
            instance: self.instance.clone(),
            verb: in_flight.action.verb(),
            since: in_flight.since,
        })
    }

    /// Whether the host's ledger, as last reported, has our claim, run out or not.
    pub(crate) fn has_our_claim(&self, rollout: &Rollout) -> bool {
        self.claim().is_some_and(|claim| claim.rollout == rollout.plan.id)
    }

    /// Whether the host's ledger, as last reported, has our claim, and it has not run out: a controller that takes over
    /// after a while finds claims that have.
    pub(crate) fn is_claimed(&self, world: &World) -> bool {
        self.claim()
            .is_some_and(|claim| claim.rollout == world.rollout.plan.id && claim.expires_at > world.now)
    }

    /// Somebody else's claim that has not run out.
    pub(crate) fn foreign_claim(&self, world: &World) -> Option<&'a Claim> {
        self.claim().filter(|claim| claim.rollout != world.rollout.plan.id && claim.expires_at > world.now)
    }

    /// Whether it runs `release` as far as the last report proves it. One that this rollout has begun to switch must
    /// have done so under the wanted generation: a late message of an older one could still reach it otherwise.
    pub(crate) fn runs(&self, release: ReleaseId) -> bool {
        self.proven == Some(release)
            && self.report.is_some_and(|report| {
                report.ledger.active == Some(release)
                    && (!self.is_touched || report.ledger.generation >= self.generation)
            })
    }

    /// Whether it is counted among those that serve, where it serves: not when it was told to drain, and not while its host
    /// would go back by itself.
    pub(crate) fn is_counted(&self) -> bool {
        !self.is_drained && self.report.is_none_or(|report| report.ledger.guard.is_none())
    }

    /// Whether the release it runs was confirmed.
    pub(crate) fn is_confirmed(&self, release: ReleaseId) -> bool {
        self.report.is_some_and(|report| {
            report.ledger.last_good == Some(release)
                && report.ledger.confirmed == Some(report.ledger.generation)
        })
    }

    fn claim(&self) -> Option<&'a Claim> {
        self.report.and_then(|report| report.ledger.claim.as_ref())
    }
}

/// A moment after another; far beyond any rollout when it cannot be represented.
pub(crate) fn later(moment: Timestamp, by: Duration) -> Timestamp {
    moment.checked_add(by).unwrap_or(Timestamp::MAX)
}

fn traffic(world: &World, instance: &Instance) -> Traffic {
    let unread = world.environment.balancers.get(world.traffic.len()..).unwrap_or_default();
    match unread.iter().find(|balancer| balancer.service == instance.service) {
        Some(balancer) => Traffic::Unknown { why: format!("{} has not been read yet", balancer.title()) },
        None => world.traffic(instance),
    }
}
