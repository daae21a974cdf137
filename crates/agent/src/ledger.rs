//! The ledger of one service on this host: who may change it, which generation it has seen, what it ran and runs.
//!
//! Guarantees: on disk it is always whole (write, fsync, rename, fsync of the directory); two agents never write it at once; a
//! damaged or newer one is an error, never silently begun anew. Not in here: what the generations stand for.

use std::time::{Duration, Instant};

use greenlight_model::Timestamp;
use greenlight_model::host::{
    Claim, ClaimRequest, Desired, LEDGER_HISTORY_MAX, LEDGER_VERSION, Ledger, LedgerEntry, LedgerEvent,
};
use greenlight_model::id::{ContentHash, Generation, ReleaseId, RolloutId};

use crate::failure::{OrHost as _, Outcome, host, passing};
use crate::files::{self, Lock};
use crate::layout::Layout;
use crate::poll;

/// A ledger with a full history has some tens of kilobytes.
const LEDGER_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Longest claim that is granted: a dead controller must not hold a host for longer. A claim that ends later than this from now was
/// written before the clock was set back, and counts as expired.
pub(crate) const CLAIM_MAX: Duration = Duration::from_secs(3600);
/// How long a change waits for another one of the same instance to end.
pub(crate) const CHANGE_WAIT: Duration = Duration::from_secs(10);
/// How often a change looks whether another one has ended.
const CHANGE_INTERVAL: Duration = Duration::from_millis(50);

/// Reads the ledger; an empty one when nothing was ever done here.
pub(crate) fn load(layout: &Layout) -> Outcome<Ledger> {
    let path = layout.ledger();
    let read = files::read_if_there(&path, LEDGER_BYTES_MAX)
        .or_host(|| format!("read the ledger {}", path.display()))?;
    match read {
        None => Ok(Ledger { version: LEDGER_VERSION, ..Ledger::default() }),
        Some(bytes) => parse(&bytes).map_err(|why| {
            host(format!(
                "the ledger {} {why}. Nothing was changed. Restore it from a backup, or, when you are sure of what runs on this \
                 host, move it away and deploy again",
                path.display()
            ))
        }),
    }
}

/// Reads a ledger from the bytes of its file.
///
/// # Errors
/// What is wrong with it, as the end of a sentence that begins with its name: "is damaged (…)".
pub fn parse(bytes: &[u8]) -> Result<Ledger, String> {
    #[derive(serde::Deserialize)]
    struct Version {
        version: u32,
    }
    let damaged = |error: serde_json::Error| format!("is damaged ({error})");
    // The version first: a newer form need not be readable as this one.
    let Version { version } = serde_json::from_slice(bytes).map_err(damaged)?;
    if version > LEDGER_VERSION {
        return Err(format!(
            "was written by a newer greenlight (version {version}; this one knows {LEDGER_VERSION})"
        ));
    }
    let ledger: Ledger = serde_json::from_slice(bytes).map_err(damaged)?;
    // An older form lacks only what is none or empty then.
    Ok(Ledger { version: LEDGER_VERSION, ..ledger })
}

/// Reads, changes and writes the ledger, alone. Nothing is written when `change` fails.
pub(crate) fn update<T>(layout: &Layout, change: impl FnOnce(&mut Ledger) -> Outcome<T>) -> Outcome<T> {
    create_state(layout)?;
    let path = layout.ledger_lock();
    let _lock = Lock::wait(&path).or_host(|| format!("lock {}", path.display()))?;
    let before = load(layout)?;
    let mut ledger = before.clone();
    let outcome = change(&mut ledger)?;
    if ledger != before {
        store(layout, &ledger)?;
    }
    Ok(outcome)
}

fn store(layout: &Layout, ledger: &Ledger) -> Outcome<()> {
    let path = layout.ledger();
    let bytes = serde_json::to_vec(ledger).or_host(|| "write the ledger as JSON".to_owned())?;
    files::write_atomically(&path, &bytes, 0o644, None)
        .or_host(|| format!("write the ledger {}", path.display()))
}

fn create_state(layout: &Layout) -> Outcome<()> {
    let state = layout.state();
    files::create_directory(&state, 0o755).or_host(|| format!("create {}", state.display()))
}

/// Held while an instance is being changed, so that two agents, or two requests, never do it at once.
#[derive(Debug)]
pub(crate) struct Change {
    _lock: Lock,
}

impl Change {
    /// Waits a moment for a change that is under way, and refuses when it goes on.
    pub(crate) fn begin(layout: &Layout, doing: &str) -> Outcome<Self> {
        Self::begin_within(layout, doing, CHANGE_WAIT)
    }

    /// The same without waiting: none when another change is under way.
    pub(crate) fn try_begin(layout: &Layout, doing: &str) -> Outcome<Option<Self>> {
        create_state(layout)?;
        let path = layout.change_lock();
        let taken = Lock::try_take(&path).or_host(|| format!("lock {}", path.display()))?;
        let Some(mut lock) = taken else { return Ok(None) };
        lock.describe(&format!("{doing} by agent process {}", std::process::id()))
            .or_host(|| format!("write {}", path.display()))?;
        Ok(Some(Self { _lock: lock }))
    }

    /// The same with another moment.
    pub(crate) fn begin_within(layout: &Layout, doing: &str, wait: Duration) -> Outcome<Self> {
        let taken = poll::until(CHANGE_INTERVAL, Instant::now() + wait, || Self::try_begin(layout, doing))?;
        let Some(change) = taken else {
            let path = layout.change_lock();
            let holder = files::read_if_there(&path, 4096)
                .or_host(|| format!("read {}", path.display()))?
                .unwrap_or_default();
            return Err(passing(format!(
                "another change of this instance is under way on the host: {}. Try again when it has ended",
                String::from_utf8_lossy(&holder)
            )));
        };
        Ok(change)
    }
}

/// Grants or renews a lease, or says who holds it.
pub(crate) fn grant(ledger: &mut Ledger, wish: &ClaimRequest, now: Timestamp) -> Outcome<Claim> {
    if let Some(claim) = &ledger.claim
        && claim.rollout != wish.rollout
        && is_current(claim, now)
    {
        return Err(host(format!(
            "the instance is claimed by {} for rollout {} ({}) until {}; it can be claimed when that rollout ends or lets the claim \
             expire",
            claim.holder, claim.rollout, claim.reason, claim.expires_at
        )));
    }
    let is_own = ledger.rollout.as_ref() == Some(&wish.rollout);
    if wish.generation < ledger.generation || wish.generation == ledger.generation && !is_own {
        return Err(host(format!(
            "the host has already seen generation {} (rollout {}), and this rollout would use {}: its view of the host is out of \
             date",
            ledger.generation,
            ledger.rollout.as_ref().map_or("unknown", RolloutId::as_str),
            wish.generation
        )));
    }
    let duration = jiff::SignedDuration::try_from(wish.duration.min(CLAIM_MAX))
        .or_host(|| "use the claim's duration".to_owned())?;
    let expires_at =
        now.checked_add(duration).or_host(|| "add the claim's duration to the host's clock".to_owned())?;
    let claim = Claim {
        rollout: wish.rollout.clone(),
        holder: wish.holder.clone(),
        reason: wish.reason.clone(),
        expires_at,
    };
    ledger.claim = Some(claim.clone());
    Ok(claim)
}

/// Gives a lease back; that it is not held is as good.
pub(crate) fn release(ledger: &mut Ledger, rollout: &RolloutId) {
    if ledger.claim.as_ref().is_some_and(|claim| claim.rollout == *rollout) {
        ledger.claim = None;
    }
}

/// Whether `rollout` may change the instance now.
pub(crate) fn check_claim(ledger: &Ledger, rollout: &RolloutId, now: Timestamp) -> Outcome<()> {
    match &ledger.claim {
        // Also when its time is up: it only means that another rollout may take it, and none has.
        Some(claim) if claim.rollout == *rollout => Ok(()),
        Some(claim) if is_current(claim, now) => Err(host(format!(
            "rollout {rollout} does not hold the claim: {} does, for rollout {} ({}) until {}",
            claim.holder, claim.rollout, claim.reason, claim.expires_at
        ))),
        _ => Err(passing(format!(
            "rollout {rollout} does not hold the claim of this instance: it must claim it first"
        ))),
    }
}

fn is_current(claim: &Claim, now: Timestamp) -> bool {
    let left = claim.expires_at.duration_since(now);
    left.is_positive() && left.unsigned_abs() <= CLAIM_MAX
}

/// What identifies the content of a desired state: the same generation must always have the same.
pub(crate) fn content_of(desired: &Desired) -> Outcome<ContentHash> {
    // Maps and sets of the model are ordered, so equal values have equal JSON.
    let json = serde_json::to_vec(desired).or_host(|| "write the desired state as JSON".to_owned())?;
    Ok(ContentHash::from_bytes(*blake3::hash(&json).as_bytes()))
}

/// Takes over a generation, or refuses an older one and the same one with other content. What an earlier one had armed is void.
pub(crate) fn accept(ledger: &mut Ledger, desired: &Desired, content: ContentHash) -> Outcome<()> {
    let (seen, wanted) = (ledger.generation, desired.generation);
    let seen_rollout = ledger.rollout.as_ref().map_or("unknown", RolloutId::as_str);
    if wanted < seen {
        return Err(host(format!(
            "generation {wanted} is stale: the host has already seen generation {seen} (rollout {seen_rollout})"
        )));
    }
    if wanted == seen && ledger.content.is_some_and(|known| known != content) {
        return Err(host(format!(
            "generation {wanted} was already used for something else on this host (rollout {seen_rollout}): two controllers are at \
             work, or the plan was changed without a new generation"
        )));
    }
    if ledger.guard.as_ref().is_some_and(|guard| guard.generation != wanted) {
        ledger.guard = None;
    }
    ledger.generation = wanted;
    ledger.content = Some(content);
    ledger.rollout = Some(desired.rollout.clone());
    Ok(())
}

/// Adds an entry to the history; the oldest go when it is full.
pub(crate) fn note(
    ledger: &mut Ledger,
    now: Timestamp,
    event: LedgerEvent,
    release: Option<ReleaseId>,
    generation: Generation,
    detail: impl Into<String>,
) {
    let surplus = (ledger.history.len() + 1).saturating_sub(LEDGER_HISTORY_MAX);
    ledger.history.drain(..surplus);
    let rollout = ledger.claim.as_ref().map(|claim| claim.rollout.clone());
    ledger.history.push(LedgerEntry { at: now, event, release, generation, rollout, detail: detail.into() });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;
    use std::fs;

    fn wish(rollout: &str, generation: u64) -> ClaimRequest {
        ClaimRequest {
            rollout: rollout.parse().unwrap(),
            holder: "ada@desk".to_owned(),
            reason: "deploy web v2".to_owned(),
            duration: Duration::from_secs(120),
            generation: Generation(generation),
        }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    #[test]
    fn a_claim_is_for_one_rollout_until_it_expires() {
        let mut ledger = Ledger::default();
        let claim = grant(&mut ledger, &wish("r1", 1), at(0)).unwrap();
        assert_eq!(claim.expires_at, at(120));
        let (r1, r2) = ("r1".parse().unwrap(), "r2".parse().unwrap());
        check_claim(&ledger, &r1, at(119)).unwrap();
        // A controller that comes back late goes on where nobody else has come first.
        check_claim(&ledger, &r1, at(120)).unwrap();
        let refused = grant(&mut ledger, &wish("r2", 1), at(60)).unwrap_err().message;
        for part in ["ada@desk", "r1", "deploy web v2", &at(120).to_string()] {
            assert!(refused.contains(part), "{refused} lacks {part}");
        }
        assert!(check_claim(&ledger, &r2, at(60)).unwrap_err().message.contains("ada@desk"));
        assert_eq!(
            grant(&mut ledger, &wish("r1", 1), at(60)).unwrap().expires_at,
            at(180),
            "its holder renews it"
        );
        grant(&mut ledger, &wish("r2", 1), at(180)).unwrap();
        assert!(check_claim(&ledger, &r1, at(181)).is_err(), "somebody else has come");
        release(&mut ledger, &r1);
        check_claim(&ledger, &r2, at(181)).unwrap();
        release(&mut ledger, &r2);
        assert_eq!(ledger.claim, None);
        assert!(check_claim(&ledger, &r2, at(181)).is_err());
    }

    #[test]
    fn a_claim_from_before_the_clock_was_set_back_does_not_lock_for_ever() {
        let mut ledger = Ledger::default();
        grant(&mut ledger, &ClaimRequest { duration: Duration::MAX, ..wish("r1", 1) }, at(0)).unwrap();
        assert_eq!(ledger.claim.as_ref().unwrap().expires_at, at(3600), "no longer than the maximum");
        grant(&mut ledger, &wish("r2", 1), at(-1)).unwrap();
    }

    #[test]
    fn generations_fence() {
        let mut ledger = Ledger::default();
        let first = fixture::desired(3, "r1");
        let content = content_of(&first).unwrap();
        accept(&mut ledger, &first, content).unwrap();
        accept(&mut ledger, &first, content).unwrap();
        let mut other = first.clone();
        other.spec.shared.push("data/".to_owned());
        let refused = accept(&mut ledger, &other, content_of(&other).unwrap()).unwrap_err();
        assert!(refused.message.contains("already used for something else"), "{refused}");
        let stale = fixture::desired(2, "r2");
        assert!(
            accept(&mut ledger, &stale, content_of(&stale).unwrap()).unwrap_err().message.contains("stale")
        );
        assert_eq!(
            (ledger.generation, ledger.content),
            (Generation(3), Some(content)),
            "a refusal changes nothing"
        );

        for (rollout, generation, granted) in
            [("r1", 3, true), ("r1", 2, false), ("r2", 3, false), ("r2", 4, true)]
        {
            let mut ledger = ledger.clone();
            assert_eq!(
                grant(&mut ledger, &wish(rollout, generation), at(0)).is_ok(),
                granted,
                "{rollout} {generation}"
            );
        }
    }

    #[test]
    fn the_file_is_kept_or_refused_never_begun_anew() {
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::new(directory.path());
        assert_eq!(load(&layout).unwrap().version, LEDGER_VERSION);
        update(&layout, |ledger| grant(ledger, &wish("r1", 1), at(0))).unwrap();
        let kept = load(&layout).unwrap();
        assert_eq!(kept.claim.as_ref().unwrap().holder, "ada@desk");
        update(&layout, |ledger| {
            ledger.claim = None;
            Err::<(), _>(host("no"))
        })
        .unwrap_err();
        assert_eq!(load(&layout).unwrap(), kept, "a change that fails writes nothing");

        for (content, why) in
            [("", "damaged"), ("{\"version\":1,", "damaged"), ("[]", "damaged"), ("{\"version\":3}", "newer")]
        {
            fs::write(layout.ledger(), content).unwrap();
            let error = update(&layout, |_| Ok(())).unwrap_err();
            assert!(error.message.contains(why), "{content}: {error}");
            assert_eq!(fs::read_to_string(layout.ledger()).unwrap(), content);
        }
    }

    #[test]
    fn the_history_is_bounded() {
        let mut ledger = Ledger::default();
        for number in 0..LEDGER_HISTORY_MAX + 5 {
            note(&mut ledger, at(0), LedgerEvent::Proven, None, Generation(number as u64), "");
        }
        assert_eq!(ledger.history.len(), LEDGER_HISTORY_MAX);
        assert_eq!(ledger.history[0].generation, Generation(5));
    }

    /// The bytes of version 1 as they were first released: they must stay readable.
    #[test]
    fn version_1_is_read() {
        let text = r#"{"version":1,"generation":7,"content":null,"rollout":"production-1","active":null,"previous":null,"last_good":null,
            "confirmed":6,"claim":{"rollout":"production-1","holder":"a@b","reason":"x","expires_at":"2026-11-21T01:00:00Z"},
            "history":[{"at":"2026-11-21T00:59:00Z","event":"turned_back","release":null,"generation":6,"detail":""}]}"#;
        let ledger = parse(text.as_bytes()).unwrap();
        assert_eq!((ledger.generation, ledger.confirmed), (Generation(7), Some(Generation(6))));
        assert_eq!(ledger.history[0].event, LedgerEvent::TurnedBack);
        assert_eq!((ledger.version, ledger.guard), (LEDGER_VERSION, None));
    }

    /// The same of version 2.
    #[test]
    fn version_2_is_read() {
        let text = r#"{"version":2,"generation":7,"content":null,"rollout":"production-1","active":null,"previous":null,"last_good":null,
            "confirmed":6,"claim":null,"guard":{"generation":7,"back_to":null,"limit":90000,"fires_at":"2026-11-21T01:00:00Z",
            "boot":"b","armed_at_ms":12},"history":[{"at":"2026-11-21T00:59:00Z","event":"migration_begun","release":null,
            "generation":6,"detail":""}]}"#;
        let ledger = parse(text.as_bytes()).unwrap();
        let guard = ledger.guard.unwrap();
        assert_eq!(
            (guard.generation, guard.limit, guard.lost),
            (Generation(7), Duration::from_secs(90), None)
        );
        assert_eq!(ledger.history[0].event, LedgerEvent::MigrationBegun);
    }

    #[test]
    fn another_generation_voids_a_guard_and_the_same_keeps_it() {
        let desired = fixture::desired(3, "r1");
        for (generation, is_kept) in [(3, true), (2, false)] {
            let guard = greenlight_model::host::Guard {
                generation: Generation(generation),
                back_to: None,
                limit: Duration::from_secs(90),
                fires_at: at(90),
                boot: "b".to_owned(),
                armed_at_ms: 12,
                rearmed: None,
                lost: None,
            };
            let mut ledger =
                Ledger { generation: Generation(generation), guard: Some(guard), ..Ledger::default() };
            accept(&mut ledger, &desired, content_of(&desired).unwrap()).unwrap();
            assert_eq!(ledger.guard.is_some(), is_kept, "{generation}");
        }
    }
}
