//! Opening a connection: starting the agent here or over ssh, and hearing its greeting.
//!
//! Guarantees: one process and one ssh connection per call; it ends within the connect timeout (and the time that sending the agent
//! may take); every failure is one line that names the host, what happened and what to do.
//! Not in here: how many hosts are opened at once. sshd drops unauthenticated connections beyond ten by default; the
//! caller keeps its pace.

use std::path::PathBuf;
use std::time::Duration;

use greenlight_model::fleet::LinkKind;
use greenlight_model::host::HostFacts;
use greenlight_model::id::HostName;
use greenlight_model::quantity::human_duration;
use tokio::process::Command;

use crate::connection::Connection;
use crate::diagnosis;
use crate::frame::{Frame, read_frame_async};
use crate::message::{Message, PROTOCOL_VERSION};
use crate::process::Process;
use crate::ssh;

/// How hosts are reached, besides what the fleet file says of each.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// The binary that is the agent when its first argument is `agent`: our own.
    pub agent_program: PathBuf,
    /// Whether the agent must be root: by `sudo -n` when the user is not.
    pub become_root: bool,
    /// How long it may take until the agent greets, the time for sending it not counted.
    pub connect_timeout: Duration,
    /// A configuration file for ssh instead of the user's own (`ssh -F`).
    pub ssh_config: Option<PathBuf>,
}

/// Why a host's agent could not be reached.
#[derive(Debug, thiserror::Error)]
#[error("{host}: {problem}")]
pub struct OpenError {
    /// The host.
    pub host: HostName,
    /// What is wrong.
    pub problem: OpenProblem,
}

/// What can be wrong, each with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum OpenProblem {
    /// Another host key than the known one.
    #[error(
        "its ssh host key is not the one that is known ({said}). If the machine was set up anew, forget the old key \
         (`ssh-keygen -R`), run `ssh {destination}` once and compare the fingerprint; if not, somebody may be in between"
    )]
    HostKeyChanged {
        /// What ssh was asked for.
        destination: String,
        /// What ssh said.
        said: String,
    },
    /// No host key is known, or the known ones are of another kind.
    #[error(
        "its ssh host key is not known here; run `ssh {destination}` once and compare the fingerprint, or add the key to known_hosts"
    )]
    HostKeyUnknown {
        /// What ssh was asked for.
        destination: String,
    },
    /// No key was accepted.
    #[error(
        "ssh was refused ({said}); load an accepted key with `ssh-add`, or set User and IdentityFile for {destination} in your ssh configuration, until `ssh -o BatchMode=yes {destination} true` works"
    )]
    PermissionDenied {
        /// What ssh was asked for.
        destination: String,
        /// What ssh said.
        said: String,
    },
    /// The name has no address.
    #[error(
        "its name cannot be resolved ({said}); correct it, or give the host a destination in the fleet file or a HostName in your ssh configuration"
    )]
    Unresolved {
        /// What ssh said.
        said: String,
    },
    /// Nothing listens there.
    #[error("nothing accepts ssh connections there ({said}); is sshd running, and is the port right?")]
    ConnectionRefused {
        /// What ssh said.
        said: String,
    },
    /// No answer in time.
    #[error("it does not answer ({said}); is it up, and does a firewall let ssh through?")]
    TimedOut {
        /// What ssh said, or how long was waited.
        said: String,
    },
    /// The network does not lead there.
    #[error("there is no way to it in the network ({said})")]
    Unreachable {
        /// What ssh said.
        said: String,
    },
    /// The way through another host failed.
    #[error("its jump host or proxy command did not connect it ({said}); try `ssh {destination} true`")]
    JumpHost {
        /// What ssh was asked for.
        destination: String,
        /// What ssh said.
        said: String,
    },
    /// The connection was closed during the handshake.
    #[error(
        "its sshd closed the connection during the handshake ({said}); it may limit connections (MaxStartups) or ban this address (fail2ban)"
    )]
    HandshakeDropped {
        /// What ssh said.
        said: String,
    },
    /// ssh does not accept its configuration.
    #[error("the ssh configuration here is wrong ({said})")]
    SshConfiguration {
        /// What ssh said.
        said: String,
    },
    /// Anything else that ssh failed with.
    #[error("ssh failed ({said}); try `ssh {destination} true`")]
    Ssh {
        /// What ssh was asked for.
        destination: String,
        /// What ssh said.
        said: String,
    },
    /// The account cannot run `/bin/sh`.
    #[error(
        "the account has no POSIX shell to start the agent with ({said}); give it /bin/sh as login shell, or name another user in the fleet file"
    )]
    NoShell {
        /// What came instead of an answer.
        said: String,
    },
    /// The agent's program is for another machine.
    #[error(
        "it is {theirs}, and this greenlight is built for {ours}; deploy from a machine of its kind, or with a greenlight built for it"
    )]
    OtherArchitecture {
        /// The host's system and architecture.
        theirs: String,
        /// Ours.
        ours: String,
    },
    /// The agent was started and ended at once.
    #[error("the agent does not run there ({said}){}", diagnosis::hint_for_agent(said))]
    AgentDoesNotRun {
        /// How it ended, and what it or the loader said.
        said: String,
    },
    /// The agent could not be placed.
    #[error(
        "there is no room for the agent ({said}); free some space, or give the user a home directory that it may write to and execute from"
    )]
    NoRoomForAgent {
        /// What failed.
        said: String,
    },
    /// `sudo -n` was refused.
    #[error(
        "the agent must be root there and `sudo -n` was refused ({said}); allow it with the sudoers line \
         `USER ALL=(root) NOPASSWD: ALL`, or let the user's own processes do: manager = \"systemd-user\" or \"agent\""
    )]
    SudoRefused {
        /// What sudo said.
        said: String,
    },
    /// The destination could be taken for something else by ssh.
    #[error("`{destination}` cannot be given to ssh: {why}")]
    BadDestination {
        /// As the fleet file has it.
        destination: String,
        /// Which rule it breaks.
        why: &'static str,
    },
    /// A program could not be started here.
    #[error("`{}` cannot be started here: {source}", program.display())]
    NotStarted {
        /// Which: ssh, sudo, or the agent.
        program: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Our own binary cannot be read in order to send it.
    #[error("the agent's program {} cannot be read: {source}", program.display())]
    ProgramUnreadable {
        /// Where it was looked for.
        program: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The agent speaks another version.
    #[error(
        "the agent there speaks protocol {theirs}, and this greenlight {PROTOCOL_VERSION}; use the same build on both sides"
    )]
    OtherProtocol {
        /// Its version.
        theirs: u32,
    },
    /// What came was no greeting.
    #[error("what answers there is not a greenlight agent ({why})")]
    NoGreeting {
        /// What was wrong with it.
        why: String,
    },
}

impl Connection {
    /// Connects to a host's agent: a child process for a local link, the system's `ssh` otherwise.
    ///
    /// # Errors
    /// When the agent does not come to greet, with the reason.
    pub async fn open(host: &HostName, link: &LinkKind, options: &OpenOptions) -> Result<Self, OpenError> {
        let opened = match link {
            LinkKind::Local => open_local(options).await,
            LinkKind::Ssh { destination, user } => {
                let destination = destination.as_deref().unwrap_or(host.as_str());
                Box::pin(ssh::open(destination, user.as_ref(), options)).await
            }
        };
        match opened {
            Ok((facts, process)) => Ok(Self::over(host.clone(), facts, process)),
            Err(problem) => Err(OpenError { host: host.clone(), problem }),
        }
    }
}

async fn open_local(options: &OpenOptions) -> Result<(HostFacts, Process), OpenProblem> {
    let sudo = options.become_root && !rustix::process::geteuid().is_root();
    let mut command = if sudo {
        let mut command = Command::new("sudo");
        command.args(["-n", "--"]).arg(&options.agent_program);
        command
    } else {
        Command::new(&options.agent_program)
    };
    command.arg("agent").env_clear();
    for name in LOCAL_ENVIRONMENT {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    let program = PathBuf::from(command.as_std().get_program());
    let process = Process::spawn(command).map_err(|source| OpenProblem::NotStarted { program, source })?;
    greeting(process, options.connect_timeout).await
}

/// What a local agent inherits: as much as a login over ssh would give it. Tokens and keys that the controller was
/// started with are none of its business.
const LOCAL_ENVIRONMENT: [&str; 11] = [
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "PATH",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "XDG_RUNTIME_DIR",
    "XDG_CACHE_HOME",
    "DBUS_SESSION_BUS_ADDRESS",
];

/// Hears the agent's first message.
pub(crate) async fn greeting(
    mut process: Process,
    timeout: Duration,
) -> Result<(HostFacts, Process), OpenProblem> {
    let first = match tokio::time::timeout(timeout, read_frame_async(&mut process.stdout)).await {
        Ok(first) => first,
        Err(_) => {
            let heard = process.life.heard();
            let said = format!("its agent did not greet within {}{heard}", human_duration(timeout));
            return Err(OpenProblem::TimedOut { said });
        }
    };
    match first {
        Ok(Some(Frame::Message(Message::Greeting { protocol: PROTOCOL_VERSION, facts }))) => {
            Ok((facts, process))
        }
        Ok(Some(Frame::Message(Message::Greeting { protocol, .. }))) => {
            Err(OpenProblem::OtherProtocol { theirs: protocol })
        }
        Ok(Some(_)) => Err(OpenProblem::NoGreeting { why: "its first message is another one".to_owned() }),
        Ok(None) => Err(diagnosis::agent_ended(&process.end().await)),
        Err(error) => {
            let ending = process.end().await;
            Err(OpenProblem::NoGreeting { why: format!("{error}; it ended with {}", ending.describe()) })
        }
    }
}
