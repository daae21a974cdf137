//! The manifest of a release, up to the tree on the disk: whatever is placed lies in the release's directory, leads nowhere
//! outside and has the bytes that the manifest names; whatever is refused leaves nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use greenlight_depot::host::HostDepot;
use greenlight_depot::{Encoding, content_hash};
use greenlight_model::id::ReleaseId;
use greenlight_model::manifest::{Entry, Manifest};

use super::{Target, demand};
use crate::chance::Chance;

pub(super) const TARGET: Target = Target {
    name: "manifest",
    about: "a release's manifest, placed",
    words: &[
        "\"entries\"",
        "\"kind\"",
        "\"directory\"",
        "\"file\"",
        "\"symlink\"",
        "\"target\"",
        "\"size\"",
        "\"executable\"",
        "\"hash\"",
        "\"chunks\"",
        "\"..\"",
        "\"../..\"",
        "\"/etc/passwd\"",
        "\"a/../../b\"",
        "\".\"",
        "\"a\"",
        "\"a/b\"",
        "\"a/b/c\"",
        "\"./a\"",
        "\"a//b\"",
        "\"\"",
        "\"a/up\"",
        "\"up/../out\"",
        "\"loop\"",
        "\"../../../outside\"",
    ],
    make: Some(make),
    mend: None,
    feed,
    bytes_fixed: 4 << 20,
    bytes_per_byte: 256,
};

/// The bytes that a manifest of the corpus may name, by their true hashes.
const CONTENTS: [&[u8]; 3] = [b"", b"a\n", b"hello\n"];
/// More entries are checked, but not placed: the disk would be what is measured.
const PLACED_MAX: usize = 300;
const OUTSIDE: &str = "untouched";

/// A manifest of few names, so that entries lie under each other and links lead to one another.
fn make(chance: &mut Chance) -> Vec<u8> {
    const NAMES: [&str; 8] = ["a", "b", "c", "a", "b", "..", ".", ""];
    const ENTRIES_MAX: usize = 12;
    let path = |chance: &mut Chance, names: &[&str]| {
        let parts: Vec<&str> = (0..=chance.below(4)).filter_map(|_| chance.pick(names).copied()).collect();
        parts.join("/")
    };
    let entries: BTreeMap<String, Entry> = (0..=chance.below(ENTRIES_MAX))
        .map(|_| {
            // Most paths are good: one that is not refuses the whole.
            let names = if chance.once_in(40) { &NAMES[..] } else { &NAMES[..3] };
            let path_here = path(chance, names);
            let content = chance.pick(&CONTENTS).copied().unwrap_or_default();
            let size = if chance.once_in(40) { chance.number() } else { content.len() as u64 };
            let entry = match chance.below(4) {
                0 => Entry::Directory,
                1 => Entry::File {
                    size,
                    executable: chance.once_in(2),
                    hash: content_hash(content),
                    chunks: Vec::new(),
                },
                _ => Entry::Symlink { target: path(chance, &NAMES) },
            };
            (path_here, entry)
        })
        .collect();
    serde_json::to_vec(&Manifest { entries }).unwrap_or_default()
}

/// Where releases are placed: beside a directory that must stay as it is.
struct Ground {
    directory: tempfile::TempDir,
    depot: HostDepot,
}

thread_local! {
    static GROUND: Result<Ground, String> = Ground::new();
}

fn feed(input: &[u8]) -> Result<bool, String> {
    let Ok(manifest) = serde_json::from_slice::<Manifest>(input) else { return Ok(false) };
    if greenlight_depot::manifest::check(&manifest).is_ok() {
        let written =
            serde_json::to_vec(&manifest).map_err(|error| format!("it cannot be written: {error}"))?;
        let again: Manifest = serde_json::from_slice(&written).map_err(|error| error.to_string())?;
        demand(again == manifest, || "it is read again as another".to_owned())?;
    }
    if manifest.entries.len() > PLACED_MAX {
        return Ok(false);
    }
    GROUND.with(|ground| match ground {
        Ok(ground) => ground.place(&manifest),
        Err(why) => Err(format!("no place for releases: {why}")),
    })
}

impl Ground {
    fn new() -> Result<Self, String> {
        // In memory where there is a file system for that: placing syncs.
        let memory = Path::new("/dev/shm");
        let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let directory = tempfile::Builder::new().prefix("greenlight-fuzz-").tempdir_in(base);
        let directory = directory.map_err(|error| error.to_string())?;
        fs::create_dir(directory.path().join("outside")).map_err(|error| error.to_string())?;
        fs::write(directory.path().join("outside/file"), OUTSIDE).map_err(|error| error.to_string())?;
        let depot = HostDepot::open(&directory.path().join("srv")).map_err(|error| error.to_string())?;
        for content in CONTENTS {
            let received = depot.receive(content_hash(content), Encoding::Raw, content);
            received.map_err(|error| error.to_string())?;
        }
        Ok(Self { directory, depot })
    }

    fn place(&self, manifest: &Manifest) -> Result<bool, String> {
        let id = ReleaseId::from_bytes([7; 32]);
        let release = self.depot.release_directory(id);
        let placed = self.depot.place(id, manifest);
        let verdict = match &placed {
            Ok(()) => lies_inside(&release, manifest),
            Err(_) => demand(!release.exists(), || "it was refused, and something is there".to_owned()),
        };
        let verdict = verdict.and_then(|()| self.is_untouched());
        // A directory of any name may have come to be: what is there now must not be taken for the next one's.
        if release.exists() {
            fs::remove_dir_all(&release).map_err(|error| format!("cannot be removed again: {error}"))?;
        }
        verdict.map(|()| placed.is_ok())
    }

    fn is_untouched(&self) -> Result<(), String> {
        let root = self.directory.path();
        let names = names(root)?;
        demand(names == BTreeSet::from(["outside".into(), "srv".into()]), || {
            format!("beside the service there is now {names:?}")
        })?;
        let service = self::names(&root.join("srv"))?;
        let expected = [".greenlight", "releases", "shared"].map(PathBuf::from);
        demand(service == BTreeSet::from(expected), || format!("in the service there is now {service:?}"))?;
        let outside = fs::read_to_string(root.join("outside/file")).map_err(|error| error.to_string())?;
        demand(outside == OUTSIDE && self::names(&root.join("outside"))?.len() == 1, || {
            "something outside was changed".to_owned()
        })
    }
}

fn lies_inside(release: &Path, manifest: &Manifest) -> Result<(), String> {
    for (path, entry) in &manifest.entries {
        let is_plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
        demand(is_plain, || format!("`{path}` was placed"))?;
        let full = release.join(path);
        let found = fs::symlink_metadata(&full).map_err(|error| format!("`{path}` is not there: {error}"))?;
        match entry {
            Entry::Directory => demand(found.is_dir(), || format!("`{path}` is no directory"))?,
            Entry::File { size, hash, .. } => {
                demand(found.is_file() && found.len() == *size, || format!("`{path}` is another file"))?;
                let bytes = fs::read(&full).map_err(|error| error.to_string())?;
                demand(content_hash(&bytes) == *hash, || format!("`{path}` has other bytes"))?;
            }
            Entry::Symlink { .. } => {
                demand(found.is_symlink(), || format!("`{path}` is no link"))?;
                // As the system follows it; one that leads nowhere is allowed.
                if let Ok(leads_to) = fs::canonicalize(&full) {
                    let inside = fs::canonicalize(release).map_err(|error| error.to_string())?;
                    demand(leads_to.starts_with(&inside), || {
                        format!("`{path}` leads to {}", leads_to.display())
                    })?;
                }
            }
        }
    }
    Ok(())
}

fn names(directory: &Path) -> Result<BTreeSet<PathBuf>, String> {
    let entries = fs::read_dir(directory).map_err(|error| error.to_string())?;
    entries
        .map(|entry| entry.map(|entry| PathBuf::from(entry.file_name())).map_err(|error| error.to_string()))
        .collect()
}
