//! What a host is told about one service, put together from the service's definition and the environment's settings.

use greenlight_model::fleet::{Environment, Service};
use greenlight_model::host::{InstanceSpec, ReleaseMark};
use greenlight_model::id::Instance;
use greenlight_model::manifest::Release;

/// The instance as its host is to lay it out and run it. None when the environment has no settings for the host: the
/// fleet file was changed since the rollout began.
#[must_use]
pub fn instance_spec(
    service: &Service,
    environment: &Environment,
    instance: &Instance,
) -> Option<InstanceSpec> {
    let settings = environment.host_settings.get(&instance.host)?;
    let mut processes = service.processes.clone();
    for (name, process) in &mut processes {
        if let Some(port) = settings.ports.get(name) {
            process.port = Some(*port);
        }
        // The environment knows more about where the process runs than the service does.
        process
            .variables
            .extend(environment.variables.iter().map(|(name, value)| (name.clone(), value.clone())));
    }
    Some(InstanceSpec {
        service: service.name.clone(),
        environment: environment.name.clone(),
        host: instance.host.clone(),
        root: format!("{}/{}", settings.root.trim_end_matches('/'), service.name),
        manager: settings.manager,
        shared: service.shared.clone(),
        prepare: service.prepare.clone(),
        processes,
        profiles: std::collections::BTreeMap::new(),
        secrets: service.secrets.clone(),
    })
}

/// What a host needs to recognise a release in a process's answer.
#[must_use]
pub fn mark(release: &Release) -> ReleaseMark {
    ReleaseMark { id: release.id, label: release.label.clone(), commit: release.commit.clone() }
}
