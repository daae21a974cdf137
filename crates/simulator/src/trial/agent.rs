//! What a host does when it is asked: the agent's own rules, step by step, so that it can die between any two of them.
//!
//! This follows the agent: claims with expiry by the host's clock, generations that fence, one change of an instance at a
//! time, idempotence, the guard. A difference between the two is a defect of one of them.

use std::collections::BTreeSet;

use greenlight_model::action::{Blame, Verb};
use greenlight_model::host::{HostReport, LedgerEvent};
use greenlight_model::id::{Generation, ReleaseId, RolloutId};
use greenlight_model::migration::MigrationPhase;

use super::scenario::Ms;
use super::trial::{Event, Trial};

/// How long a change waits for another one of the same instance to end.
const CHANGE_WAIT_MS: Ms = 2_000;
const CHANGE_INTERVAL_MS: Ms = 100;
/// Time between two steps of one request.
pub(super) const STEP_MS: Ms = 5;

/// What an agent is asked.
#[derive(Debug, Clone)]
pub(super) enum Request {
    Observe,
    Preflight,
    /// `ended` is the ended rollout whose claim is given up first.
    Claim {
        rollout: RolloutId,
        generation: Generation,
        ended: Option<RolloutId>,
    },
    Unclaim {
        rollout: RolloutId,
    },
    Stage {
        release: ReleaseId,
        rollout: RolloutId,
    },
    Smoke {
        release: ReleaseId,
    },
    Migrate {
        release: ReleaseId,
        part: MigrationPhase,
        rollout: RolloutId,
    },
    Activate {
        release: Option<ReleaseId>,
        generation: Generation,
        rollout: RolloutId,
        is_guarded: bool,
    },
    Confirm {
        release: ReleaseId,
        generation: Generation,
        rollout: RolloutId,
    },
    Prune {
        keep: BTreeSet<ReleaseId>,
        rollout: RolloutId,
    },
    /// The host's own: nobody asks for it.
    GoBack {
        serial: u32,
    },
}

impl Request {
    pub(super) fn verb(&self) -> Option<Verb> {
        Some(match self {
            Self::Observe | Self::GoBack { .. } => return None,
            Self::Preflight => Verb::Preflight,
            Self::Claim { .. } => Verb::Claim,
            Self::Unclaim { .. } => Verb::Unclaim,
            Self::Stage { .. } => Verb::Stage,
            Self::Smoke { .. } => Verb::Smoke,
            Self::Migrate { part: MigrationPhase::Expand, .. } => Verb::Migrate,
            Self::Migrate { part: MigrationPhase::Contract, .. } => Verb::Contract,
            Self::Activate { .. } => Verb::Activate,
            Self::Confirm { .. } => Verb::Confirm,
            Self::Prune { .. } => Verb::Prune,
        })
    }
}

/// Why an agent did not do it.
#[derive(Debug, Clone)]
pub(super) struct Refusal {
    pub(super) why: String,
    pub(super) blame: Blame,
}

pub(super) type Answered = Result<Option<Box<HostReport>>, Refusal>;

/// Who asked, and what the answer is for.
#[derive(Debug, Clone, Copy)]
pub(super) struct From {
    pub(super) controller: usize,
    pub(super) purpose: Purpose,
    /// When the action was begun that this belongs to.
    pub(super) began: Ms,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A step of an action.
    Job { job: u32, serial: u32 },
    /// A look.
    Look { serial: u32 },
    /// A claim renewed.
    Renew { service: usize },
    /// Nobody waits for it.
    Nothing,
}

/// A request under way on a host.
pub(super) struct Task {
    pub(super) from: From,
    pub(super) host: usize,
    pub(super) service: usize,
    pub(super) request: Request,
    pub(super) phase: u8,
    has_lock: bool,
    pub(super) deadline: Ms,
    boots: u32,
    is_hanging: bool,
}

impl Task {
    /// Whether it holds its instance's lock.
    pub(super) fn is_changing(&self) -> bool {
        self.has_lock
    }
}

pub(super) enum Next {
    /// Go on after so long.
    After(Ms),
    /// It is over.
    Ended(Result<(), Refusal>),
    /// The host is gone.
    Gone,
}

pub(super) fn refuse(blame: Blame, why: &str) -> Refusal {
    Refusal { why: why.to_owned(), blame }
}

impl Trial<'_> {
    /// A request has arrived.
    pub(super) fn arrives(&mut self, from: From, host: usize, service: usize, request: Request) {
        if !self.hosts[host].is_up {
            return;
        }
        let answer = match request {
            Request::Observe => self
                .observe(host)
                .map(|report| Some(Box::new(report)))
                .map_err(|why| Refusal { why, blame: Blame::Host }),
            request => {
                self.task_serial += 1;
                let id = self.task_serial;
                let is_hanging = request.verb().is_some_and(|verb| self.hangs(host, verb));
                let boots = self.hosts[host].boots;
                let deadline = self.now + CHANGE_WAIT_MS;
                let task = Task {
                    from,
                    host,
                    service,
                    request,
                    phase: 0,
                    has_lock: false,
                    deadline,
                    boots,
                    is_hanging,
                };
                if let Some(verb) = task.request.verb() {
                    self.ambush(host, verb);
                }
                self.tasks.insert(id, task);
                return self.step_task(id);
            }
        };
        self.answer(from, host, answer);
    }

    /// The connection of a controller has ended: what need not be finished is killed.
    pub(super) fn connection_ends(&mut self, controller: usize, only_host: Option<usize>) {
        let ended: Vec<u32> = self
            .tasks
            .iter()
            .filter(|(_, task)| task.from.controller == controller && task.from.purpose != Purpose::Nothing)
            .filter(|(_, task)| only_host.is_none_or(|host| host == task.host))
            .filter(|(_, task)| {
                let is_finished_anyway = matches!(
                    task.request,
                    Request::Activate { .. }
                        | Request::GoBack { .. }
                        | Request::Confirm { .. }
                        | Request::Claim { .. }
                        | Request::Unclaim { .. }
                        | Request::Prune { .. }
                );
                !is_finished_anyway
            })
            .map(|(id, _)| *id)
            .collect();
        for id in ended {
            self.drop_task(id);
        }
    }

    /// The agents of a host are killed, or the host itself.
    pub(super) fn agents_die(&mut self, host: usize, with_guard: bool) {
        let ids: Vec<u32> = self
            .tasks
            .iter()
            .filter(|(_, task)| task.host == host)
            .filter(|(_, task)| with_guard || !matches!(task.request, Request::GoBack { .. }))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.drop_task(id);
        }
    }

    fn drop_task(&mut self, id: u32) {
        let Some(task) = self.tasks.remove(&id) else { return };
        if matches!(task.request, Request::Migrate { .. }) && task.phase == 2 {
            self.check.migration_broken(task.service);
        }
        let instance = &mut self.hosts[task.host].instances[task.service];
        if instance.lock == Some(id) {
            instance.lock = None;
        }
    }

    /// The next step of a request.
    pub(super) fn step_task(&mut self, id: u32) {
        let Some(mut task) = self.tasks.remove(&id) else { return };
        if !self.hosts[task.host].is_up || self.hosts[task.host].boots != task.boots {
            return;
        }
        let (host, service) = (task.host, task.service);
        let wants_lock = !matches!(
            task.request,
            Request::Preflight | Request::Claim { .. } | Request::Unclaim { .. } | Request::Observe
        );
        let next = if wants_lock && !task.has_lock {
            let instance = &mut self.hosts[host].instances[service];
            if instance.lock.is_none() {
                instance.lock = Some(id);
                task.has_lock = true;
                self.check_alone(&task);
                Next::After(STEP_MS)
            } else if self.now < task.deadline {
                Next::After(CHANGE_INTERVAL_MS)
            } else if matches!(task.request, Request::GoBack { .. }) {
                // The guard waits longer: it has nobody who would ask it again.
                task.deadline = self.now + CHANGE_WAIT_MS;
                Next::After(CHANGE_INTERVAL_MS)
            } else {
                Next::Ended(Err(refuse(Blame::Passing, "another change of this instance is under way")))
            }
        } else if task.is_hanging && self.hangs(host, task.request.verb().unwrap_or(Verb::Preflight)) {
            Next::After(500)
        } else {
            self.next_step(&mut task)
        };
        match next {
            Next::After(ms) => {
                self.tasks.insert(id, task);
                self.after(ms, Event::Task(id));
            }
            Next::Ended(result) => {
                if !self.hosts[host].is_up {
                    return;
                }
                let instance = &mut self.hosts[host].instances[service];
                if instance.lock == Some(id) {
                    instance.lock = None;
                }
                // Its timer is over, however it ended: where the ledger still has it, the next look starts it again.
                if let Request::GoBack { serial } = task.request
                    && instance.guard_serial == Some(serial)
                {
                    instance.guard_serial = None;
                }
                let answer = result.map(|()| None);
                self.answer(task.from, host, answer);
            }
            Next::Gone => {}
        }
    }

    fn next_step(&mut self, task: &mut Task) -> Next {
        if let Some(verb) = task.request.verb()
            && task.phase == self.fails_in_phase(verb)
            && let Some(blame) = self.command_fails(task.host, verb)
        {
            if verb == Verb::Activate && task.phase > 1 {
                let (release, generation) = match &task.request {
                    Request::Activate { release, generation, .. } => (*release, *generation),
                    _ => (None, Generation(0)),
                };
                self.note(task.host, task.service, LedgerEvent::Failed, release, generation);
            }
            let is_migration = matches!(verb, Verb::Migrate | Verb::Contract);
            if is_migration && task.phase == 2 && blame == Blame::Passing {
                self.check.migration_broken(task.service);
            } else if is_migration && task.phase == 2 {
                self.check.migration_failed(task.service);
                if let Request::Migrate { release, part, .. } = task.request {
                    let generation = self.hosts[task.host].instances[task.service].ledger.generation;
                    let event = match part {
                        MigrationPhase::Expand => LedgerEvent::MigrationFailed,
                        MigrationPhase::Contract => LedgerEvent::ContractionFailed,
                    };
                    self.note(task.host, task.service, event, Some(release), generation);
                }
            }
            return Next::Ended(Err(refuse(blame, "it failed by chance")));
        }
        let done = match task.request.clone() {
            Request::Observe => Ok(Next::Ended(Ok(()))),
            Request::Preflight => self.preflight(task),
            Request::Claim { rollout, generation, ended } => {
                self.claim(task, &rollout, generation, ended.as_ref())
            }
            Request::Unclaim { rollout } => self.unclaim(task, &rollout),
            Request::Stage { release, rollout } => self.stage(task, release, &rollout),
            Request::Smoke { release } => self.smoke(task, release),
            Request::Migrate { release, part, rollout } => self.migrate(task, release, part, &rollout),
            Request::Activate { release: Some(release), generation, rollout, is_guarded } => {
                self.activate(task, release, generation, &rollout, is_guarded)
            }
            Request::Activate { release: None, generation, rollout, .. } => {
                self.deactivate(task, generation, &rollout)
            }
            Request::Confirm { release, generation, rollout } => {
                self.confirm(task, release, generation, &rollout)
            }
            Request::Prune { keep, rollout } => self.prune(task, &keep, &rollout),
            Request::GoBack { serial } => self.go_back(task, serial),
        };
        match done {
            Ok(next) => {
                task.phase += 1;
                next
            }
            Err(refusal) => Next::Ended(Err(refusal)),
        }
    }

    /// In which step a command of this kind fails when it does: an activation in the middle, with nothing running.
    fn fails_in_phase(&self, verb: Verb) -> u8 {
        match verb {
            Verb::Activate => 1 + 3 * u8::from(self.scenario.seed.is_multiple_of(2)),
            Verb::Migrate | Verb::Contract => 1 + u8::from(self.scenario.seed.is_multiple_of(2)),
            Verb::Stage => 1,
            _ => 0,
        }
    }
}
