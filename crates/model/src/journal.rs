//! What people saw and have to do around deployments: issues, and actions that may wait for a green light.
//!
//! Guarantees: an action that waits for a light is never recorded as done before it, whoever writes the record; what is
//! settled is not settled twice. Who may give a light or do an action is judged by who writes (roles are the fleet's).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Timestamp;
use crate::id::{EnvironmentName, RoleName, RolloutId};

/// What is written into the journal. An issue or action is known by the number of the record that opened it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "entry")]
pub enum Entry {
    /// Somebody saw something.
    IssueOpened {
        /// Where.
        environment: EnvironmentName,
        /// In which rollout, when it belongs to one.
        rollout: Option<RolloutId>,
        /// Which part of the report it belongs to.
        section: Section,
        /// What was seen.
        what: String,
        /// What it did.
        impact: Impact,
    },
    /// It is settled.
    IssueResolved {
        /// Which.
        issue: u64,
        /// How.
        how: String,
    },
    /// Somebody has to do something.
    ActionAdded {
        /// Where.
        environment: EnvironmentName,
        /// What.
        what: String,
        /// Who does it: a user, or whoever holds the role of that name.
        owner: String,
        /// Whose green light it waits for.
        waits_for: Option<RoleName>,
        /// What must be so before the light is given.
        condition: String,
        /// The issue that it is for.
        issue: Option<u64>,
    },
    /// The light is green.
    ActionLit {
        /// Which.
        action: u64,
    },
    /// It is done.
    ActionDone {
        /// Which.
        action: u64,
        /// What came of it.
        note: String,
    },
}

/// A part of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Section {
    /// What went wrong while deploying.
    Deployment,
    /// What testing found.
    Testing,
    /// The rest.
    Miscellaneous,
}

/// What an issue did to the deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Impact {
    /// Nothing.
    Nil,
    /// It went on, with less.
    Degraded,
    /// It did not go on.
    Blocker,
    /// It did not go on, and that is settled.
    BlockerResolved,
}

impl Impact {
    /// As reports write it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Nil => "nil",
            Self::Degraded => "degraded",
            Self::Blocker => "blocker",
            Self::BlockerResolved => "blocker resolved",
        }
    }
}

/// Who did something, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// Who: `user@machine`.
    pub by: String,
    /// When.
    pub at: Timestamp,
}

/// An issue as folded from its entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issue {
    /// Where.
    pub environment: EnvironmentName,
    /// In which rollout, when it belongs to one.
    pub rollout: Option<RolloutId>,
    /// Which part of the report it belongs to.
    pub section: Section,
    /// What was seen.
    pub what: String,
    /// What it did; a blocker that is settled is a resolved one.
    pub impact: Impact,
    /// Who saw it.
    pub opened: Signature,
    /// How it was settled, and by whom, when it was.
    pub resolved: Option<(String, Signature)>,
}

/// An action of a person, as folded from its entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Where.
    pub environment: EnvironmentName,
    /// What.
    pub what: String,
    /// Who does it: a user, or whoever holds the role of that name.
    pub owner: String,
    /// Whose green light it waits for.
    pub waits_for: Option<RoleName>,
    /// What must be so before the light is given.
    pub condition: String,
    /// The issue that it is for.
    pub issue: Option<u64>,
    /// Who added it.
    pub added: Signature,
    /// Who gave the light, when somebody did.
    pub lit: Option<Signature>,
    /// What came of it, and who did it, when somebody did.
    pub done: Option<(String, Signature)>,
}

/// Issues and actions, by the number of the record that opened each.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Journal {
    /// What was seen.
    pub issues: BTreeMap<u64, Issue>,
    /// What is to be done.
    pub tasks: BTreeMap<u64, Task>,
}

/// Why an entry cannot follow the ones before it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IllegalEntry {
    /// There is no such issue.
    #[error("there is no issue {0}")]
    NoIssue(u64),
    /// It is settled.
    #[error("issue {0} is resolved already")]
    ResolvedTwice(u64),
    /// There is no such action.
    #[error("there is no action {0}")]
    NoAction(u64),
    /// It waits for no light, or has it.
    #[error("action {0} waits for no light")]
    NoLightWanted(u64),
    /// Its light is not green.
    #[error(
        "action {action} waits for the green light of {role}, and that is not given; nothing may be done yet"
    )]
    NoLight {
        /// Which.
        action: u64,
        /// Whose.
        role: RoleName,
    },
    /// It is done.
    #[error("action {0} is done already")]
    DoneTwice(u64),
}

impl Task {
    /// Whether it may be done now.
    #[must_use]
    pub fn may_be_done(&self) -> bool {
        self.waits_for.is_none() || self.lit.is_some()
    }
}

impl Journal {
    /// Takes one more entry.
    ///
    /// # Errors
    /// When it cannot follow; the journal is unchanged then.
    pub fn apply(&mut self, seq: u64, entry: &Entry, signature: Signature) -> Result<(), IllegalEntry> {
        match entry.clone() {
            Entry::IssueOpened { environment, rollout, section, what, impact } => {
                let opened = signature;
                let issue = Issue { environment, rollout, section, what, impact, opened, resolved: None };
                self.issues.insert(seq, issue);
            }
            Entry::IssueResolved { issue: number, how } => {
                let issue = self.issues.get_mut(&number).ok_or(IllegalEntry::NoIssue(number))?;
                if issue.resolved.is_some() {
                    return Err(IllegalEntry::ResolvedTwice(number));
                }
                if issue.impact == Impact::Blocker {
                    issue.impact = Impact::BlockerResolved;
                }
                issue.resolved = Some((how, signature));
            }
            Entry::ActionAdded { environment, what, owner, waits_for, condition, issue } => {
                if let Some(number) = issue
                    && !self.issues.contains_key(&number)
                {
                    return Err(IllegalEntry::NoIssue(number));
                }
                let added = signature;
                let task = Task {
                    environment,
                    what,
                    owner,
                    waits_for,
                    condition,
                    issue,
                    added,
                    lit: None,
                    done: None,
                };
                self.tasks.insert(seq, task);
            }
            Entry::ActionLit { action } => {
                let task = self.tasks.get_mut(&action).ok_or(IllegalEntry::NoAction(action))?;
                if task.may_be_done() {
                    return Err(IllegalEntry::NoLightWanted(action));
                }
                task.lit = Some(signature);
            }
            Entry::ActionDone { action, note } => {
                let task = self.tasks.get_mut(&action).ok_or(IllegalEntry::NoAction(action))?;
                if let Some(role) = task.waits_for.clone().filter(|_| task.lit.is_none()) {
                    return Err(IllegalEntry::NoLight { action, role });
                }
                if task.done.is_some() {
                    return Err(IllegalEntry::DoneTwice(action));
                }
                task.done = Some((note, signature));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(journal: &mut Journal, seq: u64, entry: &Entry) -> Result<(), IllegalEntry> {
        let before = journal.clone();
        let signature = Signature { by: "ann@desk".to_owned(), at: Timestamp::UNIX_EPOCH };
        let result = journal.apply(seq, entry, signature);
        assert!(result.is_ok() || *journal == before, "what is refused changes nothing");
        result
    }

    fn task(waits_for: Option<&str>) -> Entry {
        Entry::ActionAdded {
            environment: "production".parse().unwrap(),
            what: "make the queues anew".to_owned(),
            owner: "database".to_owned(),
            waits_for: waits_for.map(|role| role.parse().unwrap()),
            condition: "the old ones are empty".to_owned(),
            issue: None,
        }
    }

    #[test]
    fn an_action_is_not_done_before_its_light() {
        let mut journal = Journal::default();
        let done = || Entry::ActionDone { action: 1, note: String::new() };
        assert_eq!(write(&mut journal, 1, &done()), Err(IllegalEntry::NoAction(1)));
        write(&mut journal, 1, &task(Some("operator"))).unwrap();
        let role = "operator".parse().unwrap();
        assert_eq!(write(&mut journal, 2, &done()), Err(IllegalEntry::NoLight { action: 1, role }));
        write(&mut journal, 2, &Entry::ActionLit { action: 1 }).unwrap();
        assert_eq!(
            write(&mut journal, 3, &Entry::ActionLit { action: 1 }),
            Err(IllegalEntry::NoLightWanted(1))
        );
        write(&mut journal, 3, &done()).unwrap();
        assert_eq!(write(&mut journal, 4, &done()), Err(IllegalEntry::DoneTwice(1)));
        write(&mut journal, 4, &task(None)).unwrap();
        assert_eq!(
            write(&mut journal, 5, &Entry::ActionLit { action: 4 }),
            Err(IllegalEntry::NoLightWanted(4))
        );
        write(&mut journal, 5, &Entry::ActionDone { action: 4, note: String::new() }).unwrap();
    }

    #[test]
    fn a_blocker_that_is_settled_is_a_resolved_one() {
        let mut journal = Journal::default();
        let opened = Entry::IssueOpened {
            environment: "production".parse().unwrap(),
            rollout: None,
            section: Section::Testing,
            what: "no mail".to_owned(),
            impact: Impact::Blocker,
        };
        write(&mut journal, 7, &opened).unwrap();
        let resolved = |issue| Entry::IssueResolved { issue, how: "queue restarted".to_owned() };
        write(&mut journal, 8, &resolved(7)).unwrap();
        assert_eq!(journal.issues[&7].impact, Impact::BlockerResolved);
        assert_eq!(write(&mut journal, 9, &resolved(7)), Err(IllegalEntry::ResolvedTwice(7)));
        assert_eq!(write(&mut journal, 9, &resolved(8)), Err(IllegalEntry::NoIssue(8)));
    }
}
