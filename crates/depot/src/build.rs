//! Building a release: a commit, checked out clean; the service's own build steps; the tree that they leave.
//!
//! Guarantees: the user's repository and work tree are not touched, and not seen by build steps that look around; steps see a clean environment and no terminal, and
//! nothing they started survives them; what was printed is kept, for failed builds too; the same commit, steps and tree
//! give the same id, and a release that exists already is not made twice. Not guaranteed: that the steps themselves
//! give the same tree twice; `SOURCE_DATE_EPOCH` is set to help those that can.

use std::collections::VecDeque;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use greenlight_model::Timestamp;
use greenlight_model::fleet::Service;
use greenlight_model::manifest::{Entry, Manifest, Release};

use crate::depot::{Built, Depot, Recipe, Work};
use crate::disk::{self, Workplace};
use crate::error::{At, DepotError};
use crate::git::{GitError, Repository, Resolved};
use crate::manifest::release_id;
use crate::scan::scan_into;
use crate::step::{self, Ended, Log, Step};

/// What is to be built, and in whose name.
#[derive(Debug, Clone, Copy)]
pub struct BuildRequest<'a> {
    /// The service.
    pub service: &'a Service,
    /// The directory of the fleet file, which the source's path is relative to.
    pub project: &'a Path,
    /// A commit, branch or tag; when absent, the source's branch, else what the repository stands at.
    pub revision: Option<&'a str>,
    /// What people are to call it; `git describe` when absent.
    pub label: Option<&'a str>,
    /// Who builds: `user@machine`.
    pub built_by: &'a str,
    /// The time.
    pub now: Timestamp,
    /// Set by whoever wants the build to stop, at any moment.
    pub cancel: &'a AtomicBool,
}

/// What happens during a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BuildEvent {
    /// The repository is being read, or fetched.
    Opening {
        /// Its path or address.
        repository: String,
    },
    /// The commit is known.
    Commit {
        /// Its full hash.
        commit: String,
        /// Its first line.
        subject: String,
        /// The branch, when known.
        branch: Option<String>,
    },
    /// The user's work tree has changes that are in no commit, and so not in the release.
    Uncommitted {
        /// In how many files.
        files: usize,
    },
    /// A build step begins.
    Step {
        /// Which, from 1.
        number: usize,
        /// Of how many.
        of: usize,
        /// Its script.
        script: String,
    },
    /// A step printed a line, on whichever output.
    Line {
        /// The line.
        text: String,
    },
    /// The tree is being read and kept.
    Packing,
}

/// Why there is no release.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The commit could not be had.
    #[error(transparent)]
    Git(#[from] GitError),
    /// The tree could not be read, is refused, or could not be kept.
    #[error(transparent)]
    Depot(#[from] DepotError),
    /// The label cannot be one.
    #[error("`{}` cannot be a label: {why}", label.escape_debug())]
    Label {
        /// As given.
        label: String,
        /// Why not.
        why: &'static str,
    },
    /// The service's directory is not in the repository.
    #[error("commit {commit} has no directory `{directory}` (the `directory` of service {service}'s source)")]
    NoDirectory {
        /// Whose.
        service: String,
        /// The directory.
        directory: String,
        /// Where it was looked for.
        commit: String,
    },
    /// A build step could not be started, or its output not be kept.
    #[error("build step `{script}` cannot be run: {source}")]
    Run {
        /// Its script.
        script: String,
        /// Why.
        source: io::Error,
    },
    /// A build step failed.
    #[error("build step {number} of {of}, `{script}`, failed: {how}; its last lines:{}\nall of its output: {}", lines(last), log.display())]
    StepFailed {
        /// Which, from 1.
        number: usize,
        /// Of how many.
        of: usize,
        /// Its script.
        script: String,
        /// Exit code or signal.
        how: String,
        /// The last lines it printed.
        last: Vec<String>,
        /// Where all of its output is.
        log: PathBuf,
    },
    /// It was asked to stop.
    #[error("the build was stopped; nothing of it is kept but its output")]
    Cancelled,
    /// Nothing is left of the tree.
    #[error(
        "nothing is left to release of commit {commit}: look at `include`, `exclude` and the build steps"
    )]
    Empty {
        /// Of which commit.
        commit: String,
    },
}

/// The longest label: it stands in lines and in answers of processes.
const LABEL_BYTES_MAX: usize = 128;
/// How many logs of failed builds are kept.
const FAILED_LOGS_MAX: usize = 20;
/// What build steps see of the environment of whoever builds: where programs are found, where their caches are, and how
/// the network is reached. What else a build needs belongs in its steps.
const PASSED_VARIABLES: [&str; 10] = [
    "PATH",
    "HOME",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
];

fn lines(last: &[String]) -> String {
    last.iter().map(|line| format!("\n  {line}")).collect()
}

/// Builds a release and keeps it in the depot. One that exists already is returned as it is, under the new label when
/// one is given.
///
/// # Errors
/// When the commit cannot be found or checked out, a step fails, the tree is refused, or the disk does not take it. Nothing
/// counts as a release then.
pub fn build(
    depot: &Depot,
    request: &BuildRequest<'_>,
    on_event: &mut dyn FnMut(BuildEvent),
) -> Result<Release, BuildError> {
    match attempt(depot, request, on_event) {
        // Stopped in its tracks, it failed at whatever it was doing: with git, a step, a file.
        Err(_) if request.cancel.load(Ordering::Relaxed) => Err(BuildError::Cancelled),
        result => result,
    }
}

/// The release that building this would give, when it was built before: of the same commit, by the same steps, with the
/// same choice of files; the newest, should the steps have given several trees. Nothing is built; a remote repository
/// is fetched.
///
/// # Errors
/// When the commit cannot be found, or the depot not be read.
pub fn built_before(
    depot: &Depot,
    service: &Service,
    project: &Path,
    revision: Option<&str>,
) -> Result<Option<Release>, BuildError> {
    let repository = Repository::open(depot, &service.source, project, revision)?;
    let commit = repository.resolve(&service.source, revision)?.commit;
    let recipe = Recipe::of(service);
    for release in depot.releases()? {
        if release.service == service.name
            && release.commit == commit
            && depot.built(release.id)?.is_some_and(|built| built.recipe == recipe)
        {
            return Ok(Some(release));
        }
    }
    Ok(None)
}

fn attempt(
    depot: &Depot,
    request: &BuildRequest<'_>,
    on_event: &mut dyn FnMut(BuildEvent),
) -> Result<Release, BuildError> {
    let service = request.service;
    if let Some(label) = request.label {
        check_label(label)?;
    }
    on_event(BuildEvent::Opening { repository: service.source.git.clone() });
    let repository = Repository::open(depot, &service.source, request.project, request.revision)?;
    let resolved = repository.resolve(&service.source, request.revision)?;
    on_event(BuildEvent::Commit {
        commit: resolved.commit.clone(),
        subject: resolved.subject.clone(),
        branch: resolved.branch.clone(),
    });
    match repository.uncommitted() {
        0 => {}
        files => on_event(BuildEvent::Uncommitted { files }),
    }
    let work = depot.work()?;
    let outside = Workplace::create(&checkouts(), "greenlight-build-")?;
    let checkout = outside.fresh();
    repository.check_out(&resolved, &checkout)?;
    let directory = service_directory(service, &resolved, &checkout)?;
    let log = work.fresh();
    run_steps(depot, request, &resolved, &directory, &log, on_event)?;
    on_event(BuildEvent::Packing);
    let manifest = pack(request, &work, &directory)?;
    if manifest.entries.is_empty() {
        return Err(BuildError::Empty { commit: resolved.commit });
    }
    keep(depot, &work, request, resolved, &manifest, &log)
}

fn check_label(label: &str) -> Result<(), BuildError> {
    let why = if label.is_empty() {
        "it is empty"
    } else if label.len() > LABEL_BYTES_MAX {
        "it is longer than 128 bytes"
    } else if label == "latest" {
        "that word always means the newest release"
    } else if label.chars().any(|c| c.is_control() || c.is_whitespace()) {
        "it has white space or control characters"
    } else {
        return Ok(());
    };
    Err(BuildError::Label { label: label.to_owned(), why })
}

/// Where checkouts are made: outside the project, because many tools look for their settings and packages in the
/// directories above, and would find those of the work tree. `/var/tmp` rather than `/tmp`, which is often in memory.
fn checkouts() -> PathBuf {
    match std::env::var_os("TMPDIR") {
        None if Path::new("/var/tmp").is_dir() => PathBuf::from("/var/tmp"),
        _ => std::env::temp_dir(),
    }
}

/// The directory that is the service. It may be a link, but only to inside the checkout.
fn service_directory(service: &Service, resolved: &Resolved, checkout: &Path) -> Result<PathBuf, BuildError> {
    let Some(directory) = &service.source.directory else { return Ok(checkout.to_owned()) };
    let top = checkout.canonicalize().at("look at", checkout)?;
    match checkout.join(directory).canonicalize() {
        Ok(found) if found.starts_with(&top) && found.is_dir() => Ok(found),
        _ => Err(BuildError::NoDirectory {
            service: service.name.to_string(),
            directory: directory.clone(),
            commit: resolved.commit.clone(),
        }),
    }
}

fn run_steps(
    depot: &Depot,
    request: &BuildRequest<'_>,
    resolved: &Resolved,
    directory: &Path,
    log_path: &Path,
    on_event: &mut dyn FnMut(BuildEvent),
) -> Result<(), BuildError> {
    let mut variables: Vec<(&str, String)> =
        PASSED_VARIABLES.iter().filter_map(|name| Some((*name, std::env::var(name).ok()?))).collect();
    variables.extend([
        ("LANG", "C.UTF-8".to_owned()),
        ("GREENLIGHT_COMMIT", resolved.commit.clone()),
        ("GREENLIGHT_SERVICE", request.service.name.to_string()),
        ("SOURCE_DATE_EPOCH", resolved.committed_at_s.clone()),
    ]);
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(log_path);
    let mut log = Log::new(file.at("create", log_path)?);
    let of = request.service.build.len();
    for (number, script) in (1..).zip(&request.service.build) {
        if request.cancel.load(Ordering::Relaxed) {
            return Err(BuildError::Cancelled);
        }
        on_event(BuildEvent::Step { number, of, script: script.clone() });
        let mut last = VecDeque::new();
        let step = Step { script, directory, variables: &variables, cancel: request.cancel };
        let ended = log.line(&format!("$ {script}")).and_then(|()| {
            step::run(&step, &mut log, &mut last, &mut |line| {
                on_event(BuildEvent::Line { text: line.to_owned() });
            })
        });
        let failed = match ended {
            Ok(Ended::Exited(status)) if status.success() => continue,
            Ok(Ended::Cancelled) => BuildError::Cancelled,
            Ok(Ended::Exited(status)) => BuildError::StepFailed {
                number,
                of,
                script: script.clone(),
                how: step::describe(status),
                last: last.into(),
                log: failed_log(depot, request),
            },
            Err(source) => BuildError::Run { script: script.clone(), source },
        };
        drop(log.sync());
        move_log(log_path, &failed_log(depot, request))?;
        forget_failed_logs(depot)?;
        return Err(failed);
    }
    log.sync().at("write", log_path)?;
    Ok(())
}

fn pack(request: &BuildRequest<'_>, work: &Work<'_>, directory: &Path) -> Result<Manifest, BuildError> {
    let Service { include, exclude, .. } = request.service;
    let packed = scan_into(directory, include, exclude, &|hash, data| {
        if request.cancel.load(Ordering::Relaxed) {
            return Err(io::Error::from(io::ErrorKind::Interrupted)).at("keep", directory);
        }
        work.keep(hash, data)
    });
    // Also when the release turns out to be there already: what was damaged of it is brought back by building it again.
    work.finish_packs()?;
    Ok(packed?)
}

fn keep(
    depot: &Depot,
    work: &Work<'_>,
    request: &BuildRequest<'_>,
    resolved: Resolved,
    manifest: &Manifest,
    log: &Path,
) -> Result<Release, BuildError> {
    let service = request.service;
    let id = release_id(&service.name, &resolved.commit, &service.build, manifest);
    let before = depot.built(id)?;
    let is_new = before.is_none();
    let mut built = before.unwrap_or_else(|| {
        let sizes = manifest.entries.values().filter_map(|entry| match entry {
            Entry::File { size, .. } => Some(*size),
            _ => None,
        });
        let (files, bytes) = sizes.fold((0, 0), |(files, bytes), size| (files + 1, bytes + size));
        let release = Release {
            id,
            service: service.name.clone(),
            label: resolved.description,
            commit: resolved.commit,
            branch: resolved.branch,
            subject: resolved.subject,
            built_at: request.now,
            built_by: request.built_by.to_owned(),
            files,
            bytes,
        };
        Built { release, recipe: Recipe::of(service) }
    });
    let recipe = Recipe::of(service);
    let label = request.label.unwrap_or(&built.release.label);
    if is_new || label != built.release.label || recipe != built.recipe {
        built.release.label = label.to_owned();
        built.recipe = recipe;
        move_log(log, &depot.log(id))?;
        work.finish(&built, manifest)?;
    }
    Ok(built.release)
}

fn move_log(from: &Path, to: &Path) -> Result<(), DepotError> {
    fs::rename(from, to).at("put in place", to)?;
    disk::sync_directory(to.parent().unwrap_or(to))
}

fn failed_log(depot: &Depot, request: &BuildRequest<'_>) -> PathBuf {
    let at = request.now.strftime("%Y%m%dT%H%M%SZ");
    let name = format!("{FAILED}{at}-{}-{}.log", request.service.name, std::process::id());
    depot.path().join("logs").join(name)
}

const FAILED: &str = "failed-";

fn forget_failed_logs(depot: &Depot) -> Result<(), DepotError> {
    let directory = depot.path().join("logs");
    let mut names = disk::names(&directory)?;
    names.retain(|name| name.starts_with(FAILED));
    // Their names begin with the time.
    names.sort_unstable_by(|a, b| b.cmp(a));
    names.iter().skip(FAILED_LOGS_MAX).try_for_each(|name| disk::remove_file(&directory.join(name)))
}

#[cfg(test)]
mod tests;
