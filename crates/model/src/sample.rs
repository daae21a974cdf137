//! What a host and its services use, as of one moment: counters that only grow, and sizes.
//!
//! Whoever asks twice has the rate between: nothing is averaged on the host, and a sample that is lost costs nothing. Not in here:
//! what is too much (`verdict`'s guards).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Timestamp;
use crate::id::{ProcessName, ServiceName};

/// One look at a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSample {
    /// When, by the host's clock.
    pub at: Timestamp,
    /// When, in milliseconds since the host's boot, which nobody sets: rates are measured by it.
    pub since_boot_ms: u64,
    /// Time that all processors together worked since boot, in milliseconds.
    pub cpu_busy_ms: u64,
    /// Time that they worked or could have.
    pub cpu_all_ms: u64,
    /// The host's memory.
    pub memory_total_bytes: u64,
    /// How much of it new work could have without swapping, as the kernel estimates it.
    pub memory_available_bytes: u64,
    /// Processes that ran or waited to, on the average of the last minute, in hundredths.
    pub load_hundredths: u32,
    /// Bytes that were read from its disks since boot.
    pub disk_read_bytes: u64,
    /// Bytes that were written to them.
    pub disk_written_bytes: u64,
    /// Each service asked for.
    pub services: BTreeMap<ServiceName, ServiceSample>,
}

impl HostSample {
    /// The processors' load since an earlier sample of the same boot, in percent of all of them. None when no time passed.
    #[must_use]
    pub fn cpu_percent_since(&self, earlier: &Self) -> Option<f64> {
        let all = self.cpu_all_ms.checked_sub(earlier.cpu_all_ms).filter(|all| *all > 0)?;
        Some(self.cpu_busy_ms.saturating_sub(earlier.cpu_busy_ms) as f64 * 100.0 / all as f64)
    }

    /// The memory that is not available, in percent. None when the host does not say.
    #[must_use]
    pub fn memory_percent(&self) -> Option<f64> {
        let used = self.memory_total_bytes.checked_sub(self.memory_available_bytes)?;
        (self.memory_total_bytes > 0).then(|| used as f64 * 100.0 / self.memory_total_bytes as f64)
    }
}

/// One look at a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceSample {
    /// Size of the file system that its directory is on.
    pub disk_total_bytes: u64,
    /// What is free of it for the agent's account.
    pub disk_free_bytes: u64,
    /// Each process that runs; one that does not is absent.
    pub processes: BTreeMap<ProcessName, ProcessSample>,
}

impl ServiceSample {
    /// Processor time since an earlier sample, in milliseconds. A process that was started in between counts from its start,
    /// one that ended in between not at all.
    #[must_use]
    pub fn cpu_ms_since(&self, earlier: &Self) -> u64 {
        let since = |(name, now): (&ProcessName, &ProcessSample)| {
            let before = earlier.processes.get(name).filter(|before| before.is_same_run(now));
            now.cpu_ms.saturating_sub(before.map_or(0, |before| before.cpu_ms))
        };
        self.processes.iter().map(since).sum()
    }

    /// How many processes were started anew since an earlier sample: those that run under another process.
    #[must_use]
    pub fn restarts_since(&self, earlier: &Self) -> u64 {
        let is_new = |(name, now): &(&ProcessName, &ProcessSample)| {
            earlier.processes.get(name).is_some_and(|before| !before.is_same_run(now))
        };
        self.processes.iter().filter(is_new).count() as u64
    }
}

/// One look at a process with all that it started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSample {
    /// Its process id.
    pub pid: u32,
    /// When it was started, in clock ticks since boot: tells it from another one with the same id.
    pub start_ticks: u64,
    /// Processor time of it, of all processes that it started, and of those of them that have ended, in milliseconds.
    pub cpu_ms: u64,
    /// Their resident memory. What they share is counted in each of them.
    pub memory_bytes: u64,
    /// How many they are.
    pub members: u32,
}

impl ProcessSample {
    fn is_same_run(&self, other: &Self) -> bool {
        (self.pid, self.start_ticks) == (other.pid, other.start_ticks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(cpu_busy_ms: u64, cpu_all_ms: u64, processes: &[(&str, u32, u64)]) -> HostSample {
        let process = |(name, pid, cpu_ms): &(&str, u32, u64)| {
            let sample =
                ProcessSample { pid: *pid, start_ticks: 7, cpu_ms: *cpu_ms, memory_bytes: 1, members: 1 };
            (name.parse().unwrap(), sample)
        };
        let processes = processes.iter().map(process).collect();
        let service = ServiceSample { disk_total_bytes: 2, disk_free_bytes: 1, processes };
        HostSample {
            at: Timestamp::UNIX_EPOCH,
            since_boot_ms: 0,
            cpu_busy_ms,
            cpu_all_ms,
            memory_total_bytes: 1000,
            memory_available_bytes: 250,
            load_hundredths: 50,
            disk_read_bytes: 0,
            disk_written_bytes: 0,
            services: [("web".parse().unwrap(), service)].into(),
        }
    }

    #[test]
    fn rates_are_differences() {
        let before = host(1000, 8000, &[("a", 1, 100), ("b", 2, 100), ("gone", 3, 100)]);
        let after = host(1500, 10_000, &[("a", 1, 130), ("b", 9, 40), ("new", 4, 5)]);
        assert_eq!(after.cpu_percent_since(&before), Some(25.0));
        assert_eq!(before.cpu_percent_since(&before), None);
        assert_eq!(after.memory_percent(), Some(75.0));
        let (before, after) =
            (&before.services[&"web".parse().unwrap()], &after.services[&"web".parse().unwrap()]);
        assert_eq!(after.cpu_ms_since(before), 30 + 40 + 5);
        assert_eq!(after.restarts_since(before), 1, "what had not run is no restart");
    }
}
