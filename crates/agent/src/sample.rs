//! What the host and the services on it use: read from `/proc`, as often as once a second, at next to no cost.
//!
//! Each sample reads some eight small files, and one for each process of a service. Who belongs to a process, and which process it
//! is, is looked up every [`LOOK_UP_INTERVAL`] only, since that reads all of `/proc` and asks the manager: what a worker used that began
//! and ended in between is counted by its parent once that has waited for it. A test counts the processor time.
//!
//! Not in here: control groups. A process that leaves its parent behind, as daemons of old do, is not seen.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::time::{Duration, Instant};

use greenlight_link::message::Event;
use greenlight_model::Timestamp;
use greenlight_model::host::InstanceSpec;
use greenlight_model::id::{ProcessName, ServiceName};
use greenlight_model::sample::{HostSample, ProcessSample, ServiceSample};

use crate::context::Context;
use crate::failure::{OrHost as _, Outcome, host};
use crate::layout::Layout;
use crate::ledger;
use crate::manager::{self, Live};
use crate::observe;
use crate::poll;
use crate::process::{self, Identity, Stat};
use crate::run::Run;

/// How often it is looked up who belongs to a process.
const LOOK_UP_INTERVAL: Duration = Duration::from_secs(10);
/// The same while one does not run: it may have been started anew.
const LOOK_UP_INTERVAL_DOWN: Duration = Duration::from_secs(2);
/// Samples are no closer than this: each costs some processor time.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// And no further apart, so that an ended connection is noticed.
const INTERVAL_MAX: Duration = Duration::from_secs(10);
/// Who wants samples for longer asks again: samples that nobody reads any more end by themselves.
const DURING_MAX: Duration = Duration::from_secs(3600);
/// What `/proc/diskstats` counts in, whatever the disk's own sectors are.
const SECTOR_BYTES: u64 = 512;

/// Gives a sample as an event at once, and one each `every` from then on, for as long as `during`.
pub(crate) fn sample(
    context: &Context,
    specs: &[InstanceSpec],
    every: Duration,
    during: Duration,
) -> Outcome<()> {
    let every = every.clamp(INTERVAL_MIN, INTERVAL_MAX);
    let mut sampler = Sampler::new(context, specs);
    poll::until(every, Instant::now() + during.min(DURING_MAX), || {
        (context.events)(Event::Sampled(Box::new(sampler.take()?)));
        Ok(context.is_cancelled().then_some(()))
    })?;
    Ok(())
}

/// Takes samples.
struct Sampler<'a> {
    context: &'a Context,
    specs: &'a [InstanceSpec],
    watched: Vec<Watched>,
    looked_up: Option<Instant>,
    disks: Vec<String>,
}

/// A process of a service, and who belongs to it.
struct Watched {
    service: ServiceName,
    process: ProcessName,
    main: Option<Identity>,
    /// The processes that it started, and they.
    others: Vec<Identity>,
}

impl<'a> Sampler<'a> {
    fn new(context: &'a Context, specs: &'a [InstanceSpec]) -> Self {
        Self { context, specs, watched: Vec::new(), looked_up: None, disks: disks() }
    }

    fn take(&mut self) -> Outcome<HostSample> {
        let is_down = self.watched.iter().any(|watched| !watched.main.is_some_and(Identity::is_alive));
        let interval = if is_down { LOOK_UP_INTERVAL_DOWN } else { LOOK_UP_INTERVAL };
        if self.looked_up.is_none_or(|looked_up| looked_up.elapsed() >= interval) {
            self.look_up()?;
            self.looked_up = Some(Instant::now());
        }
        let mut services = BTreeMap::new();
        for spec in self.specs {
            let path = Layout::new(&spec.root).root().to_owned();
            let space = rustix::fs::statvfs(observe::existing_ancestor(&path))
                .or_host(|| format!("look at the disk under {}", path.display()))?;
            let own = self.watched.iter().filter(|watched| watched.service == spec.service);
            let processes =
                own.filter_map(|watched| Some((watched.process.clone(), watched.sample()?))).collect();
            let service = ServiceSample {
                disk_total_bytes: space.f_blocks.saturating_mul(space.f_frsize),
                disk_free_bytes: space.f_bavail.saturating_mul(space.f_frsize),
                processes,
            };
            services.insert(spec.service.clone(), service);
        }
        let (cpu_busy_ms, cpu_all_ms) = cpu(&read("/proc/stat")?)
            .ok_or_else(|| host("/proc/stat does not say how busy the processors are"))?;
        let memory = read("/proc/meminfo")?;
        let memory_of =
            |key| memory_bytes(&memory, key).ok_or_else(|| host(format!("/proc/meminfo has no {key}")));
        let (disk_read_bytes, disk_written_bytes) = disk(&read("/proc/diskstats")?, &self.disks);
        Ok(HostSample {
            at: Timestamp::now(),
            since_boot_ms: u64::try_from(process::since_boot().as_millis()).unwrap_or(u64::MAX),
            cpu_busy_ms,
            cpu_all_ms,
            memory_total_bytes: memory_of("MemTotal")?,
            memory_available_bytes: memory_of("MemAvailable")?,
            load_hundredths: load(&read("/proc/loadavg")?)
                .ok_or_else(|| host("/proc/loadavg does not begin with a number"))?,
            disk_read_bytes,
            disk_written_bytes,
            services,
        })
    }

    /// Which processes the services have now, and who belongs to each.
    fn look_up(&mut self) -> Outcome<()> {
        let mut children: HashMap<u32, Vec<Identity>> = HashMap::new();
        for stat in process::all().or_host(|| "read /proc".to_owned())? {
            children.entry(stat.parent).or_default().push(stat.identity());
        }
        self.watched.clear();
        for spec in self.specs {
            let layout = Layout::new(&spec.root);
            let run = match ledger::load(&layout)?.active {
                Some(active) => Run::load(&layout, active)?,
                None => None,
            };
            // Processes are as they were started, not as the fleet file would have them by now.
            let (running, kind) = match &run {
                Some(run) => (&run.desired.spec, run.manager),
                None => (spec, spec.manager),
            };
            let manager = manager::of(kind, self.context.site(spec));
            for name in running.processes.keys() {
                let main = match manager.state(name) {
                    Ok(Live::Running(identity)) => Some(identity),
                    Ok(Live::Starting | Live::Stopped | Live::Ended { .. }) => None,
                    Err(error) => return Err(error),
                };
                let mut others: Vec<Identity> = Vec::new();
                let mut next: Vec<Identity> = main.into_iter().collect();
                while let Some(parent) = next.pop() {
                    let own = children.get(&parent.pid).map_or(&[][..], Vec::as_slice);
                    others.extend(own);
                    next.extend(own);
                }
                self.watched.push(Watched {
                    service: spec.service.clone(),
                    process: name.clone(),
                    main,
                    others,
                });
            }
        }
        Ok(())
    }
}

impl Watched {
    /// None when the process does not run.
    fn sample(&self) -> Option<ProcessSample> {
        let main = self.main?;
        let of = |identity: Identity| Stat::of(identity.pid).filter(|stat| stat.identity() == identity);
        let own = of(main).filter(Stat::is_alive)?;
        let others: Vec<Stat> = self.others.iter().filter_map(|other| of(*other)).collect();
        let sum = |value: fn(&Stat) -> u64| others.iter().map(value).fold(value(&own), u64::saturating_add);
        let pages = sum(|stat| stat.resident_pages);
        Some(ProcessSample {
            pid: main.pid,
            start_ticks: main.start_ticks,
            cpu_ms: process::ticks_to_ms(sum(|stat| stat.cpu_ticks)),
            memory_bytes: pages.saturating_mul(u64::try_from(rustix::param::page_size()).unwrap_or(4096)),
            members: u32::try_from(others.len() + 1).unwrap_or(u32::MAX),
        })
    }
}

fn read(path: &str) -> Outcome<String> {
    fs::read_to_string(path).or_host(|| format!("read {path}"))
}

/// How long all processors worked, and could have, in milliseconds.
fn cpu(stat: &str) -> Option<(u64, u64)> {
    let values = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    // user nice system idle iowait irq softirq steal; what guests had is in user already.
    let values: Vec<u64> = values.split_whitespace().take(8).map_while(|value| value.parse().ok()).collect();
    let all: u64 = values.iter().sum();
    let idle = values.get(3)? + values.get(4).copied().unwrap_or(0);
    Some((process::ticks_to_ms(all - idle), process::ticks_to_ms(all)))
}

fn memory_bytes(meminfo: &str, key: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kibibytes: u64 = value.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    Some(kibibytes.saturating_mul(1024))
}

fn load(loadavg: &str) -> Option<u32> {
    let (whole, hundredths) = loadavg.split_whitespace().next()?.split_once('.')?;
    whole.parse::<u32>().ok()?.checked_mul(100)?.checked_add(hundredths.parse().ok()?)
}

/// The names of the host's real disks: without partitions, and without what is made of other disks.
fn disks() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return Vec::new() };
    let real = entries.flatten().filter(|entry| entry.path().join("device").exists());
    real.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Bytes read and written.
fn disk(diskstats: &str, disks: &[String]) -> (u64, u64) {
    let mut sums = (0, 0);
    for line in diskstats.lines() {
        let mut fields = line.split_whitespace().skip(2);
        if fields.next().is_none_or(|name| !disks.iter().any(|disk| disk == name)) {
            continue;
        }
        // reads, reads merged, sectors read, ms; writes, writes merged, sectors written.
        let mut sectors = |skipped: usize| fields.nth(skipped).and_then(|field| field.parse::<u64>().ok());
        sums.0 += sectors(2).unwrap_or(0) * SECTOR_BYTES;
        sums.1 += sectors(3).unwrap_or(0) * SECTOR_BYTES;
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    /// What sampling once a second may take of one core.
    const SHARE_MAX: f64 = 0.005;

    #[test]
    fn the_files_of_the_kernel_are_read() {
        let ticks = rustix::param::clock_ticks_per_second();
        let stat = "cpu  10 20 30 400 50 6 7 8 9 9\ncpu0 1 1 1 1\nintr 5\n";
        assert_eq!(cpu(stat), Some((81 * 1000 / ticks, 531 * 1000 / ticks)));
        assert_eq!(cpu("cpu0 1 2 3 4\n"), None);
        let meminfo = "MemTotal:       1000 kB\nMemFree:  10 kB\nMemAvailable:    500 kB\n";
        assert_eq!(
            (memory_bytes(meminfo, "MemTotal"), memory_bytes(meminfo, "Mem")),
            (Some(1_024_000), None)
        );
        assert_eq!(load("1.05 0.70 0.50 2/345 6789\n"), Some(105));
        assert_eq!(load(""), None);
        let diskstats = "   8 0 sda 5 1 100 9 7 2 40 9 0 9 9\n   8 1 sda1 5 1 100 9 7 2 40 9 0 9 9\n 7 0 loop0 1 1 1 1 1 1 1 1\n";
        assert_eq!(disk(diskstats, &["sda".to_owned()]), (51_200, 20_480));
    }

    /// Counts processor time, which other work on the machine hardly changes.
    #[test]
    fn a_sample_a_second_takes_less_than_half_a_percent_of_a_core() {
        const SAMPLES: u32 = 100;
        let root = tempfile::tempdir().unwrap();
        let specs = [fixture::spec(root.path().to_str().unwrap(), [fixture::process("web", &["app"])])];
        let context = Context {
            events: Box::new(|_| ()),
            cancelled: Arc::new(AtomicBool::new(false)),
            program: PathBuf::new(),
        };
        let mut sampler = Sampler::new(&context, &specs);
        let time = || {
            let spent = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            Duration::try_from(spent).unwrap()
        };
        // One look-up for every ten samples, as they come at one a second; this process stands for the service's.
        let before = time();
        for number in 0..SAMPLES {
            if number % 10 == 0 {
                sampler.look_up().unwrap();
                sampler.looked_up = Some(Instant::now());
            }
            let main = Some(Identity::own().unwrap());
            sampler.watched[0].main = main;
            sampler.watched[0].others = vec![Identity::own().unwrap(); 8];
            let sample = sampler.take().unwrap();
            let process = &sample.services[&specs[0].service].processes[&"web".parse().unwrap()];
            assert!(process.memory_bytes > 0 && process.members == 9, "{process:?}");
            serde_json::to_vec(&Event::Sampled(Box::new(sample))).unwrap();
        }
        let each = (time() - before) / SAMPLES;
        println!("{each:?} of processor time for a sample");
        assert!(each.as_secs_f64() < SHARE_MAX, "{each:?} each second");
    }
}
