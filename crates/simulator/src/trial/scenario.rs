//! A scenario: a fleet, what is rolled out over it, and the faults that happen meanwhile, as plain data. A seed draws one;
//! one that fails is made smaller by taking parts of it away.

use std::time::Duration;

use greenlight_model::action::{Blame, Verb};
use greenlight_model::fleet::{BatchSize, Floor, OnFailure, Strategy};
use greenlight_model::quantity::Percent;
use greenlight_model::rollout::{Direction, OperatorRequest};
use greenlight_model::traffic::Admission;

use super::numbers::Numbers;
use super::{canary, plot};

/// A moment or a duration of the simulation, in milliseconds.
pub type Ms = u64;

/// Until then faults happen; after it everything outside Greenlight is mended, and the rollout has to end.
pub const SAFETY_ENDS_MS: Ms = 60_000;

/// A fleet, a rollout over it, and what goes wrong.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    /// What chance that is not in `faults` is drawn from: how long things take.
    pub seed: u64,
    /// How many hosts there are.
    pub hosts: usize,
    /// The services.
    pub services: Vec<ServiceShape>,
    /// How waves are cut.
    pub strategy: Strategy,
    /// What must go on serving.
    pub floor: Floor,
    /// How many hosts may be left out.
    pub failure_budget: u32,
    /// What happens when the budget is spent.
    pub on_failure: OnFailure,
    /// How often what failed is tried again.
    pub retries: u32,
    /// Standby hosts.
    pub standby: Vec<usize>,
    /// Forward, or back to the release before.
    pub direction: Direction,
    /// Nothing runs before.
    pub is_first: bool,
    /// Only these hosts change; all when empty.
    pub only: Vec<usize>,
    /// Hosts go back by themselves when an activation is not confirmed.
    pub has_guard: bool,
    /// A host that starts again starts its processes.
    pub starts_at_boot: bool,
    /// Whether balancers lend a canary its share for a time, and it returns to stable when nobody renews it (as the built-in
    /// router); else weights stay as they are set (as HAProxy's).
    pub lends: bool,
    /// How many requests to a canary a verdict takes.
    pub requests_needed: u64,
    /// What goes wrong.
    pub faults: Vec<Fault>,
}

/// One service of a scenario.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceShape {
    /// Where it runs.
    pub hosts: Vec<usize>,
    /// How many balancers are before it.
    pub balancers: usize,
    /// Whether its release migrates a database.
    pub migrates: bool,
    /// Whether it is tried out before it is switched to.
    pub has_smoke: bool,
    /// Whether anything runs; configuration does not.
    pub has_process: bool,
}

/// Something that goes wrong.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    /// When it begins.
    pub at: Ms,
    /// For how long it lasts, where that means something.
    pub lasts: Ms,
    /// What it is.
    pub kind: FaultKind,
}

/// Kinds of what goes wrong. Hosts, services and balancers are given by their index, releases by their number in their
/// service (0 the one before, 1 what runs, 2 the target, 3 another).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FaultKind {
    /// The controller dies at so many step boundaries after the moment, and is replaced after `lasts`.
    KillController {
        /// The boundaries count only from the next beginning of such an action on.
        amid: Option<Verb>,
        /// How many boundaries it still passes.
        boundaries: u8,
        /// What replaces it.
        then: OperatorRequest,
    },
    /// The operator resumes on another machine that shares the record log, while the first controller lives.
    SecondController,
    /// A host loses power and returns.
    Crash {
        /// Which.
        host: usize,
        /// Whether its disk is still there then.
        keeps_disk: bool,
    },
    /// The host that is the first to be asked this after the moment is struck so much later.
    Amid {
        /// What it is asked.
        verb: Verb,
        /// How long after it was asked, in milliseconds.
        after: Ms,
        /// What strikes it.
        strike: Strike,
    },
    /// A host loses power at its next ledger write.
    CrashAtWrite {
        /// Which.
        host: usize,
        /// Whether the rename had reached the disk.
        keeps_new: bool,
    },
    /// Messages to or from a host do not arrive.
    Cut {
        /// Which.
        host: usize,
        /// Those to it.
        to: bool,
        /// Those from it.
        from: bool,
    },
    /// A balancer does not answer the controller.
    CutBalancer {
        /// Which.
        balancer: usize,
    },
    /// A balancer is started again.
    RestartBalancer {
        /// Which.
        balancer: usize,
        /// Whether it had saved the state of its servers; else all are ready.
        has_state: bool,
    },
    /// A person changes a server.
    ByHand {
        /// At which balancer.
        balancer: usize,
        /// Which.
        host: usize,
        /// To what.
        admission: Admission,
    },
    /// Messages are lost, repeated or late.
    Messages {
        /// How many are lost, in percent.
        lost: u64,
        /// How many come twice, in percent.
        repeated: u64,
        /// How late they are at most.
        late: Ms,
    },
    /// What an agent is asked to do fails.
    CommandFails {
        /// Where.
        host: usize,
        /// Which.
        verb: Verb,
        /// By whose fault.
        blame: Blame,
    },
    /// What an agent is asked to do does not end.
    CommandHangs {
        /// Where.
        host: usize,
        /// Which.
        verb: Verb,
    },
    /// The agent's processes are killed; what they began is half done.
    AgentKilled {
        /// Where.
        host: usize,
    },
    /// Nothing can be written.
    DiskFull {
        /// Where.
        host: usize,
    },
    /// The ledgers of a host cannot be read until they are restored.
    LedgerDamaged {
        /// Where.
        host: usize,
    },
    /// A rollout of which this record log knows nothing claims a service on a host, when nobody else does.
    ForeignClaim {
        /// Where.
        host: usize,
        /// Which.
        service: usize,
    },
    /// A host's clock jumps.
    HostClock {
        /// Where.
        host: usize,
        /// By how much.
        by_ms: i64,
    },
    /// The controllers' clock jumps.
    ControllerClock {
        /// By how much.
        by_ms: i64,
    },
    /// A release does not work.
    BadRelease {
        /// Of which service.
        service: usize,
        /// Which.
        release: usize,
        /// How.
        how: Badness,
        /// On this host only; everywhere when none.
        on: Option<usize>,
    },
    /// A process ends by itself and is not started again.
    ProcessDies {
        /// Where.
        host: usize,
        /// Of which service.
        service: usize,
    },
    /// A gate is amber.
    Gate,
    /// The operator asks something of the rollout.
    Asks(OperatorRequest),
    /// The operator deploys another release of the first service, when nothing is open.
    Deploys {
        /// Which.
        release: usize,
        /// To these hosts only.
        part: Part,
    },
    /// Somebody marks a release of the first service bad.
    MarksBad {
        /// Which.
        release: usize,
    },
}

/// What strikes a host for as long as the fault lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strike {
    /// It loses power.
    Crash {
        /// Whether its disk is still there when it returns.
        keeps_disk: bool,
    },
    /// No message reaches it or comes from it.
    Cut,
}

/// Which hosts of a fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All.
    All,
    /// The first, the third …
    Even,
    /// The second, the fourth …
    Odd,
}

impl Part {
    /// Whether a host, by its index, belongs to it.
    #[must_use]
    pub fn contains(self, host: usize) -> bool {
        match self {
            Self::All => true,
            Self::Even => host.is_multiple_of(2),
            Self::Odd => !host.is_multiple_of(2),
        }
    }
}

/// How a release does not work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Badness {
    /// It ends while it starts.
    AtStart,
    /// It ends some time after it answered.
    After(Ms),
    /// It ends at so many requests.
    UnderTraffic(u8),
    /// It never answers.
    NeverAnswers,
    /// It lives, and of a hundred requests so many are answered wrongly.
    AnswersWrongly(u8),
}

impl FaultKind {
    /// What it is called in reports.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::KillController { .. } => "controller killed",
            Self::SecondController => "second controller",
            Self::Crash { keeps_disk: true, .. } => "host crash",
            Self::Crash { .. } => "host crash, disk lost",
            Self::Amid { strike: Strike::Crash { keeps_disk: true }, .. } => "host crash amid an action",
            Self::Amid { strike: Strike::Crash { .. }, .. } => "host crash amid an action, disk lost",
            Self::Amid { strike: Strike::Cut, .. } => "link cut amid an action",
            Self::CrashAtWrite { .. } => "crash in a ledger write",
            Self::Cut { to: true, from: true, .. } => "link cut",
            Self::Cut { .. } => "link cut one way",
            Self::CutBalancer { .. } => "balancer unreachable",
            Self::RestartBalancer { .. } => "balancer restarted",
            Self::ByHand { .. } => "balancer changed by hand",
            Self::Messages { .. } => "messages lost, repeated, late",
            Self::CommandFails { .. } => "command fails",
            Self::CommandHangs { .. } => "command hangs",
            Self::AgentKilled { .. } => "agent killed",
            Self::DiskFull { .. } => "disk full",
            Self::LedgerDamaged { .. } => "ledger damaged",
            Self::ForeignClaim { .. } => "claimed by another",
            Self::HostClock { .. } => "host clock jumps",
            Self::ControllerClock { .. } => "controller clock jumps",
            Self::BadRelease { .. } => "bad release",
            Self::ProcessDies { .. } => "process dies",
            Self::Gate => "gate amber",
            Self::Asks(OperatorRequest::Hold) => "operator holds",
            Self::Asks(OperatorRequest::Resume) => "operator resumes",
            Self::Asks(OperatorRequest::Abort) => "operator aborts",
            Self::Deploys { .. } => "operator deploys another",
            Self::MarksBad { .. } => "operator marks bad",
        }
    }

    /// Whether everything that it is about is there in a smaller fleet.
    #[must_use]
    pub fn fits(&self, hosts: usize, services: usize, balancers: usize) -> bool {
        let (service, balancer) = match self {
            Self::CutBalancer { balancer }
            | Self::RestartBalancer { balancer, .. }
            | Self::ByHand { balancer, .. } => (0, *balancer),
            Self::BadRelease { service, .. }
            | Self::ProcessDies { service, .. }
            | Self::ForeignClaim { service, .. } => (*service, 0),
            _ => (0, 0),
        };
        let is_about_balancers =
            matches!(self, Self::CutBalancer { .. } | Self::RestartBalancer { .. } | Self::ByHand { .. });
        self.host().is_none_or(|host| host < hosts)
            && service < services
            && (!is_about_balancers || balancer < balancers)
    }

    /// The host it is about, when it is about one.
    #[must_use]
    pub fn host(&self) -> Option<usize> {
        match self {
            Self::Crash { host, .. }
            | Self::CrashAtWrite { host, .. }
            | Self::Cut { host, .. }
            | Self::ByHand { host, .. }
            | Self::CommandFails { host, .. }
            | Self::CommandHangs { host, .. }
            | Self::AgentKilled { host }
            | Self::DiskFull { host }
            | Self::LedgerDamaged { host }
            | Self::HostClock { host, .. }
            | Self::ForeignClaim { host, .. }
            | Self::ProcessDies { host, .. } => Some(*host),
            Self::BadRelease { on, .. } => *on,
            _ => None,
        }
    }
}

/// Where the numbers begin that canaries are drawn from.
const CANARY_NUMBERS: u64 = 0x00ca_0a51;

/// Scenarios that get a plot beside what chance brings.
const PLOTS_PERCENT: u64 = 12;

impl Scenario {
    /// Whether its migrations take something away when everything runs the release. Not drawn, so that seeds stay what they
    /// are.
    pub(super) fn contracts(&self) -> bool {
        self.seed % 4 == 3
    }

    /// The scenario of a seed.
    #[must_use]
    pub fn from_seed(seed: u64) -> Self {
        let numbers = &mut Numbers::new(seed);
        let hosts = match numbers.below(1000) {
            0..=949 => 2 + numbers.place(4),
            950..=989 => 6 + numbers.place(7),
            990..=997 => 13 + numbers.place(28),
            _ => 41 + numbers.place(160),
        };
        let services = services(numbers, hosts);
        let direction = if numbers.chance(15) { Direction::Back } else { Direction::Forward };
        let mut scenario = Self {
            seed,
            hosts,
            strategy: strategy(numbers, hosts),
            floor: numbers.pick(&[
                Floor::Count(0),
                Floor::Count(1),
                Floor::Count(1),
                Floor::Count(2),
                Floor::Share(share(50)),
                Floor::Share(share(60)),
            ]),
            failure_budget: u32::try_from(numbers.below(3)).unwrap_or(0),
            on_failure: numbers.pick(&[OnFailure::TurnBack, OnFailure::TurnBack, OnFailure::Hold]),
            retries: u32::try_from(numbers.below(3)).unwrap_or(0),
            standby: if hosts > 2 && numbers.chance(20) { vec![numbers.place(hosts)] } else { Vec::new() },
            direction,
            is_first: direction == Direction::Forward && numbers.chance(8),
            only: if hosts > 2 && numbers.chance(10) {
                let part = numbers.pick(&[Part::Even, Part::Odd]);
                (0..hosts).filter(|host| part.contains(*host)).collect()
            } else {
                Vec::new()
            },
            has_guard: numbers.chance(85),
            starts_at_boot: numbers.chance(70),
            lends: false,
            requests_needed: 0,
            faults: Vec::new(),
            services,
        };
        let count = match numbers.below(100) {
            0..=11 => 0,
            12..=61 => 1 + numbers.below(3),
            62..=95 => 3 + numbers.below(6),
            _ => 8 + numbers.below(12),
        };
        for _ in 0..count {
            let fault = fault(numbers, &scenario);
            scenario.faults.push(fault);
        }
        if numbers.chance(PLOTS_PERCENT) {
            plot::add(numbers, &mut scenario);
        }
        // Numbers of their own: what the others are drawn from stays as it is.
        canary::add(&mut Numbers::new(seed ^ CANARY_NUMBERS), &mut scenario);
        scenario.faults.sort_by_key(|fault| fault.at);
        scenario
    }

    /// How many balancers there are, over all services.
    #[must_use]
    pub fn balancers(&self) -> usize {
        self.services.iter().map(|service| service.balancers).sum()
    }
}

fn share(percent: u8) -> Percent {
    #[expect(clippy::expect_used, reason = "only constants under 100 are given")]
    Percent::try_from(percent).expect("a share")
}

fn services(numbers: &mut Numbers, hosts: usize) -> Vec<ServiceShape> {
    let count = 1 + usize::from(numbers.chance(35)) + usize::from(numbers.chance(8));
    (0..count)
        .map(|index| {
            let has_process = index == 0 || numbers.chance(85);
            let is_everywhere = index == 0 && numbers.chance(80) || numbers.chance(30);
            let all: Vec<usize> = (0..hosts).filter(|_| is_everywhere || numbers.chance(65)).collect();
            ServiceShape {
                hosts: if all.is_empty() { vec![numbers.place(hosts)] } else { all },
                balancers: if has_process { numbers.pick(&[0, 1, 1, 1, 2]) } else { 0 },
                migrates: numbers.chance(35),
                has_smoke: has_process && numbers.chance(25),
                has_process,
            }
        })
        .collect()
}

fn strategy(numbers: &mut Numbers, hosts: usize) -> Strategy {
    match numbers.below(5) {
        0 if hosts <= 12 => Strategy::Rolling { batch: vec![BatchSize::Count(1)] },
        0 | 1 => Strategy::Rolling { batch: vec![BatchSize::Count(1), BatchSize::Share(share(50))] },
        2 => Strategy::Rolling { batch: vec![BatchSize::Share(share(34))] },
        3 => Strategy::BlueGreen,
        _ => Strategy::Halves { keep_for: Duration::from_millis(numbers.pick(&[0, 3_000, 8_000])) },
    }
}

fn fault(numbers: &mut Numbers, scenario: &Scenario) -> Fault {
    let at = if numbers.chance(75) { numbers.below(20_000) } else { numbers.below(SAFETY_ENDS_MS - 12_000) };
    let lasts = match numbers.below(3) {
        0 => 1_000 + numbers.below(1_500),
        1 => 1_000 + numbers.below(6_000),
        _ => 1_000 + numbers.below(25_000),
    };
    let host = numbers.place(scenario.hosts);
    let service = numbers.place(scenario.services.len());
    let balancers = scenario.balancers();
    let way = if numbers.chance(60) { OperatorRequest::Resume } else { OperatorRequest::Abort };
    let verb = numbers.pick(&[
        Verb::Preflight,
        Verb::Claim,
        Verb::Stage,
        Verb::Smoke,
        Verb::Migrate,
        Verb::Activate,
        Verb::Activate,
        Verb::Confirm,
        Verb::Prune,
        Verb::Unclaim,
    ]);
    let jump = |numbers: &mut Numbers| {
        let by: i64 = numbers.pick(&[900, 5_000, 40_000, 4_000_000]);
        if numbers.chance(50) { by } else { -by }
    };
    let kind = match numbers.below(100) {
        0..=19 => {
            let amid = numbers.chance(20).then_some(verb);
            FaultKind::KillController { amid, boundaries: numbers.boundaries(30), then: way }
        }
        20..=23 => FaultKind::SecondController,
        24..=29 => FaultKind::Crash { host, keeps_disk: true },
        30..=31 => FaultKind::Crash { host, keeps_disk: false },
        32..=36 => FaultKind::CrashAtWrite { host, keeps_new: numbers.chance(50) },
        37..=40 => FaultKind::Cut { host, to: true, from: true },
        41..=43 => {
            let to = numbers.chance(50);
            FaultKind::Cut { host, to, from: !to }
        }
        44..=46 if balancers > 0 => FaultKind::CutBalancer { balancer: numbers.place(balancers) },
        47..=49 if balancers > 0 => {
            FaultKind::RestartBalancer { balancer: numbers.place(balancers), has_state: numbers.chance(60) }
        }
        50..=52 if balancers > 0 => FaultKind::ByHand {
            balancer: numbers.place(balancers),
            host,
            admission: numbers.pick(&[Admission::Ready, Admission::Drain, Admission::Maintenance]),
        },
        53..=57 => FaultKind::Messages {
            lost: numbers.pick(&[0, 2, 10, 40]),
            repeated: numbers.pick(&[0, 5, 30]),
            late: numbers.pick(&[50, 500, 3_000]),
        },
        58..=64 => FaultKind::CommandFails {
            host,
            verb,
            blame: numbers.pick(&[Blame::Release, Blame::Host, Blame::Passing, Blame::Passing]),
        },
        65..=68 => FaultKind::CommandHangs { host, verb },
        69..=70 => FaultKind::AgentKilled { host },
        71 => FaultKind::Amid { verb, after: numbers.below(1_500), strike: strike(numbers) },
        72..=73 => FaultKind::DiskFull { host },
        74 => FaultKind::LedgerDamaged { host },
        75 => FaultKind::HostClock { host, by_ms: jump(numbers) },
        76 => FaultKind::ForeignClaim { host, service },
        77 => FaultKind::ControllerClock { by_ms: jump(numbers) },
        78..=84 => FaultKind::BadRelease {
            service,
            release: 2 + usize::from(numbers.chance(20)),
            how: match numbers.below(5) {
                0 | 1 => Badness::AtStart,
                2 => Badness::After(numbers.between(200, 8_000)),
                3 => Badness::UnderTraffic(u8::try_from(numbers.below(12)).unwrap_or(0)),
                _ => Badness::NeverAnswers,
            },
            on: numbers.chance(50).then_some(host),
        },
        85..=87 => FaultKind::ProcessDies { host, service },
        88..=90 => FaultKind::Gate,
        91..=93 => FaultKind::Asks(numbers.pick(&[
            OperatorRequest::Hold,
            OperatorRequest::Resume,
            OperatorRequest::Abort,
        ])),
        94..=97 => FaultKind::Deploys {
            release: numbers.pick(&[1, 2, 3, 3]),
            part: numbers.pick(&[Part::All, Part::All, Part::Even, Part::Odd]),
        },
        98 => FaultKind::MarksBad { release: numbers.pick(&[1, 2]) },
        _ => FaultKind::Asks(OperatorRequest::Abort),
    };
    let at = match kind {
        FaultKind::Gate => numbers.below(3_000),
        // Later the rollout's own claim is there.
        FaultKind::ForeignClaim { .. } if numbers.chance(60) => numbers.below(1_000),
        _ => at,
    };
    Fault { at, lasts: lasts.min(SAFETY_ENDS_MS - 2_000 - at), kind }
}

fn strike(numbers: &mut Numbers) -> Strike {
    numbers.pick(&[
        Strike::Cut,
        Strike::Cut,
        Strike::Crash { keeps_disk: true },
        Strike::Crash { keeps_disk: false },
    ])
}
