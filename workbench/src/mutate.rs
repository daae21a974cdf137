//! `cargo xtask mutate`: shows that the simulation can see.
//!
//! Each mutation of `workbench/mutations.toml` breaks one thing on purpose. It is built in a copy of the sources outside the
//! tree and must be caught by the simulation's checkers, which share no code with what is mutated. The copy as it is must
//! pass first: a simulation that always complains proves nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::Error;

/// The mutations, relative to the workspace's root.
const MUTATIONS: &str = "workbench/mutations.toml";
/// What the workspace consists of for cargo. Only the crates that the simulation needs are built.
const SOURCES: [&str; 6] = ["Cargo.toml", "Cargo.lock", "crates", "testbed", "workbench", "xtask"];
/// What follows a seed's complaint in the table is cut here.
const COMPLAINT_CHARS_MAX: usize = 100;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Only mutations whose name contains this.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Seeds within which each is to be caught.
    #[arg(long, default_value_t = 10_000, value_name = "N")]
    seeds: u64,
    /// How many at a time; as many as there are processors when not given.
    #[arg(long, value_name = "J")]
    jobs: Option<usize>,
    /// Copy and build there, and keep it, instead of in a temporary directory.
    #[arg(long, value_name = "DIRECTORY")]
    directory: Option<PathBuf>,
    /// Print the results as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    mutation: Vec<Mutation>,
}

/// One thing broken on purpose.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutation {
    name: String,
    /// What it breaks, in a sentence.
    breaks: String,
    /// The changes that break it, one after another.
    edit: Vec<Edit>,
}

/// One change of a source.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Edit {
    /// Where, relative to the workspace's root.
    file: PathBuf,
    /// The text to find there, exactly once.
    find: String,
    replace: String,
}

/// What came of a mutation.
#[derive(Debug, Serialize)]
struct Trial {
    name: String,
    breaks: String,
    /// Who saw it; none when it survived.
    caught: Option<Caught>,
    seconds: f64,
}

/// What the simulation says of its first violation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Caught {
    seed: u64,
    checker: String,
    what: String,
}

/// True when every mutation is caught.
pub(crate) fn run(options: &Options) -> Result<bool, Error> {
    let root = Path::new("");
    let is_wanted =
        |mutation: &Mutation| options.only.as_ref().is_none_or(|only| mutation.name.contains(only));
    let mutations: Vec<Mutation> = read(root)?.into_iter().filter(is_wanted).collect();
    if mutations.is_empty() {
        return Err(Error::Refused(format!("no mutation of {MUTATIONS} has such a name")));
    }
    let temporary = tempfile::Builder::new().prefix("greenlight-mutate-").tempdir();
    let temporary = temporary.map_err(Error::system("create a temporary directory"))?;
    let directory = options.directory.as_deref().unwrap_or(temporary.path());
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let benches = (0..options.jobs.unwrap_or(processors).clamp(1, mutations.len())).map(|number| Bench {
        tree: directory.join(format!("tree{number}")),
        target: directory.join(format!("target{number}")),
    });
    let benches: Vec<Bench> = benches.collect();
    let start = Instant::now();
    if let Some(caught) = prepare(&benches, root, options.seeds)? {
        println!("the tree as it is does not pass: seed {}: {}", caught.seed, caught.what);
        return Ok(false);
    }
    if !options.json {
        println!("unmutated: {} seeds pass in {:.0} s\n", options.seeds, start.elapsed().as_secs_f64());
        println!("| mutation | caught by | seed | seconds |");
        println!("| --- | --- | ---: | ---: |");
    }
    let trials = try_out_all(&benches, &mutations, options)?;
    let survived: Vec<&str> =
        trials.iter().filter(|trial| trial.caught.is_none()).map(|trial| trial.name.as_str()).collect();
    if options.json {
        println!("{}", serde_json::to_string_pretty(&trials).map_err(Error::Json)?);
    } else {
        let took = start.elapsed().as_secs_f64();
        println!("\n{} mutations in {took:.0} s, {} survived", trials.len(), survived.len());
        survived.iter().for_each(|name| println!("survived: {name}"));
    }
    Ok(survived.is_empty())
}

/// Copies the sources to every bench, builds them there and runs their simulation as they are. The dependencies are built
/// once.
fn prepare(benches: &[Bench], root: &Path, seeds: u64) -> Result<Option<Caught>, Error> {
    let Some((first, others)) = benches.split_first() else { return Ok(None) };
    first.copy(root)?;
    first.build()?;
    for other in others {
        other.copy(root)?;
        if !other.target.exists() {
            archive(&first.target, &other.target)?;
        }
    }
    let builds = others.iter().map(|other| || other.build());
    std::thread::scope(|scope| {
        let building: Vec<_> = builds.map(|build| scope.spawn(build)).collect();
        let caught = first.simulate(seeds, benches.len())?;
        building.into_iter().try_for_each(|build| build.join().unwrap_or_else(|_| Err(panicked())))?;
        Ok(caught)
    })
}

/// Every mutation, as many at a time as there are benches; the results in the order of the mutations.
fn try_out_all(benches: &[Bench], mutations: &[Mutation], options: &Options) -> Result<Vec<Trial>, Error> {
    let next = AtomicUsize::new(0);
    let work = |bench: &Bench| {
        let mut trials = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(mutation) = mutations.get(number) else { return Ok(trials) };
            let start = Instant::now();
            let result = bench.try_out(mutation, options.seeds);
            if result.is_err() {
                // The others end with what they are at.
                next.store(mutations.len(), Ordering::Relaxed);
            }
            let trial = mutation.trial(result?, start.elapsed());
            if !options.json {
                println!("{}", trial.line());
            }
            trials.push((number, trial));
        }
    };
    let mut trials = std::thread::scope(|scope| {
        let workers: Vec<_> = benches.iter().map(|bench| scope.spawn(|| work(bench))).collect();
        let mut all = Vec::new();
        for worker in workers {
            all.extend(worker.join().unwrap_or_else(|_| Err(panicked()))?);
        }
        Ok::<_, Error>(all)
    })?;
    trials.sort_by_key(|(number, _)| *number);
    Ok(trials.into_iter().map(|(_, trial)| trial).collect())
}

fn panicked() -> Error {
    Error::Refused("a worker panicked, see above".to_owned())
}

impl Mutation {
    fn trial(&self, caught: Option<Caught>, took: Duration) -> Trial {
        let (name, breaks) = (self.name.clone(), self.breaks.clone());
        Trial { name, breaks, caught, seconds: took.as_secs_f64() }
    }

    /// The sources that it changes, below a root: as they are, and with the mutation in them.
    fn apply(&self, root: &Path) -> Result<BTreeMap<PathBuf, Change>, Error> {
        let mut changes: BTreeMap<PathBuf, Change> = BTreeMap::new();
        for edit in &self.edit {
            let path = root.join(&edit.file);
            if !changes.contains_key(&path) {
                let shown = edit.file.display();
                let before =
                    std::fs::read_to_string(&path).map_err(Error::system(format!("read {shown}")))?;
                changes.insert(path.clone(), Change { after: before.clone(), before });
            }
            if let Some(change) = changes.get_mut(&path) {
                change.after = edit.apply(&change.after).map_err(|why| {
                    Error::Refused(format!("mutation {}: {}: {why}", self.name, edit.file.display()))
                })?;
            }
        }
        Ok(changes)
    }
}

impl Edit {
    fn apply(&self, source: &str) -> Result<String, String> {
        match source.matches(&self.find).count() {
            1 => Ok(source.replacen(&self.find, &self.replace, 1)),
            count => {
                Err(format!("this text is found {count} times, and must be there once: {}", self.find.trim()))
            }
        }
    }
}

/// A source before and after a mutation.
struct Change {
    before: String,
    after: String,
}

impl Trial {
    fn line(&self) -> String {
        match &self.caught {
            Some(Caught { seed, checker, what }) => {
                let complaint: String = what.chars().take(COMPLAINT_CHARS_MAX).collect();
                let complaint = complaint.replace('|', "/").replace('\n', " ");
                format!("| {} | {checker}: {complaint} | {seed} | {:.1} |", self.name, self.seconds)
            }
            None => format!("| {} | SURVIVED: {} | | {:.1} |", self.name, self.breaks, self.seconds),
        }
    }
}

/// The copy of the sources, and where it is built.
struct Bench {
    tree: PathBuf,
    target: PathBuf,
}

impl Bench {
    fn copy(&self, root: &Path) -> Result<(), Error> {
        if self.tree.exists() {
            std::fs::remove_dir_all(&self.tree).map_err(Error::system("remove the last copy"))?;
        }
        std::fs::create_dir_all(&self.tree).map_err(Error::system("create the copy's directory"))?;
        SOURCES.iter().try_for_each(|name| copy(&root.join(name), &self.tree.join(name)))
    }

    fn try_out(&self, mutation: &Mutation, seeds: u64) -> Result<Option<Caught>, Error> {
        let changes = mutation.apply(&self.tree)?;
        let write = |text: fn(&Change) -> &str| {
            changes.iter().try_for_each(|(path, change)| {
                std::fs::write(path, text(change)).map_err(Error::system(format!("write {}", path.display())))
            })
        };
        write(|change| &change.after)?;
        let caught = self.build().and_then(|()| self.simulate(seeds, 1));
        write(|change| &change.before)?;
        caught
    }

    fn build(&self) -> Result<(), Error> {
        let build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .current_dir(&self.tree)
            .args(["build", "--quiet", "--release", "--locked", "--package", "greenlight-workbench"])
            .arg("--no-default-features")
            .env("CARGO_TARGET_DIR", &self.target)
            // What is built is run for seconds: building takes longer than that. Each bench has one processor.
            .env("CARGO_INCREMENTAL", "1")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
            .output()
            .map_err(Error::system("start cargo"))?;
        if !build.status.success() {
            let said = String::from_utf8_lossy(&build.stderr);
            return Err(Error::Refused(format!("the copy does not build:\n{said}")));
        }
        Ok(())
    }

    /// Runs the copy's simulation: its first violation, if it has any.
    fn simulate(&self, seeds: u64, jobs: usize) -> Result<Option<Caught>, Error> {
        let output = Command::new(self.target.join("release/greenlight-workbench"))
            .args(["simulate", "--fail-fast", "--json"])
            .args(["--seeds", &seeds.to_string(), "--jobs", &jobs.to_string()])
            .output()
            .map_err(Error::system("start the simulation"))?;
        let said = String::from_utf8_lossy(&output.stdout);
        if output.status.success() {
            return Ok(None);
        }
        first_violation(&said).map(Some).ok_or_else(|| {
            let complaint = String::from_utf8_lossy(&output.stderr);
            Error::Refused(format!("the simulation neither passed nor named a violation: {said}{complaint}"))
        })
    }
}

/// The first violation in what the simulation prints.
fn first_violation(said: &str) -> Option<Caught> {
    #[derive(Deserialize)]
    struct Figures {
        failed: Vec<Caught>,
    }
    serde_json::from_str::<Figures>(said).ok()?.failed.into_iter().next()
}

fn read(root: &Path) -> Result<Vec<Mutation>, Error> {
    let text = std::fs::read_to_string(root.join(MUTATIONS)).map_err(Error::system(format!(
        "read {MUTATIONS}, which must be below the directory that this is started in"
    )))?;
    let file: File =
        toml::from_str(&text).map_err(|error| Error::Refused(format!("{MUTATIONS}: {error}")))?;
    Ok(file.mutation)
}

/// Copies what was built, with its times: cargo builds anew what looks older than what it was made of.
fn archive(from: &Path, to: &Path) -> Result<(), Error> {
    let status = Command::new("cp").arg("--archive").args([from, to]).status();
    match status.map_err(Error::system("start cp"))?.success() {
        true => Ok(()),
        false => Err(Error::Refused(format!("{} could not be copied, see above", from.display()))),
    }
}

fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    let problem = |error| Error::system(format!("copy {}", from.display()))(error);
    if from.is_dir() {
        std::fs::create_dir_all(to).map_err(problem)?;
        for entry in std::fs::read_dir(from).map_err(problem)? {
            let name = entry.map_err(problem)?.file_name();
            copy(&from.join(&name), &to.join(&name))?;
        }
        return Ok(());
    }
    std::fs::copy(from, to).map(drop).map_err(problem)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What is asked of the table: fewer would leave rules of the planner and the interlock unbroken.
    const MUTATIONS_MIN: usize = 25;

    #[test]
    fn every_mutation_fits_the_sources() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mutations = read(&root).unwrap();
        let names: BTreeSet<&str> = mutations.iter().map(|mutation| mutation.name.as_str()).collect();
        assert_eq!(names.len(), mutations.len(), "two mutations have one name");
        assert!(names.len() >= MUTATIONS_MIN);
        for mutation in &mutations {
            let changes = mutation.apply(&root).unwrap();
            assert!(!changes.is_empty(), "{} changes nothing", mutation.name);
            assert!(changes.values().all(|change| change.before != change.after), "{}", mutation.name);
        }
    }

    #[test]
    fn a_text_must_be_there_once() {
        let edit = Edit {
            file: PathBuf::from("room.rs"),
            find: "serving > floor".to_owned(),
            replace: "serving >= floor".to_owned(),
        };
        assert_eq!(edit.apply("if serving > floor {").unwrap(), "if serving >= floor {");
        for source in ["", "serving > floor && serving > floor"] {
            assert!(edit.apply(source).unwrap_err().contains("must be there once"));
        }
    }
}
