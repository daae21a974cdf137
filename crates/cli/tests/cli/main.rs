//! The program as people and scripts meet it: what it prints, its exit codes, and whole rollouts on hosts of this
//! machine, with the real agent and real processes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod check;
mod demo;
mod documents;
mod elsewhere;
mod gates;
mod help;
mod init;
mod migration;
mod operator;
mod release;
mod rollout;
mod secret;
mod site;
mod verdict;
