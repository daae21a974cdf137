//! A fleet with a staging and a production environment, its records, and the lights of production.

use std::collections::BTreeMap;

use greenlight_model::Timestamp;
use greenlight_model::decision::Outcome;
use greenlight_model::evidence::{Evidence, Fact};
use greenlight_model::fleet::{Environment, Fleet, Floor, OnFailure, Strategy, Timeouts};
use greenlight_model::gate::Gates;
use greenlight_model::history::History;
use greenlight_model::id::{EnvironmentName, Generation, PlanDigest, ReleaseId, ServiceName};
use greenlight_model::manifest::Release;
use greenlight_model::migration::Loss;
use greenlight_model::record::{Record, RecordBody};
use greenlight_model::rollout::{Direction, Plan};
use greenlight_model::traffic::BalancerReport;
use greenlight_model::world::Light;

use crate::{Asked, PlanNow, gates};

/// A Saturday.
pub(crate) const NOW: &str = "2026-11-21T16:00:00Z";

pub(crate) struct Site {
    pub(crate) fleet: Fleet,
    pub(crate) history: History,
    pub(crate) now: Timestamp,
    pub(crate) begun: Option<Timestamp>,
    pub(crate) direction: Direction,
    pub(crate) plan: Option<(PlanDigest, String)>,
    pub(crate) asked_by: Option<String>,
    pub(crate) traffic: Vec<BalancerReport>,
    pub(crate) losses: Vec<Loss>,
    pub(crate) by: String,
}

pub(crate) fn release(number: u8) -> ReleaseId {
    ReleaseId::from_bytes([number; 32])
}

pub(crate) fn digest(number: u8) -> PlanDigest {
    PlanDigest::from_bytes([number; 32])
}

pub(crate) fn production() -> EnvironmentName {
    "production".parse().unwrap()
}

fn environment(name: &str, gates: Gates) -> Environment {
    Environment {
        name: name.parse().unwrap(),
        branch: None,
        hosts: BTreeMap::from([("web".parse().unwrap(), vec!["a".parse().unwrap()])]),
        host_settings: BTreeMap::new(),
        strategy: Strategy::BlueGreen,
        floor: Floor::Count(0),
        failure_budget: 0,
        on_failure: OnFailure::TurnBack,
        after: None,
        gates,
        standby: std::collections::BTreeSet::new(),
        balancers: Vec::new(),
        timeouts: Timeouts::default(),
        tag: None,
        retries: 0,
        variables: BTreeMap::new(),
    }
}

impl Site {
    /// v2 is to go to production, which has these gates; `ann` built it, and `ann`, `bob` and `eve` are operators.
    pub(crate) fn new(gates: Gates) -> Self {
        let environments = [environment("staging", Gates::default()), environment("production", gates)];
        let operators = ["ann", "bob", "eve"].map(str::to_owned).into();
        Self {
            fleet: Fleet {
                environments: environments.map(|it| (it.name.clone(), it)).into(),
                roles: BTreeMap::from([("operator".parse().unwrap(), operators)]),
                ..Fleet::default()
            },
            history: History::default(),
            now: NOW.parse().unwrap(),
            begun: None,
            direction: Direction::Forward,
            plan: Some((digest(1), "1 activate a/web\n".to_owned())),
            asked_by: None,
            traffic: Vec::new(),
            losses: Vec::new(),
            by: "bob@desk".to_owned(),
        }
    }

    pub(crate) fn targets(&self) -> BTreeMap<ServiceName, ReleaseId> {
        BTreeMap::from([("web".parse().unwrap(), release(2))])
    }

    pub(crate) fn production(&mut self) -> &mut Environment {
        self.fleet.environments.get_mut(&production()).unwrap()
    }

    fn record(&mut self, body: RecordBody) {
        let seq = self.history.last_seq + 1;
        let record = Record { seq, at: self.now, by: self.by.clone(), body };
        self.history.apply(&record).unwrap();
    }

    /// Evidence about a release wherever it goes.
    pub(crate) fn add(&mut self, number: u8, fact: Fact) {
        let releases = BTreeMap::from([("web".parse().unwrap(), release(number))]);
        let evidence = Evidence { releases, environment: None, digest: None, fact };
        self.record(RecordBody::EvidenceAdded { evidence });
    }

    /// Evidence about v2 in an environment.
    pub(crate) fn add_here(&mut self, environment: &str, digest: Option<PlanDigest>, fact: Fact) {
        let environment = Some(environment.parse().unwrap());
        let evidence = Evidence { releases: self.targets(), environment, digest, fact };
        self.record(RecordBody::EvidenceAdded { evidence });
    }

    /// A rollout of a release that ended like this, or goes on.
    pub(crate) fn rolled(&mut self, environment: &str, number: u8, ended: Option<Outcome>, is_partial: bool) {
        let id: greenlight_model::id::RolloutId = format!("r{}", self.history.order.len()).parse().unwrap();
        let plan = Plan {
            id: id.clone(),
            environment: environment.parse().unwrap(),
            direction: Direction::Forward,
            targets: BTreeMap::from([("web".parse().unwrap(), release(number))]),
            baseline: BTreeMap::new(),
            waves: Vec::new(),
            generation: Generation(2),
            started_by: "op@desk".to_owned(),
            digest: None,
            is_partial,
            overrides: BTreeMap::new(),
            losses: Vec::new(),
        };
        self.record(RecordBody::RolloutStarted { plan, services: BTreeMap::new() });
        if let Some(outcome) = ended {
            self.record(RecordBody::RolloutEnded { rollout: id, outcome, running: BTreeMap::new() });
        }
    }

    pub(crate) fn lights(&self) -> BTreeMap<String, Light> {
        let releases: Vec<Release> = [1, 2].map(known).into();
        let targets = self.targets();
        let asked = Asked {
            fleet: &self.fleet,
            environment: &self.fleet.environments[&production()],
            history: &self.history,
            targets: &targets,
            direction: self.direction,
            releases: &releases,
            plan: self.plan.as_ref().map(|(digest, text)| PlanNow { digest: *digest, text: Some(text) }),
            asked_by: self.asked_by.as_deref(),
            losses: &self.losses,
            traffic: &self.traffic,
            now: self.now,
            begun: self.begun,
        };
        gates(&asked).into_iter().map(|gate| (gate.name, gate.light)).collect()
    }

    /// Asserts that a gate is `green`, `amber` or `red` and that its reason holds these.
    #[track_caller]
    pub(crate) fn is(&self, gate: &str, colour: &str, texts: &[&str]) {
        let lights = self.lights();
        let light = lights.get(gate).unwrap_or_else(|| panic!("no gate {gate} in {lights:?}"));
        let (found, why) = match light {
            Light::Green { why } => ("green", why),
            Light::Amber { why } => ("amber", why),
            Light::Red { why } => ("red", why),
        };
        assert_eq!(found, colour, "{gate}: {why}");
        for text in texts {
            assert!(why.contains(text), "{gate} does not say `{text}`: {why}");
        }
    }
}

fn known(number: u8) -> Release {
    Release {
        id: release(number),
        service: "web".parse().unwrap(),
        label: format!("v{number}"),
        commit: number.to_string().repeat(40),
        branch: None,
        subject: String::new(),
        built_at: Timestamp::UNIX_EPOCH,
        built_by: "ann@ci".to_owned(),
        files: 1,
        bytes: 1,
    }
}
