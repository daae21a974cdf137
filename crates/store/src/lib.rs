//! The record log: append-only, numbered, compare-and-swap.
//!
//! One SQLite file, by default beside the fleet file; several processes may have it open at once.
//!
//! Guarantees: a record is on disk before [`Log::append`] returns; every record was judged by
//! [`History::apply`] before it was written, and is judged again when it is read; numbers have no gaps; of two writers
//! who saw the same last record, one is told of the conflict and nothing of its own is written. Records of another
//! version, and files that are damaged or newer than this build, are refused and never changed.
//!
//! Not in here: which records to write (`controller`), and what follows from them (`planner`).

mod error;
mod schema;

use std::path::{Path, PathBuf};

use greenlight_model::Timestamp;
use greenlight_model::history::History;
use greenlight_model::record::{RECORD_VERSION, Record, RecordBody};
use rusqlite::{Connection, Transaction, TransactionBehavior, params};

pub use error::StoreError;
use error::sql;

/// Most records in one append: a turn of the controller writes a handful, so more is a loop gone wrong.
pub const APPEND_RECORDS_MAX: usize = 10_000;

/// The record log, open, with the history that its records fold to.
#[derive(Debug)]
pub struct Log {
    connection: Connection,
    path: PathBuf,
    history: History,
}

impl Log {
    /// Opens the log, and creates it (mode 0600) when there is none.
    ///
    /// # Errors
    /// When the file cannot be opened, is not a record log, is damaged, was written by a newer build, or holds records
    /// that cannot follow each other.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let connection = schema::open(path)?;
        let mut log = Self { connection, path: path.to_owned(), history: History::default() };
        log.refresh()?;
        Ok(log)
    }

    /// The history as of the last [`Log::open`], [`Log::refresh`] or [`Log::append`].
    #[must_use]
    pub fn history(&self) -> &History {
        &self.history
    }

    /// Writes records after record number `expected_seq`, all or none, and returns them with their numbers.
    ///
    /// The history is up to date afterwards, with what others wrote before as well.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when somebody else wrote since `expected_seq`, [`StoreError::Illegal`] when a record
    /// cannot follow, and whatever keeps the file from being written. Nothing is written then.
    pub fn append(
        &mut self,
        expected_seq: u64,
        records: &[(Timestamp, String, RecordBody)],
    ) -> Result<Vec<Record>, StoreError> {
        if records.len() > APPEND_RECORDS_MAX {
            return Err(StoreError::TooMany { count: records.len() });
        }
        let doing = sql(&self.path, "write to");
        // Taking the write lock first makes "nobody wrote since" true until the commit.
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(doing)?;
        fold(&transaction, &self.path, &mut self.history)?;
        let found = self.history.last_seq;
        if found != expected_seq {
            return Err(StoreError::Conflict { expected: expected_seq, found });
        }
        let records: Vec<Record> = (expected_seq + 1..)
            .zip(records)
            .map(|(seq, (at, by, body))| Record { seq, at: *at, by: by.clone(), body: body.clone() })
            .collect();
        insert(&transaction, &self.path, &records)?;
        let judged = records.iter().try_for_each(|record| self.history.apply(record));
        let result = match judged {
            Ok(()) => transaction.commit().map_err(doing),
            Err(illegal) => transaction.rollback().map_err(doing).and(Err(illegal.into())),
        };
        if let Err(error) = result {
            // The history is ahead by records that are not in the file: it is folded anew from there.
            self.history = History::default();
            self.refresh()?;
            return Err(error);
        }
        Ok(records)
    }

    /// The records from number `seq` on, in order.
    ///
    /// # Errors
    /// When the file cannot be read, or a record in it cannot be understood.
    pub fn read_from(&self, seq: u64) -> Result<Vec<Record>, StoreError> {
        read_from(&self.connection, &self.path, seq)
    }

    /// Takes what was written since into the history, by whichever process, and returns it.
    ///
    /// # Errors
    /// When the file cannot be read, or a record in it cannot be understood or cannot follow; the history then stands
    /// at the last record that could.
    pub fn refresh(&mut self) -> Result<Vec<Record>, StoreError> {
        fold(&self.connection, &self.path, &mut self.history)
    }
}

fn fold(connection: &Connection, path: &Path, history: &mut History) -> Result<Vec<Record>, StoreError> {
    let records = read_from(connection, path, history.last_seq + 1)?;
    for record in &records {
        history.apply(record).map_err(|source| StoreError::Broken {
            path: path.to_owned(),
            seq: record.seq,
            why: source.to_string(),
        })?;
    }
    Ok(records)
}

fn insert(transaction: &Transaction<'_>, path: &Path, records: &[Record]) -> Result<(), StoreError> {
    let doing = sql(path, "write to");
    let mut insert = transaction
        .prepare_cached(
            "INSERT INTO record (seq, version, written_at, written_by, body) VALUES (?1, ?2, ?3, ?4, ?5)",
        )
        .map_err(doing)?;
    for Record { seq, at, by, body } in records {
        let body = serde_json::to_string(body).map_err(StoreError::Encode)?;
        insert.execute(params![seq, RECORD_VERSION, at.to_string(), by, body]).map_err(doing)?;
    }
    Ok(())
}

fn read_from(connection: &Connection, path: &Path, from_seq: u64) -> Result<Vec<Record>, StoreError> {
    let doing = sql(path, "read");
    let mut select = connection
        .prepare_cached(
            "SELECT seq, version, written_at, written_by, body FROM record WHERE seq >= ?1 ORDER BY seq",
        )
        .map_err(doing)?;
    let mut rows = select.query([from_seq]).map_err(doing)?;
    let mut records = Vec::new();
    while let Some(row) = rows.next().map_err(doing)? {
        let seq: u64 = row.get(0).map_err(doing)?;
        let version: u32 = row.get(1).map_err(doing)?;
        if version > RECORD_VERSION {
            return Err(StoreError::RecordVersion { path: path.to_owned(), seq, found: version });
        }
        let broken = |why: String| StoreError::Broken { path: path.to_owned(), seq, why };
        let at: String = row.get(2).map_err(doing)?;
        let at = at.parse().map_err(|error| broken(format!("its time `{at}` cannot be read: {error}")))?;
        let by = row.get(3).map_err(doing)?;
        let json: String = row.get(4).map_err(doing)?;
        let body = serde_json::from_str(&json).map_err(|error| broken(error.to_string()))?;
        records.push(Record { seq, at, by, body });
    }
    Ok(records)
}

#[cfg(test)]
mod tests;
