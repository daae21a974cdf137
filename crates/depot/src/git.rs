//! What is asked of git: which commit is meant, a clean checkout of it, and what happened between two.
//!
//! The system's `git`, by argument vectors only; what the user typed never stands where an option could. The user's
//! repository is read and never written: not its work tree, its index, its configuration, nor its references, but for the tags
//! that a fleet file asks for ([`crate::tag`]).

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use greenlight_model::fleet::Source;
use rustix::fs::FlockOperation;

use crate::depot::Depot;
use crate::disk;
use crate::error::DepotError;

/// Why git did not give what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum GitError {
    /// The program could not be run.
    #[error("cannot run git: {source}; install it, or add it to PATH")]
    NoGit {
        /// Why.
        source: io::Error,
    },
    /// There is no repository.
    #[error("{path} is not in a git repository: {message}")]
    NoRepository {
        /// Where it was looked for.
        path: PathBuf,
        /// What git said.
        message: String,
    },
    /// The revision does not name a commit.
    #[error("`{revision}` is not a commit, branch or tag of {repository}{hint}")]
    UnknownRevision {
        /// As it was given.
        revision: String,
        /// Where it was looked for.
        repository: String,
        /// What else may be tried.
        hint: &'static str,
    },
    /// The text cannot be a revision, an address or a commit.
    #[error("`{text}` cannot be {what}")]
    Invalid {
        /// As it was given.
        text: String,
        /// What it was to be.
        what: &'static str,
    },
    /// A git command failed.
    #[error("git {command} failed in {repository}: {message}")]
    Failed {
        /// Which.
        command: String,
        /// Where.
        repository: String,
        /// What it printed on standard error, its last lines.
        message: String,
    },
    /// The depot's own files.
    #[error(transparent)]
    Depot(#[from] DepotError),
}

/// A commit, as a change log shows it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Commit {
    /// Its full hash.
    pub hash: String,
    /// Its first line.
    pub subject: String,
    /// Its author's name.
    pub author: String,
}

/// Most commits that a change log lists.
pub const COMMITS_MAX: usize = 500;
/// How many lines of git's complaint are passed on.
const MESSAGE_LINES_MAX: usize = 5;

/// The commits that are in `to` and not in `from`, newest first, at most [`COMMITS_MAX`]. Both are full hashes.
///
/// # Errors
/// When one of them is not a hash, or not known in the repository.
pub fn commits_between(repository: &Path, from: &str, to: &str) -> Result<Vec<Commit>, GitError> {
    for text in [from, to] {
        if !is_hash(text) {
            return Err(GitError::Invalid { text: text.to_owned(), what: "a full commit hash" });
        }
    }
    let (range, count) = (format!("{from}..{to}"), format!("--max-count={COMMITS_MAX}"));
    let format = "--format=%H%x00%an%x00%s";
    let log = run(repository, &["log", "--no-show-signature", "--no-color", format, &count, &range, "--"])?;
    let commits = log.lines().filter_map(|line| {
        let mut fields = line.splitn(3, '\0').map(str::to_owned);
        Some(Commit { hash: fields.next()?, author: fields.next()?, subject: fields.next()? })
    });
    Ok(commits.collect())
}

/// The commit that is checked out.
///
/// # Errors
/// When there is no repository, or no commit in it.
pub fn head(repository: &Path) -> Result<String, GitError> {
    let commit = run(repository, &["rev-parse", "--verify", "--quiet", "HEAD^{commit}"])?;
    Ok(commit.trim().to_owned())
}

/// A repository on this machine: the user's own, or the depot's copy of a remote one.
#[derive(Debug, Clone)]
pub(crate) struct Repository {
    /// What git is run in.
    path: PathBuf,
    /// The source's address, when it is a remote one.
    remote: Option<String>,
    /// Tags that move along with what has gone out, and so name nothing.
    moving_tags: Vec<String>,
}

/// What is going to be built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resolved {
    pub(crate) commit: String,
    pub(crate) branch: Option<String>,
    pub(crate) subject: String,
    /// `git describe`, else the short hash.
    pub(crate) description: String,
    /// When it was committed, in seconds since 1970.
    pub(crate) committed_at_s: String,
}

impl Depot {
    /// Where git finds the repository of a source: the path beside the fleet file, or the depot's copy of a remote one,
    /// which is only there after a build. For [`commits_between`].
    ///
    /// # Errors
    /// When the source cannot be an address.
    pub fn repository(&self, source: &Source, project: &Path) -> Result<PathBuf, GitError> {
        Ok(Repository::of(self, source, project)?.path)
    }
}

impl Repository {
    pub(crate) fn of(depot: &Depot, source: &Source, project: &Path) -> Result<Self, GitError> {
        let address = source.git.as_str();
        if address.is_empty() || address.starts_with('-') || address.contains('\0') {
            return Err(GitError::Invalid { text: address.to_owned(), what: "the address of a repository" });
        }
        if !is_remote(address) {
            let path = project.join(address);
            return Ok(Self { path, remote: None, moving_tags: depot.moving_tags.clone() });
        }
        let name = crate::content_hash(address.as_bytes()).to_string();
        Ok(Self {
            path: depot.path().join("git").join(name),
            remote: Some(address.to_owned()),
            moving_tags: depot.moving_tags.clone(),
        })
    }

    /// Opens the source's repository; a remote one is fetched, unless it is there and has the commit already.
    pub(crate) fn open(
        depot: &Depot,
        source: &Source,
        project: &Path,
        revision: Option<&str>,
    ) -> Result<Self, GitError> {
        let repository = Self::of(depot, source, project)?;
        match &repository.remote {
            Some(address) => repository.fetch(address, revision)?,
            None => {
                let found = run(&repository.path, &["rev-parse", "--git-dir"]);
                found.map_err(|error| match error {
                    GitError::Failed { message, .. } => {
                        GitError::NoRepository { path: repository.path.clone(), message }
                    }
                    other => other,
                })?;
            }
        }
        Ok(repository)
    }

    fn fetch(&self, address: &str, revision: Option<&str>) -> Result<(), GitError> {
        let depot_error = |doing, source| DepotError::Io { doing, path: self.path.clone(), source };
        // Two builds fetch into the same copy one after the other; git's own locks would make the second one fail.
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.path.with_extension("lock"));
        let lock = lock.map_err(|source| depot_error("lock", source))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)
            .map_err(|source| depot_error("lock", source.into()))?;
        if !self.path.join("HEAD").exists() {
            fs::create_dir_all(&self.path).map_err(|source| depot_error("create", source))?;
            run(&self.path, &["init", "--quiet", "--bare"])?;
        }
        let commit = revision.filter(|revision| is_hash(revision));
        if commit.is_some_and(|commit| self.commit_of(commit).is_ok()) {
            return Ok(());
        }
        let mut arguments =
            vec!["fetch", "--quiet", "--prune", "--force", "--no-write-fetch-head", "--", address];
        arguments.extend(["+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"]);
        if revision.is_none() {
            arguments.push("+HEAD:refs/greenlight/head");
        }
        run(&self.path, &arguments)?;
        if let Some(commit) = commit
            && self.commit_of(commit).is_err()
        {
            // On no branch; servers may still give it when asked by name. If not, resolving it says so.
            drop(run(&self.path, &["fetch", "--quiet", "--no-write-fetch-head", "--", address, commit]));
        }
        Ok(())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn remote(&self) -> Option<&str> {
        self.remote.as_deref()
    }

    /// How people know it.
    pub(crate) fn title(&self) -> String {
        self.remote.clone().unwrap_or_else(|| self.path.display().to_string())
    }

    /// Finds the commit that is meant.
    pub(crate) fn resolve(&self, source: &Source, revision: Option<&str>) -> Result<Resolved, GitError> {
        let text = revision.or(source.branch.as_deref()).unwrap_or("HEAD");
        if text.is_empty() || text.starts_with('-') || text.contains('\0') {
            return Err(GitError::Invalid { text: text.to_owned(), what: "a revision" });
        }
        // A branch of the configuration is a branch, even where a tag has its name. And a clone made by a CI system has
        // many a branch only as its origin's.
        let head = ["refs/greenlight/head".to_owned()];
        let branches = [format!("refs/heads/{text}"), format!("refs/remotes/origin/{text}")];
        let names: Vec<&str> = match revision {
            None if source.branch.is_some() => branches.iter().map(String::as_str).collect(),
            None if self.remote.is_some() => head.iter().map(String::as_str).collect(),
            _ => [text].into_iter().chain(branches.iter().map(String::as_str)).collect(),
        };
        let found = names.iter().find_map(|name| Some((*name, self.commit_of(name).ok()?)));
        let Some((name, commit)) = found else {
            let hint = match &self.remote {
                Some(_) => "",
                None => "; if it is on a server only, run `git fetch` first",
            };
            return Err(GitError::UnknownRevision {
                revision: text.to_owned(),
                repository: self.title(),
                hint,
            });
        };
        let full_name = run(&self.path, &["rev-parse", "--symbolic-full-name", "--end-of-options", name]);
        let branch = full_name.ok().and_then(|name| {
            let name = name.lines().last()?.trim();
            let name = name.strip_prefix("refs/heads/").or_else(|| name.strip_prefix("refs/remotes/origin/"));
            name.map(str::to_owned)
        });
        let subject =
            run(&self.path, &["log", "-1", "--no-show-signature", "--format=%ct %s", &commit, "--"])?;
        let (committed_at_s, subject) =
            subject.trim_end().split_once(' ').unwrap_or((subject.trim_end(), ""));
        // What says only that something has gone out does not name it.
        let of_deployments = format!("--exclude={}*", crate::tag::PREFIX);
        let moving: Vec<String> = self.moving_tags.iter().map(|tag| format!("--exclude={tag}")).collect();
        let mut describe = vec!["describe", "--tags", "--always", &of_deployments];
        describe.extend(moving.iter().map(String::as_str));
        describe.push(&commit);
        let description = run(&self.path, &describe)?;
        Ok(Resolved {
            branch,
            subject: subject.to_owned(),
            committed_at_s: committed_at_s.to_owned(),
            description: description.trim().to_owned(),
            commit,
        })
    }

    fn commit_of(&self, name: &str) -> Result<String, GitError> {
        let name = format!("{name}^{{commit}}");
        let found = run(&self.path, &["rev-parse", "--verify", "--quiet", "--end-of-options", &name])?;
        Ok(found.trim().to_owned())
    }

    /// How many tracked files of the user's work tree differ from its last commit, and so are not part of what is built.
    pub(crate) fn uncommitted(&self) -> usize {
        if self.remote.is_some() {
            return 0;
        }
        // A bare repository has no work tree and answers with an error: nothing is uncommitted there.
        let status =
            run(&self.path, &["status", "--porcelain", "--untracked-files=no", "--ignore-submodules"]);
        status.map_or(0, |status| status.lines().count())
    }

    /// Checks a commit out into a new directory, with a repository of its own, so that build steps may ask git for
    /// versions. Objects are shared with the source by reference. Not `git archive`, which leaves out what
    /// `export-ignore` names and knows neither submodules nor filters such as LFS.
    pub(crate) fn check_out(&self, resolved: &Resolved, directory: &Path) -> Result<(), GitError> {
        let io = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| GitError::Depot(DepotError::Io { doing, path, source })
        };
        let common = run(&self.path, &["rev-parse", "--path-format=absolute", "--git-common-dir"])?;
        let common = Path::new(common.trim_end_matches('\n'));
        let format = run(&self.path, &["rev-parse", "--show-object-format"])?;
        fs::create_dir(directory).map_err(io("create", directory))?;
        let format = format!("--object-format={}", format.trim());
        run(directory, &["init", "--quiet", "--template=", &format])?;
        let own = directory.join(".git");
        let alternates = own.join("objects/info/alternates");
        fs::create_dir_all(own.join("objects/info")).map_err(io("create", &own))?;
        let mut objects = common.join("objects").into_os_string();
        objects.push("\n");
        fs::write(&alternates, objects.as_encoded_bytes()).map_err(io("write", &alternates))?;
        disk::absent_is_none(fs::copy(common.join("shallow"), own.join("shallow")))
            .map_err(io("copy", common))?;
        self.pass_on_tags(directory)?;
        // Submodules with relative addresses, and LFS, start from where the source itself came from.
        let origin = match &self.remote {
            Some(address) => Some(address.clone()),
            None => run(&self.path, &["config", "--get", "remote.origin.url"]).ok(),
        };
        let origin = origin.map_or_else(|| common.display().to_string(), |origin| origin.trim().to_owned());
        run(directory, &["config", "remote.origin.url", &origin])?;
        run(directory, &["checkout", "--quiet", "--detach", &resolved.commit, "--"])?;
        if directory.join(".gitmodules").exists() {
            run(directory, &["submodule", "--quiet", "update", "--init", "--recursive"])?;
        }
        Ok(())
    }

    /// Version tools look for tags.
    fn pass_on_tags(&self, directory: &Path) -> Result<(), GitError> {
        let tags =
            run(&self.path, &["for-each-ref", "--format=create %(refname) %(objectname)", "refs/tags"])?;
        let list = directory.join(".git/greenlight-tags");
        let io = |source| DepotError::Io { doing: "write", path: list.clone(), source };
        fs::write(&list, tags).map_err(io)?;
        let input = File::open(&list).map_err(io)?;
        output(command(directory, &["update-ref", "--stdin"]).stdin(input), "update-ref", directory)?;
        Ok(())
    }
}

/// Whether the text is the full hash of a commit (SHA-1 or SHA-256).
fn is_hash(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether it is the address of a server, as git tells them apart: a scheme, or a colon before the first slash.
fn is_remote(address: &str) -> bool {
    let before_slash = address.split('/').next().unwrap_or_default();
    address.contains("://") || before_slash.contains(':')
}

pub(crate) fn run(directory: &Path, arguments: &[&str]) -> Result<String, GitError> {
    let name = arguments.first().copied().unwrap_or_default();
    output(command(directory, arguments).stdin(Stdio::null()), name, directory)
}

fn output(command: &mut Command, name: &str, directory: &Path) -> Result<String, GitError> {
    if !directory.is_dir() {
        let message = "there is no such directory".to_owned();
        return Err(GitError::NoRepository { path: directory.to_owned(), message });
    }
    let output = command.output().map_err(|source| GitError::NoGit { source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let message = lines[lines.len().saturating_sub(MESSAGE_LINES_MAX)..].join("; ");
    let message = if message.is_empty() { output.status.to_string() } else { message };
    let repository = directory.display().to_string();
    Err(GitError::Failed { command: name.to_owned(), repository, message })
}

fn command(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("git");
    // Variables that a hook sets would point git at another repository than the one it is run in.
    for (name, _) in std::env::vars_os() {
        if is_repository_variable(&name) {
            command.env_remove(name);
        }
    }
    command
        .current_dir(directory)
        .args([
            "--no-optional-locks",
            "--no-pager",
            "-c",
            "core.hooksPath=/dev/null",
            "-c",
            "advice.detachedHead=false",
        ])
        .args(arguments)
        .env("LC_ALL", "C")
        // Nobody is there to answer; ssh asks nothing either unless it has a terminal or an agent of its own.
        .env("GIT_TERMINAL_PROMPT", "0");
    command
}

fn is_repository_variable(name: &OsStr) -> bool {
    const NAMES: [&str; 9] = [
        "GIT_DIR",
        "GIT_WORK_TREE",
        "GIT_INDEX_FILE",
        "GIT_COMMON_DIR",
        "GIT_OBJECT_DIRECTORY",
        "GIT_ALTERNATE_OBJECT_DIRECTORIES",
        "GIT_NAMESPACE",
        "GIT_PREFIX",
        "GIT_QUARANTINE_PATH",
    ];
    NAMES.iter().any(|known| name == *known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_from_paths() {
        for remote in
            ["https://example.org/a.git", "git@example.org:a/b.git", "host:a", "file:///srv/a", "ssh://h/a"]
        {
            assert!(is_remote(remote), "{remote}");
        }
        for path in [".", "..", "/srv/a", "../a", "./a:b", "a/b:c"] {
            assert!(!is_remote(path), "{path}");
        }
    }
}
