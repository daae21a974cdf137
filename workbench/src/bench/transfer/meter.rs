//! What a command costs, with all that it starts, and its hosts.

use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use greenlight_testbed::{Bed, Group};
use serde::Serialize;

use super::bed;
use crate::Error;

/// How often memory is looked at. Shorter would cost what is measured; what is there for less is not seen.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// The control group of the controller's side.
const GROUP: &str = "transfer-controller";
/// How much of what a failed command printed is shown, in bytes.
const SHOWN_BYTES: usize = 4_000;

/// What one run cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct Cost {
    /// Until every host answered.
    pub(crate) wall_s: f64,
    /// Processor time of the controller's processes.
    pub(crate) controller_s: f64,
    /// Processor time of all hosts together.
    pub(crate) hosts_s: f64,
    /// Bytes at the controller's end of the network, both ways.
    pub(crate) wire_bytes: u64,
    /// Most memory that the controller's processes had resident at once, what they share counted for each.
    pub(crate) memory_bytes: u64,
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { wall_s, controller_s, hosts_s, wire_bytes, memory_bytes } = self;
        let (wire, memory) = (megabytes(*wire_bytes), megabytes(*memory_bytes));
        write!(
            f,
            "{wall_s:7.2} s, CPU {controller_s:6.2} + {hosts_s:6.2} s, {wire:8.2} MB, {memory:6.1} MB memory"
        )
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people: fewer than 2^53 bytes")]
pub(crate) fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// The median of each figure by itself.
pub(crate) fn median(costs: &[Cost]) -> Cost {
    let of = |figure: &dyn Fn(&Cost) -> f64| {
        let mut figures: Vec<f64> = costs.iter().map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures.get(figures.len() / 2).copied().unwrap_or_default()
    };
    let count = |figure: &dyn Fn(&Cost) -> u64| {
        let mut figures: Vec<u64> = costs.iter().map(figure).collect();
        figures.sort_unstable();
        figures.get(figures.len() / 2).copied().unwrap_or_default()
    };
    Cost {
        wall_s: of(&|cost| cost.wall_s),
        controller_s: of(&|cost| cost.controller_s),
        hosts_s: of(&|cost| cost.hosts_s),
        wire_bytes: count(&|cost| cost.wire_bytes),
        memory_bytes: count(&|cost| cost.memory_bytes),
    }
}

/// A measurement under way.
pub(crate) struct Meter<'a> {
    bed: &'a Bed,
    group: Group,
    controller: Duration,
    hosts: Duration,
    wire_bytes: u64,
    memory_bytes: AtomicU64,
    started: Instant,
}

impl<'a> Meter<'a> {
    pub(crate) fn start(bed: &'a Bed) -> Result<Self, Error> {
        let group = Group::create(GROUP).map_err(self::bed)?;
        Ok(Self {
            controller: group.processor_time().map_err(self::bed)?,
            hosts: hosts(bed)?,
            wire_bytes: bed.network_bytes().map_err(self::bed)?,
            memory_bytes: AtomicU64::default(),
            bed,
            group,
            started: Instant::now(),
        })
    }

    /// Runs a script to its end inside the controller's group; `shell` is what runs it.
    pub(crate) fn run(&self, mut shell: Command, script: &str, directory: &Path) -> Result<(), Error> {
        shell.args(["-c", r#"echo 0 > "$1"; exec bash -e -u -o pipefail -c "$2""#, "bench"]);
        shell.arg(self.group.processes_file()).arg(script).current_dir(directory);
        let is_over = AtomicBool::new(false);
        let output = std::thread::scope(|scope| {
            let looking = scope.spawn(|| self.look(&is_over));
            let output = shell.stdin(Stdio::null()).output();
            is_over.store(true, Ordering::Relaxed);
            looking.thread().unpark();
            let peak = looking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            output.map(|output| (output, peak))
        });
        let (output, peak) = output.map_err(Error::system("start a shell in the hub"))?;
        self.memory_bytes.store(peak, Ordering::Relaxed);
        if output.status.success() {
            return Ok(());
        }
        let printed = [output.stdout, output.stderr].concat();
        let end = String::from_utf8_lossy(&printed[printed.len().saturating_sub(SHOWN_BYTES)..]).into_owned();
        Err(Error::Refused(format!("a command of the bench ended with {}:\n{script}\n{end}", output.status)))
    }

    pub(crate) fn end(self) -> Result<Cost, Error> {
        let wall_s = self.started.elapsed().as_secs_f64();
        let controller = self.group.processor_time().map_err(bed)?;
        Ok(Cost {
            wall_s,
            controller_s: controller.saturating_sub(self.controller).as_secs_f64(),
            hosts_s: hosts(self.bed)?.saturating_sub(self.hosts).as_secs_f64(),
            wire_bytes: self.bed.network_bytes().map_err(bed)?.saturating_sub(self.wire_bytes),
            memory_bytes: self.memory_bytes.into_inner(),
        })
    }

    /// The most memory until it is over.
    fn look(&self, is_over: &AtomicBool) -> u64 {
        let mut peak = 0;
        while !is_over.load(Ordering::Relaxed) {
            // A look that fails says nothing; the group itself is asked again at the end, where it must answer.
            peak = peak.max(self.group.resident_bytes().unwrap_or(0));
            std::thread::park_timeout(LOOK_INTERVAL);
        }
        peak
    }
}

fn hosts(bed: &Bed) -> Result<Duration, Error> {
    bed.hosts().iter().map(|host| host.processor_time().map_err(self::bed)).sum()
}
