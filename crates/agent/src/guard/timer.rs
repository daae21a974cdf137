//! What waits until a guard fires: a transient timer of systemd, or a detached process of its own.

use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, Instant};

use greenlight_model::fleet::ManagerKind;
use greenlight_model::id::ServiceName;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use super::{Keeper, TIMER, Token};
use crate::command::{self, Outputs};
use crate::context::Context;
use crate::failure::{OrHost as _, Outcome, host};
use crate::files;
use crate::layout::Layout;
use crate::manager::ANSWER_TIMEOUT;
use crate::manager::systemd::{self, Scope};
use crate::poll;
use crate::process::{self, Identity};

/// A record of a timer has some hundred bytes.
const TIMER_BYTES_MAX: u64 = 64 * 1024;
/// What the detached process prints when it waits.
pub(super) const WAITING: &str = "waiting";

/// A timer that was started, as it is found again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub(super) enum Timer {
    /// A transient timer of systemd, with a service of the same name.
    Unit {
        /// Whose manager has it.
        scope: Scope,
        /// Its name, without an ending.
        name: String,
    },
    /// A process that waits.
    Process {
        /// The boot of the machine that it belongs to.
        boot: String,
        /// Which.
        identity: Identity,
    },
}

impl Timer {
    /// Starts one for what a manager of this kind runs.
    pub(super) fn start(
        context: &Context,
        layout: &Layout,
        keeper: &Keeper,
        token: &Token,
        limit: Duration,
    ) -> Outcome<Self> {
        let mut argv = agent_argv(context, layout, "guard")?;
        argv.extend(["--generation".to_owned(), token.generation.to_string()]);
        argv.extend(["--armed-at-ms".to_owned(), token.armed_at_ms.to_string()]);
        match keeper.kind {
            ManagerKind::Systemd => Self::start_unit(Scope::System, &keeper.service, token, limit, &argv),
            ManagerKind::SystemdUser => Self::start_unit(Scope::User, &keeper.service, token, limit, &argv),
            ManagerKind::Supervisord | ManagerKind::Agent | ManagerKind::Auto => {
                argv.extend(["--after-ms".to_owned(), limit.as_millis().to_string()]);
                Self::start_process(token, &argv)
            }
        }
    }

    fn start_unit(
        scope: Scope,
        service: &ServiceName,
        token: &Token,
        limit: Duration,
        argv: &[String],
    ) -> Outcome<Self> {
        // systemd puts the value of a variable where it finds `$`, and there is no way to say that in all of its versions.
        if let Some(word) = argv.iter().find(|word| word.contains('$')) {
            return Err(host(format!("`{word}` cannot be written into a timer of systemd")));
        }
        let name = format!("greenlight-guard-{service}-{}-{}", token.generation, token.armed_at_ms);
        let description =
            format!("--description=greenlight goes back: {service}, generation {}", token.generation);
        let (unit, after) = (format!("--unit={name}"), format!("--on-active={}ms", limit.as_millis()));
        let mut arguments = vec!["--quiet", "--collect", &unit, &description, &after];
        arguments.extend(["--timer-property=AccuracySec=100ms", "--"]);
        arguments.extend(argv.iter().map(String::as_str));
        let started = systemd::invoke(scope, "systemd-run", &arguments, ANSWER_TIMEOUT)?;
        if !started.status.success() {
            let how = command::ended_how(started.status);
            return Err(host(format!("`systemd-run` {how}: {}", started.stderr.trim())));
        }
        Ok(Self::Unit { scope, name })
    }

    fn start_process(token: &Token, argv: &[String]) -> Outcome<Self> {
        let mut child =
            command::spawn_to_detach(argv, &command::helper_environment(), Outputs::first_piped())
                .or_host(|| format!("start the guard's process `{}`", argv[0]))?;
        let mut answer = String::new();
        if let Some(stdout) = child.stdout.take() {
            // It closes its output when it waits or has failed, so this ends.
            stdout
                .take(TIMER_BYTES_MAX)
                .read_to_string(&mut answer)
                .or_host(|| "hear from the guard's process".to_owned())?;
        }
        let identity = Identity::of(child.id()).filter(|_| answer.starts_with(WAITING));
        // It is collected when it ends; until then it lives on its own, also without this agent.
        std::thread::spawn(move || child.wait());
        let identity = identity.ok_or_else(|| {
            let said = if answer.trim().is_empty() { "nothing" } else { answer.trim() };
            host(format!("the guard's process ended at once; it said: {said}"))
        })?;
        Ok(Self::Process { boot: token.boot.clone(), identity })
    }

    /// Stops it; that it is gone is as good. The caller holds the change lock, so it is not at work.
    pub(super) fn stop(&self) -> Outcome<()> {
        match self {
            Self::Unit { scope, name } => {
                let units = units(name);
                let arguments = ["--no-pager", "stop", "--", &units[0], &units[1]];
                let stopped = systemd::invoke(*scope, "systemctl", &arguments, ANSWER_TIMEOUT)?;
                // It fails for one that is gone already.
                match self.is_alive()? {
                    false => Ok(()),
                    true => Err(host(format!("{} does not stop: {}", units[0], stopped.stderr.trim()))),
                }
            }
            Self::Process { identity, .. } => {
                if !self.is_alive()? {
                    return Ok(());
                }
                let doing = || format!("end the guard's process {}", identity.pid);
                identity.signal(Signal::KILL).or_host(doing)?;
                let deadline = Instant::now() + ANSWER_TIMEOUT;
                let gone = poll::until(poll::PROCESS_INTERVAL, deadline, || {
                    Ok((!identity.is_alive()).then_some(()))
                })?;
                gone.ok_or_else(|| host(format!("the guard's process {} does not end", identity.pid)))
            }
        }
    }

    /// Whether it waits, or is at work.
    pub(super) fn is_alive(&self) -> Outcome<bool> {
        match self {
            Self::Unit { scope, name } => {
                let units = units(name);
                let arguments = ["--no-pager", "show", "--property=ActiveState", "--", &units[0], &units[1]];
                let shown = systemd::invoke(*scope, "systemctl", &arguments, ANSWER_TIMEOUT)?;
                if !shown.status.success() {
                    return Err(host(format!("systemd does not say how {name} is: {}", shown.stderr.trim())));
                }
                let mut states = shown.stdout.lines().filter_map(|line| line.strip_prefix("ActiveState="));
                Ok(states.any(|state| !matches!(state, "inactive" | "failed")))
            }
            Self::Process { boot, identity } => {
                let now = process::boot_id().or_host(|| "read the boot id".to_owned())?;
                Ok(*boot == now && identity.is_alive())
            }
        }
    }

    pub(super) fn store(&self, layout: &Layout) -> Outcome<()> {
        let path = layout.guard().join(TIMER);
        let bytes = serde_json::to_vec(self).or_host(|| "write the timer as JSON".to_owned())?;
        files::write_atomically(&path, &bytes, 0o600, None).or_host(|| format!("write {}", path.display()))
    }

    /// The one that was started last and not removed since.
    pub(super) fn load(layout: &Layout) -> Outcome<Option<Self>> {
        let path = layout.guard().join(TIMER);
        let bytes =
            files::read_if_there(&path, TIMER_BYTES_MAX).or_host(|| format!("read {}", path.display()))?;
        bytes
            .map(|bytes| serde_json::from_slice(&bytes).or_host(|| format!("understand {}", path.display())))
            .transpose()
    }
}

/// A command of the agent's for a service on this host.
pub(super) fn agent_argv(context: &Context, layout: &Layout, role: &str) -> Outcome<Vec<String>> {
    let text = |path: &Path| match path.to_str() {
        Some(text) if !text.chars().any(char::is_control) => Ok(text.to_owned()),
        _ => Err(host(format!("the path {} is not UTF-8, or has control characters", path.display()))),
    };
    let program = text(&context.program)?;
    Ok(vec![program, "agent".to_owned(), role.to_owned(), "--root".to_owned(), text(layout.root())?])
}

fn units(name: &str) -> [String; 2] {
    [format!("{name}.timer"), format!("{name}.service")]
}
