//! The figures for people and programs.

use serde::Serialize;

use super::Row;
use super::limit::{Limit, Medians};
use super::meter::{Cost, megabytes};
use super::payload::Payload;

/// All that was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    hosts: u8,
    rounds: u8,
    files: usize,
    bytes: u64,
    changed_files: usize,
    medians: Vec<Median>,
    limits: Vec<Judged>,
}

#[derive(Debug, Serialize)]
struct Median {
    row: Row,
    contender: &'static str,
    #[serde(flatten)]
    cost: Cost,
}

#[derive(Debug, Serialize)]
struct Judged {
    #[serde(flatten)]
    limit: Limit,
    is_kept: bool,
}

impl Report {
    pub(crate) fn new(
        hosts: u8,
        rounds: u8,
        payload: &Payload,
        medians: &Medians,
        limits: Vec<Limit>,
    ) -> Self {
        let Payload { files, bytes, changed_files, .. } = *payload;
        let medians = medians
            .iter()
            .map(|((row, contender), cost)| Median { row: *row, contender, cost: *cost })
            .collect();
        let limits = limits.into_iter().map(|limit| Judged { is_kept: limit.is_kept(), limit }).collect();
        Self { hosts, rounds, files, bytes, changed_files, medians, limits }
    }

    pub(crate) fn is_within_limits(&self) -> bool {
        self.limits.iter().all(|judged| judged.is_kept)
    }

    pub(crate) fn print(&self) {
        println!(
            "{} hosts, {} rounds, medians. The tree: {} files, {:.0} MB; {} files of the second version are others.\n",
            self.hosts,
            self.rounds,
            self.files,
            megabytes(self.bytes),
            self.changed_files
        );
        println!("| | | wall s | controller CPU s | hosts CPU s | MB on the wire | controller memory MB |");
        println!("| --- | --- | ---: | ---: | ---: | ---: | ---: |");
        for Median { row, contender, cost } in &self.medians {
            println!(
                "| {} | {contender} | {:.2} | {:.2} | {:.2} | {:.2} | {:.0} |",
                row.title(),
                cost.wall_s,
                cost.controller_s,
                cost.hosts_s,
                megabytes(cost.wire_bytes),
                megabytes(cost.memory_bytes)
            );
        }
        println!("\n| limit | at most | is | |\n| --- | ---: | ---: | --- |");
        for Judged { limit: Limit { what, most, is }, is_kept } in &self.limits {
            println!("| {what} | {most} | {is:.2} | {} |", if *is_kept { "kept" } else { "MISSED" });
        }
    }
}
