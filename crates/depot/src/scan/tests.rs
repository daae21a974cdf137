//! Scanning real trees.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;

use super::*;
use crate::testing::{Node, noise, write_tree};

fn paths(directory: &Path, include: &[&str], exclude: &[&str]) -> Result<String, DepotError> {
    let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    let manifest = scan(directory, &owned(include), &owned(exclude))?;
    Ok(manifest.entries.into_keys().collect::<Vec<_>>().join(" "))
}

#[test]
fn patterns_choose_as_in_a_gitignore() {
    let tree = tempfile::tempdir().unwrap();
    let file = || Node::File(b"x");
    write_tree(
        tree.path(),
        &[
            ("a.py", file()),
            ("app/b.py", file()),
            ("app/b.pyc", file()),
            ("app/tests/t.py", file()),
            ("app/empty", Node::Empty),
            ("tests/t.py", file()),
            ("static/css/x.css", file()),
            (".git/config", file()),
            ("vendor/lib/.git", file()),
            ("vendor/lib/l.py", file()),
        ],
    );
    let all = "a.py app/b.py app/b.pyc app/empty app/tests/t.py static/css/x.css tests/t.py vendor/lib/l.py";
    let cases: &[(&[&str], &[&str], &str)] = &[
        (&[], &[], all),
        (&[], &["*.pyc", "vendor"], "a.py app/b.py app/empty app/tests/t.py static/css/x.css tests/t.py"),
        (&["app", "static/"], &["*.pyc"], "app/b.py app/empty app/tests/t.py static/css/x.css"),
        (&["app/"], &["tests"], "app/b.py app/b.pyc app/empty"),
        (&["app"], &["/tests"], "app/b.py app/b.pyc app/empty app/tests/t.py"),
        (&["*.py"], &[], "a.py app/b.py app/tests/t.py tests/t.py vendor/lib/l.py"),
        (&["/*.py"], &[], "a.py"),
        (&["static/**/*.css"], &[], "static/css/x.css"),
        (&["{a.py,app/*.py}"], &[], "a.py app/b.py"),
        (&["a.py", "vendor/lib/.git"], &[], "REFUSED"),
    ];
    for (include, exclude, expected) in cases {
        let found = paths(tree.path(), include, exclude);
        match *expected {
            "REFUSED" => assert!(matches!(found, Err(DepotError::Refused { .. })), "{include:?} {found:?}"),
            expected => assert_eq!(found.unwrap(), expected, "{include:?} {exclude:?}"),
        }
    }
}

#[test]
fn everything_that_cannot_be_released_is_named_at_once() {
    let tree = tempfile::tempdir().unwrap();
    let at = |name: &str| tree.path().join(name);
    write_tree(
        tree.path(),
        &[
            ("fine", Node::File(b"x")),
            ("a/setuid", Node::Executable(b"x")),
            ("a/absolute", Node::Link("/etc/passwd")),
            ("a/up", Node::Link("../../outside")),
            ("a/fine", Node::Link("../fine")),
        ],
    );
    fs::set_permissions(at("a/setuid"), fs::Permissions::from_mode(0o4755)).unwrap();
    let _socket = UnixListener::bind(at("socket")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    fs::write(tree.path().join(std::ffi::OsStr::from_bytes(b"caf\xe9")), "x").unwrap();
    std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(b"\xff"), at("target")).unwrap();

    let error = scan(tree.path(), &["[".to_owned(), "*".to_owned()], &[]).unwrap_err();
    let DepotError::Refused { refusals, .. } = &error else { panic!("{error}") };
    let found: Vec<(&str, &str)> =
        refusals.iter().map(|refusal| (refusal.path.as_str(), refusal.why.as_str())).collect();
    let expected = [
        ("[", "not a glob"),
        ("a/absolute", "absolute path"),
        ("a/setuid", "set-user-id"),
        ("a/up", "outside the release"),
        ("caf\u{fffd}", "not UTF-8"),
        ("pipe", "named pipe"),
        ("socket", "socket"),
        ("target", "target is not UTF-8"),
    ];
    assert_eq!(found.len(), expected.len(), "{error}");
    for ((path, why), (expected_path, says)) in found.into_iter().zip(expected) {
        assert_eq!(path, expected_path);
        assert!(why.contains(says), "{path}: {why}");
        assert!(error.to_string().contains(says), "{error}");
    }
    // Everything that is refused can be excluded.
    let exclude = ["setuid", "absolute", "up", "socket", "pipe", "caf?", "target"].map(str::to_owned);
    assert_eq!(scan(tree.path(), &[], &exclude).unwrap().entries.len(), 2);
}

#[test]
fn an_include_that_matches_nothing_is_a_mistake() {
    let tree = tempfile::tempdir().unwrap();
    write_tree(tree.path(), &[("app/a", Node::File(b"x"))]);
    let error = paths(tree.path(), &["app", "statik"], &[]).unwrap_err().to_string();
    assert!(error.contains("statik: nothing in the tree matches"), "{error}");
}

#[test]
fn times_do_not_matter_and_modes_do() {
    let tree = tempfile::tempdir().unwrap();
    write_tree(tree.path(), &[("a/run", Node::Executable(b"x")), ("a/data", Node::File(b"x"))]);
    let first = scan(tree.path(), &[], &[]).unwrap();
    let file = File::options().write(true).open(tree.path().join("a/run")).unwrap();
    file.set_modified(std::time::UNIX_EPOCH).unwrap();
    fs::set_permissions(tree.path().join("a/data"), fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(scan(tree.path(), &[], &[]).unwrap(), first);
    fs::set_permissions(tree.path().join("a/data"), fs::Permissions::from_mode(0o700)).unwrap();
    assert_ne!(scan(tree.path(), &[], &[]).unwrap(), first);
}

#[test]
fn a_byte_changed_in_a_large_file_costs_a_chunk() {
    let tree = tempfile::tempdir().unwrap();
    let mut data = noise(1, 12 << 20);
    fs::write(tree.path().join("large"), &data).unwrap();
    fs::write(tree.path().join("just"), noise(2, CUT_BYTES_MIN)).unwrap();
    let before = scan(tree.path(), &[], &[]).unwrap();
    data.insert(5 << 20, 7);
    fs::write(tree.path().join("large"), &data).unwrap();
    let after = scan(tree.path(), &[], &[]).unwrap();

    let chunks = |manifest: &Manifest, path: &str| match &manifest.entries[path] {
        Entry::File { size, hash, chunks, .. } => (*size, *hash, chunks.clone()),
        other => panic!("{other:?}"),
    };
    assert_eq!(chunks(&before, "just").2, []);
    let ((_, _, old), (size, hash, new)) = (chunks(&before, "large"), chunks(&after, "large"));
    assert_eq!((size, hash), (data.len() as u64, content_hash(&data)));
    assert_eq!(new.iter().map(|(_, size)| u64::from(*size)).sum::<u64>(), size);
    let fresh = new.iter().filter(|chunk| !old.contains(chunk)).count();
    assert!(old.len() >= 4 && (1..=2).contains(&fresh), "{} chunks, {fresh} new", old.len());
    let (min, _, max) = CHUNK_BYTES;
    let (_, whole) = new.split_last().unwrap();
    assert!(whole.iter().all(|(_, size)| (min..=max).contains(&(*size as usize))));
    check::check(&after).unwrap();
}

/// Sizes beyond 32 bits: a file of holes, which costs no disk, only hashing.
#[test]
fn a_file_over_4_gib_keeps_its_size() {
    const SIZE: u64 = (4 << 30) + 1;
    let tree = tempfile::tempdir().unwrap();
    File::create(tree.path().join("holes")).unwrap().set_len(SIZE).unwrap();
    let manifest = scan(tree.path(), &[], &[]).unwrap();
    let Entry::File { size, chunks, .. } = &manifest.entries["holes"] else { panic!() };
    assert_eq!(*size, SIZE);
    assert_eq!(chunks.len(), 1025);
    assert!(chunks[..1024].iter().all(|chunk| *chunk == chunks[0]), "zeros are one object, repeated");
    check::check(&manifest).unwrap();
}
