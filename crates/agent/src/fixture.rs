//! Values that the unit tests of several modules start from.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use greenlight_model::fleet::{ManagerKind, Process};
use greenlight_model::host::{Desired, InstanceSpec, ReleaseMark};
use greenlight_model::id::{Generation, ReleaseId};

pub(crate) fn mark(digit: u8, label: &str) -> ReleaseMark {
    ReleaseMark {
        id: ReleaseId::from_bytes([digit; 32]),
        label: label.to_owned(),
        commit: format!("{digit:02x}").repeat(20),
    }
}

pub(crate) fn process(name: &str, argv: &[&str]) -> Process {
    Process {
        name: name.parse().unwrap(),
        argv: argv.iter().map(|argument| (*argument).to_owned()).collect(),
        port: None,
        health: None,
        variables: BTreeMap::new(),
        stdout: format!("logs/{name}.stdout"),
        stderr: format!("logs/{name}.stderr"),
        profiles: BTreeMap::new(),
        user: None,
        smoke: None,
        start_timeout: Duration::from_secs(20),
        stop_timeout: Duration::from_secs(10),
        stop_argv: None,
    }
}

pub(crate) fn spec(root: &str, processes: impl IntoIterator<Item = Process>) -> InstanceSpec {
    InstanceSpec {
        service: "web".parse().unwrap(),
        environment: "test".parse().unwrap(),
        host: "host1".parse().unwrap(),
        root: root.to_owned(),
        manager: ManagerKind::Agent,
        shared: Vec::new(),
        prepare: Vec::new(),
        processes: processes.into_iter().map(|process| (process.name.clone(), process)).collect(),
        profiles: BTreeMap::new(),
        secrets: BTreeSet::new(),
    }
}

pub(crate) fn desired(generation: u64, rollout: &str) -> Desired {
    Desired {
        generation: Generation(generation),
        rollout: rollout.parse().unwrap(),
        release: Some(mark(1, "v1")),
        spec: spec("/srv/web", [process("web", &["app"])]),
    }
}
