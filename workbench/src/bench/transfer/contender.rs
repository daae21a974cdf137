//! Who brings the release to the hosts, each in the way that its users do.

use std::path::{Path, PathBuf};
use std::process::Command;

use greenlight_testbed::{Bed, Project, run};

use super::payload::Payload;
use super::{Row, bed};
use crate::Error;

/// Where the application of Greenlight's release listens.
pub(crate) const PORT_GREENLIGHT: u16 = 8000;
/// Where that of everybody else's does.
pub(crate) const PORT_PEER: u16 = 8001;
/// The unit that Greenlight writes.
pub(crate) const UNIT_GREENLIGHT: &str = "greenlight-payload-web.service";
/// The unit that the others restart.
pub(crate) const UNIT_PEER: &str = "payload.service";
/// Names of what is no contender.
pub(crate) const SSH: &str = "ssh";
pub(crate) const SYSTEMD: &str = "systemd";
pub(crate) const GREENLIGHT: &str = "greenlight";
pub(crate) const TAR: &str = "tar + zstd";
pub(crate) const RSYNC: &str = "rsync";

/// One way to bring a release to the hosts.
pub(crate) trait Contender {
    fn name(&self) -> &'static str;
    fn port(&self) -> u16;
    /// Where its commands are run.
    fn directory(&self) -> &Path;
    /// What is done once, before the first measurement: what its users have done before they deploy.
    fn prepare(&self, bed: &Bed) -> Result<(), Error>;
    /// Makes the hosts as if they had never had the release.
    fn clear(&self, bed: &Bed) -> Result<(), Error>;
    /// The script for a row of the table; none where it has no such thing.
    fn script(&self, row: Row) -> Option<String>;
}

/// All of them.
pub(crate) fn all(bed: &Bed, payload: &Payload) -> Result<Vec<Box<dyn Contender>>, Error> {
    let peer = |name| Peer::new(name, bed, payload);
    Ok(vec![Box::new(Greenlight::new(bed, payload)?), Box::new(peer(TAR)), Box::new(peer(RSYNC))])
}

/// A script that runs a command on every host over ssh at once, and fails when one does.
pub(crate) fn on_all(bed: &Bed, command: &str) -> String {
    each(bed, &format!("ssh \"$host\" '{command}'"))
}

/// A script that runs something for every host at once, and fails when one does.
fn each(bed: &Bed, command: &str) -> String {
    let hosts: Vec<&str> = bed.hosts().iter().map(greenlight_testbed::Host::name).collect();
    let hosts = hosts.join(" ");
    format!(
        "jobs=\nfor host in {hosts}; do {command} & jobs=\"$jobs $!\"; done\nfor job in $jobs; do wait $job; done"
    )
}

/// Runs a command as root inside every host at once, beside what is measured.
fn inside(bed: &Bed, script: &str) -> Result<(), Error> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = bed
            .hosts()
            .iter()
            .map(|host| scope.spawn(move || host.run("sh", &["-e", "-c", script])))
            .collect();
        let mut ended = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        ended.try_for_each(|ended| ended.map(drop).map_err(self::bed))
    })
}

/// `greenlight deploy` and `greenlight rollback`, as an operator types them.
struct Greenlight {
    project: Project,
    program: PathBuf,
}

impl Greenlight {
    fn new(bed: &Bed, payload: &Payload) -> Result<Self, Error> {
        let program = build_greenlight()?;
        let project = Project::new().map_err(self::bed)?;
        let write = |name: &str, text: &str| project.write(name, text).map_err(self::bed);
        let hosts: Vec<String> = bed.hosts().iter().map(|host| format!("{:?}", host.name())).collect();
        write("greenlight.toml", &fleet(&hosts.join(", ")))?;
        write(".gitignore", ".greenlight/\n")?;
        for (version, tree) in [("v1", &payload.v1), ("v2", &payload.v2)] {
            write("PAYLOAD", &tree.display().to_string())?;
            project.commit(version).map_err(self::bed)?;
            project.git(&["tag", version]).map_err(self::bed)?;
        }
        Ok(Self { project, program })
    }
}

/// All hosts in one batch, as the others do it: nothing stands before them.
fn fleet(hosts: &str) -> String {
    format!(
        r#"[service.payload]
build = ["cp -a \"$(cat PAYLOAD)/.\" ."]
exclude = ["PAYLOAD", "greenlight.toml", ".gitignore"]

[service.payload.process.web]
run = "python3 app.py --port {{port}}"
port = {PORT_GREENLIGHT}
health = {{ http = "/health", release = "/version" }}

[environment.production]
hosts.payload = [{hosts}]
strategy = {{ kind = "rolling", batch = "100%", floor = 0 }}
"#
    )
}

/// The program that is measured, built as it is released.
fn build_greenlight() -> Result<PathBuf, Error> {
    if let Some(program) = std::env::var_os("GREENLIGHT_BIN") {
        return Ok(program.into());
    }
    eprintln!("building greenlight");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    run(cargo.args(["build", "--quiet", "--locked", "--release", "--package", "greenlight"])).map_err(bed)?;
    // This program was built beside it.
    let own = std::env::current_exe().map_err(Error::system("find this program"))?;
    Ok(own.with_file_name("greenlight"))
}

impl Contender for Greenlight {
    fn name(&self) -> &'static str {
        GREENLIGHT
    }

    fn port(&self) -> u16 {
        PORT_GREENLIGHT
    }

    fn directory(&self) -> &Path {
        self.project.path()
    }

    fn prepare(&self, bed: &Bed) -> Result<(), Error> {
        for version in ["v1", "v2"] {
            let mut build = bed.machine_command(&self.program);
            build.args(["build", "payload", "--commit", version]).current_dir(self.project.path());
            run(&mut build).map_err(self::bed)?;
        }
        // The agent is brought by the first connection, once for all releases.
        let mut status = bed.hub_command(&self.program);
        status.args(["status", "production"]).current_dir(self.project.path());
        greenlight_testbed::output_of(&mut status).map(drop).map_err(self::bed)
    }

    fn clear(&self, bed: &Bed) -> Result<(), Error> {
        inside(
            bed,
            &format!("systemctl disable --now {UNIT_GREENLIGHT} 2>/dev/null || true; rm -rf /srv/payload"),
        )
    }

    fn script(&self, row: Row) -> Option<String> {
        let arguments = match row {
            Row::Cold => "deploy production v1 --yes",
            Row::Warm | Row::Unchanged => "deploy production v2 --yes",
            Row::Rollback => "rollback production --yes",
            Row::Bare | Row::Restart => return None,
        };
        Some(format!("{} {arguments}", self.program.display()))
    }
}

/// What people do with ssh and a tool that copies.
struct Peer {
    name: &'static str,
    cold: String,
    warm: String,
    unchanged: Option<String>,
    rollback: String,
    directory: PathBuf,
}

/// What is run on a host when the tree is there.
const SWITCH: &str = "ln -sfn releases/VERSION /srv/peer/current.new && mv -T /srv/peer/current.new /srv/peer/current && systemctl restart payload.service";

impl Peer {
    fn new(name: &'static str, bed: &Bed, payload: &Payload) -> Self {
        let switch = |version: &str| SWITCH.replace("VERSION", version);
        let bring = |tree: &Path, version: &str, before: Option<&str>| match name {
            TAR => {
                let there = format!(
                    "mkdir -p /srv/peer/releases/{version} && zstd -dqc | tar -x -C /srv/peer/releases/{version} && {}",
                    switch(version)
                );
                let send = each(bed, &format!("ssh \"$host\" '{there}' < release.tar.zst"));
                // Compressed once for all, which is the best that can be made of it.
                format!("tar -c -C {} . | zstd -q -3 -f -o release.tar.zst\n{send}", tree.display())
            }
            _ => {
                let link = before.map(|before| format!("--link-dest=/srv/peer/releases/{before}"));
                let link = link.unwrap_or_default();
                let copy = format!(
                    "rsync -az --delete {link} {}/ \"$host\":/srv/peer/releases/{version}/ && ssh \"$host\" '{}'",
                    tree.display(),
                    switch(version)
                );
                each(bed, &format!("({copy})"))
            }
        };
        Self {
            name,
            cold: bring(&payload.v1, "v1", None),
            warm: bring(&payload.v2, "v2", Some("v1")),
            unchanged: (name == RSYNC).then(|| bring(&payload.v2, "v2", Some("v1"))),
            rollback: on_all(bed, &switch("v1")),
            directory: bed.home(),
        }
    }
}

impl Contender for Peer {
    fn name(&self) -> &'static str {
        self.name
    }

    fn port(&self) -> u16 {
        PORT_PEER
    }

    fn directory(&self) -> &Path {
        &self.directory
    }

    fn prepare(&self, bed: &Bed) -> Result<(), Error> {
        let unit = format!(
            "[Service]\nWorkingDirectory=/srv/peer/current\nExecStart=/usr/bin/python3 app.py --port {PORT_PEER}\n"
        );
        for host in bed.hosts() {
            host.write(&format!("/etc/systemd/system/{UNIT_PEER}"), 0o644, &unit).map_err(self::bed)?;
            if self.name == RSYNC {
                for (path, content) in rsync()? {
                    host.write(&path, 0o755, content).map_err(self::bed)?;
                }
            }
        }
        inside(bed, "systemctl daemon-reload")
    }

    fn clear(&self, bed: &Bed) -> Result<(), Error> {
        inside(bed, &format!("systemctl stop {UNIT_PEER}; rm -rf /srv/peer; mkdir -p /srv/peer/releases"))
    }

    fn script(&self, row: Row) -> Option<String> {
        match row {
            Row::Cold => Some(self.cold.clone()),
            Row::Warm => Some(self.warm.clone()),
            Row::Unchanged => self.unchanged.clone(),
            Row::Rollback => Some(self.rollback.clone()),
            Row::Bare | Row::Restart => None,
        }
    }
}

/// The machine's own rsync with the libraries that it names: the hosts are of the machine's release of Debian.
fn rsync() -> Result<Vec<(String, Vec<u8>)>, Error> {
    let program = "/usr/bin/rsync";
    let read = |path: &str| std::fs::read(path).map(|content| (path.to_owned(), content));
    let missing = |_| Error::Refused("rsync is not installed: apt-get install --yes rsync".to_owned());
    let mut files = vec![read(program).map_err(missing)?];
    let listed = run(Command::new("ldd").arg(program)).map_err(bed)?;
    for path in listed.lines().filter_map(|line| line.split(" => ").nth(1)?.split(' ').next()) {
        if !path.contains("/libc.so") {
            files.push(read(path).map_err(Error::system("read a library of rsync"))?);
        }
    }
    Ok(files)
}
