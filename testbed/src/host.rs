//! One host: its process 1, what runs inside, what faults can be done to it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::command::{run, run_with_input, tail};
use crate::process::Process;
use crate::registry::{BedState, control_group};
use crate::{Error, cgroup, network, wait};

const LAUNCH: &str = include_str!("scripts/launch.sh");
const BOOT: &str = include_str!("scripts/boot.sh");

/// What commands inside a host find programs by.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// From process 1 to an answer of sshd: under a second on an idle machine; a busy one gets time.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);

/// How long one look at sshd may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);

/// The system of processes of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// systemd as process 1, as on a Debian server.
    Systemd,
    /// supervisord, which also keeps sshd.
    Supervisord,
    /// No manager of processes: sshd under tini.
    None,
}

impl Init {
    fn name(self) -> &'static str {
        match self {
            Init::Systemd => "systemd",
            Init::Supervisord => "supervisord",
            Init::None => "none",
        }
    }
}

/// What a user may do as root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sudo {
    /// Everything, without a password.
    Everything,
    /// Nothing: `sudo -n` refuses.
    Nothing,
}

/// One host of a bed.
#[derive(Debug, Clone)]
pub struct Host {
    name: String,
    init: Init,
    address: Ipv4Addr,
    index: usize,
    number: u8,
    base: PathBuf,
    /// Holds `upper` and `work` of the overlay, its mount point `root`, `console` and `process`.
    disk: PathBuf,
}

impl Host {
    pub(crate) fn new(bed: &BedState, index: usize) -> Self {
        let host = &bed.hosts[index];
        Self {
            name: host.name.clone(),
            init: host.init,
            address: host.address,
            index,
            number: bed.number,
            base: bed.base.clone(),
            disk: bed.directory.join("hosts").join(&host.name),
        }
    }

    /// Its name, which ssh from the hub knows.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it answers, from the hub and from the other hosts.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// What runs as process 1.
    pub fn init(&self) -> Init {
        self.init
    }

    /// The host's root as the machine sees it. Only while it runs; an absolute link below it leads to the
    /// machine's own files, so prefer [`Host::read`] and [`Host::write`].
    pub fn root_path(&self) -> Result<PathBuf, Error> {
        Ok(PathBuf::from(format!("/proc/{}/root", self.process()?.id)))
    }

    /// Whether its process 1 runs.
    pub fn is_up(&self) -> bool {
        self.process().is_ok()
    }

    /// A command that will run inside the host as root, in all of its namespaces, with a clean environment and
    /// `/` as its directory. It does not pass through ssh, and works while the link is cut.
    pub fn command(&self, program: &str) -> Result<Command, Error> {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.process()?.id.to_string(), "--all", "--", "env", "-i"]);
        command.args([&format!("PATH={PATH}"), "HOME=/root", "LANG=C.UTF-8", "TERM=dumb", program]);
        Ok(command)
    }

    /// Runs a program inside and returns what it printed; anything but success is an error.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String, Error> {
        run(self.command(program)?.args(arguments))
    }

    /// The bytes of a file inside.
    pub fn read(&self, path: &str) -> Result<String, Error> {
        self.run("cat", &["--", path])
    }

    /// Writes a file inside, with its directories, owned by root.
    pub fn write(&self, path: &str, mode: u32, content: impl AsRef<[u8]>) -> Result<(), Error> {
        let mode = format!("{mode:o}");
        let mut command = self.command("install")?;
        command.args(["-D", "-m", &mode, "/dev/stdin", path]);
        run_with_input(&mut command, content.as_ref()).map(drop)
    }

    /// Whether a path exists inside, a link that leads nowhere included.
    pub fn exists(&self, path: &str) -> Result<bool, Error> {
        let output = crate::output_of(self.command("sh")?.args([
            "-c",
            r#"test -e "$1" || test -L "$1""#,
            "exists",
            path,
        ]))?;
        Ok(output.status.success())
    }

    /// Adds a user with a shell and a home who may log in with the bed's key.
    pub fn add_user(&self, user: &str, sudo: Sudo) -> Result<(), Error> {
        self.run("useradd", &["--create-home", "--shell", "/bin/bash", "--", user])?;
        let home = format!("/home/{user}");
        self.write(&format!("{home}/.ssh/authorized_keys"), 0o600, self.read("/root/.ssh/authorized_keys")?)?;
        self.run("chmod", &["700", &format!("{home}/.ssh")])?;
        self.run("chown", &["--recursive", &format!("{user}:"), &format!("{home}/.ssh")])?;
        if sudo == Sudo::Everything {
            self.write(
                &format!("/etc/sudoers.d/{user}"),
                0o440,
                format!("{user} ALL=(ALL) NOPASSWD: ALL\n"),
            )?;
        }
        Ok(())
    }

    /// Starts the host on its disk, and returns when it answers: sshd with its banner, systemd having finished
    /// to boot. The link must be up.
    pub fn boot(&self) -> Result<(), Error> {
        self.start()?;
        self.wait_until_ready()
    }

    /// Loss of power: its link goes down and all of its processes end at once. What it had written stays.
    pub fn crash(&self) -> Result<(), Error> {
        self.cut()?;
        self.kill()
    }

    /// Ends process 1, and with it all others, with the link up: peers see their connections reset.
    pub fn kill(&self) -> Result<(), Error> {
        self.process()?.kill()
    }

    /// Takes its link down: packets are lost silently both ways, processes run on.
    pub fn cut(&self) -> Result<(), Error> {
        network::cut(self.number, self.index)
    }

    /// Takes its link up again, and returns when it carries packets.
    pub fn heal(&self) -> Result<(), Error> {
        network::heal(self.number, self.index)
    }

    /// Loses what it sends to an address, silently; what comes from there still arrives.
    pub fn mute_to(&self, address: Ipv4Addr) -> Result<(), Error> {
        network::mute(self.number, &self.name, address)
    }

    /// Ends [`Host::mute_to`].
    pub fn unmute_to(&self, address: Ipv4Addr) -> Result<(), Error> {
        network::unmute(self.number, &self.name, address)
    }

    /// Limits its link both ways; `None` takes the limit away.
    pub fn set_rate(&self, kilobits_per_second: Option<u32>) -> Result<(), Error> {
        network::set_rate(self.number, self.index, &self.name, kilobits_per_second)
    }

    /// Processor time that all of its processes have taken since it was first booted.
    pub fn processor_time(&self) -> Result<Duration, Error> {
        cgroup::processor_time(&control_group(self.number, &self.name))
    }

    /// The end of what its process 1 printed.
    pub fn console(&self) -> String {
        fs::read(self.disk.join("console")).map(|bytes| tail(&bytes)).unwrap_or_default()
    }

    /// Makes the disk with what is the host's own: name, keys, addresses of the others.
    pub(crate) fn create_disk(&self, bed: &BedState, authorized_key: &str) -> Result<(), Error> {
        let upper = self.disk.join("upper");
        for (directory, mode) in [
            (upper.clone(), 0o755),
            (self.disk.join("work"), 0o755),
            (self.disk.join("root"), 0o755),
            (upper.join("etc"), 0o755),
            (upper.join("etc/ssh"), 0o755),
            (upper.join("root"), 0o700),
            (upper.join("root/.ssh"), 0o700),
        ] {
            make_directory(&directory, mode)?;
        }
        let hosts: String =
            bed.hosts.iter().map(|host| format!("{} {}\n", host.address, host.name)).collect();
        let machine_id = format!("{:016x}{:016x}\n", u64::from(self.number), self.index + 1);
        let files = [
            ("etc/hostname", 0o644, format!("{}\n", self.name)),
            ("etc/hosts", 0o644, format!("127.0.0.1 localhost\n{hosts}")),
            ("etc/machine-id", 0o444, machine_id),
            ("root/.ssh/authorized_keys", 0o600, authorized_key.to_owned()),
        ];
        for (name, mode, content) in files {
            write_file(&upper.join(name), mode, &content)?;
        }
        let key = upper.join("etc/ssh/ssh_host_ed25519_key");
        run(Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", &self.name, "-f"])
            .arg(key))
        .map(drop)
    }

    /// The line that lets ssh on the controller know this host.
    pub(crate) fn known_hosts_line(&self) -> Result<String, Error> {
        let path = self.disk.join("upper/etc/ssh/ssh_host_ed25519_key.pub");
        let key = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let key: Vec<_> = key.split_whitespace().take(2).collect();
        Ok(format!("{},{} {}\n", self.name, self.address, key.join(" ")))
    }

    /// Starts process 1 and returns when it is about to become the host's init.
    pub(crate) fn start(&self) -> Result<(), Error> {
        if self.is_up() {
            return Err(Error::HostState { host: self.name.clone(), state: "up already" });
        }
        let group = cgroup::path(&control_group(self.number, &self.name))?;
        fs::create_dir_all(&group).map_err(Error::io("create", &group))?;
        let console_path = self.disk.join("console");
        let console = File::create(&console_path).map_err(Error::io("create", &console_path))?;
        let mut child = Command::new("sh")
            .args(["-c", LAUNCH, "launch"])
            .arg(group.join("cgroup.procs"))
            .arg(network::path(&network::host(self.number, &self.name)))
            .args(["sh", "-c", BOOT, "boot", &self.name])
            .args([&self.base, &self.disk])
            .arg(self.init.name())
            .env_clear()
            .env("PATH", PATH)
            .current_dir("/")
            // A ^C meant for the tests is not meant for the host.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(console)
            .spawn()
            .map_err(|source| Error::Start { command: format!("host {}", self.name), source })?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            // Ends with the line, or with the process; both say what happened.
            BufReader::new(stdout.take(64))
                .read_line(&mut line)
                .map_err(Error::system("read from a host"))?;
        }
        // Collects the process when the host ends. How it ended is of no interest: the host is told by its
        // process 1, whose parent this is.
        std::thread::spawn(move || child.wait());
        let process = line
            .strip_prefix("ready ")
            .and_then(|id| Process::find(id.trim_end().parse().ok()?))
            .ok_or_else(|| self.boot_error("its root could not be made"))?;
        write_file(&self.disk.join("process"), 0o644, &format!("{} {}\n", process.id, process.start))
    }

    /// Waits until sshd answers and, with systemd, until the boot is finished.
    pub(crate) fn wait_until_ready(&self) -> Result<(), Error> {
        let address = SocketAddr::from((self.address, 22));
        let look = || if self.is_up() { look(address).map(|()| true) } else { Ok(false) };
        let answered = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                network::enter(&network::hub(self.number))?;
                wait::until(&format!("sshd of host {}", self.name), BOOT_DEADLINE, look)
            });
            waiting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        if !answered.map_err(|error| self.boot_error(&error.to_string()))? {
            return Err(self.boot_error("its process 1 has ended"));
        }
        if self.init == Init::Systemd {
            // "degraded" ends with an error status, and a failed unit is for the test to judge.
            let output = crate::output_of(self.command("systemctl")?.args(["is-system-running", "--wait"]))?;
            let state = String::from_utf8_lossy(&output.stdout);
            if !matches!(state.trim(), "running" | "degraded") {
                return Err(self.boot_error(&format!("systemd is {}", state.trim())));
            }
        }
        Ok(())
    }

    fn boot_error(&self, reason: &str) -> Error {
        Error::Boot { host: self.name.clone(), reason: reason.into(), console: self.console() }
    }

    fn process(&self) -> Result<Process, Error> {
        let down = || Error::HostState { host: self.name.clone(), state: "down" };
        let text = fs::read_to_string(self.disk.join("process")).map_err(|_| down())?;
        let (id, start) = text.trim_end().split_once(' ').ok_or_else(down)?;
        let process =
            Process { id: id.parse().map_err(|_| down())?, start: start.parse().map_err(|_| down())? };
        if process.is_alive() { Ok(process) } else { Err(down()) }
    }
}

/// One look at whether sshd greets.
fn look(address: SocketAddr) -> Result<(), String> {
    let greeting = || {
        let mut stream = TcpStream::connect_timeout(&address, LOOK_TIMEOUT)?;
        stream.set_read_timeout(Some(LOOK_TIMEOUT))?;
        let mut greeting = [0; 4];
        stream.read_exact(&mut greeting)?;
        Ok::<_, std::io::Error>(greeting)
    };
    match greeting() {
        Ok(greeting) if &greeting == b"SSH-" => Ok(()),
        Ok(greeting) => Err(format!("{greeting:?} instead of a greeting")),
        Err(error) => Err(error.to_string()),
    }
}

pub(crate) fn make_directory(path: &Path, mode: u32) -> Result<(), Error> {
    DirBuilder::new().recursive(true).mode(mode).create(path).map_err(Error::io("create", path))?;
    // The mode given at creation passes through the mask of this process.
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(Error::io("set the mode of", path))
}

pub(crate) fn write_file(path: &Path, mode: u32, content: &str) -> Result<(), Error> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(path)
        .map_err(Error::io("create", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(Error::io("set the mode of", path))?;
    file.write_all(content.as_bytes()).map_err(Error::io("write", path))
}
