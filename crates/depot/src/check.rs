//! Whether a manifest may be placed. Manifests arrive over a wire and are not trusted.
//!
//! Guarantees of a manifest that passed: every path stays inside the release, whatever its symbolic links point to; no
//! entry lies under a file or a link; sizes add up; equal hashes have equal sizes. Not checked here: that the hashes are
//! those of any bytes.

use std::collections::{BTreeSet, HashMap, VecDeque};

use greenlight_model::id::ContentHash;
use greenlight_model::manifest::{Entry, MANIFEST_ENTRIES_MAX, Manifest, PATH_BYTES_MAX};

use crate::object::OBJECT_BYTES_MAX;

/// Most bytes of a release: far beyond any, and far from where sums overflow.
pub const RELEASE_BYTES_MAX: u64 = 16 << 40;
/// The longest name of a file on Linux.
const NAME_BYTES_MAX: usize = 255;
/// How many links Linux follows in one path before it gives up; such a path leads nowhere, so not outside either.
const LINKS_FOLLOWED_MAX: usize = 40;

/// Why a manifest may not be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// More entries than [`MANIFEST_ENTRIES_MAX`].
    #[error("the manifest has {0} entries, more than the limit of {MANIFEST_ENTRIES_MAX}")]
    TooMany(usize),
    /// More bytes than [`RELEASE_BYTES_MAX`].
    #[error("the files of the manifest have more than {RELEASE_BYTES_MAX} bytes")]
    TooLarge,
    /// An entry is not allowed.
    #[error("the manifest's entry `{}` is refused: {why}", path.escape_debug())]
    Entry {
        /// Its path.
        path: String,
        /// Why.
        why: String,
    },
}

/// A manifest that passed, in the order in which it is placed.
pub(crate) struct Tree<'a> {
    /// Every directory, those that are only implied as well; parents before children. Without the root.
    pub(crate) directories: BTreeSet<&'a str>,
    /// Every file by the directory it lies in (empty for the root) and its name there.
    pub(crate) files: Vec<File<'a>>,
    /// Every symbolic link: its path and its target.
    pub(crate) symlinks: Vec<(&'a str, &'a str)>,
}

/// A regular file of a manifest that passed.
#[derive(Clone, Copy)]
pub(crate) struct File<'a> {
    pub(crate) directory: &'a str,
    pub(crate) name: &'a str,
    pub(crate) size: u64,
    pub(crate) executable: bool,
    pub(crate) hash: ContentHash,
    pub(crate) chunks: &'a [(ContentHash, u32)],
}

/// Checks a manifest.
///
/// # Errors
/// Names the first entry that is not allowed, and why.
pub fn check(manifest: &Manifest) -> Result<(), ManifestError> {
    tree(manifest).map(drop)
}

pub(crate) fn tree(manifest: &Manifest) -> Result<Tree<'_>, ManifestError> {
    if manifest.entries.len() > MANIFEST_ENTRIES_MAX {
        return Err(ManifestError::TooMany(manifest.entries.len()));
    }
    let mut tree = Tree { directories: BTreeSet::new(), files: Vec::new(), symlinks: Vec::new() };
    let mut sizes = HashMap::new();
    let mut total = 0u64;
    for (path, entry) in &manifest.entries {
        let refused = |why: String| ManifestError::Entry { path: path.clone(), why };
        check_path(path).map_err(refused)?;
        check_parents(manifest, path, &mut tree.directories).map_err(refused)?;
        match entry {
            Entry::Directory => {
                tree.directories.insert(path);
            }
            Entry::File { size, executable, hash, chunks } => {
                check_sizes(*hash, *size, chunks, &mut sizes).map_err(refused)?;
                total = total
                    .checked_add(*size)
                    .filter(|total| *total <= RELEASE_BYTES_MAX)
                    .ok_or(ManifestError::TooLarge)?;
                let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
                tree.files.push(File {
                    directory,
                    name,
                    size: *size,
                    executable: *executable,
                    hash: *hash,
                    chunks,
                });
            }
            Entry::Symlink { target } => {
                check_target(manifest, path, target).map_err(|why| refused(why.to_owned()))?;
                tree.symlinks.push((path, target));
            }
        }
    }
    Ok(tree)
}

fn check_path(path: &str) -> Result<(), String> {
    if path.len() > PATH_BYTES_MAX {
        return Err(format!("its path is longer than {PATH_BYTES_MAX} bytes"));
    }
    for component in path.split('/') {
        match component {
            "" => return Err("its path is absolute, or has an empty component".to_owned()),
            "." | ".." => return Err(format!("its path has the component `{component}`")),
            _ if component.contains('\0') => return Err("its path has a NUL byte".to_owned()),
            _ if component.len() > NAME_BYTES_MAX => {
                return Err(format!("a name in it is longer than {NAME_BYTES_MAX} bytes"));
            }
            _ => {}
        }
    }
    Ok(())
}

fn check_parents<'a>(
    manifest: &Manifest,
    path: &'a str,
    directories: &mut BTreeSet<&'a str>,
) -> Result<(), String> {
    let mut below = path;
    while let Some((parent, _)) = below.rsplit_once('/') {
        // What is known as a directory has had its own parents looked at.
        if directories.contains(parent) {
            break;
        }
        match manifest.entries.get(parent) {
            None | Some(Entry::Directory) => directories.insert(parent),
            Some(Entry::File { .. }) => return Err(format!("`{parent}`, above it, is a file")),
            Some(Entry::Symlink { .. }) => return Err(format!("`{parent}`, above it, is a symbolic link")),
        };
        below = parent;
    }
    Ok(())
}

fn check_sizes(
    hash: ContentHash,
    size: u64,
    chunks: &[(ContentHash, u32)],
    sizes: &mut HashMap<ContentHash, u64>,
) -> Result<(), String> {
    let mut is_known = |hash: ContentHash, size: u64| match sizes.insert(hash, size) {
        Some(before) if before != size => {
            Err(format!("its hash {hash} stands at two sizes, {before} and {size}"))
        }
        _ => Ok(()),
    };
    is_known(hash, size)?;
    if chunks.is_empty() {
        return if size > OBJECT_BYTES_MAX as u64 {
            Err(format!("it has {size} bytes and is not cut into chunks"))
        } else {
            Ok(())
        };
    }
    let mut sum = 0u64;
    for (chunk, bytes) in chunks {
        if *bytes == 0 || *bytes as usize > OBJECT_BYTES_MAX {
            return Err(format!("it has a chunk of {bytes} bytes"));
        }
        is_known(*chunk, u64::from(*bytes))?;
        sum += u64::from(*bytes);
    }
    if sum != size {
        return Err(format!("it has {size} bytes, but its chunks have {sum}"));
    }
    Ok(())
}

/// Whether a link at `path` stays inside the release, following the links it leads through as the system would.
pub(crate) fn check_target(manifest: &Manifest, path: &str, target: &str) -> Result<(), &'static str> {
    if target.is_empty() || target.contains('\0') || target.len() >= PATH_BYTES_MAX {
        return Err("its target is empty, has a NUL byte, or is too long");
    }
    if target.starts_with('/') {
        return Err(
            "it is a link to an absolute path, which is outside the release (a virtual environment, for one, belongs in `prepare`, not in `build`)",
        );
    }
    let mut at: Vec<&str> = path.split('/').collect();
    at.pop();
    let mut ahead: VecDeque<&str> = target.split('/').collect();
    let mut followed = 0;
    while let Some(component) = ahead.pop_front() {
        match component {
            "" | "." => {}
            ".." => {
                if at.pop().is_none() {
                    return Err("it is a link to outside the release");
                }
            }
            name => {
                at.push(name);
                if let Some(Entry::Symlink { target }) = manifest.entries.get(&at.join("/")) {
                    followed += 1;
                    if followed > LINKS_FOLLOWED_MAX {
                        return Ok(());
                    }
                    if target.starts_with('/') {
                        return Err("it leads through a link to an absolute path, outside the release");
                    }
                    at.pop();
                    for component in target.rsplit('/') {
                        ahead.push_front(component);
                    }
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(n: u8, size: u64, chunks: &[(u8, u32)]) -> Entry {
        let hash = |n| ContentHash::from_bytes([n; 32]);
        let chunks = chunks.iter().map(|(n, size)| (hash(*n), *size)).collect();
        Entry::File { size, executable: false, hash: hash(n), chunks }
    }

    fn link(target: &str) -> Entry {
        Entry::Symlink { target: target.to_owned() }
    }

    fn verdict(entries: &[(&str, Entry)]) -> Result<(), ManifestError> {
        let entries = entries.iter().map(|(path, entry)| ((*path).to_owned(), entry.clone())).collect();
        check(&Manifest { entries })
    }

    #[test]
    fn what_a_release_may_hold_passes() {
        let long = format!("{}/{}", "a".repeat(255), "b".repeat(255));
        verdict(&[
            ("a", file(1, 3, &[])),
            ("b/c/d", file(1, 3, &[])),
            ("b/empty", Entry::Directory),
            ("b/up", link("../a")),
            ("b/c/root", link("../..")),
            ("dangling", link("venv/bin/python")),
            ("loop", link("loop")),
            ("b/through", link("c/root/b/c/d")),
            ("large", file(2, 5_000_000, &[(3, 4_000_000), (4, 1_000_000)])),
            ("...", file(5, 0, &[])),
            ("new\nline", file(5, 0, &[])),
            (&long, file(5, 0, &[])),
        ])
        .unwrap();
        verdict(&[]).unwrap();
    }

    #[test]
    fn hostile_manifests_are_refused() {
        let one = || file(1, 3, &[]);
        let cases: &[(&[(&str, Entry)], &str)] = &[
            (&[("", one())], "empty component"),
            (&[("/etc/passwd", one())], "absolute"),
            (&[("a//b", one())], "empty component"),
            (&[("a/", Entry::Directory)], "empty component"),
            (&[("../a", one())], "component `..`"),
            (&[("a/../../b", one())], "component `..`"),
            (&[("a/.", one())], "component `.`"),
            (&[("..", Entry::Directory)], "component `..`"),
            (&[("a\0b", one())], "NUL"),
            (&[(&"a".repeat(256), one())], "longer than 255"),
            (&[(&"a/".repeat(2048), one())], "empty component"),
            (&[(&format!("{}b", "a/".repeat(2048)), one())], "longer than 4096"),
            (&[("a", one()), ("a/b", one())], "`a`, above it, is a file"),
            (&[("a", link("b")), ("a/b", one())], "`a`, above it, is a symbolic link"),
            (&[("a", link("b")), ("a/b/c/d", Entry::Directory)], "`a`, above it, is a symbolic link"),
            (&[("a", link("/etc"))], "absolute path"),
            (&[("a", link(".."))], "outside"),
            (&[("a/b", link("../../c"))], "outside"),
            (&[("a/b", link("x/../../../c"))], "outside"),
            (&[("a", link(""))], "empty"),
            (&[("a", link("b\0"))], "NUL"),
            // Lexically this stays inside; the system would follow `deep` to the root and go up from there.
            (&[("a/deep", link("..")), ("a/out", link("deep/../etc"))], "outside"),
            (&[("large", file(1, OBJECT_BYTES_MAX as u64 + 1, &[]))], "not cut"),
            (&[("large", file(1, 7, &[(2, 3), (3, 3)]))], "its chunks have 6"),
            (&[("large", file(1, 3, &[(2, 3), (3, 0)]))], "chunk of 0 bytes"),
            (&[("large", file(1, u64::MAX, &[(2, u32::MAX)]))], "chunk of 4294967295 bytes"),
            (&[("a", file(1, 3, &[])), ("b", file(1, 4, &[]))], "two sizes"),
            (&[("a", file(1, 3, &[])), ("b", file(2, 4, &[(1, 4)]))], "two sizes"),
        ];
        for (entries, says) in cases {
            let error = verdict(entries).expect_err(says).to_string();
            assert!(error.contains(says), "{entries:?}: {error}");
        }
    }

    #[test]
    fn counts_are_bounded() {
        let entries = (0..=MANIFEST_ENTRIES_MAX).map(|n| (n.to_string(), Entry::Directory)).collect();
        assert_eq!(check(&Manifest { entries }), Err(ManifestError::TooMany(MANIFEST_ENTRIES_MAX + 1)));
    }
}
