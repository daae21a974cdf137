//! What a host and its services use, asked of the real agent.

use std::time::Duration;

use greenlight_link::message::{Event, Reply, Request};
use greenlight_model::host::InstanceSpec;
use greenlight_model::sample::HostSample;

use crate::support::{Host, kill, pid, release};

fn sampled(host: &mut Host, spec: &InstanceSpec, every_ms: u64, during_ms: u64) -> Vec<HostSample> {
    let request = Request::Sample {
        specs: vec![spec.clone()],
        every: Duration::from_millis(every_ms),
        during: Duration::from_millis(during_ms),
    };
    assert_eq!(host.ask(request).unwrap(), Reply::Done);
    let events = host.events.iter();
    events
        .map(
            |event| if let Event::Sampled(sample) = event { (**sample).clone() } else { panic!("{event:?}") },
        )
        .collect()
}

#[test]
fn a_service_and_its_host_are_sampled() {
    let mut host = Host::new();
    let spec = host.spec();
    let empty = sampled(&mut host, &spec, 1000, 0);
    assert_eq!(empty.len(), 1, "one, when asked for one");
    assert!(empty[0].services[&spec.service].processes.is_empty(), "nothing runs yet: {empty:?}");
    host.deploy(&spec, &release("v1", "normal"), 1);
    let report = host.observe(&spec);
    let samples = sampled(&mut host, &spec, 100, 1500);
    assert!(samples.len() >= 3, "{samples:?}");
    let (first, last) = (&samples[0], &samples[samples.len() - 1]);
    assert!(last.since_boot_ms > first.since_boot_ms && last.cpu_all_ms > first.cpu_all_ms);
    let load = last.cpu_percent_since(first).unwrap();
    assert!((0.0..=100.0).contains(&load), "{load}");
    assert!(last.memory_percent().is_some_and(|percent| percent > 0.0 && percent < 100.0));
    let service = &last.services[&spec.service];
    assert!(service.disk_free_bytes > 0 && service.disk_total_bytes > service.disk_free_bytes);
    let process = &service.processes[&"web".parse().unwrap()];
    assert_eq!(process.pid, pid(&report));
    assert!(process.memory_bytes > 0 && process.members >= 1 && process.cpu_ms > 0, "{process:?}");
    assert_eq!(service.restarts_since(&first.services[&spec.service]), 0);
    // What is started anew is another run.
    kill(process.pid, "-KILL");
    let later = sampled(&mut host, &spec, 100, 10_000);
    let restarted = later.iter().map(|sample| sample.services[&spec.service].restarts_since(service)).max();
    assert_eq!(restarted, Some(1), "{later:?}");
    host.clean_up(&spec, 2);
}
