//! The log against real files, with other connections at work on them.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use greenlight_model::id::ReleaseId;
use greenlight_model::record::IllegalRecord;
use greenlight_model::rollout::OperatorRequest;

use super::*;

struct Directory(tempfile::TempDir);

impl Directory {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn log(&self) -> PathBuf {
        self.0.path().join(".greenlight/records.sqlite")
    }
}

fn marked(n: u8, by: &str) -> (Timestamp, String, RecordBody) {
    let release = ReleaseId::from_bytes([n; 32]);
    let at = Timestamp::new(1_700_000_000 + i64::from(n), 123_456_789).unwrap();
    (at, by.to_owned(), RecordBody::ReleaseMarked { release, bad: Some(format!("leaks \"ü\" {n}\n")) })
}

fn held(rollout: &str) -> (Timestamp, String, RecordBody) {
    let body = RecordBody::OperatorAsked {
        rollout: rollout.parse().unwrap(),
        request: OperatorRequest::Hold,
        why: String::new(),
    };
    (Timestamp::UNIX_EPOCH, "op@desk".to_owned(), body)
}

#[test]
fn what_is_written_is_read_back_the_same() {
    let directory = Directory::new();
    let mut log = Log::open(&directory.log()).unwrap();
    let written = log.append(0, &[marked(1, "op@desk"), marked(2, "ö@desk")]).unwrap();
    let more = log.append(2, &[marked(3, "op@desk")]).unwrap();
    let all: Vec<Record> = written.into_iter().chain(more).collect();
    assert_eq!(log.read_from(1).unwrap(), all);
    assert_eq!(log.read_from(3).unwrap(), all[2..]);
    assert_eq!(log.read_from(4).unwrap(), []);

    let again = Log::open(&directory.log()).unwrap();
    assert_eq!(again.read_from(1).unwrap(), all);
    assert_eq!(again.history(), log.history());
    assert_eq!(again.history().bad.len(), 3);
    let bytes = |records: &[Record]| serde_json::to_vec(records).unwrap();
    assert_eq!(bytes(&again.read_from(1).unwrap()), bytes(&all));
}

#[test]
fn only_the_owner_can_read_it() {
    let directory = Directory::new();
    let mut log = Log::open(&directory.log()).unwrap();
    log.append(0, &[marked(1, "op@desk")]).unwrap();
    for entry in fs::read_dir(directory.log().parent().unwrap()).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{:?}", entry.path());
    }
}

#[test]
fn a_writer_who_did_not_see_the_last_record_is_refused() {
    let directory = Directory::new();
    let mut first = Log::open(&directory.log()).unwrap();
    let mut second = Log::open(&directory.log()).unwrap();
    first.append(0, &[marked(1, "first")]).unwrap();
    let refused = second.append(0, &[marked(2, "second")]);
    assert!(matches!(refused, Err(StoreError::Conflict { expected: 0, found: 1 })), "{refused:?}");
    assert_eq!(second.history(), first.history(), "a conflict leaves the loser up to date");
    second.append(1, &[marked(2, "second")]).unwrap();
    let ahead = first.append(7, &[marked(3, "first")]);
    assert!(matches!(ahead, Err(StoreError::Conflict { expected: 7, found: 2 })), "{ahead:?}");
    first.append(2, &[marked(3, "first")]).unwrap();
    let news: Vec<u64> = second.refresh().unwrap().iter().map(|record| record.seq).collect();
    assert_eq!(news, [3]);
    assert_eq!(second.refresh().unwrap(), []);
}

#[test]
fn an_illegal_record_takes_the_whole_append_with_it() {
    let directory = Directory::new();
    let mut log = Log::open(&directory.log()).unwrap();
    log.append(0, &[marked(1, "op@desk")]).unwrap();
    let before = log.history().clone();
    let refused = log.append(1, &[marked(2, "op@desk"), held("none")]);
    assert!(matches!(refused, Err(StoreError::Illegal(IllegalRecord::Unknown(_)))), "{refused:?}");
    assert_eq!(log.history(), &before);
    assert_eq!(log.read_from(1).unwrap().len(), 1);
    log.append(1, &[marked(2, "op@desk")]).unwrap();
}

/// Connections of one process exclude each other exactly as those of two processes do: SQLite locks per connection.
#[test]
fn racing_writers_lose_nothing_and_leave_no_gap() {
    const WRITERS: u8 = 4;
    const EACH: u8 = 15;
    let directory = Directory::new();
    let path = directory.log();
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let path = &path;
            scope.spawn(move || {
                // Opening races as well: one of them creates the file.
                let mut log = Log::open(path).unwrap();
                for n in 0..EACH {
                    loop {
                        let last = log.history().last_seq;
                        match log.append(last, &[marked(n, &format!("writer {writer}"))]) {
                            Ok(_) => break,
                            Err(StoreError::Conflict { found, .. }) => assert_ne!(found, last),
                            Err(error) => panic!("{error}"),
                        }
                    }
                }
            });
        }
    });
    let records = Log::open(&path).unwrap().read_from(1).unwrap();
    let seqs: Vec<u64> = records.iter().map(|record| record.seq).collect();
    assert_eq!(seqs, (1..=u64::from(WRITERS) * u64::from(EACH)).collect::<Vec<_>>());
    for writer in 0..WRITERS {
        let own = records.iter().filter(|record| record.by == format!("writer {writer}"));
        let bodies: Vec<RecordBody> = own.map(|record| record.body.clone()).collect();
        assert_eq!(bodies, (0..EACH).map(|n| marked(n, "").2).collect::<Vec<_>>());
    }
}

/// Some find no file, some find one that another is about to make; nobody sees one that is half made.
#[test]
fn racing_openers_all_open_one_whole_log() {
    const ROUNDS: usize = 50;
    const OPENERS: usize = 8;
    for _ in 0..ROUNDS {
        let directory = Directory::new();
        let path = directory.log();
        let start = std::sync::Barrier::new(OPENERS);
        std::thread::scope(|scope| {
            for _ in 0..OPENERS {
                scope.spawn(|| {
                    start.wait();
                    Log::open(&path).unwrap();
                });
            }
        });
        let names = fs::read_dir(path.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name());
        let left: Vec<_> = names.filter(|name| name.to_string_lossy().starts_with(".records-")).collect();
        assert_eq!(left, [""; 0], "nothing is left of those that came too late");
    }
}

/// The bytes that a build wrote whose records were version 1: a whole rollout, and a mark. They stay readable, and what is
/// written after them can stand beside them.
#[test]
fn a_log_of_version_1_is_read_and_gone_on_with() {
    let directory = Directory::new();
    fs::create_dir(directory.log().parent().unwrap()).unwrap();
    fs::write(directory.log(), include_bytes!("version-1.sqlite")).unwrap();
    let mut log = Log::open(&directory.log()).unwrap();
    let history = log.history();
    let rollout = &history.rollouts[&history.order[0]];
    assert!(rollout.is_whole() && rollout.touched.len() == 1 && rollout.under_way.is_empty());
    assert_eq!(rollout.plan.started_by, "operator@vm");
    assert_eq!(history.bad.values().collect::<Vec<_>>(), ["leaks"]);
    let last = history.last_seq;
    log.append(last, &[marked(1, "op@desk")]).unwrap();
    assert_eq!(Log::open(&directory.log()).unwrap().history(), log.history());
}

/// A log with some hundred records and nothing left in its write-ahead log.
fn filled(directory: &Directory) -> PathBuf {
    let path = directory.log();
    let mut log = Log::open(&path).unwrap();
    for last in 0..20 {
        let records: Vec<_> = (0..10).map(|n| marked(n, "op@desk")).collect();
        log.append(last * 10, &records).unwrap();
    }
    log.connection.pragma_update(None, "wal_checkpoint", "TRUNCATE").unwrap();
    path
}

#[test]
fn what_is_no_sound_log_is_refused_with_the_way_out() {
    type Harm = fn(&Path);
    fn run(path: &Path, statement: &str) {
        Connection::open(path).unwrap().execute_batch(statement).unwrap();
    }
    let cases: &[(&str, Harm, &str)] = &[
        ("garbage", |path| fs::write(path, "x".repeat(9_000)).unwrap(), "restore it from a backup"),
        (
            "truncated",
            |path| {
                let bytes = fs::read(path).unwrap();
                fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
            },
            "restore it from a backup",
        ),
        ("newer", |path| run(path, "PRAGMA user_version = 2"), "use the newer greenlight"),
        ("foreign", |path| run(path, "PRAGMA application_id = 7"), "not a record log"),
        (
            "record of a version to come",
            |path| run(path, "INSERT INTO record VALUES (201, 9999, '2026-01-01T00:00:00Z', 'op', '{}')"),
            "record 201 is version 9999",
        ),
        (
            "record that says nothing",
            |path| run(path, "INSERT INTO record VALUES (201, 1, '2026-01-01T00:00:00Z', 'op', '{}')"),
            "record 201 cannot be read",
        ),
        (
            "gap",
            |path| {
                run(
                    path,
                    "INSERT INTO record SELECT 300, version, written_at, written_by, body FROM record WHERE seq = 1",
                );
            },
            "record 300 cannot follow record 200",
        ),
    ];
    for (what, harm, says) in cases {
        let directory = Directory::new();
        let path = filled(&directory);
        harm(&path);
        let error = Log::open(&path).expect_err(what).to_string();
        assert!(error.contains(says), "{what}: {error}");
        assert!(error.contains(&*path.to_string_lossy()), "{what}: {error}");
    }
}

#[test]
fn a_database_of_something_else_is_not_touched() {
    let directory = Directory::new();
    fs::create_dir(directory.log().parent().unwrap()).unwrap();
    Connection::open(directory.log()).unwrap().execute_batch("CREATE TABLE guest (name TEXT)").unwrap();
    let before = fs::read(directory.log()).unwrap();
    assert!(matches!(Log::open(&directory.log()), Err(StoreError::NotALog { .. })));
    assert_eq!(fs::read(directory.log()).unwrap(), before);
}

#[test]
fn records_cannot_be_changed_or_deleted() {
    let directory = Directory::new();
    let path = filled(&directory);
    for statement in ["DELETE FROM record", "UPDATE record SET written_by = 'nobody'"] {
        let error = Connection::open(&path).unwrap().execute_batch(statement).unwrap_err();
        assert!(error.to_string().contains("records are never"), "{error}");
    }
    assert_eq!(Log::open(&path).unwrap().history().last_seq, 200);
}
