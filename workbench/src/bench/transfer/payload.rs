//! The trees that are released: a Python application with its libraries, in two versions.
//!
//! Built once per machine from PyPI and kept beside the base of the bed. The second version has another version of one
//! library, and every fiftieth file of the rest has one more line.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use greenlight_testbed::{APPLICATION, cache_directory, run};

use super::bed;
use crate::Error;

/// Libraries, pinned: some 9,000 files and 200 MB, from thousands of small ones to shared objects of 30 MB.
const LIBRARIES: [&str; 9] = [
    "django==5.0.6",
    "numpy==1.26.4",
    "pandas==2.2.2",
    "sqlalchemy==2.0.30",
    "babel==2.15.0",
    "cryptography==42.0.7",
    "pytz==2024.1",
    "sympy==1.12",
    "mpmath==1.3.0",
];
/// The one that is another in the second version.
const CHANGED_LIBRARY: (&str, &str) = ("sqlalchemy==2.0.30", "sqlalchemy==2.0.31");
/// One file in so many is changed in the second version.
const CHANGED_ONE_IN: usize = 50;
/// Changed by hand whenever the trees are made in another way.
const RECIPE: &str = "1";

/// Where the trees are, and what they are.
#[derive(Debug)]
pub(crate) struct Payload {
    pub(crate) v1: PathBuf,
    pub(crate) v2: PathBuf,
    pub(crate) files: usize,
    pub(crate) bytes: u64,
    pub(crate) changed_files: usize,
}

/// Builds the trees, unless they were built before.
pub(crate) fn build() -> Result<Payload, Error> {
    let directory = cache_directory().join(format!("payload-{RECIPE}"));
    let (v1, v2) = (directory.join("v1"), directory.join("v2"));
    if !directory.exists() {
        eprintln!("building the payload from PyPI, once, in {}", directory.display());
        let under_way = directory.with_extension("part");
        if under_way.exists() {
            fs::remove_dir_all(&under_way).map_err(Error::system("remove a half-built payload"))?;
        }
        make(&under_way.join("v1"), "v1", &LIBRARIES)?;
        let others =
            LIBRARIES.map(|library| if library == CHANGED_LIBRARY.0 { CHANGED_LIBRARY.1 } else { library });
        make(&under_way.join("v2"), "v2", &others)?;
        change(&under_way.join("v2"))?;
        fs::rename(&under_way, &directory).map_err(Error::system("put the payload in place"))?;
    }
    let files = files(&v1)?;
    let mut bytes = 0;
    for file in &files {
        bytes += fs::metadata(v1.join(file)).map_err(Error::system("look at the payload"))?.len();
    }
    let mut changed_files = 0;
    for file in self::files(&v2)? {
        let read = |tree: &Path| fs::read(tree.join(&file)).ok();
        changed_files += usize::from(read(&v1) != read(&v2));
    }
    Ok(Payload { files: files.len(), bytes, changed_files, v1, v2 })
}

fn make(tree: &Path, version: &str, libraries: &[&str]) -> Result<(), Error> {
    fs::create_dir_all(tree).map_err(Error::system("create the payload's directory"))?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary", ":all:"]);
    pip.args(["--python-version", "3.11", "--implementation", "cp", "--platform", "manylinux2014_x86_64"]);
    pip.args(["--disable-pip-version-check", "--root-user-action", "ignore", "--target"]);
    run(pip.arg(tree.join("lib")).args(libraries)).map_err(bed)?;
    for (name, text) in [("app.py", APPLICATION), ("VERSION", version)] {
        fs::write(tree.join(name), text).map_err(Error::system("write the payload"))?;
    }
    Ok(())
}

/// Adds a line to some of the files.
fn change(tree: &Path) -> Result<(), Error> {
    for file in files(&tree.join("lib"))?.iter().step_by(CHANGED_ONE_IN) {
        let mut file = OpenOptions::new()
            .append(true)
            .open(tree.join("lib").join(file))
            .map_err(Error::system("change the payload"))?;
        file.write_all(b"# changed\n").map_err(Error::system("change the payload"))?;
    }
    Ok(())
}

/// The regular files below a directory, relative to it, in order.
fn files(tree: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    let mut directories = vec![tree.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).map_err(Error::system("read the payload"))? {
            let entry = entry.map_err(Error::system("read the payload"))?;
            let kind = entry.file_type().map_err(Error::system("read the payload"))?;
            if kind.is_dir() {
                directories.push(entry.path());
            } else if let Ok(path) = entry.path().strip_prefix(tree) {
                files.push(path.to_owned());
            }
        }
    }
    files.sort();
    Ok(files)
}
