//! A real HAProxy on a host, with its runtime API at the level of an administrator.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::{Bed, Error, Host, wait};

/// Where the runtime API answers on the host.
const SOCKET: &str = "/run/haproxy/admin.sock";
const CONFIG: &str = "/etc/haproxy/haproxy.cfg";
const PID_FILE: &str = "/run/haproxy.pid";
/// Where the states of servers are kept from one process to the next.
const STATE_FILE: &str = "/run/haproxy/state";

/// What every configuration begins with. Timeouts are those of the examples that operators copy.
const PREAMBLE: &str = "\
global
    stats socket /run/haproxy/admin.sock mode 660 level admin expose-fd listeners
    stats timeout 30s
    user haproxy
    group haproxy

defaults
    mode http
    timeout connect 5s
    timeout client 50s
    timeout server 50s

";

/// From its start to an answer on its socket; 0.1 s on an idle machine.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// How long one command may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest answer, in bytes.
const ANSWER_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// A HAProxy that runs.
#[derive(Debug)]
pub struct HaProxy {
    host: Host,
}

impl Bed {
    /// Starts HAProxy on a host and returns when it answers. The configuration holds frontends and backends;
    /// `global` with the admin socket and `defaults` in HTTP mode stand before it.
    pub fn haproxy(&self, host: &str, config: &str) -> Result<HaProxy, Error> {
        let haproxy = HaProxy { host: self.host(host).clone() };
        haproxy.start(config)?;
        Ok(haproxy)
    }
}

impl HaProxy {
    /// What a configuration begins with whose backends have `load-server-state-from-file global`.
    pub const STATE: &'static str = "global\n    server-state-file /run/haproxy/state\n\n";

    /// A frontend on a port of its host, in front of one backend whose servers are checked over HTTP. One that is gone refuses
    /// at once; one that lives has time to say so, however busy the machine is.
    pub fn web(port: u16, backend: &str, health: &str, servers: &[(&str, SocketAddr)]) -> String {
        let servers: String = servers
            .iter()
            .map(|(name, address)| format!("    server {name} {address} check inter 200ms fall 2 rise 2\n"))
            .collect();
        format!(
            "frontend {backend}-in\n    bind :{port}\n    default_backend {backend}\n\n\
             backend {backend}\n    balance roundrobin\n    option httpchk GET {health}\n    timeout check 5s\n{servers}"
        )
    }

    /// The host it runs on.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The path of its admin socket on its host.
    pub fn socket(&self) -> &'static str {
        SOCKET
    }

    /// Gives a command to the runtime API and returns the answer.
    pub fn command(&self, command: &str) -> Result<String, Error> {
        let path = self.host.root_path()?.join(SOCKET.trim_start_matches('/'));
        let ask = || {
            let mut stream = UnixStream::connect(&path)?;
            stream.set_read_timeout(Some(COMMAND_TIMEOUT))?;
            stream.write_all(command.as_bytes())?;
            stream.write_all(b"\n")?;
            let mut answer = String::new();
            stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
            Ok(answer)
        };
        ask().map_err(Error::io("ask", &path))
    }

    /// Replaces it by a new process without a gap, as a reload does, and returns when the new one answers. With
    /// `keeps_state` the states of its servers are saved before to the file that [`HaProxy::STATE`] names; without, there is
    /// none.
    pub fn reload(&self, keeps_state: bool) -> Result<(), Error> {
        let before = self.process()?;
        if keeps_state {
            self.host.write(STATE_FILE, 0o644, self.command("show servers state")?)?;
        } else {
            self.host.run("rm", &["-f", STATE_FILE])?;
        }
        let master = self.host.read(PID_FILE)?;
        self.host.run("kill", &["-USR2", master.trim()])?;
        wait::until(&format!("a new haproxy on {}", self.host.name()), START_DEADLINE, || {
            let now = self.process().map_err(|error| error.to_string())?;
            if now == before { Err(now) } else { Ok(()) }
        })
    }

    /// The process that answers on the socket.
    fn process(&self) -> Result<String, Error> {
        let info = self.command("show info")?;
        let line = info.lines().find(|line| line.starts_with("Pid: "));
        Ok(line.unwrap_or_default().to_owned())
    }

    /// The state of each server of a backend as HAProxy's statistics name it: `UP`, `DRAIN`, `MAINT`, `DOWN 1/2` …
    pub fn server_states(&self, backend: &str) -> Result<Vec<(String, String)>, Error> {
        Ok(server_states(&self.command("show stat")?, backend))
    }

    /// Waits until every server of a backend is UP.
    pub fn wait_until_up(&self, backend: &str, deadline: Duration) -> Result<(), Error> {
        wait::until(&format!("all servers of backend {backend} to be UP"), deadline, || {
            let states = self.server_states(backend).map_err(|error| error.to_string())?;
            if !states.is_empty() && states.iter().all(|(_, state)| state == "UP") {
                Ok(())
            } else {
                Err(format!("{states:?}"))
            }
        })
    }

    fn start(&self, config: &str) -> Result<(), Error> {
        self.host.write(CONFIG, 0o644, format!("{PREAMBLE}{config}"))?;
        self.host.run("haproxy", &["-c", "-f", CONFIG])?;
        self.host.run("mkdir", &["-p", "/run/haproxy"])?;
        self.host.run("haproxy", &["-W", "-D", "-p", PID_FILE, "-f", CONFIG])?;
        wait::until(&format!("haproxy on {}", self.host.name()), START_DEADLINE, || {
            let answer = self.command("show info").map_err(|error| error.to_string())?;
            if answer.starts_with("Name: HAProxy") { Ok(()) } else { Err(answer) }
        })
    }
}

/// The columns are found by their names, which HAProxy prints first.
fn server_states(statistics: &str, backend: &str) -> Vec<(String, String)> {
    let mut lines = statistics.lines();
    let columns: Vec<_> = lines.next().unwrap_or_default().trim_start_matches("# ").split(',').collect();
    let position = |name| columns.iter().position(|column| *column == name);
    let (Some(proxy), Some(server), Some(status)) =
        (position("pxname"), position("svname"), position("status"))
    else {
        return Vec::new();
    };
    lines
        .map(|line| line.split(',').collect::<Vec<_>>())
        .filter(|fields| fields.len() > status && fields[proxy] == backend)
        .filter(|fields| !matches!(fields[server], "BACKEND" | "FRONTEND"))
        .map(|fields| (fields[server].to_owned(), fields[status].to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_states_by_the_names_of_columns() {
        let statistics = "# pxname,svname,qcur,status,\nweb-in,FRONTEND,,OPEN,\nweb,a,0,UP,\nweb,b,0,DOWN 1/2,\nweb,BACKEND,0,UP,\n\n";
        let states = server_states(statistics, "web");
        assert_eq!(states, [("a".into(), "UP".into()), ("b".into(), "DOWN 1/2".into())]);
        assert_eq!(server_states("", "web"), []);
    }
}
