//! One ssh connection: the system's `ssh`, the script that starts the agent, and the agent's binary when it is missing.
//!
//! The user's own configuration, agent, known hosts and jump hosts hold. What is set on top is what a program needs that
//! nobody sits at: no questions, no terminal, no forwardings, and an end to silence.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use greenlight_model::host::HostFacts;
use greenlight_model::id::{ContentHash, UserName};
use greenlight_model::quantity::human_duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{ChildStdin, ChildStdout, Command};

use crate::diagnosis;
use crate::open::{OpenOptions, OpenProblem, greeting};
use crate::process::{Process, clean_lines};

/// The script, as it is kept; [`script`] makes one line of it.
const BOOTSTRAP: &str = include_str!("bootstrap.sh");
/// After this long without a sign of life the server is asked for one …
const ALIVE_INTERVAL_S: u32 = 5;
/// … and after so many unanswered questions the connection is dead: a host that lost power is noticed in 20 s.
const ALIVE_COUNT_MAX: u32 = 4;
/// ssh's own timeout is to strike first, because it knows what it was waiting for.
const SSH_HEAD_START: Duration = Duration::from_secs(2);
/// Sending the agent: 25 MB over a line of 1 Mbit/s.
const SEND_TIMEOUT: Duration = Duration::from_secs(300);
/// What a login may print (messages of the day, shells that greet) before the script speaks.
const NOISE_BYTES_MAX: usize = 64 * 1024;
/// How much of the agent is read at a time.
const SEND_BYTES: usize = 256 * 1024;

/// Starts the agent on the other side and hears its greeting.
pub(crate) async fn open(
    destination: &str,
    user: Option<&UserName>,
    options: &OpenOptions,
) -> Result<(HostFacts, Process), OpenProblem> {
    check_destination(destination)?;
    let program = Program::of(options.agent_program.clone()).await?;
    let command = ssh_command(destination, user, options, &program);
    let mut process = Process::spawn(command)
        .map_err(|source| OpenProblem::NotStarted { program: PathBuf::from("ssh"), source })?;

    let mut patience = options.connect_timeout + SSH_HEAD_START;
    let mut is_sent = false;
    loop {
        let line = match tokio::time::timeout(patience, next_line(&mut process.stdout)).await {
            Ok(line) => line,
            Err(_) => {
                let heard = process.life.heard();
                let said = format!("no answer within {}{heard}", human_duration(patience));
                return Err(OpenProblem::TimedOut { said });
            }
        };
        match line {
            Line::Ready => return greeting(process, options.connect_timeout).await,
            Line::Need { .. } if is_sent => {
                return Err(OpenProblem::NoGreeting { why: "it asked for the agent twice".to_owned() });
            }
            Line::Need { theirs } => {
                let ours = system();
                if !is_same_system(&theirs, &ours) {
                    return Err(OpenProblem::OtherArchitecture { theirs, ours });
                }
                // A side that goes away in the middle says why on its way out: the next line, or its end.
                match tokio::time::timeout(SEND_TIMEOUT, program.send(&mut process.stdin)).await {
                    Ok(Err(SendError::Read(source))) => {
                        return Err(OpenProblem::ProgramUnreadable {
                            program: options.agent_program.clone(),
                            source,
                        });
                    }
                    Ok(Ok(()) | Err(SendError::Write)) => {}
                    Err(_) => {
                        let said = format!("the agent was not sent within {}", human_duration(SEND_TIMEOUT));
                        return Err(OpenProblem::TimedOut { said });
                    }
                }
                is_sent = true;
                // What is on its way still has to arrive and be written.
                patience = SEND_TIMEOUT;
            }
            Line::Refused { about, said } if about == "sudo" => {
                return Err(OpenProblem::SudoRefused { said });
            }
            Line::Refused { said, .. } => return Err(OpenProblem::NoRoomForAgent { said }),
            Line::Ended { noise } => {
                return Err(diagnosis::ssh_ended(destination, &process.end().await, &noise));
            }
            Line::TooMuchNoise => {
                let said = format!("more than {NOISE_BYTES_MAX} bytes came before its answer");
                return Err(OpenProblem::NoShell { said });
            }
        }
    }
}

fn ssh_command(
    destination: &str,
    user: Option<&UserName>,
    options: &OpenOptions,
    program: &Program,
) -> Command {
    let mut command = Command::new("ssh");
    // Without a terminal; a failure is explained even if the user's configuration is silent; a session of the user's
    // making (a command, forwarded ports) is not wanted here.
    command.args(["-T", "-o", "BatchMode=yes", "-o", "LogLevel=INFO"]);
    command.args(["-o", "RemoteCommand=none", "-o", "ClearAllForwardings=yes", "-o", "TCPKeepAlive=yes"]);
    let seconds = options.connect_timeout.as_millis().div_ceil(1000).max(1);
    command.arg("-o").arg(format!("ConnectTimeout={seconds}"));
    command.arg("-o").arg(format!("ServerAliveInterval={ALIVE_INTERVAL_S}"));
    command.arg("-o").arg(format!("ServerAliveCountMax={ALIVE_COUNT_MAX}"));
    if let Some(file) = &options.ssh_config {
        command.arg("-F").arg(file);
    }
    if let Some(user) = user {
        command.arg("-l").arg(user.as_str());
    }
    command.arg("--").arg(destination).arg(remote_command(program, options.become_root));
    command
}

/// What the account's login shell is given. The only values in it are a hash, a number and one of two words.
fn remote_command(program: &Program, become_root: bool) -> String {
    let root = if become_root { "always" } else { "never" };
    format!("exec /bin/sh -c '{}' greenlight {} {} {root}", script(), program.hash, program.bytes)
}

/// The script in one line, without its comments.
fn script() -> String {
    let lines = BOOTSTRAP.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.collect::<Vec<_>>().join(" ")
}

/// A destination comes from a file that others may write: ssh expands it into proxy commands, and takes one that begins
/// with `-` for an option.
fn check_destination(destination: &str) -> Result<(), OpenProblem> {
    let bad = |why| Err(OpenProblem::BadDestination { destination: destination.to_owned(), why });
    match destination.as_bytes() {
        [] => bad("it is empty"),
        [b'-', ..] => bad("it begins with `-`"),
        bytes if bytes.len() > DESTINATION_BYTES_MAX => bad("it is too long"),
        bytes if !bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"._-@:[]%/+".contains(b)) => {
            bad("only letters, digits and `. _ - @ : [ ] % / +` are allowed in it")
        }
        _ => Ok(()),
    }
}

/// A domain name with a user, a scheme and a port.
const DESTINATION_BYTES_MAX: usize = 400;

/// A line of the script, or what came in its place.
enum Line {
    Ready,
    Need { theirs: String },
    Refused { about: String, said: String },
    Ended { noise: Vec<String> },
    TooMuchNoise,
}

/// Reads up to the script's next line; what a login prints before it is skipped.
async fn next_line(stdout: &mut BufReader<ChildStdout>) -> Line {
    let mut noise = Vec::new();
    loop {
        let mut line = Vec::new();
        let room = NOISE_BYTES_MAX.saturating_sub(noise.len()) as u64;
        // A read that fails is an end as well; how the process ended says more.
        let count = (&mut *stdout).take(room).read_until(b'\n', &mut line).await.unwrap_or(0);
        if count == 0 && room > 0 {
            return Line::Ended { noise: clean_lines(&noise) };
        }
        if !line.ends_with(b"\n") && count as u64 == room {
            return Line::TooMuchNoise;
        }
        let text = String::from_utf8_lossy(&line);
        // A shell's prompt or an unfinished line may stand before it.
        let marked = text.split_once("GREENLIGHT ").map(|(_, rest)| rest.trim());
        match marked.map(|rest| rest.split_once(' ').unwrap_or((rest, ""))) {
            Some(("READY", _)) => return Line::Ready,
            Some(("NEED", theirs)) => return Line::Need { theirs: clean_lines(theirs.as_bytes()).join(" ") },
            Some(("REFUSED", rest)) => {
                let (about, said) = rest.split_once(' ').unwrap_or((rest, ""));
                let said = clean_lines(said.as_bytes()).join(" ");
                return Line::Refused { about: about.to_owned(), said };
            }
            _ => noise.extend_from_slice(&line),
        }
    }
}

/// Our own system and architecture, in the words of `uname -s` and `uname -m`.
fn system() -> String {
    let name = rustix::system::uname();
    format!("{} {}", name.sysname().to_string_lossy(), std::env::consts::ARCH)
}

fn is_same_system(theirs: &str, ours: &str) -> bool {
    /// What `uname -m` calls an architecture, where Rust calls it otherwise.
    fn rust_name(machine: &str) -> &str {
        match machine {
            "arm64" => "aarch64",
            "amd64" => "x86_64",
            "ppc64le" | "ppc64" => "powerpc64",
            "i386" | "i486" | "i586" | "i686" => "x86",
            machine if machine.starts_with("armv") => "arm",
            machine => machine,
        }
    }
    let split = |text: &str| text.split_once(' ').map(|(s, m)| (s.to_owned(), rust_name(m).to_owned()));
    split(theirs).is_some() && split(theirs) == split(ours)
}

/// The agent's binary: open once, so that what is hashed is what is sent even when the file is replaced meanwhile.
struct Program {
    file: File,
    hash: ContentHash,
    bytes: u64,
}

enum SendError {
    Read(io::Error),
    Write,
}

impl Program {
    /// The binary at a path, hashed. Every host needs it and the file is large, so it is hashed once per process; a
    /// file that was replaced since is another one.
    async fn of(path: PathBuf) -> Result<Arc<Self>, OpenProblem> {
        let wanted = path.clone();
        // The runtime's end is the only other way for the task to fail.
        let read = tokio::task::spawn_blocking(move || Self::read(&wanted)).await;
        read.unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|source| OpenProblem::ProgramUnreadable { program: path, source })
    }

    fn read(path: &Path) -> io::Result<Arc<Self>> {
        /// Path, device, inode, size and time of change: the same file.
        type Key = (PathBuf, u64, u64, u64, i64, i64);
        static KNOWN: Mutex<Option<HashMap<Key, Arc<Program>>>> = Mutex::new(None);

        let file = File::open(path)?;
        let status = file.metadata()?;
        let key =
            (path.to_owned(), status.dev(), status.ino(), status.size(), status.mtime(), status.mtime_nsec());
        // Held while hashing: the others would only do the same.
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.get_or_insert_with(HashMap::new);
        if let Some(program) = known.get(&key) {
            return Ok(Arc::clone(program));
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&file)?;
        let hash = ContentHash::from_bytes(*hasher.finalize().as_bytes());
        let program = Arc::new(Self { file, hash, bytes: status.size() });
        // Only the newest is kept: nobody sends an older one any more.
        known.retain(|(other, ..), _| other != path);
        known.insert(key, Arc::clone(&program));
        Ok(program)
    }

    async fn send(self: &Arc<Self>, stdin: &mut ChildStdin) -> Result<(), SendError> {
        let mut offset = 0;
        while offset < self.bytes {
            let program = Arc::clone(self);
            let read = tokio::task::spawn_blocking(move || {
                let mut buffer = vec![0; SEND_BYTES];
                let count = program.file.read_at(&mut buffer, offset)?;
                buffer.truncate(count);
                Ok(buffer)
            });
            let part =
                read.await.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(SendError::Read)?;
            if part.is_empty() {
                return Err(SendError::Read(io::Error::other("it became shorter while it was sent")));
            }
            offset += part.len() as u64;
            stdin.write_all(&part).await.map_err(|_| SendError::Write)?;
        }
        stdin.flush().await.map_err(|_| SendError::Write)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_checked() {
        for good in
            ["web1", "deploy@web1.example.org", "ssh://deploy@web1:2222", "[fe80::1%eth0]", "10.0.0.1"]
        {
            assert!(check_destination(good).is_ok(), "{good}");
        }
        for bad in
            ["", "-oProxyCommand=reboot", "a b", "a;b", "$(id)", "a`id`", "a\nb", "wéb", &"a".repeat(500)]
        {
            assert!(check_destination(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_script_survives_every_login_shell() {
        let line = script();
        for forbidden in ['\'', '\\', '\n', '\t'] {
            assert!(!line.contains(forbidden), "the script has {forbidden:?}");
        }
        // csh takes `!` for its history unless a space or `=` follows.
        assert!(!line.replace("! ", "").contains('!'));
        let checked = std::process::Command::new("/bin/sh").args(["-n", "-c", &line]).status().unwrap();
        assert!(checked.success());
    }

    #[test]
    fn architectures_are_compared_by_meaning() {
        for (theirs, ours, same) in [
            ("Linux x86_64", "Linux x86_64", true),
            ("Linux amd64", "Linux x86_64", true),
            ("Linux arm64", "Linux aarch64", true),
            ("Linux armv7l", "Linux arm", true),
            ("Linux i686", "Linux x86", true),
            ("Linux aarch64", "Linux x86_64", false),
            ("FreeBSD x86_64", "Linux x86_64", false),
            ("", "Linux x86_64", false),
        ] {
            assert_eq!(is_same_system(theirs, ours), same, "{theirs} {ours}");
        }
    }
}
