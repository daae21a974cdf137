//! The log's file: how it is created, recognised and checked.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, TransactionBehavior};

use crate::error::{StoreError, sql};

/// The version of the tables, in SQLite's `user_version`.
pub(crate) const SCHEMA_VERSION: i64 = 1;
/// "GRNL" in SQLite's `application_id`: tells our files from other programs' databases.
const APPLICATION_ID: i64 = 0x4752_4E4C;
/// How long a writer waits for another: appends take milliseconds, so beyond this the other one hangs.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

const TABLES: &str = "
    CREATE TABLE record (
        seq        INTEGER PRIMARY KEY,
        version    INTEGER NOT NULL,
        written_at TEXT NOT NULL,
        written_by TEXT NOT NULL,
        body       TEXT NOT NULL
    ) STRICT;
    -- What is written stays as it was written, whoever opens the file.
    CREATE TRIGGER record_is_never_changed BEFORE UPDATE ON record BEGIN
        SELECT RAISE(ABORT, 'records are never changed');
    END;
    CREATE TRIGGER record_is_never_deleted BEFORE DELETE ON record BEGIN
        SELECT RAISE(ABORT, 'records are never deleted');
    END;
";

/// Opens the file, creates it when absent, and refuses what is not a sound log of a version that this build knows.
pub(crate) fn open(path: &Path) -> Result<Connection, StoreError> {
    create_file(path).map_err(|source| StoreError::Create { path: path.to_owned(), source })?;
    let doing = sql(path, "open");
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(path, flags).map_err(doing)?;
    connection.busy_timeout(BUSY_TIMEOUT).map_err(doing)?;
    connection.pragma_update(None, "synchronous", "FULL").map_err(doing)?;
    create_tables(&mut connection, path)?;
    // Only now, when the file is known to be ours: this changes it.
    let mode: String =
        connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).map_err(doing)?;
    if mode != "wal" {
        return Err(StoreError::NoWriteAheadLog { path: path.to_owned(), found: mode });
    }
    let found: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(doing)?;
    if found != "ok" {
        return Err(StoreError::Damaged { path: path.to_owned(), why: found });
    }
    Ok(connection)
}

/// SQLite gives its `-wal` and `-shm` files the mode of the main file, so that one is made first, readable by its owner
/// alone.
fn create_file(path: &Path) -> std::io::Result<()> {
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    }
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(file) => {
            file.sync_all()?;
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

fn create_tables(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let doing = sql(path, "open");
    if is_ours(connection, path)? {
        return Ok(());
    }
    // Somebody else may create the tables at the same moment; under the write lock only one of us finds none.
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(doing)?;
    if is_ours(&transaction, path)? {
        return Ok(());
    }
    transaction.execute_batch(TABLES).map_err(doing)?;
    transaction.pragma_update(None, "application_id", APPLICATION_ID).map_err(doing)?;
    transaction.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(doing)?;
    transaction.commit().map_err(doing)
}

/// Whether the file is a log of this version (yes) or empty (no).
fn is_ours(connection: &Connection, path: &Path) -> Result<bool, StoreError> {
    let doing = sql(path, "open");
    let number = |pragma: &str| connection.query_row(pragma, [], |row| row.get::<_, i64>(0)).map_err(doing);
    let tables = number("SELECT count(*) FROM sqlite_schema")?;
    let (application, version) = (number("PRAGMA application_id")?, number("PRAGMA user_version")?);
    match (application, version) {
        (0, 0) if tables == 0 => Ok(false),
        (APPLICATION_ID, SCHEMA_VERSION) => Ok(true),
        (APPLICATION_ID, found) if found > SCHEMA_VERSION => {
            Err(StoreError::NewerSchema { path: path.to_owned(), found })
        }
        _ => Err(StoreError::NotALog { path: path.to_owned() }),
    }
}
