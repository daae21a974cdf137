//! What is promised of a transfer, beside the others in the same run.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Row;
use super::contender::{GREENLIGHT, RSYNC, SSH, SYSTEMD, TAR};
use super::meter::Cost;

/// The median costs, by row and contender.
pub(crate) type Medians = BTreeMap<(Row, &'static str), Cost>;

/// What the controller may hold at a time, whatever the tree and however many hosts.
const MEMORY_BYTES: f64 = 1e8;

/// One promise, and what was seen.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Limit {
    /// What is compared.
    pub(crate) what: String,
    /// The most that it may be.
    pub(crate) most: f64,
    /// What it is.
    pub(crate) is: f64,
}

impl Limit {
    pub(crate) fn is_kept(&self) -> bool {
        self.is <= self.most
    }
}

/// Every promise whose two sides were measured.
pub(crate) fn judge(medians: &Medians) -> Vec<Limit> {
    let cost = |row, name| medians.get(&(row, name)).copied();
    let wall = |row, name| cost(row, name).map(|cost: Cost| cost.wall_s);
    let controller = |row, name| cost(row, name).map(|cost: Cost| cost.controller_s);
    #[expect(clippy::cast_precision_loss, reason = "a ratio of fewer than 2^53 bytes")]
    let bytes = |row, name| cost(row, name).map(|cost: Cost| cost.wire_bytes as f64);
    #[expect(clippy::cast_precision_loss, reason = "a ratio of fewer than 2^53 bytes")]
    let memory = |row, name| cost(row, name).map(|cost: Cost| cost.memory_bytes as f64);
    // What the ssh processes need is theirs: greenlight has as many as the bare connections had.
    let own_memory = memory(Row::Cold, GREENLIGHT).zip(memory(Row::Bare, SSH)).map(|(all, ssh)| all - ssh);
    let bare = wall(Row::Bare, SSH);
    let rollback = bare.zip(wall(Row::Restart, SYSTEMD)).map(|(bare, restart)| 1.5 * bare + restart);
    [
        ("cold: wall against tar + zstd", 1.1, wall(Row::Cold, GREENLIGHT), wall(Row::Cold, TAR)),
        (
            "cold: controller CPU against rsync",
            0.15,
            controller(Row::Cold, GREENLIGHT),
            controller(Row::Cold, RSYNC),
        ),
        ("cold: memory of the controller against 100 MB", 1.0, own_memory, Some(MEMORY_BYTES)),
        ("warm: wall against rsync", 0.5, wall(Row::Warm, GREENLIGHT), wall(Row::Warm, RSYNC)),
        ("warm: bytes against rsync", 1.0, bytes(Row::Warm, GREENLIGHT), bytes(Row::Warm, RSYNC)),
        ("nothing changed: wall against bare ssh", 1.3, wall(Row::Unchanged, GREENLIGHT), bare),
        ("rollback: wall against 1.5 bare ssh and a restart", 1.0, wall(Row::Rollback, GREENLIGHT), rollback),
    ]
    .into_iter()
    .filter_map(|(what, most, ours, theirs)| {
        let (ours, theirs) = ours.zip(theirs)?;
        Some(Limit { what: what.to_owned(), most, is: ours / theirs })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_is_judged_when_both_sides_were_measured() {
        let wall = |wall_s| Cost { wall_s, ..Cost::default() };
        let mut medians =
            Medians::from([((Row::Cold, GREENLIGHT), wall(11.0)), ((Row::Cold, TAR), wall(10.0))]);
        let [limit] = &judge(&medians)[..] else { panic!("{:?}", judge(&medians)) };
        assert!(limit.is_kept() && (limit.is - 1.1).abs() < 1e-9, "{limit:?}");
        medians.insert((Row::Cold, GREENLIGHT), wall(11.2));
        assert!(!judge(&medians)[0].is_kept());
        medians.extend([
            ((Row::Bare, SSH), wall(1.0)),
            ((Row::Restart, SYSTEMD), wall(0.5)),
            ((Row::Rollback, GREENLIGHT), wall(3.0)),
        ]);
        medians.get_mut(&(Row::Bare, SSH)).unwrap().memory_bytes = 80_000_000;
        medians.get_mut(&(Row::Cold, GREENLIGHT)).unwrap().memory_bytes = 130_000_000;
        let memory = judge(&medians).into_iter().find(|limit| limit.what.contains("memory")).unwrap();
        assert!((memory.is - 0.5).abs() < 1e-9, "{memory:?}");
        let back = judge(&medians).into_iter().find(|limit| limit.what.starts_with("rollback")).unwrap();
        assert!((back.is - 1.5).abs() < 1e-9, "{back:?}");
    }
}
