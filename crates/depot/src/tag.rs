//! Tags in git for what has gone out: one that stays, named by its day, and one that moves along where that is wanted.

use std::path::Path;

use greenlight_model::fleet::{Source, Tagging};
use jiff::Timestamp;

use crate::depot::Depot;
use crate::git::{GitError, Repository, run};

/// What the names of tags that stay begin with.
pub(crate) const PREFIX: &str = "deploy-";
/// Most tags of one day: beyond that somebody tags in a loop.
const OF_DAY_MAX: usize = 1_000;

/// What was tagged.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Tagged {
    /// The tag that stays.
    pub name: String,
    /// Where the tags were pushed to, when that was asked for.
    pub pushed_to: Option<String>,
}

impl Depot {
    /// Tags a commit of a source: `deploy-YYYY-MM-DD` by the day in UTC, with `-2`, `-3` … where another commit has the name, and
    /// the moving tag. What has its tag of the day keeps that one. Then both are pushed, where that is asked for.
    ///
    /// # Errors
    /// When git refuses. Tags that were made by then are there.
    pub fn tag(
        &self,
        source: &Source,
        project: &Path,
        commit: &str,
        at: Timestamp,
        tagging: &Tagging,
    ) -> Result<Tagged, GitError> {
        let repository = Repository::of(self, source, project)?;
        let path = repository.path();
        let day = at.strftime("%Y-%m-%d").to_string();
        let name = made(path, &format!("{PREFIX}{day}"), commit)?;
        if let Some(moving) = &tagging.moving {
            run(path, &["tag", "--force", "--end-of-options", moving, commit])?;
        }
        let mut pushed_to = None;
        if let Some(remote) = &tagging.push {
            // A copy of a remote repository has no name for it but its address.
            let to = repository.remote().unwrap_or(remote);
            let mut references = vec![format!("refs/tags/{name}")];
            references.extend(tagging.moving.iter().map(|moving| format!("+refs/tags/{moving}")));
            let mut arguments = vec!["push", "--quiet", "--no-verify", "--end-of-options", to];
            arguments.extend(references.iter().map(String::as_str));
            run(path, &arguments)?;
            pushed_to = Some(to.to_owned());
        }
        Ok(Tagged { name, pushed_to })
    }
}

/// Makes the tag under the first name that is free, or that stands for the commit already.
fn made(repository: &Path, base: &str, commit: &str) -> Result<String, GitError> {
    let mut refused = None;
    for number in 1..=OF_DAY_MAX {
        let name = if number == 1 { base.to_owned() } else { format!("{base}-{number}") };
        // git refuses a name that is taken, so that two who tag at once never get the same one.
        match run(repository, &["tag", "--end-of-options", &name, commit]) {
            Ok(_) => return Ok(name),
            Err(error) => {
                let reference = format!("refs/tags/{name}^{{commit}}");
                match run(repository, &["rev-parse", "--verify", "--quiet", "--end-of-options", &reference]) {
                    Ok(found) if found.trim() == commit => return Ok(name),
                    Ok(_) => refused = Some(error),
                    // It is not taken: git has refused for another reason.
                    Err(_) => return Err(error),
                }
            }
        }
    }
    Err(refused
        .unwrap_or(GitError::Invalid { text: base.to_owned(), what: "a tag of a day with fewer tags" }))
}
