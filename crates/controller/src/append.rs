//! Writing one record, with a step boundary on either side.

use greenlight_model::record::RecordBody;
use greenlight_store::{Log, StoreError};

use crate::{boundary, clock};

/// How often a record is offered again when somebody else was faster with theirs.
const APPEND_ATTEMPTS_MAX: usize = 20;

/// Writes one record that stands on its own: what happened, or what somebody asked for. When somebody else wrote first, what
/// they wrote is taken in and the record is offered again.
///
/// # Errors
/// When the log refuses the record or cannot be written.
pub fn append(log: &mut Log, by: &str, body: &RecordBody) -> Result<(), StoreError> {
    boundary::pass(Boundary("before", body));
    let mut attempts = 0;
    loop {
        let expected = log.history().last_seq;
        match log.append(expected, &[(clock::now(), by.to_owned(), body.clone())]) {
            Ok(_) => break,
            Err(StoreError::Conflict { .. }) if attempts < APPEND_ATTEMPTS_MAX => {
                attempts += 1;
                log.refresh()?;
            }
            Err(error) => return Err(error),
        }
    }
    boundary::pass(Boundary("after", body));
    Ok(())
}

/// Writes one record that was decided upon what the log said: a step begun, a turn, an end. False, with nothing written, when
/// somebody else wrote first: what they wrote (a hold, an abort, another controller's step) is taken in, and it is to be
/// decided anew.
///
/// # Errors
/// When the log refuses the record or cannot be written.
pub(crate) fn append_decision(log: &mut Log, by: &str, body: &RecordBody) -> Result<bool, StoreError> {
    boundary::pass(Boundary("before", body));
    let expected = log.history().last_seq;
    match log.append(expected, &[(clock::now(), by.to_owned(), body.clone())]) {
        Ok(_) => {}
        Err(StoreError::Conflict { .. }) => {
            log.refresh()?;
            return Ok(false);
        }
        Err(error) => return Err(error),
    }
    boundary::pass(Boundary("after", body));
    Ok(true)
}

/// The name of the boundary beside a record.
struct Boundary<'a>(&'static str, &'a RecordBody);

impl std::fmt::Display for Boundary<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self(side, body) = self;
        match body {
            RecordBody::ActionStarted { action, .. } => {
                write!(f, "{side} the record that {} of {} began", action.verb(), action.instance())
            }
            RecordBody::ActionFinished { action, .. } => {
                write!(f, "{side} the record that {} of {} ended", action.verb(), action.instance())
            }
            RecordBody::RolloutStarted { .. } => write!(f, "{side} the record that the rollout began"),
            RecordBody::DatabaseRestored { .. } => write!(f, "{side} the record of a database put back"),
            RecordBody::MigrationDone { .. } => write!(f, "{side} the record of a migration's end"),
            RecordBody::RolloutAdopted { .. } => write!(f, "{side} the record that the rollout was adopted"),
            RecordBody::RolloutEnded { .. } => write!(f, "{side} the record that the rollout ended"),
            RecordBody::Noted { .. } => write!(f, "{side} the record of a turn"),
            RecordBody::OperatorAsked { .. } => write!(f, "{side} the record of what an operator asked"),
            RecordBody::Journal { .. } => write!(f, "{side} the record of the journal"),
            RecordBody::EvidenceAdded { evidence } => {
                write!(f, "{side} the record of evidence: {}", evidence.fact.kind())
            }
            RecordBody::ReleaseMarked { .. } => write!(f, "{side} the record of a release's mark"),
        }
    }
}
