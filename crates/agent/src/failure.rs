//! How the agent says that something failed: one message that is complete in itself, and whose fault it looks like.

use std::error::Error;

use greenlight_link::message::AgentError;
use greenlight_model::action::Blame;

/// What a part of a request comes to.
pub(crate) type Outcome<T> = Result<T, AgentError>;

/// Most lines of a failed step's output that travel with its error.
pub(crate) const OUTPUT_LINES_MAX: usize = 20;

/// The host refused or lacks something.
pub(crate) fn host(message: impl Into<String>) -> AgentError {
    AgentError { message: message.into(), blame: Blame::Host, output: Vec::new() }
}

/// The release does not work.
pub(crate) fn release(message: impl Into<String>) -> AgentError {
    AgentError { message: message.into(), blame: Blame::Release, output: Vec::new() }
}

/// It may work when it is tried again.
pub(crate) fn passing(message: impl Into<String>) -> AgentError {
    AgentError { message: message.into(), blame: Blame::Passing, output: Vec::new() }
}

/// Adds what was being done to an error of the system, and blames the host.
pub(crate) trait OrHost<T> {
    /// `doing` completes the sentence "cannot …".
    fn or_host(self, doing: impl FnOnce() -> String) -> Outcome<T>;
}

impl<T, E: Error> OrHost<T> for Result<T, E> {
    fn or_host(self, doing: impl FnOnce() -> String) -> Outcome<T> {
        self.map_err(|error| host(format!("cannot {}: {}", doing(), with_sources(&error))))
    }
}

/// An error with everything that caused it, in one line.
pub(crate) fn with_sources(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors already print their cause; saying it twice helps nobody.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
