//! Running a release's migration on this host, once: where the ledger knows that it ran, it is not run again, and where it
//! was begun and its end is not known, neither. One that failed is run again for another rollout, never for the same one.

use greenlight_model::Timestamp;
use greenlight_model::action::Blame;
use greenlight_model::fleet::Migration;
use greenlight_model::host::{InstanceSpec, LedgerEvent, MigrationTrace, ReleaseMark};
use greenlight_model::id::RolloutId;

use crate::account::Account;
use crate::command::{self, Step};
use crate::context::Context;
use crate::environment;
use crate::failure::{Outcome, host, release, with_sources};
use crate::layout::Layout;
use crate::ledger::{self, Change};
use crate::plan;
use crate::stage::run_step;

/// Runs the migration in the release's directory, with the secrets that its processes have.
pub(crate) fn migrate(
    context: &Context,
    spec: &InstanceSpec,
    mark: &ReleaseMark,
    migration: &Migration,
    rollout: &RolloutId,
) -> Outcome<()> {
    let layout = Layout::new(&spec.root);
    let _change = Change::begin(&layout, &format!("migrating to {}", mark.label))?;
    let ledger = ledger::load(&layout)?;
    ledger::check_claim(&ledger, rollout, Timestamp::now())?;
    match ledger.migration(mark.id) {
        Some(MigrationTrace::Done) => return Ok(()),
        // A request that arrives twice, or is sent twice by two controllers, runs it once.
        Some(MigrationTrace::Begun) => {
            return Err(host(format!(
                "the migration of {} was begun here before, and how it ended is not known; it is never run twice: look at the \
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
    let mut argv = migration.argv.clone();
    let program = argv.first().cloned().unwrap_or_default();
    let path = variables.get("PATH").map_or(command::PATH, String::as_str);
    let found = plan::find_program(&program, &directory, path).ok_or_else(|| {
        release(format!("the migration's program `{program}` is neither in the release nor in {path}"))
    })?;
    argv[0] =
        found.to_str().ok_or_else(|| host("the path of the migration's program is not UTF-8"))?.to_owned();

    context.phase("migrating");
    let step = Step {
        argv: &argv,
        directory: Some(&directory),
        environment: &variables,
        account: account.as_ref(),
        timeout: migration.timeout,
    };
    let note = |event, detail: String| {
        ledger::update(&layout, |ledger| {
            let generation = ledger.generation;
            ledger::note(ledger, Timestamp::now(), event, Some(mark.id), generation, detail);
            Ok(())
        })
    };
    // Whoever comes after a death in the middle must see that it was begun.
    note(LedgerEvent::MigrationBegun, mark.label.clone())?;
    match run_step(context, &step, &format!("the migration (`{}`)", migration.argv.join(" "))) {
        Ok(()) => note(LedgerEvent::Migrated, mark.label.clone()),
        // It was killed because the controller went: how far it came is not known.
        Err(error) if error.blame == Blame::Passing => Err(error),
        Err(error) => {
            note(LedgerEvent::MigrationFailed, error.message.clone())?;
            Err(error)
        }
    }
}
