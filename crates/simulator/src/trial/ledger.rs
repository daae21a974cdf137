//! A host's ledger: who may change the instance, which generation it has seen, and that power may go at any write.

use greenlight_model::action::Blame;
use greenlight_model::host::{Claim, Ledger, LedgerEntry, LedgerEvent};
use greenlight_model::id::{ContentHash, Generation, ReleaseId, RolloutId};

use super::agent::{Refusal, refuse};
use super::site::stamp;
use super::trial::Trial;

/// A claim that ends later than this was written before the clock was set back.
const CLAIM_MAX_MS: i64 = 600_000;

impl Trial<'_> {
    pub(super) fn check_claim(
        &self,
        host: usize,
        service: usize,
        rollout: &RolloutId,
    ) -> Result<(), Refusal> {
        let truth = &self.hosts[host].instances[service];
        if truth.is_damaged {
            return Err(refuse(Blame::Host, "the ledger is damaged"));
        }
        claim_of(&truth.ledger, rollout, self.host_ms(host))
    }

    /// Takes over a generation, or refuses it.
    pub(super) fn accept(
        &mut self,
        host: usize,
        service: usize,
        release: Option<ReleaseId>,
        generation: Generation,
        rollout: &RolloutId,
    ) -> Result<(), Refusal> {
        let content = content(release, rollout);
        let now = self.host_ms(host);
        self.update(host, service, |ledger| {
            claim_of(ledger, rollout, now)?;
            if generation < ledger.generation {
                return Err(refuse(Blame::Host, "the generation is stale"));
            }
            if generation == ledger.generation && ledger.content.is_some_and(|known| known != content) {
                return Err(refuse(Blame::Host, "the generation was used for something else"));
            }
            if ledger.guard.as_ref().is_some_and(|guard| guard.generation != generation) {
                ledger.guard = None;
            }
            ledger.generation = generation;
            ledger.content = Some(content);
            ledger.rollout = Some(rollout.clone());
            Ok(())
        })?;
        let truth = &mut self.hosts[host].instances[service];
        if truth.ledger.guard.is_none() {
            truth.guard_serial = None;
        }
        Ok(())
    }

    /// Reads, changes and writes a ledger. The host may lose power in between.
    pub(super) fn update(
        &mut self,
        host: usize,
        service: usize,
        change: impl FnOnce(&mut Ledger) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let is_full = self.is_disk_full(host);
        let truth = &mut self.hosts[host].instances[service];
        if truth.is_damaged {
            return Err(refuse(Blame::Host, "the ledger is damaged"));
        }
        if is_full {
            return Err(refuse(Blame::Host, "write the ledger: no space left on device"));
        }
        if let Some((lasts, keeps_new)) = self.hosts[host].crashes_at_write.take() {
            let truth = &mut self.hosts[host].instances[service];
            let before = truth.ledger.clone();
            let result = change(&mut truth.ledger);
            if !keeps_new || result.is_err() {
                truth.ledger = before;
            }
            self.count("crash in a ledger write");
            self.host_crashes(host, true, lasts);
            return Ok(());
        }
        let truth = &mut self.hosts[host].instances[service];
        change(&mut truth.ledger)?;
        let seen = truth.ledger.generation;
        if seen < truth.generation_seen {
            self.violation("generation", |trial| {
                format!("the generation of {} fell to {seen}", trial.place(host, service))
            });
        } else {
            truth.generation_seen = seen;
        }
        Ok(())
    }

    pub(super) fn note(
        &mut self,
        host: usize,
        service: usize,
        event: LedgerEvent,
        release: Option<ReleaseId>,
        generation: Generation,
    ) {
        // That it failed is said in the answer as well; a disk that is full has no room for it.
        let _ = self.note_or(host, service, event, release, generation);
    }

    pub(super) fn note_or(
        &mut self,
        host: usize,
        service: usize,
        event: LedgerEvent,
        release: Option<ReleaseId>,
        generation: Generation,
    ) -> Result<(), Refusal> {
        let now = self.host_ms(host);
        self.update(host, service, |ledger| {
            enter(ledger, now, event, release, generation);
            Ok(())
        })
    }

    pub(super) fn host_ms(&self, host: usize) -> i64 {
        i64::try_from(self.now).unwrap_or(i64::MAX).saturating_add(self.hosts[host].clock_ms)
    }
}

pub(super) fn is_current(claim: &Claim, now_ms: i64) -> bool {
    let left = claim.expires_at.as_millisecond().saturating_sub(stamp(0, now_ms).as_millisecond());
    left > 0 && left <= CLAIM_MAX_MS
}

pub(super) fn is_claim_current(claim: &Claim, now_ms: i64) -> bool {
    is_current(claim, now_ms)
}

fn claim_of(ledger: &Ledger, rollout: &RolloutId, now_ms: i64) -> Result<(), Refusal> {
    match &ledger.claim {
        // Also when its time is up: nobody else has taken it.
        Some(claim) if claim.rollout == *rollout => Ok(()),
        Some(claim) if is_current(claim, now_ms) => {
            Err(refuse(Blame::Host, "another rollout holds the claim"))
        }
        _ => Err(refuse(Blame::Passing, "the instance is not claimed: it must be claimed first")),
    }
}

fn content(release: Option<ReleaseId>, rollout: &RolloutId) -> ContentHash {
    let mut bytes = [0u8; 32];
    bytes[0] = release.map_or(0, |release| release.as_bytes()[0]);
    for (place, byte) in bytes[1..].iter_mut().zip(rollout.as_str().bytes()) {
        *place = byte;
    }
    ContentHash::from_bytes(bytes)
}

pub(super) fn enter(
    ledger: &mut Ledger,
    now_ms: i64,
    event: LedgerEvent,
    release: Option<ReleaseId>,
    generation: Generation,
) {
    let surplus = (ledger.history.len() + 1).saturating_sub(greenlight_model::host::LEDGER_HISTORY_MAX);
    ledger.history.drain(..surplus);
    let rollout = ledger.claim.as_ref().map(|claim| claim.rollout.clone());
    let (at, detail) = (stamp(0, now_ms), String::new());
    ledger.history.push(LedgerEntry { at, event, release, generation, rollout, detail });
}
