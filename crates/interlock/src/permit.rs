//! The rules. Each is a function from the world and the action to a sentence, or to nothing when it has no objection.

use std::cell::OnceCell;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use greenlight_model::Timestamp;
use greenlight_model::action::{Action, Verb};
use greenlight_model::host::MigrationTrace;
use greenlight_model::id::{Generation, Instance, ReleaseId, ServiceName};
use greenlight_model::migration::MigrationPhase;
use greenlight_model::rollout::Direction;
use greenlight_model::world::{Light, Traffic, World};

use crate::{Rule, Violation};

/// Permits an action in the world as it is.
///
/// # Errors
/// The first rule that it would break, with a sentence for the operator.
pub fn permit(world: &World, action: &Action) -> Result<(), Violation> {
    Interlock::new(world).permit(action)
}

/// The interlock of one moment: judges several actions that are to be begun together, each with those begun before it,
/// and looks at the whole fleet only once.
pub struct Interlock<'w> {
    world: &'w World,
    /// Actions under way or begun at this moment, by instance.
    begun: HashMap<Instance, Vec<Action>>,
    migrating: Option<Instance>,
    /// Per service how many serve and are not being taken out; counted when first asked for.
    serving: BTreeMap<ServiceName, OnceCell<usize>>,
    /// Per service how many served before the rollout; counted when first asked for.
    served_before: BTreeMap<ServiceName, OnceCell<usize>>,
    red: OnceCell<Option<Red>>,
    unproven: OnceCell<BTreeMap<&'w ServiceName, &'w Instance>>,
}

/// The first wave that is not proven, by its index, and who in it is not when the wave had been proven before.
struct Red {
    wave: usize,
    broken: Option<Instance>,
}

type Check = fn(&Interlock<'_>, &Action) -> Option<String>;

/// In this order, because a later rule may take for granted what an earlier one has judged.
const CHECKS: [(Rule, Check); 10] = [
    (Rule::Ownership, ownership),
    (Rule::Claim, claim),
    (Rule::Migration, migration),
    (Rule::Retention, retention),
    (Rule::Gates, gates),
    (Rule::Order, order),
    (Rule::Fallback, fallback),
    (Rule::Share, share),
    (Rule::Proof, proof),
    (Rule::Capacity, capacity),
];

impl<'w> Interlock<'w> {
    /// The interlock for this world, with what is in flight in it.
    #[must_use]
    pub fn new(world: &'w World) -> Self {
        let services = || world.environment.hosts.keys().map(|service| (service.clone(), OnceCell::new()));
        let mut interlock = Self {
            world,
            begun: HashMap::new(),
            migrating: None,
            serving: services().collect(),
            served_before: services().collect(),
            red: OnceCell::new(),
            unproven: OnceCell::new(),
        };
        for in_flight in &world.in_flight {
            interlock.begin(&in_flight.action);
        }
        interlock
    }

    /// Permits an action beside those that were begun.
    ///
    /// # Errors
    /// The first rule that it would break, with a sentence for the operator.
    pub fn permit(&self, action: &Action) -> Result<(), Violation> {
        for (rule, check) in CHECKS {
            if let Some(sentence) = check(self, action) {
                return Err(Violation { rule, sentence });
            }
        }
        Ok(())
    }

    /// From here on this action is under way.
    pub fn begin(&mut self, action: &Action) {
        let instance = action.instance();
        if takes_out(action)
            && !self.is_out(instance)
            && self.world.serves(instance)
            && let Some(serving) = self.serving.get_mut(&instance.service).and_then(OnceCell::get_mut)
        {
            *serving = serving.saturating_sub(1);
        }
        if action.migration_phase().is_some() {
            self.migrating = Some(instance.clone());
        }
        self.begun.entry(instance.clone()).or_default().push(action.clone());
    }

    fn is_leaving(&self, instance: &Instance) -> bool {
        self.begun.get(instance).is_some_and(|begun| begun.iter().any(takes_out))
    }

    /// Whether it is being taken out, was told to drain and not admitted since (a balancer that shows it admitted all the
    /// same may yet come to know of the drain), or would be taken out by its host, which goes back by itself.
    fn is_out(&self, instance: &Instance) -> bool {
        self.is_leaving(instance)
            || self.world.rollout.drained_at.contains_key(instance)
            || self.world.report(instance).is_some_and(|report| report.ledger.guard.is_some())
    }

    /// How many instances of a service serve and are not being taken out.
    fn serving(&self, service: &ServiceName) -> usize {
        let count = || {
            let all = self.world.environment.instances_of(service);
            all.filter(|instance| !self.is_out(instance) && self.world.serves(instance)).count()
        };
        self.serving.get(service).map_or(0, |serving| *serving.get_or_init(count))
    }

    /// How many instances of a service must serve. On the way back no more can be asked than what served before: where
    /// nothing ran, nothing has to go on running.
    fn floor(&self, instance: &Instance) -> usize {
        let service = &instance.service;
        let floor = self.world.floor(service);
        if !is_going_back(self.world, instance) {
            return floor;
        }
        let count = || {
            let baseline = &self.world.rollout.plan.baseline;
            let all = self.world.environment.instances_of(service);
            // Of instances that are not part of the rollout only those that serve were there to serve before.
            all.filter(|one| baseline.get(one).map_or_else(|| self.world.serves(one), Option::is_some))
                .count()
        };
        floor.min(self.served_before.get(service).map_or(0, |served| *served.get_or_init(count)))
    }

    /// The first wave that is red.
    fn red(&self) -> Option<&Red> {
        self.red.get_or_init(|| first_red(self.world)).as_ref()
    }

    /// For each service the first instance, standbys not counted, that does not prove its release.
    fn unproven(&self, service: &ServiceName) -> Option<&'w Instance> {
        let first_of_each = || {
            let standby = &self.world.environment.standby;
            let active = self.world.rollout.plan.baseline.keys().filter(|one| !standby.contains(&one.host));
            let mut firsts = BTreeMap::new();
            for instance in active.filter(|instance| !is_proven(self.world, instance)) {
                firsts.entry(&instance.service).or_insert(instance);
            }
            firsts
        };
        self.unproven.get_or_init(first_of_each).get(service).copied()
    }
}

/// Rule 10.
fn ownership(interlock: &Interlock<'_>, action: &Action) -> Option<String> {
    let world = interlock.world;
    let instance = action.instance();
    let plan = &world.rollout.plan;
    if !plan.baseline.contains_key(instance) {
        return Some(format!("{instance} is not part of rollout {}", plan.id));
    }
    let environment = &world.environment;
    if !environment.host_settings.contains_key(&instance.host)
        || !environment.hosts.contains_key(&instance.service)
    {
        return Some(format!("{instance} is no longer part of {}", environment.name));
    }
    None
}

/// Rule 2.
fn claim(interlock: &Interlock<'_>, action: &Action) -> Option<String> {
    let world = interlock.world;
    let instance = action.instance();
    let mut begun = interlock.begun.get(instance).into_iter().flatten();
    if let Some(other) = begun.find(|begun| *begun != action) {
        return Some(format!("{} is under way on {instance}", other.verb()));
    }
    let ledger = world.report(instance).map(|report| &report.ledger);
    let held = ledger.and_then(|ledger| ledger.claim.as_ref());
    let is_change = !matches!(action.verb(), Verb::Preflight | Verb::Unclaim);
    if let Some(held) = held
        && is_change
        && held.rollout != world.rollout.plan.id
        && held.expires_at > world.now
    {
        return Some(format!(
            "{instance} is claimed by {} for rollout {} until {:.0}",
            held.holder, held.rollout, held.expires_at
        ));
    }
    let (generation, release) = match action {
        Action::Activate { generation, release, .. } => (*generation, Some(*release)),
        Action::Deactivate { generation, .. } => (*generation, None),
        _ => return None,
    };
    let (wanted, wanted_generation) = wanted(world, instance);
    if generation != wanted_generation {
        return Some(format!(
            "generation {generation} is not the rollout's for {instance}, which is {wanted_generation}"
        ));
    }
    if release != wanted {
        let name = |release: Option<ReleaseId>| release.map_or("no release".to_owned(), |id| world.title(id));
        return Some(format!(
            "generation {generation} brings {} to {instance}, not {}",
            name(wanted),
            name(release)
        ));
    }
    let seen = ledger.map(|ledger| ledger.generation)?;
    (seen > generation)
        .then(|| format!("the host of {instance} has seen generation {seen}, so {generation} is out of date"))
}

/// Rule 6.
fn migration(interlock: &Interlock<'_>, action: &Action) -> Option<String> {
    let world = interlock.world;
    let rollout = &world.rollout;
    let instance = action.instance();
    let service = &instance.service;
    let (Some(phase), Some(release)) = (action.migration_phase(), action.release()) else {
        return older_code(world, action);
    };
    let noun = phase.noun();
    if rollout.plan.direction == Direction::Back || is_going_back(world, instance) {
        return Some(format!("a {noun} of {service} never runs on the way back"));
    }
    if rollout.plan.targets.get(service) != Some(&release) {
        return Some(format!("{} is not what this rollout brings to {service}", world.title(release)));
    }
    if rollout.migrations(phase).contains_key(service) {
        return Some(format!("the {noun} of {service} was begun before in this rollout"));
    }
    if let Some(other) = &interlock.migrating
        && other != instance
    {
        return Some(format!("another migration is under way on {other}"));
    }
    let title = world.title(release);
    if let Some(former) = rollout.former_migrations(phase).get(service) {
        let has_ledger = world.report(&former.on).is_some_and(|report| !report.ledger.history.is_empty());
        if former.is_done {
            return Some(format!("the {noun} of {title} ran before, on {}, by the records", former.on));
        }
        if !has_ledger {
            return Some(format!(
                "the {noun} of {title} was begun before, on {}, which does not know how it ended",
                former.on
            ));
        }
    }
    let traced = world.environment.instances_of(service).find_map(|other| {
        match world.report(&other)?.ledger.migration(release, phase)? {
            MigrationTrace::Done => Some(format!("the {noun} of {title} ran before, on {other}")),
            MigrationTrace::Begun => Some(format!(
                "the {noun} of {title} was begun before, on {other}, and how it ended is not known"
            )),
            MigrationTrace::Failed => None,
        }
    });
    traced.or_else(|| {
        let mut older = world.environment.instances_of(service).filter(|other| {
            phase == MigrationPhase::Contract
                && (is_going_back(world, other)
                    || world.report(other).and_then(|report| report.proven()) != Some(release))
        });
        older.next().map(|other| {
            format!("{other} does not prove {title}: what it runs may need what the {noun} takes away")
        })
    })
}

/// Part of rule 6: a release of before on a database that lacks what it may need.
fn older_code(world: &World, action: &Action) -> Option<String> {
    let instance = action.instance();
    let brings_code = matches!(action, Action::Activate { .. }) && is_going_back(world, instance);
    let loss = world.rollout.lost_of(&instance.service).filter(|_| brings_code)?;
    Some(format!("{instance} would run older code, and a migration took away what that may need: {loss}"))
}

/// Rule 8.
fn retention(interlock: &Interlock<'_>, action: &Action) -> Option<String> {
    let world = interlock.world;
    let instance = action.instance();
    match action {
        Action::Prune { keep, .. } => {
            let Some(report) = world.report(instance) else {
                return Some(format!("what {instance} could go back to is not known"));
            };
            let ledger = &report.ledger;
            let plan = &world.rollout.plan;
            let of_plan = plan.baseline.get(instance).copied().flatten();
            let needed = [
                (ledger.active, "it runs"),
                (ledger.previous, "it ran before"),
                (ledger.last_good, "was last good there"),
                (plan.targets.get(&instance.service).copied(), "this rollout brings"),
                (of_plan, "this rollout could go back to"),
            ];
            let (lost, what) = needed
                .iter()
                .find_map(|(release, what)| release.filter(|id| !keep.contains(id)).map(|id| (id, what)))?;
            Some(format!("{} would be removed from {instance}, which {what}", world.title(lost)))
        }
        Action::Activate { release, .. } => {
            let bad = world.releases.get(release).and_then(|facts| facts.bad.as_ref());
            if let Some(why) = bad
                && !is_going_back(world, instance)
            {
                return Some(format!("{} is marked bad: {why}", world.title(*release)));
            }
            let is_staged = world.report(instance).is_some_and(|report| report.staged.contains(release));
            (!is_staged).then(|| format!("{} is not complete on {}", world.title(*release), instance.host))
        }
        _ => None,
    }
}

/// Rule 4. Gates are for the beginning: what was begun under green lights may be finished.
fn gates(interlock: &Interlock<'_>, action: &Action) -> Option<String> {
    let world = interlock.world;
    let rollout = &world.rollout;
    let has_begun = !rollout.touched.is_empty()
        || !rollout.drained_at.is_empty()
        || !rollout.admitted_at.is_empty()
        || !rollout.migrations.is_empty();
    if has_begun || !is_forward_change(world, action) {
        return None;
    }
    world.gates.iter().find_map(|gate| match &gate.light {
        Light::Green { .. } => None,
        Light::Amber { why } => Some(format!("gate {} is amber: {why}", gate.name)),
        Light::Red { why } => Some(format!("gate {} is red: {why}", gate.name)),
    })
}

/// Rule 9. To end a canary is always permitted: every server gets what its balancer's configuration says.
fn share(interlock: &Interlock<'_>, action: &Action) -> Option<String> {
    let Action::Share { instance, canaries, share: Some(share) } = action else { return None };
    let world = interlock.world;
    let rollout = &world.rollout;
    let service = &instance.service;
    if rollout.is_turning_back() {
        return Some(format!(
            "the rollout turns back, so no canary of {service} gets {share} of the traffic"
        ));
    }
    let mut open = rollout.plan.waves.iter().enumerate().filter(|(index, wave)| {
        !wave.steps.is_empty()
            && !rollout.waves_proven.contains_key(index)
            && wave.instances.iter().any(|one| one.service == *service)
    });
    let Some((index, wave)) = open.next() else {
        return Some(format!("no canary of {service} is being judged, so none gets {share} of the traffic"));
    };
    let passed = rollout.canaries.get(&index).map_or(0, |canary| canary.passed);
    let due = wave.steps.get(passed).map(|step| step.share);
    if due.is_none_or(|due| due < *share) {
        let due = due.map_or("nothing".to_owned(), |due| due.to_string());
        return Some(format!("the canary of {service} is to get {due} of the traffic now, not {share}"));
    }
    canaries.iter().find_map(|host| {
        let canary = Instance::new(host.clone(), service.clone());
        if !wave.instances.contains(&canary) {
            return Some(format!("{canary} is not of the canary"));
        }
        // One that was left out gets no more than the canary while it is on its way back.
        (!rollout.left_out.contains_key(&canary) && !is_proven(world, &canary))
            .then(|| format!("{canary} does not prove its release, so it gets no share of the traffic"))
    })
}

/// Rule 5.
fn order(interlock: &Interlock<'_>, action: &Action) -> Option<String> {
    let world = interlock.world;
    if !is_forward_change(world, action) || action.verb() == Verb::Migrate {
        return None;
    }
    let instance = action.instance();
    let waves = &world.rollout.plan.waves;
    let Some(own) = waves.iter().position(|wave| wave.instances.contains(instance)) else {
        return Some(format!("{instance} is in no wave of the rollout"));
    };
    let red = interlock.red().filter(|red| red.wave < own)?;
    let number = red.wave + 1;
    Some(match &red.broken {
        None => format!("{instance} is in wave {}, and wave {number} has not been proven", own + 1),
        Some(broken) => {
            format!(
                "{instance} is in wave {}, and {broken} of wave {number} does not prove its release",
                own + 1
            )
        }
    })
}

/// Rule 7.
fn fallback(interlock: &Interlock<'_>, action: &Action) -> Option<String> {
    let world = interlock.world;
    if !is_forward_change(world, action) || action.verb() == Verb::Migrate {
        return None;
    }
    let instance = action.instance();
    let plan = &world.rollout.plan;
    if world.environment.standby.contains(&instance.host)
        && let Some(other) = interlock.unproven(&instance.service)
    {
        return Some(format!("{instance} is a standby, and {other} does not prove its release yet"));
    }
    let own = plan.waves.iter().position(|wave| wave.instances.contains(instance))?;
    let after = plan.waves[own].after;
    if own == 0 || after.is_zero() {
        return None;
    }
    match world.rollout.waves_proven.get(&(own - 1)) {
        None => Some(format!("{instance} is kept as the way back while wave {own} is not proven")),
        Some(proven_at) => {
            let until = plus(*proven_at, after);
            (world.now < until).then(|| format!("{instance} is kept as the way back until {until}"))
        }
    }
}

/// Rule 3.
fn proof(interlock: &Interlock<'_>, action: &Action) -> Option<String> {
    let world = interlock.world;
    let Action::Admit { instance } = action else { return None };
    let (wanted, generation) = wanted(world, instance);
    let Some(wanted) = wanted else { return Some(format!("{instance} is to run nothing")) };
    let Some(report) = world.report(instance) else { return Some(format!("{instance} has never reported")) };
    if report.proven() != Some(wanted) {
        let why = report.why_not_proven(wanted).unwrap_or_else(|| "it runs something else".to_owned());
        return Some(format!("{instance} does not prove {}: {why}", world.title(wanted)));
    }
    if let Some(guard) = &report.ledger.guard {
        return Some(format!(
            "{instance} was not confirmed: its host would go back by itself at {}, in the middle of requests",
            guard.fires_at
        ));
    }
    let is_switched = world.rollout.touched.contains(instance);
    (is_switched && report.ledger.generation < generation).then(|| {
        format!(
            "what {instance} proves is of generation {}, and generation {generation} was begun since",
            report.ledger.generation
        )
    })
}

/// Rule 1.
fn capacity(interlock: &Interlock<'_>, action: &Action) -> Option<String> {
    let world = interlock.world;
    let instance = action.instance();
    let is_drain = match action.verb() {
        Verb::Drain => true,
        Verb::Activate | Verb::Deactivate => false,
        _ => return None,
    };
    let unread = world.environment.balancers.get(world.traffic.len()..).unwrap_or_default();
    if let Some(balancer) = unread.iter().find(|balancer| balancer.service == instance.service) {
        return Some(format!("{} has not been read", balancer.title()));
    }
    match world.traffic(instance) {
        Traffic::Unknown { why } => {
            return Some(format!("whether {instance} gets requests is not known: {why}"));
        }
        Traffic::Known { admitted: true, .. } if !is_drain => {
            return Some(format!("{instance} still gets requests: it must be drained first"));
        }
        Traffic::Known { sessions, .. } if !is_drain && sessions > 0 => {
            let Some(drained_at) = world.rollout.drained_at.get(instance) else {
                return Some(format!(
                    "{instance} has {sessions} sessions and was not drained by this rollout"
                ));
            };
            let until = plus(*drained_at, world.environment.timeouts.drain);
            if world.now < until {
                return Some(format!("{instance} has {sessions} sessions, which may last until {until}"));
            }
        }
        Traffic::Known { .. } | Traffic::None => {}
    }
    if !world.serves(instance) {
        return None;
    }
    let service = &instance.service;
    let others = usize::from(!interlock.is_out(instance));
    let remaining = interlock.serving(service).saturating_sub(others);
    let floor = interlock.floor(instance);
    (remaining < floor).then(|| {
        format!(
            "without {instance}, {remaining} instances of {service} would serve, and the floor is {floor}"
        )
    })
}

fn first_red(world: &World) -> Option<Red> {
    let rollout = &world.rollout;
    rollout.plan.waves.iter().enumerate().find_map(|(index, wave)| {
        if !rollout.waves_proven.contains_key(&index) {
            return Some(Red { wave: index, broken: None });
        }
        let broken = wave.instances.iter().find(|earlier| !is_proven(world, earlier))?;
        Some(Red { wave: index, broken: Some(broken.clone()) })
    })
}

fn takes_out(action: &Action) -> bool {
    matches!(action.verb(), Verb::Drain | Verb::Activate | Verb::Deactivate)
}

/// Whether an instance of an earlier wave still is what the wave was to make of it.
fn is_proven(world: &World, instance: &Instance) -> bool {
    if is_going_back(world, instance) {
        return true;
    }
    let target = world.rollout.plan.targets.get(&instance.service);
    world.report(instance).and_then(|report| report.proven()).as_ref() == target
}

fn is_forward_change(world: &World, action: &Action) -> bool {
    matches!(action.verb(), Verb::Drain | Verb::Activate | Verb::Deactivate | Verb::Migrate)
        && !is_going_back(world, action.instance())
}

fn is_going_back(world: &World, instance: &Instance) -> bool {
    world.rollout.goes_back(instance)
}

/// What the rollout wants of an instance now, and the generation that stands for it.
fn wanted(world: &World, instance: &Instance) -> (Option<ReleaseId>, Generation) {
    let plan = &world.rollout.plan;
    if is_going_back(world, instance) {
        (plan.baseline.get(instance).copied().flatten(), plan.generation.next())
    } else {
        (plan.targets.get(&instance.service).copied(), plan.generation)
    }
}

fn plus(moment: Timestamp, by: Duration) -> Timestamp {
    moment.checked_add(by).unwrap_or(Timestamp::MAX)
}
