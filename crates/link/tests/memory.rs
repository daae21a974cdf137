//! What the controller holds while many hosts take a large release: a program of its own, whose memory nothing else uses.

#![expect(clippy::unwrap_used, reason = "these are tests")]

#[expect(dead_code, reason = "the other tests use the rest of it")]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read as _};
use std::sync::Arc;

use greenlight_link::connection::{Connection, Lacking, Parcel, Parcels, ReleaseSource};
use greenlight_link::frame::Encoding;
use greenlight_link::message::{Reply, Request};
use greenlight_model::fleet::{LinkKind, ManagerKind};
use greenlight_model::host::{InstanceSpec, ReleaseMark};
use greenlight_model::id::{ContentHash, ReleaseId};
use support::{PATIENCE, host, options};

const HOSTS: usize = 20;
const PARCELS: usize = 6;
const PARCEL_BYTES: u64 = 4 << 20;
/// Three batches of 64 KiB for each host, and as much again for what threads and pipes need. Parcels as a whole would be 80 MiB.
const GROWTH_KIB_MAX: u64 = HOSTS as u64 * 2 * 3 * 64 + 8 * 1024;

/// Every parcel is the same bytes, made as they are read.
struct Large {
    hash: ContentHash,
}

impl ReleaseSource for Large {
    fn manifest(&self) -> io::Result<Parcel> {
        let content = PARCELS.to_string().into_bytes();
        let hash = ContentHash::from_bytes(*blake3::hash(&content).as_bytes());
        let bytes = content.len() as u64;
        Ok(Parcel {
            hash,
            encoding: Encoding::Manifest,
            objects: 0,
            bytes,
            content: Box::new(io::Cursor::new(content)),
        })
    }

    fn parcels(&self, _: Lacking) -> io::Result<Box<dyn Parcels>> {
        Ok(Box::new(Left { hash: self.hash, parcels: PARCELS as u64 }))
    }
}

struct Left {
    hash: ContentHash,
    parcels: u64,
}

impl Parcels for Left {
    fn next(&mut self) -> io::Result<Option<Parcel>> {
        let Some(left) = self.parcels.checked_sub(1) else { return Ok(None) };
        self.parcels = left;
        let content = Box::new(io::repeat(7).take(PARCEL_BYTES));
        Ok(Some(Parcel {
            hash: self.hash,
            encoding: Encoding::Raw,
            objects: 1,
            bytes: PARCEL_BYTES,
            content,
        }))
    }

    fn left_bytes(&self) -> u64 {
        self.parcels * PARCEL_BYTES
    }
}

/// A line of what the system says of this process's memory, in KiB.
fn memory_kib(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_held_does_not_grow_with_what_is_sent() {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(io::repeat(7).take(PARCEL_BYTES)).unwrap();
    let release = Arc::new(Large { hash: ContentHash::from_bytes(*hasher.finalize().as_bytes()) });
    let mut connections = Vec::new();
    for _ in 0..HOSTS {
        connections.push(Connection::open(&host(), &LinkKind::Local, &options()).await.unwrap());
    }
    let before = memory_kib("VmRSS");
    let stages: Vec<_> = connections
        .into_iter()
        .map(|connection| {
            let release = Arc::clone(&release);
            tokio::spawn(async move { connection.stage(stage(), release, PATIENCE, |_| {}, |_| {}).await })
        })
        .collect();
    for stage in stages {
        let sent = format!("{PARCELS} objects, {} bytes", PARCELS as u64 * PARCEL_BYTES);
        assert_eq!(stage.await.unwrap().unwrap(), Reply::Output(sent));
    }
    let growth = memory_kib("VmHWM").saturating_sub(before);
    assert!(growth <= GROWTH_KIB_MAX, "{growth} KiB more than before, of {GROWTH_KIB_MAX}");
}

fn stage() -> Request {
    Request::Stage {
        spec: InstanceSpec {
            service: "web".parse().unwrap(),
            environment: "test".parse().unwrap(),
            host: host(),
            root: "/nowhere".to_owned(),
            manager: ManagerKind::Agent,
            shared: Vec::new(),
            prepare: Vec::new(),
            processes: BTreeMap::new(),
            profiles: BTreeMap::new(),
            secrets: BTreeSet::new(),
        },
        release: ReleaseMark {
            id: ReleaseId::from_bytes([1; 32]),
            label: String::new(),
            commit: String::new(),
        },
        rollout: "test-1".parse().unwrap(),
        secrets: BTreeMap::new(),
    }
}
