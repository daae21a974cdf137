//! The record log that the controllers share: taking in what others wrote, and writing.

use greenlight_model::action::ActionResult;
use greenlight_model::record::{Record, RecordBody};
use greenlight_model::rollout::OperatorRequest;

use super::controller::{Controller, Stopped};
use super::trial::Trial;

impl Trial<'_> {
    /// Takes in what others wrote.
    pub(super) fn refresh(&mut self, index: usize) {
        let controller = &mut self.controllers[index];
        let known = usize::try_from(controller.history.last_seq).unwrap_or(usize::MAX);
        if known >= self.log.len() {
            return;
        }
        let own = controller.machine;
        let mut taker = None;
        for record in &self.log[known..] {
            if let RecordBody::OperatorAsked { rollout, request, .. } = &record.body
                && *rollout == controller.rollout
                && *request != OperatorRequest::Hold
                && record.by != format!("operator@m{own}")
            {
                taker = Some(record.by.clone());
            }
            if let Err(illegal) = controller.history.apply(record) {
                let why = illegal.to_string();
                self.violation("records", |_| format!("a record of the log is illegal: {why}"));
                return;
            }
        }
        self.learn_marks(index);
        if let Some(by) = taker {
            self.leaves(index, &format!("{by} has taken over"));
        }
    }

    /// Which releases are bad by now.
    pub(super) fn learn_marks(&mut self, index: usize) {
        let Controller { history, world, .. } = &mut self.controllers[index];
        for (release, facts) in &mut world.releases {
            let bad = history.bad.get(release);
            if facts.bad.as_ref() != bad {
                facts.bad = bad.cloned();
            }
        }
    }

    /// Writes a record that stands on its own; what others wrote first is taken in.
    pub(super) fn append(&mut self, index: usize, body: RecordBody) -> Result<(), Stopped> {
        self.boundary(index)?;
        self.refresh(index);
        if !self.controllers[index].is_alive {
            return Err(Stopped);
        }
        self.offer(index, body)
    }

    /// Writes a record that was decided upon what the log said. False, with nothing written, when somebody else wrote first.
    pub(super) fn append_decision(&mut self, index: usize, body: RecordBody) -> Result<bool, Stopped> {
        self.boundary(index)?;
        if self.controllers[index].history.last_seq < self.history.last_seq {
            self.refresh(index);
            return Ok(false);
        }
        self.offer(index, body).map(|()| true)
    }

    fn offer(&mut self, index: usize, body: RecordBody) -> Result<(), Stopped> {
        let by = format!("controller@m{}", self.controllers[index].machine);
        let record = Record { seq: self.history.last_seq + 1, at: self.controller_time(), by, body };
        if let Err(illegal) = self.controllers[index].history.apply(&record) {
            // Somebody else has ended the rollout.
            self.leaves(index, &illegal.to_string());
            return Err(Stopped);
        }
        self.write(record);
        self.learn_marks(index);
        self.boundary(index)
    }

    /// Puts a record into the log.
    pub(super) fn write(&mut self, record: Record) {
        if let Err(illegal) = self.history.apply(&record) {
            let why = illegal.to_string();
            self.violation("records", |_| format!("an illegal record was written: {why}"));
            return;
        }
        self.say(|_| format!("record {}: {}", record.seq, show(&record.body)));
        self.recorded(&record.body);
        self.log.push(record);
    }
}

pub(super) fn show(body: &RecordBody) -> String {
    match body {
        RecordBody::RolloutStarted { plan, .. } => {
            format!("{} starts, generation {}", plan.id, plan.generation)
        }
        RecordBody::MigrationDone { service, .. } => {
            format!("the migration of {service} is done, somebody says")
        }
        RecordBody::DatabaseRestored { .. } => "the database is as it was, somebody says".to_owned(),
        RecordBody::RolloutAdopted { charter, .. } => format!("{} is adopted", charter.plan.id),
        RecordBody::ActionStarted { action, .. } => match action.release() {
            Some(release) => {
                let number = super::site::of_release(release).1;
                format!("begin to {} {} (v{number})", action.verb(), action.instance())
            }
            None => format!("begin to {} {}", action.verb(), action.instance()),
        },
        RecordBody::ActionFinished { action, result, .. } => {
            let how = match result {
                ActionResult::Succeeded => "done".to_owned(),
                ActionResult::Failed { why, blame } => format!("failed ({blame:?}): {why}"),
            };
            format!("{} {}: {how}", action.verb(), action.instance())
        }
        RecordBody::Noted { note, .. } => format!("{note:?}"),
        RecordBody::OperatorAsked { request, .. } => format!("the operator asks: {request:?}"),
        RecordBody::RolloutEnded { outcome, .. } => format!("ended: {outcome:?}"),
        RecordBody::Journal { entry } => format!("journal: {entry:?}"),
        RecordBody::EvidenceAdded { evidence } => format!("evidence: {}", evidence.fact.summary()),
        RecordBody::ReleaseMarked { bad, .. } => format!("marked: {bad:?}"),
    }
}
