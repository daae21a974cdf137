//! The proxies that are measured: each as an operator would set it up for this, in a process of its own.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::Error;

/// How long a proxy may take until it accepts connections.
const START_TIME_MAX: Duration = Duration::from_secs(10);
/// Threads or processes of each proxy.
const WORKERS: usize = 2;

/// Which proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    /// Ours, with a split by share and everything counted.
    Router,
    /// Ours, not counting by release and route.
    RouterUncounted,
    Haproxy,
    Nginx,
}

/// Where the programs are.
pub(super) struct Programs {
    pub(super) greenlight: PathBuf,
    pub(super) haproxy: PathBuf,
    pub(super) nginx: PathBuf,
}

/// A proxy that runs. It ends with this.
pub(super) struct Proxy {
    pub(super) kind: Kind,
    pub(super) address: SocketAddr,
    child: Child,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Router => "router",
            Self::RouterUncounted => "router, not counting",
            Self::Haproxy => "HAProxy",
            Self::Nginx => "nginx",
        }
    }

    pub(super) fn is_peer(self) -> bool {
        matches!(self, Self::Haproxy | Self::Nginx)
    }
}

impl Programs {
    /// The program, and the argument by which it tells its version.
    fn of(&self, kind: Kind) -> (&Path, &'static str) {
        match kind {
            Kind::Router | Kind::RouterUncounted => (&self.greenlight, "--version"),
            Kind::Haproxy => (&self.haproxy, "-v"),
            Kind::Nginx => (&self.nginx, "-v"),
        }
    }

    /// What it calls itself; `None` when it is not there.
    pub(super) fn version(&self, kind: Kind) -> Option<String> {
        let (program, argument) = self.of(kind);
        let output = Command::new(program).arg(argument).output().ok()?;
        // nginx says it on standard error.
        let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
        String::from_utf8_lossy(&text).lines().next().map(str::to_owned)
    }
}

impl Proxy {
    /// Starts a proxy in front of the two backends, split 70 to 30, with its files in `directory`.
    pub(super) fn start(
        kind: Kind,
        programs: &Programs,
        directory: &Path,
        backends: [SocketAddr; 2],
    ) -> Result<Self, Error> {
        let address = free_address().map_err(Error::system("find a free port"))?;
        let (program, _) = programs.of(kind);
        let mut command = Command::new(program);
        match kind {
            Kind::Router | Kind::RouterUncounted => {
                let state = directory.join(format!("{kind:?}.json"));
                write(&state, &router_state(backends))?;
                command.args(["router", "--listen", &address.to_string(), "--workers"]);
                command.arg(WORKERS.to_string()).arg("--state").arg(state);
                command.arg("--control").arg(directory.join(format!("{kind:?}.sock")));
                if kind == Kind::RouterUncounted {
                    command.arg("--no-counts");
                }
            }
            Kind::Haproxy => {
                let path = directory.join("haproxy.cfg");
                write(&path, &haproxy_settings(address, backends))?;
                command.args(["-db", "-q", "-f"]).arg(path);
            }
            Kind::Nginx => {
                let path = directory.join("nginx.conf");
                write(&path, &nginx_settings(address, backends, directory))?;
                command.args(["-e", "stderr", "-p"]).arg(directory).arg("-c").arg(path);
            }
        }
        let log = std::fs::File::create(directory.join(format!("{kind:?}.log")))
            .map_err(Error::system("make a proxy's log"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().map_err(Error::system(format!("start {}", program.display())))?;
        let mut proxy = Self { kind, address, child };
        proxy.wait_until_it_listens(directory)?;
        Ok(proxy)
    }

    fn wait_until_it_listens(&mut self, directory: &Path) -> Result<(), Error> {
        let deadline = Instant::now() + START_TIME_MAX;
        loop {
            let ended = self.child.try_wait().map_err(Error::system("look after a proxy"))?;
            if ended.is_none() && TcpStream::connect(self.address).is_ok() {
                return Ok(());
            }
            if ended.is_some() || Instant::now() > deadline {
                let path = directory.join(format!("{:?}.log", self.kind));
                let said = std::fs::read_to_string(path).unwrap_or_default();
                return Err(Error::Refused(format!("{} does not listen: {said}", self.kind.name())));
            }
            // Nothing tells when another program listens; only asking does.
            std::thread::yield_now();
        }
    }

    /// Processor time of all its threads and processes up to now.
    pub(super) fn processor_time(&self) -> Result<Duration, Error> {
        let mut total = 0;
        for process in self.processes()? {
            let tasks = std::fs::read_dir(format!("/proc/{process}/task"));
            for task in tasks.map_err(Error::system("list a proxy's threads"))? {
                let path = task.map_err(Error::system("list a proxy's threads"))?.path().join("schedstat");
                let text = std::fs::read_to_string(path).map_err(Error::system("read a thread's time"))?;
                let nanoseconds = text.split(' ').next().and_then(|first| first.parse::<u64>().ok());
                total += nanoseconds.ok_or_else(|| Error::Refused(format!("no time in {text:?}")))?;
            }
        }
        Ok(Duration::from_nanos(total))
    }

    /// Resident memory of all its processes, in bytes.
    pub(super) fn memory_bytes(&self) -> Result<u64, Error> {
        let mut total = 0;
        for process in self.processes()? {
            let text = std::fs::read_to_string(format!("/proc/{process}/status"))
                .map_err(Error::system("read a proxy's memory"))?;
            let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
            let kibibytes = line.trim().trim_end_matches(" kB").parse::<u64>();
            total += kibibytes.map_err(|_| Error::Refused(format!("no memory in {line:?}")))? * 1024;
        }
        Ok(total)
    }

    fn processes(&self) -> Result<Vec<u32>, Error> {
        let parent = self.child.id();
        let text = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))
            .map_err(Error::system("list a proxy's processes"))?;
        let children = text.split_whitespace().filter_map(|number| number.parse().ok());
        Ok(std::iter::once(parent).chain(children).collect())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // SIGTERM, so that nginx ends its workers too; whether it was still there is of no interest.
        if let Some(process) = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(process, rustix::process::Signal::TERM);
        }
        drop(self.child.wait());
    }
}

fn router_state(backends: [SocketAddr; 2]) -> String {
    let backend = |name: &str, release: &str, address: SocketAddr| {
        format!(r#"{{"name":"{name}","address":"{address}","release":"{release}"}}"#)
    };
    format!(
        r#"{{"generation":1,"backends":[{},{}],"canary":{{"release":"v2","share_per_mille":300,"lease_ms":3600000}},"routes":["/","/users/{{id}}","/items/{{id}}","/static/*"]}}"#,
        backend("a", "v1", backends[0]),
        backend("b", "v2", backends[1]),
    )
}

fn haproxy_settings(address: SocketAddr, [a, b]: [SocketAddr; 2]) -> String {
    format!(
        "global\n  nbthread {WORKERS}\n  maxconn 4096\ndefaults\n  mode http\n  option http-keep-alive\n  http-reuse always\n  \
         timeout client 60s\n  timeout server 60s\n  timeout connect 5s\nfrontend front\n  bind {address}\n  \
         option forwardfor\n  default_backend back\nbackend back\n  balance roundrobin\n  server a {a} weight 70\n  \
         server b {b} weight 30\n"
    )
}

fn nginx_settings(address: SocketAddr, [a, b]: [SocketAddr; 2], directory: &Path) -> String {
    let directory = directory.display();
    // As root its workers would be of another user, who may not look into the directory.
    let user = if rustix::process::geteuid().is_root() { "user root;\n" } else { "" };
    format!(
        "{user}worker_processes {WORKERS};\ndaemon off;\npid {directory}/nginx.pid;\nevents {{ worker_connections 4096; }}\n\
         http {{\n  access_log off;\n  keepalive_requests 1000000000;\n  client_body_temp_path {directory}/body;\n  \
         proxy_temp_path {directory}/proxy;\n  fastcgi_temp_path {directory}/fastcgi;\n  \
         uwsgi_temp_path {directory}/uwsgi;\n  scgi_temp_path {directory}/scgi;\n  \
         upstream back {{\n    server {a} weight=70;\n    server {b} weight=30;\n    keepalive 256;\n    \
         keepalive_requests 1000000000;\n  }}\n  server {{\n    listen {address} reuseport;\n    location / {{\n      \
         proxy_pass http://back;\n      proxy_http_version 1.1;\n      proxy_set_header Connection \"\";\n      \
         proxy_set_header X-Forwarded-For $remote_addr;\n    }}\n  }}\n}}\n"
    )
}

fn free_address() -> std::io::Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    std::fs::write(path, text).map_err(Error::system(format!("write {}", path.display())))
}
