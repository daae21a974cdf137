//! What can be wrong with a record log, said so that the reader knows what to do.

use std::path::{Path, PathBuf};

use greenlight_model::record::{IllegalRecord, RECORD_VERSION};

use crate::schema::SCHEMA_VERSION;

/// Why the record log could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Somebody else wrote first.
    #[error(
        "the record log has {found} records where {expected} were expected: somebody else wrote to it; look again and decide anew"
    )]
    Conflict {
        /// The last record that the writer knew.
        expected: u64,
        /// The last record that is there.
        found: u64,
    },
    /// A record cannot follow those before it. Nothing was written.
    #[error(transparent)]
    Illegal(#[from] IllegalRecord),
    /// More records at once than [`crate::APPEND_RECORDS_MAX`].
    #[error("{count} records at once are too many (at most {max})", max = crate::APPEND_RECORDS_MAX)]
    TooMany {
        /// How many there were.
        count: usize,
    },
    /// The file was written by a newer build.
    #[error(
        "record log {path}: its schema is version {found}, this greenlight knows up to {SCHEMA_VERSION}; use the newer greenlight that wrote it"
    )]
    NewerSchema {
        /// The log's file.
        path: PathBuf,
        /// Its version.
        found: i64,
    },
    /// A record was written in a newer form.
    #[error(
        "record log {path}: record {seq} is version {found}, this greenlight reads up to version {RECORD_VERSION}; use the newer greenlight that wrote it"
    )]
    RecordVersion {
        /// The log's file.
        path: PathBuf,
        /// The record's number.
        seq: u64,
        /// Its version.
        found: u32,
    },
    /// The file is an SQLite database of something else.
    #[error(
        "{path} is a database, but not a record log of greenlight; nothing was changed in it, name another file"
    )]
    NotALog {
        /// The file.
        path: PathBuf,
    },
    /// The file is damaged.
    #[error(
        "record log {path} is damaged: {why}; restore it from a backup, or move it away with its -wal and -shm files (hosts keep their own ledgers, but the history of rollouts begins anew then)"
    )]
    Damaged {
        /// The log's file.
        path: PathBuf,
        /// What SQLite found.
        why: String,
    },
    /// A record in the file cannot be understood.
    #[error("record log {path}: record {seq} cannot be read: {why}; restore the file from a backup")]
    Broken {
        /// The log's file.
        path: PathBuf,
        /// The record's number.
        seq: u64,
        /// What is wrong with it.
        why: String,
    },
    /// The file system cannot hold a log.
    #[error(
        "record log {path}: its file system does not allow SQLite's write-ahead log (it answered `{found}`); put the file on a local disk"
    )]
    NoWriteAheadLog {
        /// The log's file.
        path: PathBuf,
        /// The journal mode in force.
        found: String,
    },
    /// The file or its directory could not be made.
    #[error("record log {path} cannot be created: {source}")]
    Create {
        /// The log's file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A record could not be written as JSON.
    #[error("a record cannot be written as JSON")]
    Encode(#[source] serde_json::Error),
    /// SQLite refused.
    #[error("cannot {doing} record log {path}: {source}")]
    Sql {
        /// What was tried: "read", "write to".
        doing: &'static str,
        /// The log's file.
        path: PathBuf,
        /// Why.
        source: rusqlite::Error,
    },
}

/// Turns SQLite's errors into ours, for one file and one thing tried.
pub(crate) fn sql<'a>(
    path: &'a Path,
    doing: &'static str,
) -> impl Fn(rusqlite::Error) -> StoreError + Copy + use<'a> {
    move |source| match source.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => {
            StoreError::Damaged { path: path.to_owned(), why: source.to_string() }
        }
        _ => StoreError::Sql { doing, path: path.to_owned(), source },
    }
}
