//! What holds requests back on purpose: a maintenance page, and a pause that lets them wait.

use serde::{Deserialize, Serialize};

/// Longest page, in bytes: it is kept in memory, and sent with every answer.
pub const MAX_PAGE_BYTES: usize = 64 * 1024;
/// Longest wait in a pause, in milliseconds: shorter than clients usually wait themselves.
pub const MAX_PAUSE_MS: u64 = 30_000;
/// Most requests that wait in a pause, over all cores.
pub const MAX_PAUSED: usize = 10_000;

/// Every request is answered with 503 and this page; no backend is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaintenancePage {
    /// The page.
    pub body: String,
    /// Its type.
    #[serde(default = "html")]
    pub content_type: String,
    /// When clients may ask again, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_seconds: Option<u32>,
}

fn html() -> String {
    "text/html; charset=utf-8".to_owned()
}

/// Requests wait until the pause ends; what waits too long, or would be one too many, is answered with 503.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pause {
    /// How long each request may wait, in milliseconds.
    pub max_wait_ms: u64,
    /// How many may wait at once. Rounded up to a whole number for each core.
    pub max_requests: usize,
}

impl MaintenancePage {
    /// The text says what is wrong.
    pub(crate) fn validate(&self) -> Result<(), String> {
        if self.body.len() > MAX_PAGE_BYTES {
            return Err(format!(
                "a maintenance page of {} bytes is longer than {MAX_PAGE_BYTES}",
                self.body.len()
            ));
        }
        if self.content_type.is_empty() || hyper::header::HeaderValue::from_str(&self.content_type).is_err() {
            return Err(format!("{:?} cannot be the type of a maintenance page", self.content_type));
        }
        Ok(())
    }
}

impl Pause {
    /// The text says what is wrong.
    pub(crate) fn validate(&self) -> Result<(), String> {
        if !(1..=MAX_PAUSE_MS).contains(&self.max_wait_ms) {
            return Err(format!("a pause of {} ms is not within 1 to {MAX_PAUSE_MS} ms", self.max_wait_ms));
        }
        if !(1..=MAX_PAUSED).contains(&self.max_requests) {
            return Err(format!("a pause of {} requests is not within 1 to {MAX_PAUSED}", self.max_requests));
        }
        Ok(())
    }
}
