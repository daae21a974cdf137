//! From what ssh, sudo and the loader print to one of the problems that an operator can do something about.
//!
//! ssh ends with 255 for its own failures and tells them apart only in words, which have not changed in many years; a
//! wording that is not known here is passed on as it is.

use crate::open::OpenProblem;
use crate::process::Ending;

/// The code with which ssh reports a failure of its own rather than of the remote command.
const SSH_FAILED: i32 = 255;

/// Why ssh ended before the script said anything.
pub(crate) fn ssh_ended(destination: &str, ending: &Ending, noise: &[String]) -> OpenProblem {
    match ending.status.and_then(|status| status.code()) {
        Some(SSH_FAILED) => ssh_failed(destination, &ending.stderr),
        _ => {
            let printed = [noise, &ending.stderr].concat();
            let said = match printed.last() {
                Some(line) => format!("it printed `{line}` and ended"),
                None => format!("it ended with {}", ending.describe()),
            };
            OpenProblem::NoShell { said }
        }
    }
}

/// Why the agent ended before it greeted.
pub(crate) fn agent_ended(ending: &Ending) -> OpenProblem {
    // The loader's message is longer than the others and the only one that counts.
    let loader = ending.stderr.iter().find(|line| is_loader_complaint(line));
    if let Some(sudo) =
        ending.stderr.iter().find(|line| line.starts_with("sudo:") || line.starts_with("Sorry, user"))
    {
        return OpenProblem::SudoRefused { said: sudo.clone() };
    }
    OpenProblem::AgentDoesNotRun { said: loader.cloned().unwrap_or_else(|| ending.describe()) }
}

/// What to do about an agent that does not run, where what it said tells.
pub(crate) fn hint_for_agent(said: &str) -> &'static str {
    if is_loader_complaint(said) {
        "; use a greenlight that is linked statically or built on a system as old as that host's"
    } else if said.contains("Permission denied") {
        "; its cache directory may be on a file system that is mounted noexec, or closed to root"
    } else if said.contains("Exec format error") {
        "; the cached agent is for another architecture or damaged: remove ~/.cache/greenlight there"
    } else {
        ""
    }
}

/// The dynamic loader's words for a C library that is too old, of another kind, or missing.
fn is_loader_complaint(line: &str) -> bool {
    line.contains("GLIBC_")
        || line.contains("error while loading shared libraries")
        || line.contains("Error loading shared library")
        || line.ends_with(": not found")
        || line.ends_with("agent: No such file or directory")
}

fn ssh_failed(destination: &str, stderr: &[String]) -> OpenProblem {
    let destination = destination.to_owned();
    let find = |needles: &[&str]| {
        stderr.iter().find(|line| needles.iter().any(|needle| line.contains(needle))).cloned()
    };
    // The order matters: what is said last is often only the consequence ("Connection closed by …").
    if find(&["REMOTE HOST IDENTIFICATION HAS CHANGED"]).is_some() {
        let said = find(&["Offending"]).unwrap_or_else(|| "it has changed".to_owned());
        return OpenProblem::HostKeyChanged { destination, said };
    }
    if find(&["Host key verification failed"]).is_some() {
        return OpenProblem::HostKeyUnknown { destination };
    }
    if let Some(said) = find(&[
        "Bad configuration option",
        "Bad owner or permissions",
        "terminating,",
        "Can't open user config",
    ]) {
        return OpenProblem::SshConfiguration { said };
    }
    // Behind a proxy ssh does not know the address it talks to, and says so.
    let is_proxied = find(&["UNKNOWN port", "stdio forwarding failed"]).is_some();
    if is_proxied {
        let cause =
            stderr.iter().find(|line| !line.contains("UNKNOWN port") && !line.starts_with("Warning:"));
        let said = cause.or(stderr.last()).cloned().unwrap_or_default();
        return OpenProblem::JumpHost { destination, said };
    }
    if let Some(said) = find(&["Permission denied (", "Too many authentication failures"]) {
        return OpenProblem::PermissionDenied { destination, said };
    }
    if let Some(said) = find(&["Could not resolve hostname"]) {
        return OpenProblem::Unresolved { said };
    }
    if let Some(said) = find(&["Connection refused"]) {
        return OpenProblem::ConnectionRefused { said };
    }
    if let Some(said) = find(&["No route to host", "Network is unreachable"]) {
        return OpenProblem::Unreachable { said };
    }
    if let Some(said) = find(&["timed out", "not responding"]) {
        return OpenProblem::TimedOut { said };
    }
    if let Some(said) = find(&["exec request failed", "shell request failed"]) {
        return OpenProblem::NoShell { said };
    }
    if let Some(said) = find(&[
        "kex_exchange_identification",
        "ssh_exchange_identification",
        "Connection reset by peer",
        "Exceeded MaxStartups",
    ]) {
        return OpenProblem::HandshakeDropped { said };
    }
    let said = stderr.last().cloned().unwrap_or_else(|| "it did not say why".to_owned());
    OpenProblem::Ssh { destination, said }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;

    fn ending(code: i32, stderr: &str) -> Ending {
        let status = std::process::ExitStatus::from_raw(code << 8);
        Ending { status: Some(status), stderr: crate::process::clean_lines(stderr.as_bytes()) }
    }

    /// What OpenSSH 9.2 prints, and the beginning of what we make of it.
    #[test]
    fn what_ssh_says_becomes_what_to_do() {
        let changed = "@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@\n\
             @    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\n\
             IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!\n\
             Offending ED25519 key in /home/ada/.ssh/known_hosts:3\n\
             Host key for web1 has changed and you have requested strict checking.\n\
             Host key verification failed.\n";
        let cases = [
            (
                changed,
                "its ssh host key is not the one that is known (Offending ED25519 key in /home/ada/.ssh/known_hosts:3)",
            ),
            ("Host key verification failed.\n", "its ssh host key is not known here; run `ssh web1` once"),
            (
                "No ED25519 host key is known for web1 and you have requested strict checking.\nHost key verification failed.\n",
                "its ssh host key is not known here",
            ),
            (
                "ada@web1: Permission denied (publickey,password).\n",
                "ssh was refused (ada@web1: Permission denied (publickey,password).)",
            ),
            (
                "Received disconnect from 10.0.0.1 port 22:2: Too many authentication failures\nDisconnected from 10.0.0.1 port 22\n",
                "ssh was refused (Received disconnect",
            ),
            (
                "ssh: Could not resolve hostname web1: Name or service not known\n",
                "its name cannot be resolved",
            ),
            (
                "ssh: connect to host web1 port 22: Connection refused\n",
                "nothing accepts ssh connections there",
            ),
            ("ssh: connect to host web1 port 22: Connection timed out\n", "it does not answer"),
            (
                "Connection timed out during banner exchange\nConnection to 10.0.0.1 port 22 timed out\n",
                "it does not answer",
            ),
            ("ssh: connect to host web1 port 22: No route to host\n", "there is no way to it"),
            ("ssh: connect to host 10.9.9.9 port 22: Network is unreachable\n", "there is no way to it"),
            (
                "ssh: connect to host jump port 22: Connection refused\nConnection closed by UNKNOWN port 65535\n",
                "its jump host or proxy command did not connect it (ssh: connect to host jump port 22: Connection refused)",
            ),
            (
                "channel 0: open failed: connect failed: No route to host\nstdio forwarding failed\nConnection closed by UNKNOWN port 65535\n",
                "its jump host or proxy command did not connect it (channel 0: open failed",
            ),
            (
                "kex_exchange_identification: Connection closed by remote host\nConnection closed by 10.0.0.1 port 22\n",
                "its sshd closed the connection during the handshake",
            ),
            (
                "kex_exchange_identification: read: Connection reset by peer\nConnection reset by 10.0.0.1 port 22\n",
                "its sshd closed the connection during the handshake",
            ),
            (
                "/home/ada/.ssh/config: line 3: Bad configuration option: hostnam\n/home/ada/.ssh/config: terminating, 1 bad configuration options\n",
                "the ssh configuration here is wrong (/home/ada/.ssh/config: line 3",
            ),
            ("Bad owner or permissions on /home/ada/.ssh/config\n", "the ssh configuration here is wrong"),
            ("exec request failed on channel 0\n", "the account has no POSIX shell"),
            (
                "Unable to negotiate with 10.0.0.1 port 22: no matching host key type found. Their offer: ssh-rsa\n",
                "ssh failed (Unable to negotiate with 10.0.0.1 port 22",
            ),
            ("", "ssh failed (it did not say why); try `ssh web1 true`"),
        ];
        for (stderr, expected) in cases {
            let problem = ssh_ended("web1", &ending(255, stderr), &[]).to_string();
            assert!(problem.starts_with(expected), "{stderr}\nbecame {problem}");
            assert!(!problem.contains('\n'), "more than one line: {problem}");
        }
    }

    #[test]
    fn an_account_without_a_shell_is_named() {
        let noise = ["This account is currently not available.".to_owned()];
        let problem = ssh_ended("web1", &ending(1, ""), &noise).to_string();
        assert!(problem.contains("no POSIX shell"), "{problem}");
        assert!(problem.contains("currently not available"), "{problem}");
        let restricted = "rbash: line 1: exec: restricted";
        assert!(ssh_ended("web1", &ending(1, restricted), &[]).to_string().contains(restricted));
        assert!(ssh_ended("web1", &ending(1, ""), &[]).to_string().contains("exit code 1"));
    }

    #[test]
    fn an_agent_that_does_not_run_is_explained() {
        let old = "/root/.cache/greenlight/agent-1f: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.34' not found (required by /root/.cache/greenlight/agent-1f)";
        for (code, stderr, expected) in [
            (1, old, "linked statically"),
            (127, "/bin/sh: 1: exec: /root/.cache/greenlight/agent-1f: not found", "linked statically"),
            (126, "/bin/sh: 1: exec: /home/a/agent-1f: Exec format error", "remove ~/.cache/greenlight"),
            (126, "/bin/sh: 1: exec: /home/a/agent-1f: Permission denied", "noexec"),
            (101, "thread main panicked", "exit code 101: thread main panicked"),
            (1, "sudo: a password is required", "NOPASSWD"),
            (1, "Sorry, user ada is not allowed to execute '/x agent' as root on web1.", "NOPASSWD"),
        ] {
            let problem = agent_ended(&ending(code, stderr)).to_string();
            assert!(problem.contains(expected), "{stderr}\nbecame {problem}");
        }
    }
}
