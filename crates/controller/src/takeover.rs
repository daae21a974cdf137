//! One controller at a time drives a rollout, also when two machines share the record log and no lease.
//!
//! Whoever resumes or aborts on a machine without a controller becomes one. That request is a record, so the controller
//! that drove until then reads it before it writes anything more, and lets go. What it had begun ends by itself; the new
//! one waits a moment for that and looks at everything before it decides.

use greenlight_model::id::RolloutId;
use greenlight_model::record::{Record, RecordBody};
use greenlight_model::rollout::OperatorRequest;

/// Who has taken the rollout over on another machine than that of `own`, by records that came in.
pub(crate) fn taker<'r>(records: &'r [Record], rollout: &RolloutId, own: &str) -> Option<&'r str> {
    let takes_over = |record: &&Record| match &record.body {
        RecordBody::OperatorAsked { rollout: asked, request, .. } => {
            asked == rollout && *request != OperatorRequest::Hold && machine(&record.by) != machine(own)
        }
        _ => false,
    };
    records.iter().rev().find(takes_over).map(|record| record.by.as_str())
}

/// Whether the last step was begun on another machine than that of `own`, so that a controller may be alive there.
pub(crate) fn was_driven_elsewhere(records: &[Record], rollout: &RolloutId, own: &str) -> bool {
    let of_rollout = |record: &&Record| matches!(&record.body, RecordBody::ActionStarted { rollout: begun, .. } if begun == rollout);
    records.iter().rev().find(of_rollout).is_some_and(|record| machine(&record.by) != machine(own))
}

/// The machine in `user@machine`.
fn machine(by: &str) -> &str {
    by.rsplit_once('@').map_or(by, |(_, machine)| machine)
}

#[cfg(test)]
mod tests {
    use super::*;
    use greenlight_model::Timestamp;
    use greenlight_model::action::Action;

    fn record(by: &str, body: RecordBody) -> Record {
        Record { seq: 1, at: Timestamp::UNIX_EPOCH, by: by.to_owned(), body }
    }

    fn asked(by: &str, rollout: &str, request: OperatorRequest) -> Record {
        let rollout = rollout.parse().unwrap();
        record(by, RecordBody::OperatorAsked { rollout, request, why: String::new() })
    }

    #[test]
    fn who_goes_on_elsewhere_has_taken_over() {
        use OperatorRequest::{Abort, Hold, Resume};
        let rollout = "r1".parse().unwrap();
        for (by, of, request, taken) in [
            ("ada@desk", "r1", Resume, false),
            ("bob@desk", "r1", Abort, false),
            ("ada@laptop", "r1", Resume, true),
            ("ada@laptop", "r1", Abort, true),
            ("ada@laptop", "r1", Hold, false),
            ("ada@laptop", "r2", Resume, false),
        ] {
            let records = [asked(by, of, request), asked("ada@desk", "r1", Hold)];
            assert_eq!(taker(&records, &rollout, "ada@desk"), taken.then_some(by), "{by} {request:?} {of}");
        }
    }

    #[test]
    fn where_the_last_step_was_begun_tells_who_drove() {
        let rollout: RolloutId = "r1".parse().unwrap();
        let begun = |by: &str| {
            let instance = "a/web".to_owned().try_into().unwrap();
            let (rollout, action) = (rollout.clone(), Action::Claim { instance });
            record(by, RecordBody::ActionStarted { rollout, action, why: String::new() })
        };
        assert!(!was_driven_elsewhere(&[], &rollout, "ada@desk"));
        assert!(!was_driven_elsewhere(&[begun("eve@laptop"), begun("bob@desk")], &rollout, "ada@desk"));
        assert!(was_driven_elsewhere(&[begun("bob@desk"), begun("ada@laptop")], &rollout, "ada@desk"));
    }
}
