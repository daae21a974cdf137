//! `docs/promises.md` names a test for every promise: this looks that each of them is there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::{Error, workspace_root};

/// Where the promises stand.
const PAGE: &str = "docs/promises.md";
/// Where tests are.
const FOLDERS: [&str; 2] = ["crates", "testbed/tests"];

/// The tests that the page names and that are nowhere.
fn check() -> Result<Vec<String>, Error> {
    let root = workspace_root();
    let page = root.join(PAGE);
    let text = std::fs::read_to_string(&page).map_err(Error::system(format!("read {}", page.display())))?;
    let mut tests = BTreeSet::new();
    for folder in FOLDERS {
        collect(&root.join(folder), &mut tests)?;
    }
    let missing = named(&text).into_iter().filter(|(file, test)| !is_among(&tests, file.as_deref(), test));
    Ok(missing
        .map(|(file, test)| {
            let file = file.map_or_else(String::new, |file| format!("{file}::"));
            format!("{PAGE}: there is no test {file}{test}")
        })
        .collect())
}

/// The tests that a page names: `file::test_with_a_long_name`, or the name alone.
fn named(page: &str) -> Vec<(Option<String>, String)> {
    let in_backticks = page.split('`').skip(1).step_by(2);
    in_backticks
        .filter_map(|text| {
            let (file, test) = match text.rsplit_once("::") {
                Some((file, test)) => (Some(file.to_owned()), test),
                None => (None, text),
            };
            let is_name = test.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
            (is_name && test.matches('_').count() >= 2).then(|| (file, test.to_owned()))
        })
        .collect()
}

fn is_among(tests: &BTreeSet<(String, String)>, file: Option<&str>, test: &str) -> bool {
    match file {
        Some(file) => tests.contains(&(file.to_owned(), test.to_owned())),
        None => tests.iter().any(|(_, known)| known == test),
    }
}

/// Every function that is marked as a test, with the stem of its file.
fn collect(folder: &Path, tests: &mut BTreeSet<(String, String)>) -> Result<(), Error> {
    let read = |path: &Path| Error::system(format!("read {}", path.display()));
    for entry in std::fs::read_dir(folder).map_err(read(folder))? {
        let path: PathBuf = entry.map_err(read(folder))?.path();
        if path.is_dir() {
            collect(&path, tests)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).map_err(read(&path))?;
            let stem = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
            let mut is_marked = false;
            for line in text.lines().map(str::trim) {
                if line == "#[test]" || line.starts_with("#[tokio::test") {
                    is_marked = true;
                } else if let Some(rest) = line.split_once("fn ").map(|(_, rest)| rest).filter(|_| is_marked)
                {
                    let name = rest.split('(').next().unwrap_or_default();
                    tests.insert((stem.clone(), name.to_owned()));
                    is_marked = false;
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_promise_has_its_test() {
        assert_eq!(check().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn names_of_tests_are_told_from_other_words() {
        let page =
            "`faults`, `guard::goes_back_by_itself` and `never_begun_anew`; `kill -9`, `xtask_x`, `resume`";
        let expected = [
            (Some("guard".to_owned()), "goes_back_by_itself".to_owned()),
            (None, "never_begun_anew".to_owned()),
        ];
        assert_eq!(named(page), expected);
        let tests = BTreeSet::from([("guard".to_owned(), "goes_back_by_itself".to_owned())]);
        assert!(is_among(&tests, Some("guard"), "goes_back_by_itself"));
        assert!(is_among(&tests, None, "goes_back_by_itself"));
        assert!(!is_among(&tests, Some("faults"), "goes_back_by_itself"));
        assert!(!is_among(&tests, None, "never_begun_anew"));
    }
}
