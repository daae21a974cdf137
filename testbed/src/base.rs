//! The Debian root that all hosts stand on: built once, read only, shared.

use std::fs::{self, DirBuilder, File, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::run;
use crate::{Error, machine, registry};

/// Changed by hand whenever the steps of [`build`] change what they make.
const STEPS: &str = "1";

/// What every host has installed, of whatever kind it is.
const PACKAGES: [&str; 17] = [
    "ca-certificates",
    "dbus",
    "haproxy",
    "iproute2",
    "iputils-ping",
    "libpam-systemd",
    "openssh-server",
    "postgresql",
    "procps",
    "python3",
    "python3-venv",
    "sudo",
    "supervisor",
    "systemd",
    "systemd-sysv",
    "tini",
    "zstd",
];

/// Installed but not started at boot: a bed starts them where it is asked to, or a test does.
const DISABLED: [&str; 3] = ["haproxy.service", "postgresql.service", "supervisor.service"];

/// What would reach for the machine's real kernel and devices, or for the network outside.
const MASKED: [&str; 33] = [
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty.target",
    "ldconfig.service",
    "modprobe@.service",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-binfmt.service",
    "systemd-hwdb-update.service",
    "systemd-journal-flush.service",
    "systemd-modules-load.service",
    "systemd-networkd.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-remount-fs.service",
    "systemd-resolved.service",
    "systemd-sysctl.service",
    "systemd-timesyncd.service",
    "systemd-udev-trigger.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-udevd.service",
    "systemd-update-utmp.service",
];

/// Files written over what the packages bring.
const FILES: [(&str, &str); 6] = [
    // Many short connections at once are what a rollout makes; nothing answers a reverse lookup in a bed.
    (
        "etc/ssh/sshd_config.d/bed.conf",
        "UseDNS no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nMaxStartups 200\nMaxSessions 100\nHostKey /etc/ssh/ssh_host_ed25519_key\n",
    ),
    (
        "etc/supervisor/conf.d/sshd.conf",
        "[program:sshd]\ncommand=/usr/sbin/sshd -D -e\nautorestart=true\nstdout_logfile=/var/log/sshd.stdout\nstderr_logfile=/var/log/sshd.stderr\n",
    ),
    ("etc/systemd/journald.conf.d/bed.conf", "[Journal]\nStorage=volatile\nRuntimeMaxUse=8M\n"),
    ("etc/default/locale", "LANG=C.UTF-8\n"),
    ("etc/resolv.conf", ""),
    ("etc/machine-id", ""),
];

/// A base root that stands ready.
#[derive(Debug, Clone)]
pub struct Base {
    path: PathBuf,
}

impl Base {
    /// The base root for the present list of packages, built now if it does not stand yet: about a minute
    /// and 600 MB. A second process that wants it meanwhile waits for the first.
    pub fn ensure() -> Result<Self, Error> {
        machine::check()?;
        let (codename, sources) = machine::distribution()?;
        let cache = machine::cache_directory();
        let path = cache.join(format!("base-{}", recipe_key(&codename)));
        if path.exists() {
            return Ok(Self { path });
        }
        DirBuilder::new().recursive(true).mode(0o755).create(&cache).map_err(Error::io("create", &cache))?;
        let lock_path = cache.join("base.lock");
        let lock = File::create(&lock_path).map_err(Error::io("create", &lock_path))?;
        lock.lock().map_err(Error::io("lock", &lock_path))?;
        if !path.exists() {
            let building = cache.join("base.building");
            remove(&building)?;
            build(&building, &codename, sources)?;
            fs::rename(&building, &path).map_err(Error::io("rename", &building))?;
            remove_older(&cache, &path)?;
        }
        Ok(Self { path })
    }

    /// Whether [`Base::ensure`] would return at once.
    pub fn is_ready() -> Result<bool, Error> {
        let (codename, _) = machine::distribution()?;
        Ok(machine::cache_directory().join(format!("base-{}", recipe_key(&codename))).exists())
    }

    /// Where it stands. Never write into it: hosts that run now would see it.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn build(root: &Path, codename: &str, sources: &Path) -> Result<(), Error> {
    run(Command::new("mmdebstrap")
        .args(["--quiet", "--variant=minbase", "--format=directory", "--include", &PACKAGES.join(",")])
        .arg(codename)
        .arg(root)
        .arg(sources))?;
    let chroot = |arguments: &[&str]| run(Command::new("chroot").arg(root).args(arguments)).map(drop);
    chroot(&[&["systemctl", "--quiet", "disable"], &DISABLED[..]].concat())?;
    chroot(&["systemctl", "--quiet", "enable", "ssh.service"])?;
    for unit in MASKED {
        let link = root.join("etc/systemd/system").join(unit);
        match fs::remove_file(&link) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &link)(error));
            }
            _ => symlink("/dev/null", &link).map_err(Error::io("create", &link))?,
        }
    }
    for (name, text) in FILES {
        let path = root.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        // A link here would point out of the root and into the machine.
        if path.is_symlink() {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
        fs::write(&path, text).map_err(Error::io("write", &path))?;
    }
    // Each host gets a key of its own, outside of the base.
    chroot(&["sh", "-c", "rm -f /etc/ssh/ssh_host_*"])?;
    fs::set_permissions(root, Permissions::from_mode(0o755)).map_err(Error::io("set the mode of", root))
}

/// A key that changes with everything that makes the base what it is.
fn recipe_key(codename: &str) -> String {
    let mut hasher = blake3::Hasher::new();
    let words = PACKAGES.into_iter().chain(DISABLED).chain(MASKED).chain([codename, STEPS]);
    for word in words.chain(FILES.into_iter().flat_map(|(name, text)| [name, text])) {
        hasher.update(word.as_bytes()).update(b"\0");
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

/// Removes base roots of older recipes that no bed stands on.
fn remove_older(cache: &Path, current: &Path) -> Result<(), Error> {
    let registry = registry::Registry::lock()?;
    let used: Vec<_> = registry.states()?.into_iter().map(|state| state.base).collect();
    for entry in fs::read_dir(cache).map_err(Error::io("read", cache))? {
        let path = entry.map_err(Error::io("read", cache))?.path();
        let is_base = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("base-"));
        if is_base && path != current && !used.contains(&path) {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Removes a tree. It is no error when it does not exist.
pub(crate) fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}
