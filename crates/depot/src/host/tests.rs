//! A host's depot on a real disk.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use greenlight_model::manifest::Entry;

use super::*;
use crate::object::Encoding;
use crate::testing::{Node, Sent, look, mark, noise, release, write_tree};

struct Bed {
    directory: tempfile::TempDir,
    host: HostDepot,
}

impl Bed {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let host = HostDepot::open(&directory.path().join("srv/web")).unwrap();
        Self { directory, host }
    }

    fn source(&self) -> PathBuf {
        self.directory.path().join("source")
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("srv/web")
    }

    /// Scans the source after these changes.
    fn scan(&self, nodes: &[(&str, Node<'_>)]) -> Sent {
        write_tree(&self.source(), nodes);
        Sent::scan(&self.source())
    }

    fn objects(&self) -> Vec<String> {
        let objects = self.root().join(".greenlight/objects");
        let mut names = Vec::new();
        for fan_out in disk::names(&objects).unwrap() {
            names.extend(disk::names(&objects.join(fan_out)).unwrap());
        }
        names.sort();
        names
    }

    /// Whether the file system, which is whoever's runs the tests, shares bytes between files, as seen in the first release.
    fn clones(&self, path: &str, hash: ContentHash, executable: bool) -> bool {
        let inode = |path: PathBuf| path.metadata().unwrap().ino();
        let object = self.host.objects.join(object_name(hash, executable));
        inode(object) != inode(self.host.release_directory(release(1)).join(path))
    }

    /// Nothing half-done is to be seen: one work place, ours, and empty.
    fn assert_clean(&self) {
        let tmp = self.root().join(".greenlight/tmp");
        assert_eq!(disk::names(&tmp).unwrap().len(), 1);
        assert_eq!(disk::names(self.host.workplace.path()).unwrap(), [] as [&str; 0]);
    }
}

fn first_tree() -> Vec<(&'static str, Node<'static>)> {
    vec![
        ("app.py", Node::File(b"print(1)\n")),
        ("bin/run", Node::Executable(b"#!/bin/sh\n")),
        ("bin/same-as-run", Node::File(b"#!/bin/sh\n")),
        ("data/empty-file", Node::File(b"")),
        ("data/empty", Node::Empty),
        ("data/deep/er/x", Node::File(b"print(1)\n")),
        ("link", Node::Link("data/deep")),
        ("data/dangling", Node::Link("../venv/bin/python")),
        ("name with\nline", Node::File(b"odd")),
    ]
}

#[test]
fn a_release_arrives_equal_and_readable_by_all() {
    let bed = Bed::new();
    let sent = bed.scan(&first_tree());
    assert_eq!(sent.stage(&bed.host, 1).unwrap(), 4, "equal content is sent once");
    let directory = bed.host.release_directory(release(1));
    assert_eq!(look(&directory), look(&bed.source()));
    let mode = |path: &str| directory.join(path).symlink_metadata().unwrap().permissions().mode() & 0o7777;
    assert_eq!([mode("app.py"), mode("bin/run"), mode("bin/same-as-run")], [0o444, 0o555, 0o444]);
    assert_eq!([mode(""), mode("data/empty")], [0o755, 0o755]);
    let own = bed.root().join(".greenlight");
    assert_eq!(own.metadata().unwrap().permissions().mode() & 0o7777, 0o700);

    assert_eq!(bed.host.staged().unwrap(), BTreeSet::from([release(1)]));
    assert_eq!(bed.host.mark(release(1)).unwrap(), Some(mark(1)));
    assert_eq!(bed.host.manifest(release(1)).unwrap(), Some(sent.manifest.clone()));
    assert_eq!(bed.host.mark(release(2)).unwrap(), None);
    bed.assert_clean();
    // Again, and in another process: nothing to do.
    let again = HostDepot::open(&bed.root()).unwrap();
    assert_eq!(again.missing(&sent.manifest).unwrap(), []);
    let inode = directory.metadata().unwrap().ino();
    again.place(release(1), &sent.manifest).unwrap();
    again.complete(&mark(1), &sent.manifest).unwrap();
    assert_eq!(directory.metadata().unwrap().ino(), inode);
    assert!(again.free_bytes().unwrap() > 0);
    let other = Manifest::default();
    for refused in [again.place(release(1), &other), again.complete(&mark(1), &other)] {
        assert!(matches!(refused, Err(DepotError::OtherTree { .. })), "{refused:?}");
    }
}

#[test]
fn the_next_release_lacks_what_changed_and_shares_the_rest() {
    let bed = Bed::new();
    let mut large = noise(1, 12 << 20);
    bed.scan(&first_tree());
    bed.scan(&[("large.bin", Node::File(&large))]).stage(&bed.host, 1).unwrap();
    large[6 << 20] ^= 1;
    let second = bed.scan(&[
        ("app.py", Node::File(b"print(2)\n")),
        ("large.bin", Node::File(&large)),
        // Only the mode changes: nothing to send.
        ("data/empty-file", Node::Executable(b"")),
    ]);
    let missing = bed.host.missing(&second.manifest).unwrap();
    let bytes: usize = missing.iter().map(|hash| second.objects[hash].len()).sum();
    assert!((2..=3).contains(&missing.len()) && bytes <= 8 << 20, "{} objects, {bytes} bytes", missing.len());
    second.stage(&bed.host, 2).unwrap();
    assert_eq!(look(&bed.host.release_directory(release(2))), look(&bed.source()));

    let inode = |n, path: &str| bed.host.release_directory(release(n)).join(path).metadata().unwrap().ino();
    let clones = bed.clones("bin/run", crate::content_hash(b"#!/bin/sh\n"), true);
    assert_eq!(inode(1, "bin/run") == inode(2, "bin/run"), !clones);
    assert_ne!(inode(1, "app.py"), inode(2, "app.py"));
    // A large file is kept once, as a file, not a second time as its chunks.
    let Entry::File { chunks, .. } = &second.manifest.entries["large.bin"] else { panic!() };
    let objects = bed.objects();
    assert!(chunks.iter().all(|(hash, _)| !objects.contains(&hash.to_string())));
    assert!(objects.len() < 12, "{objects:?}");
    bed.assert_clean();
}

#[test]
fn an_interrupted_transfer_goes_on_where_it_was() {
    let bed = Bed::new();
    bed.scan(&first_tree());
    let sent = bed.scan(&[("large.bin", Node::File(&noise(1, 6 << 20)))]);
    let missing = bed.host.missing(&sent.manifest).unwrap();
    let (arrived, rest) = missing.split_at(missing.len() / 2);
    for hash in arrived {
        bed.host.receive(*hash, Encoding::Raw, &sent.objects[hash]).unwrap();
    }
    let error = bed.host.place(release(1), &sent.manifest).unwrap_err();
    assert!(matches!(&error, DepotError::ObjectMissing { hash } if rest.contains(hash)), "{error}");
    assert!(!bed.host.release_directory(release(1)).exists());
    bed.assert_clean();
    let next = HostDepot::open(&bed.root()).unwrap();
    assert_eq!(next.missing(&sent.manifest).unwrap(), rest);
    sent.stage(&next, 1).unwrap();
    assert_eq!(look(&next.release_directory(release(1))), look(&bed.source()));
}

#[test]
fn what_a_kill_leaves_does_not_count_and_goes() {
    let bed = Bed::new();
    let sent = bed.scan(&first_tree());
    sent.send(&bed.host);
    bed.host.place(release(1), &sent.manifest).unwrap();
    // Killed while preparing: placed, half prepared, not complete.
    let directory = bed.host.release_directory(release(1));
    write_tree(&directory, &[("venv/half", Node::File(b"x"))]);
    assert_eq!(bed.host.staged().unwrap(), BTreeSet::new());
    assert_eq!(bed.host.manifest(release(1)).unwrap(), None);
    // Killed while placing, of which nobody holds the lock any more.
    let abandoned = bed.root().join(".greenlight/tmp/work-gone");
    write_tree(&abandoned, &[("0/app.py", Node::File(b"pri"))]);
    let next = HostDepot::open(&bed.root()).unwrap();
    assert!(!abandoned.exists());
    next.place(release(1), &sent.manifest).unwrap();
    assert_eq!(look(&directory), look(&bed.source()));
    next.complete(&mark(1), &sent.manifest).unwrap();
    assert_eq!(next.staged().unwrap(), BTreeSet::from([release(1)]));
    // Killed while pruning: the marker went first.
    fs::remove_file(next.document(release(1), "json")).unwrap();
    assert_eq!(next.prune(&BTreeSet::new(), 9).unwrap(), BTreeSet::new());
    assert!(!directory.exists());
    assert_eq!(bed.objects(), [] as [&str; 0]);
}

#[test]
fn damage_is_found_before_it_spreads() {
    let bed = Bed::new();
    let sent = bed.scan(&first_tree());
    sent.stage(&bed.host, 1).unwrap();
    // An application with the right to do so writes into its own release, keeping the size; the object changes with it.
    let file = bed.host.release_directory(release(1)).join("app.py");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&file, "print(7)\n").unwrap();
    let hash = crate::content_hash(b"print(1)\n");
    let clones = bed.clones("app.py", hash, false);
    if clones {
        assert_eq!(bed.host.missing(&sent.manifest).unwrap(), [], "the store has not changed");
    } else {
        let found = bed.host.place(release(2), &sent.manifest).unwrap_err();
        assert!(matches!(found, DepotError::ObjectMissing { hash: found } if found == hash), "{found}");
        assert_eq!(bed.host.missing(&sent.manifest).unwrap(), [hash]);
    }
    sent.stage(&bed.host, 2).unwrap();
    assert_eq!(look(&bed.host.release_directory(release(2))), look(&bed.source()));
    assert_eq!(fs::read(&file).unwrap(), b"print(7)\n", "the first release keeps its local edit");
    let changes = bed.host.local_changes(release(1)).unwrap();
    let paths: Vec<&str> = changes.iter().map(|change| change.path.as_str()).collect();
    let both_names: &[&str] = &["app.py", "data/deep/er/x"];
    assert_eq!(paths, if clones { &both_names[..1] } else { both_names });
}

#[test]
fn a_copied_store_is_sound_though_its_times_are_not() {
    let bed = Bed::new();
    let sent = bed.scan(&first_tree());
    sent.stage(&bed.host, 1).unwrap();
    let object = bed.host.objects.join(object_name(crate::content_hash(b"print(1)\n"), false));
    File::open(&object).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(bed.host.missing(&sent.manifest).unwrap(), []);
    assert_ne!(object.metadata().unwrap().modified().unwrap(), std::time::UNIX_EPOCH, "sealed anew");
    assert_eq!(bed.host.local_changes(release(1)).unwrap(), []);
}

/// Sends what the host lacks, as the difference to what it has where it has something; how many were differences, and
/// all bytes that were sent.
fn send_differences(host: &HostDepot, before: &Sent, sent: &Sent) -> Result<(usize, usize), DepotError> {
    let lacking = host.lacking(&sent.manifest)?;
    let bases = lacking.bases;
    let mut bytes = 0;
    let objects = sent.manifest.objects();
    for number in lacking.objects.iter().flat_map(|(first, count)| *first..first + count) {
        let (hash, _) = &objects[number as usize];
        let data = &sent.objects[hash];
        let object = match bases.get(&number) {
            Some(base) => crate::EncodedObject::encode_delta(*base, &before.objects[base], data).unwrap(),
            None => crate::EncodedObject::encode(data).unwrap(),
        };
        bytes += object.data.len();
        host.receive(*hash, object.encoding, &object.data)?;
    }
    Ok((bases.len(), bytes))
}

#[test]
fn what_changed_arrives_as_a_difference() {
    let bed = Bed::new();
    let (mut text, mut large) = (noise(1, 50_000), noise(2, 5 << 20));
    bed.scan(&first_tree());
    fn nodes<'a>(text: &'a [u8], large: &'a [u8]) -> [(&'static str, Node<'a>); 2] {
        [("text", Node::File(text)), ("lib/large.so", Node::Executable(large))]
    }
    let first = bed.scan(&nodes(&text, &large));
    first.stage(&bed.host, 1).unwrap();
    text[7] ^= 1;
    // The cuts move with the content: a change in the middle and one at the end.
    large.splice(1 << 20..1 << 20, *b"something more");
    large.extend(b"at the end");
    let second = bed.scan(&nodes(&text, &large));
    let (differences, bytes) = send_differences(&bed.host, &first, &second).unwrap();
    assert!(differences >= 3 && bytes < 4_000, "{differences} differences, {bytes} bytes");
    bed.host.place(release(2), &second.manifest).unwrap();
    bed.host.complete(&mark(2), &second.manifest).unwrap();
    assert_eq!(look(&bed.host.release_directory(release(2))), look(&bed.source()));
    // An executable is written once: there is no copy of it with the other mode.
    let hash = crate::content_hash(&large);
    assert!(!bed.objects().contains(&hash.to_string()) && bed.objects().contains(&format!("{hash}.x")));
    assert!(disk::names(&bed.host.large_directory()).unwrap().iter().all(|name| !name.ends_with(PART)));

    // An object that was written to, its time put back, is found when something is to be made of it.
    let path = bed.host.objects.join(object_name(crate::content_hash(&text), false));
    let times = path.metadata().unwrap().modified().unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&path, noise(3, 50_000)).unwrap();
    File::open(&path).unwrap().set_modified(times).unwrap();
    text[9] ^= 1;
    let third = bed.scan(&[("text", Node::File(&text))]);
    let error = send_differences(&bed.host, &second, &third).unwrap_err();
    assert!(matches!(error, DepotError::ObjectDamaged { .. }), "{error}");
    assert_eq!(send_differences(&bed.host, &second, &third).unwrap().0, 0, "it is not proposed again");
    bed.host.place(release(3), &third.manifest).unwrap();
    assert_eq!(look(&bed.host.release_directory(release(3))), look(&bed.source()));
    bed.assert_clean();
}

#[test]
fn the_same_large_file_in_several_directories_is_made_once() {
    let bed = Bed::new();
    let large = noise(1, 3 << 20);
    let paths: Vec<String> = (0..16).map(|n| format!("d{n}/large")).collect();
    let nodes: Vec<_> = paths
        .iter()
        .enumerate()
        .map(|(n, path)| {
            let node = if n % 2 == 0 { Node::File(&large) } else { Node::Executable(&large) };
            (path.as_str(), node)
        })
        .collect();
    let sent = bed.scan(&nodes);
    sent.stage(&bed.host, 1).unwrap();
    assert_eq!(look(&bed.host.release_directory(release(1))), look(&bed.source()));
    assert_eq!(bed.objects().len(), 2, "one for each mode");
    bed.assert_clean();
}

#[test]
fn a_damaged_large_file_gives_no_chunks() {
    let bed = Bed::new();
    let mut large = noise(1, 6 << 20);
    bed.scan(&[("large", Node::File(&large))]).stage(&bed.host, 1).unwrap();
    let file = bed.host.objects.join(object_name(crate::content_hash(&large), false));
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let times = file.metadata().unwrap().modified().unwrap();
    let mut damaged = large.clone();
    damaged[100] ^= 1;
    fs::write(&file, &damaged).unwrap();
    large.push(1);
    let second = bed.scan(&[("large", Node::File(&large))]);
    // Even when the time was put back, a chunk is verified when it is read.
    File::open(&file).unwrap().set_modified(times).unwrap();
    second.send(&bed.host);
    let error = bed.host.place(release(2), &second.manifest).unwrap_err();
    assert!(matches!(error, DepotError::ObjectMissing { .. }), "{error}");
    second.stage(&bed.host, 2).unwrap();
    assert_eq!(fs::read(bed.host.release_directory(release(2)).join("large")).unwrap(), large);
    bed.assert_clean();
}

#[test]
fn what_arrives_damaged_is_not_kept() {
    let bed = Bed::new();
    let hash = crate::content_hash(b"right");
    assert!(bed.host.receive(hash, Encoding::Raw, b"wrong").is_err());
    assert_eq!(bed.objects(), [] as [&str; 0]);
    // Chunks that are each right but do not make up the file.
    let mut lying = bed.scan(&[("large", Node::File(&noise(1, 6 << 20)))]);
    let Some(Entry::File { hash, .. }) = lying.manifest.entries.get_mut("large") else { panic!() };
    *hash = crate::content_hash(b"something else");
    lying.send(&bed.host);
    let error = bed.host.place(release(1), &lying.manifest).unwrap_err();
    assert!(matches!(error, DepotError::ObjectDamaged { .. }), "{error}");
    assert_eq!(disk::names(&bed.host.large_directory()).unwrap(), [] as [&str; 0]);
    bed.assert_clean();
}

#[test]
fn a_hostile_manifest_touches_nothing() {
    let bed = Bed::new();
    let mut sent = bed.scan(&first_tree());
    sent.send(&bed.host);
    let app = sent.manifest.entries["app.py"].clone();
    sent.manifest.entries.insert("link/planted".to_owned(), app);
    for error in [bed.host.place(release(1), &sent.manifest), bed.host.missing(&sent.manifest).map(drop)] {
        assert!(matches!(error, Err(DepotError::Manifest(_))), "{error:?}");
    }
    assert_eq!(disk::names(&bed.host.releases()).unwrap(), [] as [&str; 0]);
    bed.assert_clean();
}

#[test]
fn local_changes_are_what_was_done_after_completion() {
    let bed = Bed::new();
    let sent = bed.scan(&first_tree());
    sent.send(&bed.host);
    bed.host.place(release(1), &sent.manifest).unwrap();
    let directory = bed.host.release_directory(release(1));
    // What `prepare` and the shared paths add is part of what was staged.
    write_tree(&bed.root(), &[("shared/uploads/photo", Node::File(b"1"))]);
    write_tree(
        &directory,
        &[("venv/bin/python", Node::Executable(b"elf")), ("uploads", Node::Link("../../shared/uploads"))],
    );
    bed.host.complete(&mark(1), &sent.manifest).unwrap();
    assert_eq!(bed.host.local_changes(release(1)).unwrap(), []);

    write_tree(
        &directory,
        &[
            ("__pycache__/app.pyc", Node::File(b"x")),
            ("uploads/photo", Node::File(b"22")),
            ("data.sqlite", Node::File(b"precious")),
            // Written anew with the same bytes: no change.
            ("bin/run", Node::Executable(b"#!/bin/sh\n")),
            ("app.py", Node::File(b"print(3)\n")),
            ("venv/bin/python", Node::Executable(b"other")),
            ("link", Node::Link("elsewhere")),
        ],
    );
    fs::remove_file(directory.join("data/empty-file")).unwrap();
    let changes = bed.host.local_changes(release(1)).unwrap();
    let found: Vec<(&str, ChangeKind)> =
        changes.iter().map(|change| (change.path.as_str(), change.kind)).collect();
    let expected = [
        ("app.py", ChangeKind::Changed),
        ("data.sqlite", ChangeKind::Added),
        ("data/empty-file", ChangeKind::Removed),
        ("link", ChangeKind::Changed),
        ("venv/bin/python", ChangeKind::Changed),
    ];
    assert_eq!(found, expected);
    assert_eq!(bed.host.local_changes(release(9)).unwrap(), []);
}

#[test]
fn pruning_keeps_what_is_needed_and_no_object_more() {
    let bed = Bed::new();
    for n in 1..=5 {
        let app = format!("print({n})\n");
        let large = noise(n, 3 << 20);
        bed.scan(&first_tree());
        let nodes = [("app.py", Node::File(app.as_bytes())), ("large", Node::File(&large))];
        bed.scan(&nodes).stage(&bed.host, n).unwrap();
        // Releases are told apart by when they were staged; the clock of a fast machine need not have moved.
        let marker = File::open(bed.host.document(release(n), "json")).unwrap();
        let at = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000 + u64::from(n));
        marker.set_modified(at).unwrap();
    }
    write_tree(&bed.root(), &[("releases/not-ours", Node::Empty), ("releases/README", Node::File(b"x"))]);
    std::os::unix::fs::symlink(bed.host.release_directory(release(1)), bed.root().join("current")).unwrap();
    let removed = bed.host.prune(&BTreeSet::from([release(2)]), 1).unwrap();
    assert_eq!(removed, BTreeSet::from([release(3), release(4)]));
    assert_eq!(bed.host.staged().unwrap(), BTreeSet::from([release(1), release(2), release(5)]));
    assert!(bed.root().join("releases/not-ours").exists() && bed.root().join("releases/README").exists());

    let mut needed = BTreeSet::new();
    for n in [1, 2, 5] {
        let manifest = bed.host.manifest(release(n)).unwrap().unwrap();
        assert_eq!(bed.host.missing(&manifest).unwrap(), []);
        assert_eq!(bed.host.local_changes(release(n)).unwrap(), []);
        for entry in manifest.entries.values() {
            if let Entry::File { hash, executable, .. } = entry {
                needed.insert(format!("{hash}{}", if *executable { EXECUTABLE } else { "" }));
            }
        }
    }
    assert_eq!(bed.objects(), needed.into_iter().collect::<Vec<_>>());
    assert_eq!(bed.host.prune(&BTreeSet::new(), 9).unwrap(), BTreeSet::new());
}

#[test]
fn what_failed_is_discarded_and_nothing_that_is_complete() {
    let bed = Bed::new();
    bed.scan(&first_tree()).stage(&bed.host, 1).unwrap();
    let (before, app) = (bed.objects(), "print(2)\n".to_owned());
    let failed = bed.scan(&[("app.py", Node::File(app.as_bytes()))]);
    failed.stage(&bed.host, 2).unwrap();
    disk::remove_file(&bed.host.document(release(2), "json")).unwrap();
    bed.host.discard(release(2)).unwrap();
    assert!(!bed.host.release_directory(release(2)).exists());
    assert_eq!(disk::names(&bed.host.staged_directory()).unwrap().len(), 3, "those of the first release");
    assert_eq!(bed.objects(), before);
    bed.host.discard(release(1)).unwrap();
    assert_eq!(bed.host.local_changes(release(1)).unwrap(), []);
    assert_eq!((bed.host.staged().unwrap(), bed.objects()), (BTreeSet::from([release(1)]), before));
}
