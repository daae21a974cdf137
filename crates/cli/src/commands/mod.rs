//! One module per command, or per few that are one thing.

pub(crate) mod adopt;
pub(crate) mod agent;
pub(crate) mod build;
pub(crate) mod check;
pub(crate) mod completions;
pub(crate) mod deploy;
pub(crate) mod drift;
pub(crate) mod evidence;
pub(crate) mod exec;
pub(crate) mod foresight;
pub(crate) mod gates;
pub(crate) mod history;
pub(crate) mod hosts;
pub(crate) mod init;
pub(crate) mod journal;
pub(crate) mod logs;
pub(crate) mod operate;
pub(crate) mod preflight;
pub(crate) mod releases;
pub(crate) mod report;
pub(crate) mod roll;
pub(crate) mod router;
pub(crate) mod status;
pub(crate) mod verdict;
