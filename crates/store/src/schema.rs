//! The log's file: how it is created, recognised and checked.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

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
    let doing = sql(path, "open");
    if !path.try_exists().map_err(|source| StoreError::Create { path: path.to_owned(), source })? {
        create(path)?;
    }
    let connection = connect(path)?;
    check_version(&connection, path)?;
    let mode: String = connection.query_row("PRAGMA journal_mode", [], |row| row.get(0)).map_err(doing)?;
    if mode != "wal" {
        return Err(StoreError::NoWriteAheadLog { path: path.to_owned(), found: mode });
    }
    let found: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(doing)?;
    if found != "ok" {
        return Err(StoreError::Damaged { path: path.to_owned(), why: found });
    }
    Ok(connection)
}

fn connect(path: &Path) -> Result<Connection, StoreError> {
    let doing = sql(path, "open");
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(doing)?;
    connection.busy_timeout(BUSY_TIMEOUT).map_err(doing)?;
    connection.pragma_update(None, "synchronous", "FULL").map_err(doing)?;
    Ok(connection)
}

/// Makes an empty log under another name and gives it its own only when it is whole. Nobody ever sees one that is being
/// made, and of several who make one at once the first stays: that is the one all of them open.
///
/// SQLite gives its `-wal` and `-shm` files the mode of the main file, which is 0600 from the start.
fn create(path: &Path) -> Result<(), StoreError> {
    let failed = |source| StoreError::Create { path: path.to_owned(), source };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(failed)?;
    let file =
        tempfile::Builder::new().prefix(".records-").tempfile_in(parent).map_err(failed)?.into_temp_path();
    let doing = sql(path, "create");
    let connection = connect(&file)?;
    let mode: String =
        connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).map_err(doing)?;
    if mode != "wal" {
        return Err(StoreError::NoWriteAheadLog { path: path.to_owned(), found: mode });
    }
    connection.execute_batch(TABLES).map_err(doing)?;
    connection.pragma_update(None, "application_id", APPLICATION_ID).map_err(doing)?;
    connection.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(doing)?;
    // Closing the only connection writes everything to the main file and removes the two beside it.
    connection.close().map_err(|(_, error)| doing(error))?;
    File::open(&file).and_then(|file| file.sync_all()).map_err(failed)?;
    match file.persist_noclobber(path) {
        Ok(()) => File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed),
        Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(failed(error.error)),
    }
}

/// Refuses what is not a log, or one of another version. Nothing is changed in it.
fn check_version(connection: &Connection, path: &Path) -> Result<(), StoreError> {
    let doing = sql(path, "open");
    let number = |pragma: &str| connection.query_row(pragma, [], |row| row.get::<_, i64>(0)).map_err(doing);
    match (number("PRAGMA application_id")?, number("PRAGMA user_version")?) {
        (APPLICATION_ID, SCHEMA_VERSION) => Ok(()),
        (APPLICATION_ID, found) if found > SCHEMA_VERSION => {
            Err(StoreError::NewerSchema { path: path.to_owned(), found })
        }
        _ => Err(StoreError::NotALog { path: path.to_owned() }),
    }
}
