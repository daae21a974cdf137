//! What the tests of this crate share: trees on the disk, and how they look.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::Mutex;

use greenlight_model::host::ReleaseMark;
use greenlight_model::id::{ContentHash, ReleaseId};
use greenlight_model::manifest::Manifest;

use crate::DepotError;
use crate::host::HostDepot;
use crate::object::EncodedObject;
use crate::scan::scan_into;

/// What to put at a path.
pub(crate) enum Node<'a> {
    File(&'a [u8]),
    Executable(&'a [u8]),
    Link(&'a str),
    Empty,
}

/// Writes a tree; what is there already is replaced.
pub(crate) fn write_tree(directory: &Path, nodes: &[(&str, Node<'_>)]) {
    for (path, node) in nodes {
        let path = directory.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        drop(fs::remove_file(&path));
        match node {
            Node::File(data) | Node::Executable(data) => {
                fs::write(&path, data).unwrap();
                let mode = if matches!(node, Node::File(_)) { 0o644 } else { 0o755 };
                fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            }
            Node::Link(target) => symlink(target, &path).unwrap(),
            Node::Empty => fs::create_dir_all(&path).unwrap(),
        }
    }
}

/// A tree as a user of it sees it: kind, whether it is executable, content by path.
pub(crate) fn look(directory: &Path) -> BTreeMap<String, String> {
    let mut seen = BTreeMap::new();
    for entry in walkdir::WalkDir::new(directory).min_depth(1) {
        let entry = entry.unwrap();
        let path = entry.path().strip_prefix(directory).unwrap().to_str().unwrap().to_owned();
        let metadata = entry.path().symlink_metadata().unwrap();
        let is_executable = metadata.permissions().mode() & 0o111 != 0;
        let what = if metadata.is_symlink() {
            format!("-> {}", fs::read_link(entry.path()).unwrap().display())
        } else if metadata.is_dir() {
            "directory".to_owned()
        } else {
            let hash = crate::content_hash(&fs::read(entry.path()).unwrap());
            format!("file {} {hash}", if is_executable { "x" } else { "-" })
        };
        seen.insert(path, what);
    }
    seen
}

/// Bytes that do not compress and that content-defined chunking cuts.
pub(crate) fn noise(seed: u8, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

/// A scanned tree with its objects at hand.
pub(crate) struct Sent {
    pub(crate) manifest: Manifest,
    pub(crate) objects: HashMap<ContentHash, Vec<u8>>,
}

impl Sent {
    pub(crate) fn scan(directory: &Path) -> Self {
        let objects = Mutex::new(HashMap::new());
        let manifest = scan_into(directory, &[], &[], &|hash, data| {
            objects.lock().unwrap().insert(hash, data.to_vec());
            Ok(())
        });
        Self { manifest: manifest.unwrap(), objects: objects.into_inner().unwrap() }
    }

    /// Sends what the host lacks; returns how many objects that were.
    pub(crate) fn send(&self, host: &HostDepot) -> usize {
        let missing = host.missing(&self.manifest).unwrap();
        for hash in &missing {
            let object = EncodedObject::encode(&self.objects[hash]).unwrap();
            host.receive(*hash, object.encoding, &object.data).unwrap();
        }
        missing.len()
    }

    /// Brings the release there, complete.
    pub(crate) fn stage(&self, host: &HostDepot, n: u8) -> Result<usize, DepotError> {
        let sent = self.send(host);
        host.place(release(n), &self.manifest)?;
        host.complete(&mark(n), &self.manifest)?;
        Ok(sent)
    }
}

pub(crate) fn release(n: u8) -> ReleaseId {
    ReleaseId::from_bytes([n; 32])
}

pub(crate) fn mark(n: u8) -> ReleaseMark {
    ReleaseMark { id: release(n), label: format!("v{n}"), commit: "c".repeat(40) }
}

/// A git repository with a project in it.
pub(crate) struct Project {
    pub(crate) directory: tempfile::TempDir,
}

impl Project {
    /// A repository with one commit of these files, on branch `main`.
    pub(crate) fn new(nodes: &[(&str, Node<'_>)]) -> Self {
        let project = Self { directory: tempfile::tempdir().unwrap() };
        fs::create_dir(project.path()).unwrap();
        project.git(&["init", "--quiet", "--initial-branch=main"]);
        project.commit("first", nodes);
        project
    }

    pub(crate) fn path(&self) -> std::path::PathBuf {
        self.directory.path().join("project")
    }

    pub(crate) fn depot(&self) -> crate::Depot {
        crate::Depot::open(&self.directory.path().join("depot")).unwrap()
    }

    /// Commits these files; returns the hash.
    pub(crate) fn commit(&self, subject: &str, nodes: &[(&str, Node<'_>)]) -> String {
        write_tree(&self.path(), nodes);
        self.git(&["add", "--all", "--force"]);
        self.git(&["commit", "--quiet", "--allow-empty", "--message", subject]);
        self.git(&["rev-parse", "HEAD"])
    }

    pub(crate) fn git(&self, arguments: &[&str]) -> String {
        git(&self.path(), arguments)
    }
}

/// Runs git untouched by whoever's configuration.
pub(crate) fn git(directory: &Path, arguments: &[&str]) -> String {
    let output = std::process::Command::new("git")
        .current_dir(directory)
        .args(["-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "commit.gpgSign=false"])
        .args(arguments)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_SYSTEM", "/dev/null")
        .output()
        .unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A service that is the whole repository beside the fleet file, built by these steps.
pub(crate) fn service(steps: &[&str]) -> greenlight_model::fleet::Service {
    greenlight_model::fleet::Service {
        name: "web".parse().unwrap(),
        source: greenlight_model::fleet::Source { git: ".".to_owned(), branch: None, directory: None },
        build: steps.iter().map(|step| (*step).to_owned()).collect(),
        include: Vec::new(),
        exclude: Vec::new(),
        shared: Vec::new(),
        prepare: Vec::new(),
        requires: greenlight_model::requirements::Requirements::default(),
        migrate: None,
        processes: BTreeMap::new(),
        secrets: std::collections::BTreeSet::new(),
        keep_releases: 3,
    }
}

/// Builds at a time that is told apart from others by `at_s`.
pub(crate) fn build_at(
    project: &Project,
    service: &greenlight_model::fleet::Service,
    revision: Option<&str>,
    at_s: i64,
) -> Result<greenlight_model::manifest::Release, crate::build::BuildError> {
    let request = crate::build::BuildRequest {
        service,
        project: &project.path(),
        revision,
        label: None,
        built_by: "ada@desk",
        now: greenlight_model::Timestamp::from_second(1_700_000_000 + at_s).unwrap(),
        cancel: &std::sync::atomic::AtomicBool::new(false),
    };
    crate::build::build(&project.depot(), &request, &mut |_| {})
}
