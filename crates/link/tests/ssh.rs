//! Connections over the system's ssh to a real sshd of the test's own, on a loopback port, with keys of its own.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "these are tests")]

mod support;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use greenlight_link::connection::{Connection, OpenError, OpenOptions};
use greenlight_model::fleet::LinkKind;
use support::{host, options, run};

/// A running sshd and the client configuration that leads to it. What accounts cache goes into its directory.
struct Sshd {
    child: Child,
    port: u16,
    directory: tempfile::TempDir,
}

impl Sshd {
    /// Starts it with lines added to its configuration.
    fn start(extra: &str) -> Self {
        let program = ["/usr/sbin/sshd", "/usr/local/sbin/sshd", "/usr/bin/sshd"]
            .into_iter()
            .find(|path| Path::new(path).exists())
            .expect("this test needs sshd: apt-get install openssh-server");
        if rustix::process::geteuid().is_root() {
            // Where no init system made it, sshd refuses to start without it.
            fs::create_dir_all("/run/sshd").unwrap();
        }
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for key in ["host_key", "user_key", "other_key"] {
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(at(key))
                .status();
            assert!(made.unwrap().success());
        }
        fs::copy(at("user_key.pub"), at("authorized_keys")).unwrap();
        let port = free_port();
        let (key, accepted, cache) = (at("host_key"), at("authorized_keys"), at("cache"));
        let configuration = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\n\
             StrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n{extra}\n\
             SetEnv XDG_CACHE_HOME={} PATH={}:/usr/local/bin:/usr/bin:/bin\n",
            key.display(),
            accepted.display(),
            cache.display(),
            at("bin").display(),
        );
        fs::write(at("sshd_config"), configuration).unwrap();
        let mut child = Command::new(program)
            .args(["-D", "-e", "-f"])
            .arg(at("sshd_config"))
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let said: Vec<String> =
            log.by_ref().map(Result::unwrap).take_while(|line| !line.contains("listening on")).collect();
        let is_up = child.try_wait().unwrap().is_none();
        assert!(is_up, "sshd did not start: {said:?}");
        // It blocks when nobody reads its log.
        std::thread::spawn(move || log.for_each(drop));
        let sshd = Self { child, port, directory };
        sshd.know("host_key.pub");
        sshd.configure("client", &sshd.way("user_key"));
        sshd
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Makes this the only key that is known for the host.
    fn know(&self, key: &str) {
        let key = fs::read_to_string(self.at(key)).unwrap();
        fs::write(self.at("known_hosts"), format!("[127.0.0.1]:{} {key}", self.port)).unwrap();
    }

    /// What a client's configuration needs in order to get here.
    fn way(&self, key: &str) -> String {
        format!(
            "HostName 127.0.0.1\nPort {}\nIdentityFile {}\nIdentitiesOnly yes\nIdentityAgent none\n\
             UserKnownHostsFile {}\nGlobalKnownHostsFile /dev/null\n",
            self.port,
            self.at(key).display(),
            self.at("known_hosts").display(),
        )
    }

    fn configure(&self, name: &str, host_lines: &str) {
        fs::write(self.at(name), format!("Host web1\n{host_lines}")).unwrap();
    }

    /// A program that is found before the system's own on the other side.
    fn shadow(&self, name: &str, script: &str) {
        fs::create_dir_all(self.at("bin")).unwrap();
        fs::write(self.at("bin").join(name), script).unwrap();
        fs::set_permissions(self.at("bin").join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn cached(&self) -> Vec<PathBuf> {
        let directory = self.at("cache/greenlight");
        let mut files: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }

    fn options(&self) -> OpenOptions {
        OpenOptions { ssh_config: Some(self.at("client")), ..options() }
    }

    async fn open(&self) -> Result<Connection, OpenError> {
        self.open_with(&self.options()).await
    }

    async fn open_with(&self, options: &OpenOptions) -> Result<Connection, OpenError> {
        let link = LinkKind::Ssh { destination: None, user: None };
        Connection::open(&host(), &link, options).await
    }

    async fn problem(&self) -> String {
        let error = self.open().await.expect_err("the connection was opened");
        assert!(!error.to_string().contains('\n'), "{error}");
        error.to_string()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that nothing listens on now.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn the_agent_is_sent_once_and_found_again() {
    let sshd = Sshd::start("");
    let first = sshd.open().await.unwrap();
    let cached = sshd.cached();
    assert_eq!(cached.len(), 1, "{cached:?}");
    assert_eq!(first.facts().agent_version, cached[0].display().to_string());
    let hash = blake3::hash(&fs::read(&options().agent_program).unwrap());
    assert_eq!(cached[0].file_name().unwrap().to_str().unwrap(), format!("agent-{hash}"));
    assert_eq!(fs::metadata(&cached[0]).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(run(&first, &["echo", "hello"]).await.0, ["hello"]);
    first.close().await;

    let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    let before = inode(&cached[0]);
    let second = sshd.open().await.unwrap();
    assert_eq!(sshd.cached(), cached);
    assert_eq!(inode(&cached[0]), before, "it was sent again");
    second.close().await;

    // One that was damaged by a crash is replaced, and one that nobody used for long is removed.
    fs::write(&cached[0], "short").unwrap();
    let old = sshd.at("cache/greenlight/agent-00");
    fs::write(&old, "").unwrap();
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(40 * 86_400);
    fs::File::options().write(true).open(&old).unwrap().set_modified(long_ago).unwrap();
    let third = sshd.open().await.unwrap();
    assert_eq!(run(&third, &["echo", "hello"]).await.0, ["hello"]);
    assert_eq!(sshd.cached(), cached);
    third.close().await;
}

#[tokio::test]
async fn a_death_over_ssh_says_what_the_agent_said_last() {
    let sshd = Sshd::start("");
    let connection = sshd.open().await.unwrap();
    let error = run(&connection, &["die", "out of memory, say"]).await.1.unwrap_err();
    assert!(error.to_string().contains("exit code 3: out of memory, say"), "{error}");
}

#[tokio::test]
async fn what_a_login_prints_does_no_harm() {
    let sshd = Sshd::start("");
    // Whatever is said before: the script's own first line is looked for. `uname` speaks within the script, but only
    // while the agent is missing.
    sshd.shadow(
        "id",
        "#!/bin/sh\necho Welcome to web1 >&2\necho Last login: yesterday >&2\nexec /usr/bin/id \"$@\"\n",
    );
    let banner = sshd.at("banner");
    fs::write(&banner, "This machine is watched.\n").unwrap();
    let watched = Sshd::start(&format!("Banner {}", banner.display()));
    for sshd in [&sshd, &watched] {
        let connection = sshd.open().await.unwrap();
        assert_eq!(run(&connection, &["echo", "hello"]).await.0, ["hello"]);
    }
    // Endless noise is given up.
    let noisy = Sshd::start("ForceCommand yes noise");
    assert!(noisy.problem().await.contains("more than 65536 bytes came before its answer"));
    // A greeting on standard output, as some accounts' start-up files have it.
    let greeting =
        Sshd::start("ForceCommand echo Good morning; printf 'prompt> '; eval \"$SSH_ORIGINAL_COMMAND\"");
    let connection = greeting.open().await.unwrap();
    assert_eq!(run(&connection, &["echo", "hello"]).await.0, ["hello"]);
}

#[tokio::test]
async fn host_keys_are_held_to() {
    let sshd = Sshd::start("");
    fs::write(sshd.at("known_hosts"), "").unwrap();
    let problem = sshd.problem().await;
    assert!(
        problem.starts_with("web1: its ssh host key is not known here; run `ssh web1` once"),
        "{problem}"
    );
    sshd.know("other_key.pub");
    let problem = sshd.problem().await;
    assert!(
        problem.starts_with("web1: its ssh host key is not the one that is known (Offending"),
        "{problem}"
    );
}

#[tokio::test]
async fn refusals_of_the_network_and_of_sshd_are_told_apart() {
    let sshd = Sshd::start("");
    sshd.configure("client", &sshd.way("other_key"));
    let problem = sshd.problem().await;
    assert!(
        problem.contains("ssh was refused (") && problem.contains("Permission denied (publickey)"),
        "{problem}"
    );

    sshd.configure("client", &format!("Port {}\n{}", free_port(), sshd.way("user_key")));
    let problem = sshd.problem().await;
    assert!(
        problem.contains("nothing accepts ssh connections there") && problem.contains("refused"),
        "{problem}"
    );

    sshd.configure("client", &format!("HostName web1.invalid\n{}", sshd.way("user_key")));
    let problem = sshd.problem().await;
    assert!(problem.contains("its name cannot be resolved"), "{problem}");

    sshd.configure("client", &format!("ProxyJump 127.0.0.1:{}\n{}", free_port(), sshd.way("user_key")));
    let problem = sshd.problem().await;
    assert!(
        problem.contains("its jump host or proxy command did not connect it (ssh: connect to host"),
        "{problem}"
    );

    sshd.configure("client", "Prot 22\n");
    let problem = sshd.problem().await;
    assert!(problem.contains("the ssh configuration here is wrong") && problem.contains("prot"), "{problem}");

    // Somebody accepts and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    sshd.configure("client", &format!("Port {port}\n{}", sshd.way("user_key")));
    let options = OpenOptions { connect_timeout: Duration::from_secs(1), ..sshd.options() };
    let problem = sshd.open_with(&options).await.unwrap_err().to_string();
    assert!(problem.contains("it does not answer") && problem.contains("timed out"), "{problem}");
}

#[tokio::test]
async fn accounts_that_cannot_run_the_agent_are_named() {
    let nologin = Sshd::start("ForceCommand echo This account is currently not available.; exit 1");
    let problem = nologin.problem().await;
    assert!(problem.contains("no POSIX shell") && problem.contains("currently not available"), "{problem}");

    let files_only = Sshd::start("Subsystem sftp internal-sftp\nForceCommand internal-sftp");
    let problem = files_only.problem().await;
    assert!(problem.contains("no POSIX shell") && problem.contains("sftp connections only"), "{problem}");

    let other = Sshd::start("");
    other.shadow("uname", "#!/bin/sh\ncase $1 in -s) echo Linux;; *) echo riscv64;; esac\n");
    let problem = other.problem().await;
    let ours = std::env::consts::ARCH;
    assert!(
        problem.contains(&format!("it is Linux riscv64, and this greenlight is built for Linux {ours}")),
        "{problem}"
    );
}

#[tokio::test]
async fn sudo_is_asked_for_and_its_refusal_told() {
    let sshd = Sshd::start("");
    // The account is somebody else's as far as the script can see.
    sshd.shadow("id", "#!/bin/sh\necho 4321\n");
    sshd.shadow("sudo", "#!/bin/sh\necho sudo: a password is required >&2\nexit 1\n");
    let options = OpenOptions { become_root: true, ..sshd.options() };
    let problem = sshd.open_with(&options).await.unwrap_err().to_string();
    assert!(problem.contains("`sudo -n` was refused (sudo: a password is required)"), "{problem}");
    assert!(problem.contains("manager = \"systemd-user\" or \"agent\""), "{problem}");
    // Not asked for, it is not needed.
    sshd.open().await.unwrap();
    sshd.shadow("sudo", "#!/bin/sh\nwhile [ \"$1\" = -n ] || [ \"$1\" = -- ]; do shift; done\nexec \"$@\"\n");
    let connection = sshd.open_with(&options).await.unwrap();
    assert_eq!(run(&connection, &["echo", "hello"]).await.0, ["hello"]);
}

#[tokio::test]
async fn an_agent_finds_a_place_or_the_reason_is_told() {
    // A home that is a file: nothing can be made in it, and the place under /tmp is taken.
    let sshd = Sshd::start("");
    fs::write(sshd.at("cache"), "").unwrap();
    let connection = sshd.open().await.unwrap();
    let place = PathBuf::from(&connection.facts().agent_version);
    assert!(
        place.starts_with(format!("/tmp/greenlight-{}", rustix::process::geteuid().as_raw())),
        "{place:?}"
    );
    connection.close().await;
    fs::remove_file(place).unwrap();

    // A file system that fills up while the agent arrives: a limit on the size of files looks the same to the script.
    let full = Sshd::start("ForceCommand trap \"\" XFSZ; ulimit -f 8; eval \"$SSH_ORIGINAL_COMMAND\"");
    let problem = full.problem().await;
    assert!(
        problem.contains("there is no room for the agent") && problem.contains("File too large"),
        "{problem}"
    );
    assert_eq!(full.cached(), Vec::<PathBuf>::new(), "a part of it was left behind");
}

#[tokio::test]
async fn destinations_that_are_options_do_not_reach_ssh() {
    let link = LinkKind::Ssh { destination: Some("-oProxyCommand=touch /tmp/owned".to_owned()), user: None };
    let error = Connection::open(&host(), &link, &options()).await.unwrap_err();
    assert!(error.to_string().contains("cannot be given to ssh"), "{error}");
}
