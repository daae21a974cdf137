//! Bringing a release to the host: its objects, its tree, shared files, secrets, and the steps that prepare it.
//!
//! Guarantees: nothing that runs is touched; a release counts as staged only after everything here has succeeded; a release that is
//! staged already is not prepared again, for it may be running (its secrets are written anew all the same); what fails
//! here for good leaves nothing of the release behind, and what a lost connection interrupts keeps the bytes that arrived.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use greenlight_depot::host::HostDepot;
use greenlight_depot::{DepotError, Lacking};
use greenlight_link::frame::Encoding;
use greenlight_link::message::{AgentError, Event, MANIFEST_PARCEL_BYTES_MAX, PARCEL_BYTES_MAX, SecretValue};
use greenlight_model::Timestamp;
use greenlight_model::action::Blame;
use greenlight_model::host::{InstanceSpec, LedgerEvent, ReleaseMark};
use greenlight_model::id::{ContentHash, RolloutId, VariableName};
use greenlight_model::manifest::Manifest;

use crate::account::Account;
use crate::command::{self, RunError, Step};
use crate::context::Context;
use crate::environment;
use crate::failure::{OrHost as _, Outcome, host, passing, release};
use crate::files;
use crate::layout::Layout;
use crate::ledger::{self, Change};
use crate::plan;

/// Longest that one prepare step may take. The controller's own time-out is usually shorter and ends the connection, which ends the step.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(3600);

/// What arrives for a stage after its request.
#[derive(Debug)]
pub(crate) enum Piece {
    /// A part of a parcel, and whether it goes on with the next.
    Data { hash: ContentHash, encoding: Encoding, has_more: bool, data: Vec<u8> },
    /// There are no more.
    End,
}

/// What arrives as a whole.
struct Parcel {
    hash: ContentHash,
    encoding: Encoding,
    data: Vec<u8>,
}

/// Threads that unpack, verify and write what arrives: more only compete for the disk.
const WRITERS_MAX: usize = 4;
/// Parcels that wait for one of them.
const PARCELS_QUEUE_MAX: usize = 2;

/// A stage as it is asked for.
#[derive(Debug)]
pub(crate) struct Stage<'a> {
    pub(crate) spec: &'a InstanceSpec,
    pub(crate) mark: &'a ReleaseMark,
    pub(crate) rollout: &'a RolloutId,
    pub(crate) secrets: &'a BTreeMap<VariableName, SecretValue>,
}

impl Stage<'_> {
    /// Brings the release here. `pieces` gives the manifest, and, after the event that names what is missing, that.
    pub(crate) fn run(&self, context: &Context, pieces: &Receiver<Piece>) -> Outcome<()> {
        let layout = Layout::new(&self.spec.root);
        let _change = Change::begin(&layout, &format!("staging {}", self.mark.label))?;
        let ledger = ledger::load(&layout)?;
        ledger::check_claim(&ledger, self.rollout, Timestamp::now())?;
        let depot = HostDepot::open(layout.root()).map_err(depot_error)?;
        let staged = self.bring(context, &layout, &depot, pieces);
        if staged.as_ref().is_err_and(|error| error.blame != Blame::Passing) {
            self.discard(&layout, &depot);
        }
        staged
    }

    fn bring(
        &self,
        context: &Context,
        layout: &Layout,
        depot: &HostDepot,
        pieces: &Receiver<Piece>,
    ) -> Outcome<()> {
        let manifest = self.receive(context, depot, pieces)?;
        self.write_secrets(layout)?;
        if depot.mark(self.mark.id).map_err(depot_error)?.is_some() {
            return Ok(());
        }
        context.phase("placing");
        depot.place(self.mark.id, &manifest).map_err(depot_error)?;
        let owner = self.owner()?;
        for stated in &self.spec.shared {
            share(layout, self.mark, stated, owner.as_ref())?;
        }
        self.prepare(context, layout)?;
        depot.complete(self.mark, &manifest).map_err(depot_error)?;
        ledger::update(layout, |ledger| {
            let id = Some(self.mark.id);
            ledger::note(
                ledger,
                Timestamp::now(),
                LedgerEvent::Staged,
                id,
                ledger.generation,
                self.mark.label.clone(),
            );
            Ok(())
        })
    }

    /// Removes what a failed stage has left. What cannot be removed is removed when releases are pruned next; the reason why
    /// the stage failed is the one to tell.
    fn discard(&self, layout: &Layout, depot: &HostDepot) {
        if depot.mark(self.mark.id).is_ok_and(|mark| mark.is_none()) {
            let _ = files::remove_if_there(&layout.secrets(self.mark.id));
        }
        let _ = depot.discard(self.mark.id);
    }

    /// Takes what arrives until there is no more, and gives the manifest.
    fn receive(&self, context: &Context, depot: &HostDepot, pieces: &Receiver<Piece>) -> Outcome<Manifest> {
        let manifest = match next_parcel(pieces)? {
            Some(Parcel { encoding: Encoding::Manifest, data, .. }) => {
                greenlight_depot::manifest::decode(&data).map_err(depot_error)?
            }
            Some(_) => return Err(passing("objects were sent before the manifest of their release")),
            None => return Err(passing("the manifest of the release was not sent")),
        };
        let lacking = match depot.mark(self.mark.id).map_err(depot_error)? {
            Some(_) => Lacking::default(),
            None => depot.lacking(&manifest).map_err(depot_error)?,
        };
        let Lacking { objects, bases } = lacking;
        (context.events)(Event::Missing { objects, bases });
        write_all(depot, pieces)?;
        Ok(manifest)
    }

    fn write_secrets(&self, layout: &Layout) -> Outcome<()> {
        let mut variables = Vec::new();
        for name in &self.spec.secrets {
            let value = self.secrets.get(name).ok_or_else(|| {
                host(format!("the value of the secret {name}, which the service reads, was not sent"))
            })?;
            variables.push((name.as_str(), value.reveal()));
        }
        if variables.is_empty() {
            return Ok(());
        }
        environment::check(variables.iter().copied()).map_err(|error| host(error.to_string()))?;
        let (directory, path) = (layout.secrets_directory(), layout.secrets(self.mark.id));
        files::create_directory(&directory, 0o700).or_host(|| format!("create {}", directory.display()))?;
        files::write_atomically(&path, environment::render(variables).as_bytes(), 0o600, None)
            .or_host(|| format!("write {}", path.display()))
    }

    /// Runs the steps that make the release ready, in its directory.
    fn prepare(&self, context: &Context, layout: &Layout) -> Outcome<()> {
        let directory = layout.release(self.mark.id);
        let mut variables = plan::base_variables(self.spec, self.mark);
        variables.insert("HOME".to_owned(), Account::own()?.home);
        for (number, script) in self.spec.prepare.iter().enumerate() {
            context.phase("preparing");
            // The script is the operator's own; no value is put into it.
            let argv = ["/bin/sh", "-e", "-c", script].map(str::to_owned);
            let step = Step {
                argv: &argv,
                directory: Some(&directory),
                environment: &variables,
                account: None,
                timeout: PREPARE_TIMEOUT,
            };
            let what = format!("step {} of prepare (`{}`)", number + 1, first_line(script));
            run_step(context, &step, &what)?;
        }
        Ok(())
    }

    /// Who owns shared files: the account of the first process that has one of its own.
    fn owner(&self) -> Outcome<Option<Account>> {
        for process in self.spec.processes.values() {
            if let Some(account) = plan::account_of(process)? {
                return Ok(Some(account));
            }
        }
        Ok(None)
    }
}

/// Unpacks, verifies and writes every parcel until there is no more, while the next ones arrive.
fn write_all(depot: &HostDepot, pieces: &Receiver<Piece>) -> Outcome<()> {
    let (hand_over, parcels) = sync_channel::<Parcel>(PARCELS_QUEUE_MAX);
    let parcels = Mutex::new(parcels);
    let write = || {
        loop {
            // Nothing panics while it is held. Who waits for the next parcel keeps the others from nothing: there is none.
            let next = parcels.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(Parcel { hash, encoding, data }) = next else { return Ok(()) };
            let encoding = match encoding {
                Encoding::Raw => greenlight_depot::Encoding::Raw,
                Encoding::Zstd => greenlight_depot::Encoding::Zstd,
                Encoding::Delta => greenlight_depot::Encoding::Delta,
                Encoding::Pack => greenlight_depot::Encoding::Pack,
                Encoding::Manifest => return Err(passing("the manifest of the release was sent twice")),
            };
            depot.receive(hash, encoding, &data).map_err(depot_error)?;
        }
    };
    let writers = std::thread::available_parallelism().map_or(1, usize::from).min(WRITERS_MAX);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..writers).map(|_| scope.spawn(write)).collect();
        let arrived = loop {
            let parcel = match next_parcel(pieces) {
                Ok(Some(parcel)) => parcel,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            };
            // A writer that is gone before the end says why.
            if writers.iter().any(std::thread::ScopedJoinHandle::is_finished)
                || hand_over.send(parcel).is_err()
            {
                break Ok(());
            }
        };
        drop(hand_over);
        let written = writers
            .into_iter()
            .map(|writer| writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .fold(Ok(()), Result::and);
        written.and(arrived)
    })
}

/// The next parcel, as a whole; none when there are no more.
fn next_parcel(pieces: &Receiver<Piece>) -> Outcome<Option<Parcel>> {
    let mut begun: Option<Parcel> = None;
    loop {
        match pieces.recv() {
            Ok(Piece::Data { hash, encoding, has_more, data }) => {
                let parcel = match &mut begun {
                    None => begun.insert(Parcel { hash, encoding, data }),
                    Some(parcel) if parcel.hash == hash && parcel.encoding == encoding => {
                        parcel.data.extend_from_slice(&data);
                        parcel
                    }
                    Some(_) => return Err(passing("a parcel was sent into the middle of another one")),
                };
                let bytes_max = match encoding {
                    Encoding::Manifest => MANIFEST_PARCEL_BYTES_MAX,
                    _ => PARCEL_BYTES_MAX,
                };
                if parcel.data.len() > bytes_max {
                    return Err(host(format!("a parcel of more than {bytes_max} bytes was sent")));
                }
                if !has_more {
                    return Ok(begun);
                }
            }
            // The sender could not read the rest, and says so to whom it belongs.
            Ok(Piece::End) => return Ok(None),
            Err(_) => return Err(passing("the connection ended before the whole release had arrived")),
        }
    }
}

/// Runs a step of a release, giving its lines as events; its failure is the release's.
pub(crate) fn run_step(context: &Context, step: &Step<'_>, what: &str) -> Outcome<()> {
    let ended = command::run(step, &context.cancelled, &mut |stream, line| context.line(None, stream, line));
    match ended {
        Ok(ended) if ended.status.success() => Ok(()),
        Ok(ended) => {
            let message = format!("{what} {}", command::ended_how(ended.status));
            Err(AgentError { output: ended.last_lines, ..release(message) })
        }
        Err(error @ RunError::Disconnected { .. }) => Err(passing(format!("{what}: {error}"))),
        Err(error) => {
            let message = format!("{what}: {error}");
            Err(AgentError { output: error.into_last_lines(), ..release(message) })
        }
    }
}

/// Makes a path of the release stand for one under `shared`, which outlives releases. What the release ships there is the beginning of
/// what is shared, once.
fn share(layout: &Layout, mark: &ReleaseMark, stated: &str, owner: Option<&Account>) -> Outcome<()> {
    let relative = Path::new(stated.trim_end_matches('/'));
    let is_plain = relative.components().all(|part| matches!(part, Component::Normal(_)));
    if !is_plain || relative.as_os_str().is_empty() {
        return Err(host(format!("the shared path `{stated}` does not stay inside the release")));
    }
    let (in_release, in_shared) = (layout.release(mark.id).join(relative), layout.shared().join(relative));
    let sharing = || format!("share {stated}");
    let shipped = metadata_if_there(&in_release).or_host(sharing)?;
    let is_directory = stated.ends_with('/') || shipped.as_ref().is_some_and(fs::Metadata::is_dir);
    if metadata_if_there(&in_shared).or_host(sharing)?.is_none() {
        create_owned(&layout.shared(), in_shared.parent().unwrap_or(&in_shared), owner).or_host(sharing)?;
        match &shipped {
            // Beside it first, so that a crash does not leave half of it as if it were all.
            Some(_) => {
                let beside = layout.shared().join(format!(".{}.new", mark.id.short()));
                remove_any(&beside).or_host(sharing)?;
                copy(&in_release, &beside, owner).or_host(sharing)?;
                fs::rename(&beside, &in_shared).or_host(sharing)?;
            }
            None if is_directory => create_owned(&layout.shared(), &in_shared, owner).or_host(sharing)?,
            // The file will be made through the link by whoever writes it first.
            None => {}
        }
    }
    remove_any(&in_release).or_host(sharing)?;
    if let Some(parent) = in_release.parent() {
        files::create_directory(parent, 0o755).or_host(sharing)?;
    }
    // releases/ID/a/b leads to shared/a/b by as many steps up as there are parts, and two.
    let mut target: PathBuf = relative.components().map(|_| "..").collect();
    target.push("..");
    target.push("shared");
    target.push(relative);
    std::os::unix::fs::symlink(target, &in_release).or_host(sharing)
}

/// Creates the missing directories from `base` down to `path`, each with the owner.
fn create_owned(base: &Path, path: &Path, owner: Option<&Account>) -> io::Result<()> {
    files::create_directory(base, 0o755)?;
    let mut at = base.to_owned();
    for part in path.strip_prefix(base).map_err(io::Error::other)?.components() {
        at.push(part);
        match fs::create_dir(&at) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            created => {
                created?;
                give(&at, owner)?;
            }
        }
    }
    Ok(())
}

/// Copies a tree. Not links: the release's files are the same inodes as the objects, and what is shared will be written to.
fn copy(from: &Path, to: &Path, owner: Option<&Account>) -> io::Result<()> {
    let metadata = fs::symlink_metadata(from)?;
    if metadata.is_dir() {
        fs::create_dir(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            copy(&entry.path(), &to.join(entry.file_name()), owner)?;
        }
    } else if metadata.is_symlink() {
        std::os::unix::fs::symlink(fs::read_link(from)?, to)?;
    } else {
        fs::copy(from, to)?;
        let executable = if metadata.permissions().mode() & 0o100 == 0 { 0 } else { 0o111 };
        fs::set_permissions(to, fs::Permissions::from_mode(0o644 | executable))?;
    }
    give(to, owner)
}

fn give(path: &Path, owner: Option<&Account>) -> io::Result<()> {
    match owner {
        Some(owner) => std::os::unix::fs::lchown(path, Some(owner.uid), Some(owner.gid)),
        None => Ok(()),
    }
}

fn metadata_if_there(path: &Path) -> io::Result<Option<fs::Metadata>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn remove_any(path: &Path) -> io::Result<()> {
    match metadata_if_there(path)? {
        None => Ok(()),
        Some(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Some(_) => fs::remove_file(path),
    }
}

fn first_line(script: &str) -> String {
    script.trim().lines().next().unwrap_or_default().chars().take(80).collect()
}

/// What the depot says is complete in itself. Bytes that were damaged or missing are sent again.
#[expect(clippy::needless_pass_by_value, reason = "it stands in `map_err`")]
pub(crate) fn depot_error(error: DepotError) -> AgentError {
    let message = crate::failure::with_sources(&error);
    match error {
        DepotError::ObjectMissing { .. } | DepotError::ObjectDamaged { .. } => passing(message),
        _ => host(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;

    fn check_shared(stated: &str, shipped: &[&str], before: &[(&str, &str)], expected: &[(&str, &str)]) {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::new(root.path());
        let mark = fixture::mark(1, "v1");
        let write = |path: PathBuf, text: &str| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        fs::create_dir_all(layout.release(mark.id)).unwrap();
        for path in shipped {
            write(layout.release(mark.id).join(path), "shipped");
        }
        for (path, text) in before {
            write(layout.shared().join(path), text);
        }
        share(&layout, &mark, stated, None).unwrap();
        for (path, text) in expected {
            assert_eq!(
                fs::read_to_string(layout.release(mark.id).join(path)).unwrap(),
                *text,
                "{stated} {path} in the release"
            );
            assert_eq!(
                fs::read_to_string(layout.shared().join(path)).unwrap(),
                *text,
                "{stated} {path} in shared"
            );
        }
        let link = layout.release(mark.id).join(stated.trim_end_matches('/'));
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink(), "{stated}");
        if stated.ends_with('/') {
            fs::write(link.join("new"), "x").unwrap();
        }
    }

    #[test]
    fn shared_paths_begin_with_what_is_shipped_and_outlive_it() {
        check_shared("var/uploads/", &[], &[], &[]);
        check_shared("var/uploads/", &["var/uploads/a/b"], &[], &[("var/uploads/a/b", "shipped")]);
        check_shared(
            "var/uploads/",
            &["var/uploads/a"],
            &[("var/uploads/a", "kept")],
            &[("var/uploads/a", "kept")],
        );
        check_shared("app.db", &["app.db"], &[], &[("app.db", "shipped")]);
        check_shared("app.db", &[], &[("app.db", "kept")], &[("app.db", "kept")]);
        check_shared("etc/app.db", &[], &[], &[]);
    }

    #[test]
    fn a_shared_path_stays_inside() {
        let root = tempfile::tempdir().unwrap();
        for bad in ["../x", "/etc", "a/../../x", "", "/", "."] {
            let error = share(&Layout::new(root.path()), &fixture::mark(1, "v1"), bad, None).unwrap_err();
            assert!(error.message.contains("does not stay inside"), "{bad}: {error}");
        }
    }
}
