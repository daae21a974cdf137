//! `cargo xtask fuzz`: hostile inputs for every place where bytes of others come in.
//!
//! For each target a child process feeds mutated inputs of its corpus, and keeps the input of the moment in a file: so one
//! that takes the whole process with it is not lost. An input fails when the target panics or complains, takes too
//! long, or holds too much memory. It is then shrunk, each smaller one in a process of its own, saved and printed with
//! the command that replays it. What was found and mended stays in the corpus under a name, and is fed in every run.
//!
//! The program is built with debug assertions and checks of overflow.

mod mutator;
mod shrink;
mod targets;

use std::io::{Read, Seek, SeekFrom, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::chance::Chance;
use crate::{Error, measure};
use mutator::{INPUT_BYTES_MAX, Mutator};
use targets::{ALL, Target};

/// Known inputs of every target, a directory for each, relative to the workspace's root.
const CORPUS: &str = "workbench/corpus";
/// Where inputs that fail are saved.
const FOUND: &str = "target/fuzz";
/// Processor time that an input may take, whatever its length…
const TIME_FIXED: Duration = Duration::from_secs(1);
/// …and for each byte: the program is built for checking rather than for speed.
const TIME_PER_BYTE: Duration = Duration::from_micros(20);
/// An input that is not done by then will not be: the process is ended.
const HANG: Duration = Duration::from_secs(60);
/// How often that is looked at.
const HANG_INTERVAL: Duration = Duration::from_secs(1);
/// Inputs that are made by default.
const RUNS: u64 = 10_000;
/// What is shown of an input that fails; all of it is in its file.
const SHOWN_CHARS_MAX: usize = 400;
/// The exit status of a child whose input failed by a complaint.
const COMPLAINED: u8 = 1;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Only this target.
    target: Option<String>,
    /// New inputs for each target, beside its corpus.
    #[arg(long, value_name = "N", conflicts_with = "seconds")]
    runs: Option<u64>,
    /// Make new inputs for so long, for each target.
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// The first seed; another one every time when not given.
    #[arg(long, value_name = "SEED")]
    from: Option<u64>,
    /// Feed only what is in this file.
    #[arg(long, value_name = "FILE", requires = "target")]
    input: Option<PathBuf>,
    /// Feed here and keep the input of the moment in this file: what the program starts itself with.
    #[arg(long, value_name = "FILE", requires = "target", hide = true)]
    inside: Option<PathBuf>,
}

/// What feeding an input came to.
#[derive(Debug)]
struct Meal {
    is_valid: bool,
    took: Duration,
    bytes: u64,
}

/// What a child did.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Fed {
    known: u64,
    new: u64,
    /// Of the new ones, those that were taken for valid.
    valid: u64,
    slowest_ms: u64,
    bytes_peak: u64,
}

/// True when no input fails.
pub(crate) fn run(options: &Options) -> Result<bool, Error> {
    let is_wanted = |target: &&Target| options.target.as_ref().is_none_or(|name| name == target.name);
    let chosen: Vec<&Target> = ALL.iter().filter(is_wanted).collect();
    let Some(first) = chosen.first() else {
        let names: Vec<&str> = ALL.iter().map(|target| target.name).collect();
        return Err(Error::Refused(format!("there are only the targets {}", names.join(", "))));
    };
    if let Some(path) = &options.input {
        let input = std::fs::read(path).map_err(Error::system(format!("read {}", path.display())))?;
        let watch = Watch::start();
        return Ok(match watch.feed(first, &input) {
            Ok(_) => true,
            Err(complaint) => {
                println!("{complaint}");
                false
            }
        });
    }
    if let Some(state) = &options.inside {
        return inside(first, options, state);
    }
    let from = options.from.unwrap_or_else(some_seed);
    println!(
        "{:<12} {:>6} {:>9} {:>9} {:>8} {:>12} {:>12}",
        "target", "known", "new", "valid", "seconds", "slowest", "most memory"
    );
    let mut is_good = true;
    for target in chosen {
        is_good &= supervise(target, options, from)?;
    }
    println!("seeds from {from}");
    Ok(is_good)
}

/// Feeds a target in a child, and tells what came of it.
fn supervise(target: &Target, options: &Options, from: u64) -> Result<bool, Error> {
    let found = PathBuf::from(FOUND);
    std::fs::create_dir_all(&found).map_err(Error::system(format!("create {FOUND}")))?;
    let state = found.join(format!("{}.input", target.name));
    let start = Instant::now();
    let mut command = itself()?;
    command.args(["fuzz", target.name, "--from", &from.to_string(), "--inside"]).arg(&state);
    match options.seconds {
        Some(seconds) => command.args(["--seconds", &seconds.to_string()]),
        None => command.args(["--runs", &options.runs.unwrap_or(RUNS).to_string()]),
    };
    let output = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()
        .map_err(Error::system("start the program again"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    if output.status.success()
        && let Ok(fed) = serde_json::from_str::<Fed>(&said)
    {
        println!(
            "{:<12} {:>6} {:>9} {:>9} {:>8.1} {:>9} ms {:>8} KiB",
            target.name,
            fed.known,
            fed.new,
            fed.valid,
            start.elapsed().as_secs_f64(),
            fed.slowest_ms,
            fed.bytes_peak.div_ceil(1024)
        );
        return Ok(true);
    }
    let input = std::fs::read(&state).map_err(Error::system(format!("read {}", state.display())))?;
    let smaller = shrink::shrink(input, |candidate| fails(target, candidate, &state))?;
    let path = found.join(format!("{}-{}", target.name, &blake3_name(&smaller)));
    std::fs::write(&path, &smaller).map_err(Error::system(format!("write {}", path.display())))?;
    println!("{:<12} FAILED after {:.1} s ({})", target.name, start.elapsed().as_secs_f64(), output.status);
    for line in said.lines().chain(String::from_utf8_lossy(&output.stderr).lines()).take(20) {
        println!("    {line}");
    }
    let shown: String = smaller.escape_ascii().to_string().chars().take(SHOWN_CHARS_MAX).collect();
    println!("    the smallest input that fails has {} bytes: {shown}", smaller.len());
    println!("    again: cargo xtask fuzz {} --input {}", target.name, path.display());
    Ok(false)
}

/// Whether an input fails, in a process of its own.
fn fails(target: &Target, input: &[u8], state: &Path) -> Result<bool, Error> {
    std::fs::write(state, input).map_err(Error::system(format!("write {}", state.display())))?;
    let status = itself()?
        .args(["fuzz", target.name, "--input"])
        .arg(state)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .map_err(Error::system("start the program again"))?;
    Ok(!status.success())
}

/// The child: the corpus, then new inputs.
fn inside(target: &Target, options: &Options, state: &Path) -> Result<bool, Error> {
    let corpus = corpus(target)?;
    let mutator = Mutator { corpus: &corpus, words: target.words };
    let mut file = std::fs::File::create(state).map_err(Error::system("create the file of the input"))?;
    let watch = Watch::start();
    let mut fed = Fed::default();
    let mut one = |input: &[u8], fed: &mut Fed| -> Result<Result<bool, String>, Error> {
        keep(&mut file, input).map_err(Error::system("keep the input"))?;
        Ok(watch.feed(target, input).map(|Meal { is_valid, took, bytes }| {
            fed.slowest_ms = fed.slowest_ms.max(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
            fed.bytes_peak = fed.bytes_peak.max(bytes);
            is_valid
        }))
    };
    let mut is_any_valid = false;
    for input in &corpus {
        match one(input, &mut fed)? {
            Ok(is_valid) => is_any_valid |= is_valid,
            Err(complaint) => {
                println!("{complaint}");
                return Ok(false);
            }
        }
        fed.known += 1;
    }
    if !is_any_valid {
        println!("nothing in the corpus is valid: what lies behind the parser would never be reached");
        return Ok(false);
    }
    let end = options.seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let from = options.from.unwrap_or_default();
    while match end {
        Some(end) => Instant::now() < end,
        None => fed.new < options.runs.unwrap_or(RUNS),
    } {
        let mut chance = Chance::new(from.wrapping_add(fed.new));
        let mut input = match target.make {
            Some(make) if chance.once_in(2) => make(&mut chance),
            _ => mutator.make(&mut chance),
        };
        // What is not mended shows how broken frames are met.
        if let Some(mend) = target.mend
            && !chance.once_in(4)
        {
            mend(&mut input);
        }
        match one(&input, &mut fed)? {
            Ok(is_valid) => fed.valid += u64::from(is_valid),
            Err(complaint) => {
                println!("seed {}: {complaint}", from.wrapping_add(fed.new));
                return Ok(false);
            }
        }
        fed.new += 1;
    }
    println!("{}", serde_json::to_string(&fed).map_err(Error::Json)?);
    Ok(true)
}

/// Ends the process when one input takes for ever.
struct Watch {
    start: Instant,
    /// When the input of the moment was begun, in milliseconds after `start`, plus one; 0 when there is none.
    begun: Arc<AtomicU64>,
}

impl Watch {
    fn start() -> Self {
        let watch = Self { start: Instant::now(), begun: Arc::default() };
        let (start, begun) = (watch.start, Arc::clone(&watch.begun));
        std::thread::spawn(move || {
            loop {
                // It is never unparked: this is the wait of a watchdog.
                std::thread::park_timeout(HANG_INTERVAL);
                let since = begun.load(Ordering::Relaxed);
                if since > 0 && start.elapsed() > Duration::from_millis(since) + HANG {
                    println!("not done within {HANG:?}");
                    std::process::exit(COMPLAINED.into());
                }
            }
        });
        watch
    }

    /// Feeds one input: what that came to, or the complaint.
    fn feed(&self, target: &Target, input: &[u8]) -> Result<Meal, String> {
        if input.len() > INPUT_BYTES_MAX {
            return Err(format!("the input is longer than {INPUT_BYTES_MAX} bytes"));
        }
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
        self.begun.store(now + 1, Ordering::Relaxed);
        let mut verdict = None;
        let mut took = Duration::ZERO;
        let memory = allocation_counter::measure(|| {
            let (time, result) = measure::time(|| catch_unwind(AssertUnwindSafe(|| (target.feed)(input))));
            took = time;
            verdict = Some(result);
        });
        self.begun.store(0, Ordering::Relaxed);
        let Some(Ok(verdict)) = verdict else { return Err("it panicked".to_owned()) };
        let is_valid = verdict?;
        let length = u32::try_from(input.len()).unwrap_or(u32::MAX);
        let time_max = TIME_FIXED + TIME_PER_BYTE * length;
        if took > time_max {
            return Err(format!("{} bytes took {took:?}, more than {time_max:?}", input.len()));
        }
        let bytes_max = target.bytes_fixed + target.bytes_per_byte * u64::from(length);
        if memory.bytes_max > bytes_max {
            let held = memory.bytes_max;
            return Err(format!("{} bytes made it hold {held} bytes, more than {bytes_max}", input.len()));
        }
        Ok(Meal { is_valid, took, bytes: memory.bytes_max })
    }
}

fn corpus(target: &Target) -> Result<Vec<Vec<u8>>, Error> {
    let directory = Path::new(CORPUS).join(target.name);
    let problem = || Error::system(format!("read the corpus {}", directory.display()));
    let entries = std::fs::read_dir(&directory).map_err(problem())?;
    let mut paths: Vec<PathBuf> =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>().map_err(problem())?;
    paths.sort();
    let inputs = paths.iter().map(std::fs::read).collect::<Result<Vec<_>, _>>().map_err(problem())?;
    if inputs.is_empty() {
        return Err(Error::Refused(format!(
            "{} has no known inputs for {}",
            directory.display(),
            target.about
        )));
    }
    Ok(inputs)
}

fn keep(file: &mut std::fs::File, input: &[u8]) -> std::io::Result<()> {
    file.seek(SeekFrom::Start(0))?;
    file.write_all(input)?;
    file.set_len(input.len() as u64)
}

fn itself() -> Result<Command, Error> {
    Ok(Command::new(std::env::current_exe().map_err(Error::system("find this program"))?))
}

/// A seed that nobody has chosen.
fn some_seed() -> u64 {
    let mut bytes = [0; 4];
    // A seed of zeroes is as good as any other, and it is printed.
    let _ = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    u64::from(u32::from_le_bytes(bytes))
}

/// A name for an input, by its bytes.
fn blake3_name(input: &[u8]) -> String {
    greenlight_depot::content_hash(input).short()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(feed: fn(&[u8]) -> Result<bool, String>) -> Target {
        let known = &ALL[0];
        Target {
            name: known.name,
            about: "",
            words: &[],
            make: None,
            mend: None,
            feed,
            bytes_fixed: 1 << 16,
            bytes_per_byte: 2,
        }
    }

    #[test]
    fn every_way_to_fail_is_seen() {
        let watch = Watch::start();
        watch.feed(&target(|_| Ok(true)), b"x").unwrap();
        let complaint =
            |feed: fn(&[u8]) -> Result<bool, String>| watch.feed(&target(feed), b"x").unwrap_err();
        assert_eq!(complaint(|_| Err("no".to_owned())), "no");
        assert_eq!(complaint(|input| panic!("{input:?}")), "it panicked");
        let large = complaint(|_| {
            std::hint::black_box(vec![0_u8; 1 << 20]);
            Ok(true)
        });
        assert!(large.contains("made it hold"), "{large}");
    }
}
