//! Processes that we started and no record names: whoever started them was killed before it could write them down. They are known by
//! the environment that they were started with, and by working in a release of the same root.

use std::fs;

use greenlight_model::id::{ProcessName, ServiceName};

use crate::failure::{OrHost as _, Outcome};
use crate::layout::Layout;
use crate::process::{self, Identity};

/// The leaders of process groups that were started as this process of this service, on the given port where one is given.
pub(crate) fn find(
    layout: &Layout,
    service: &ServiceName,
    process: &ProcessName,
    port: Option<u16>,
) -> Outcome<Vec<Identity>> {
    let Ok(releases) = fs::canonicalize(layout.releases()) else { return Ok(Vec::new()) };
    let mut wanted = vec![format!("GREENLIGHT_SERVICE={service}"), format!("GREENLIGHT_PROCESS={process}")];
    wanted.extend(port.map(|port| format!("PORT={port}")));
    let all = process::all().or_host(|| "look at processes".to_owned())?;
    let leaders = all.iter().filter(|stat| stat.group == stat.pid).map(process::Stat::identity);
    Ok(leaders
        .filter(|leader| {
            // One that may not be looked into was started by another account, or has ended.
            let works_there = leader.directory().is_ok_and(|directory| directory.starts_with(&releases));
            works_there && has_variables(*leader, &wanted)
        })
        .collect())
}

fn has_variables(identity: Identity, wanted: &[String]) -> bool {
    let Ok(environment) = fs::read(format!("/proc/{}/environ", identity.pid)) else { return false };
    wanted
        .iter()
        .all(|variable| environment.split(|byte| *byte == 0).any(|found| found == variable.as_bytes()))
}
