//! Running a part of a release's migration on this host, once: where the ledger knows that it ran, it is not run again, and where
//! it was begun and its end is not known, neither. What comes before the first switch and failed is run again for another
//! rollout, never for the same one; what comes last and failed, when a person resumes.

mod lock;

use greenlight_link::message::AgentError;
use greenlight_model::Timestamp;
use greenlight_model::action::Blame;
use greenlight_model::fleet::Migration;
use greenlight_model::host::{InstanceSpec, LedgerEvent, MigrationTrace, ReleaseMark};
use greenlight_model::id::RolloutId;
use greenlight_model::migration::MigrationPhase;

use crate::account::Account;
use crate::command::{self, Step};
use crate::context::Context;
use crate::environment;
use crate::failure::{Outcome, host, release, with_sources};
use crate::layout::Layout;
use crate::ledger::{self, Change};
use crate::plan;
use crate::stage::run_step;

/// What is to be run.
pub(crate) struct Wanted<'a> {
    pub(crate) migration: &'a Migration,
    pub(crate) phase: MigrationPhase,
    /// Whether it takes something away, so that a copy of the database is kept first.
    pub(crate) is_lossy: bool,
    pub(crate) rollout: &'a RolloutId,
}

/// Runs a part of the migration in the release's directory, with the secrets that its processes have: first what shows what it
/// would do, then what keeps a copy of the database where that is wanted, then itself, all under the database's advisory lock
/// where one is asked for. Nothing of this is begun twice.
pub(crate) fn migrate(
    context: &Context,
    spec: &InstanceSpec,
    mark: &ReleaseMark,
    wanted: &Wanted<'_>,
) -> Outcome<()> {
    let Wanted { migration, phase, is_lossy, rollout } = *wanted;
    let noun = phase.noun();
    let Some(argv) = migration.command(phase) else { return Ok(()) };
    let layout = Layout::new(&spec.root);
    let _change = Change::begin(&layout, &format!("migrating to {}", mark.label))?;
    let ledger = ledger::load(&layout)?;
    ledger::check_claim(&ledger, rollout, Timestamp::now())?;
    match ledger.migration(mark.id, phase) {
        Some(MigrationTrace::Done) => return Ok(()),
        // A request that arrives twice, or is sent twice by two controllers, runs it once.
        Some(MigrationTrace::Begun) => {
            return Err(host(format!(
                "the {noun} of {} was begun here before, and how it ended is not known; it is never run twice: look at the \
                 database, then abort",
                mark.label
            )));
        }
        // For another rollout it is run again: what was wrong may have been mended.
        Some(MigrationTrace::Failed) => {
            if let Some(failed) = ledger.failed_migration(mark.id, rollout) {
                return Err(release(format!("{} (it is run once in a rollout)", failed.detail)));
            }
        }
        None => {}
    }
    let directory = layout.release(mark.id);
    let mut account = None;
    let mut variables = plan::base_variables(spec, mark);
    for process in spec.processes.values() {
        // What the migration needs to reach the database is what the processes have.
        variables
            .extend(process.variables.iter().map(|(name, value)| (name.as_str().to_owned(), value.clone())));
        account = account.or(plan::account_of(process)?);
    }
    let home = account.clone().map_or_else(Account::own, Ok)?.home;
    variables.insert("HOME".to_owned(), home);
    if !spec.secrets.is_empty() {
        let path = layout.secrets(mark.id);
        let secrets = environment::read(&path).map_err(|error| {
            host(format!(
                "cannot read the secrets from {}: {}. Stage the release again",
                path.display(),
                with_sources(&error)
            ))
        })?;
        variables.extend(secrets);
    }
    for (name, value) in postgres_options(migration) {
        variables.entry(name).or_insert(value);
    }
    let lock = match &migration.lock {
        None => None,
        Some(variable) => Some(lock::hold(context, variable, &variables, account.as_ref())?),
    };

    context.phase("migrating");
    let run = |argv: &[String], what: &str| {
        let path = variables.get("PATH").map_or(command::PATH, String::as_str);
        let program = argv.first().map_or("", String::as_str);
        let found = plan::find_program(program, &directory, path).ok_or_else(|| {
            release(format!("the program `{program}` of {what} is neither in the release nor in {path}"))
        })?;
        let mut resolved = argv.to_vec();
        if let Some(first) = resolved.first_mut() {
            *first =
                found.to_str().ok_or_else(|| host(format!("the path of {what} is not UTF-8")))?.to_owned();
        }
        let step = Step {
            argv: &resolved,
            directory: Some(&directory),
            environment: &variables,
            account: account.as_ref(),
            timeout: migration.timeout,
        };
        run_step(context, &step, &format!("{what} (`{}`)", argv.join(" ")))
    };
    // Neither of these changes the database: what fails here was not begun.
    if let Some(dry_run) = migration.dry_run.as_ref().filter(|_| phase.is_expand()) {
        run(dry_run, "the dry run of the migration")?;
    }
    if let Some(backup) = migration.backup.as_ref().filter(|_| is_lossy) {
        // The release has no part in this.
        run(backup, "the backup of the database").map_err(|error| match error.blame {
            Blame::Release => AgentError { blame: Blame::Host, ..error },
            Blame::Host | Blame::Passing => error,
        })?;
    }
    let note = |event, detail: String| {
        ledger::update(&layout, |ledger| {
            let generation = ledger.generation;
            ledger::note(ledger, Timestamp::now(), event, Some(mark.id), generation, detail);
            Ok(())
        })
    };
    let [begun, done, failed] = match phase {
        MigrationPhase::Expand => {
            [LedgerEvent::MigrationBegun, LedgerEvent::Migrated, LedgerEvent::MigrationFailed]
        }
        MigrationPhase::Contract => {
            [LedgerEvent::ContractionBegun, LedgerEvent::Contracted, LedgerEvent::ContractionFailed]
        }
    };
    // Whoever comes after a death in the middle must see that it was begun.
    note(begun, mark.label.clone())?;
    let ended = run(argv, &format!("the {noun}"));
    drop(lock);
    match ended {
        Ok(()) => note(done, mark.label.clone()),
        // It was killed because the controller went: how far it came is not known.
        Err(error) if error.blame == Blame::Passing => Err(error),
        Err(error) => {
            let error = AgentError { message: with_statement(&error), ..error };
            note(failed, error.message.clone())?;
            Err(error)
        }
    }
}

/// Limits that every client of PostgreSQL's own library takes from its environment: a migration that waits for a lock makes
/// everybody who comes after it wait as well.
fn postgres_options(migration: &Migration) -> [(String, String); 1] {
    let options = format!(
        "-c lock_timeout={}ms -c statement_timeout={}ms",
        migration.lock_timeout.as_millis(),
        migration.statement_timeout.as_millis()
    );
    [("PGOPTIONS".to_owned(), options)]
}

/// The error with the statement at which it stopped, where the tool's last lines name one.
fn with_statement(error: &AgentError) -> String {
    let is_error = |line: &&String| {
        let line = line.to_ascii_lowercase();
        line.contains("error") || line.contains("exception")
    };
    let is_statement = |line: &&String| {
        let line = line.trim_start();
        ["LINE ", "STATEMENT:", "[SQL:", "QUERY:"].iter().any(|mark| line.starts_with(mark))
    };
    let said = error.output.iter().rev().find(is_error).or(error.output.last());
    let statement = error.output.iter().find(is_statement);
    let parts: Vec<&str> = said.into_iter().chain(statement).map(|line| line.trim()).collect();
    match parts.is_empty() {
        true => error.message.clone(),
        false => format!("{}: {}", error.message, parts.join("; ")),
    }
}
