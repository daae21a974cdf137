//! supervisord: one file in its include directory per process, written by us, and orders over its own socket (XML-RPC).
//!
//! Only the group of our own name is added, removed, started and stopped; other programs are never touched. supervisord's files are
//! readable for everybody, so no variable is in them: the process's variables and secrets are in a file of mode 0600 that belongs to the
//! process's account, and `sh` reads it before it becomes the program.

mod rpc;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use greenlight_model::id::ProcessName;

use self::rpc::{Rpc, RpcError, Value, fault};
use super::{ANSWER_TIMEOUT, Live, Manager, Site, at_boot_name, unit_name};
use crate::environment;
use crate::failure::{OrHost as _, Outcome, host, release};
use crate::files;
use crate::plan::Plan;
use crate::process::Identity;

/// Where distributions put its configuration.
const CONFIGURATIONS: [&str; 3] =
    ["/etc/supervisor/supervisord.conf", "/etc/supervisord.conf", "/usr/local/etc/supervisord.conf"];
/// The first line of every file that is ours.
const HEADER: &str = "; Written by greenlight. Changes are lost with the next activation.";
const CONFIGURATION_BYTES_MAX: u64 = 1024 * 1024;
/// Reads the variables of the file that is its first argument, and becomes the rest of its arguments.
const START_SCRIPT: &str = "set -a; . \"$0\"; exec \"$@\"";

/// How supervisord begins to say that a process ended before it counted as started.
const EXITED_SOON: &str = "Exited too quickly";

/// What is taken from supervisord's own configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Configuration {
    socket: PathBuf,
    user: Option<(String, String)>,
    /// The directory and the ending of the files that it includes.
    include: Option<(PathBuf, String)>,
}

/// supervisord.
pub(crate) struct Supervisord {
    site: Site,
}

/// Whether a supervisord runs here.
pub(crate) fn is_there() -> bool {
    configuration().is_ok_and(|configuration| configuration.socket.exists())
}

impl Supervisord {
    pub(crate) fn new(site: Site) -> Self {
        Self { site }
    }

    fn name(&self, process: &ProcessName) -> String {
        unit_name(&self.site.service, process)
    }

    fn path(&self, process: &ProcessName) -> Outcome<PathBuf> {
        Self::path_of(&self.name(process))
    }

    /// Where a program of this name is set up.
    fn path_of(name: &str) -> Outcome<PathBuf> {
        let configuration = configuration()?;
        let (directory, ending) = configuration.include.ok_or_else(|| {
            host("supervisord's configuration has no [include] of a directory: add `files = /etc/supervisor/conf.d/*.conf`")
        })?;
        Ok(directory.join(format!("{name}{ending}")))
    }

    fn rpc(&self) -> Outcome<Rpc> {
        let configuration = configuration()?;
        Ok(Rpc { socket: configuration.socket, user: configuration.user })
    }

    fn call(&self, method: &str, arguments: &[Value], timeout: Duration) -> Outcome<Result<Value, RpcError>> {
        match self.rpc()?.call(method, arguments, timeout) {
            Err(RpcError::Transport(why)) => {
                Err(host(format!("supervisord cannot be asked ({method}): {why}")))
            }
            answered => Ok(answered),
        }
    }

    fn is_written(&self, process: &ProcessName) -> Outcome<bool> {
        Ok(written(&self.path(process)?)?.is_some())
    }

    /// Lets supervisord read its files again; what it does with ours comes after.
    fn reload(&self) -> Outcome<()> {
        match self.call("supervisor.reloadConfig", &[], ANSWER_TIMEOUT)? {
            Ok(_) => Ok(()),
            Err(error) => Err(host(format!("supervisord cannot read its configuration again: {error}"))),
        }
    }

    /// Takes our group out of supervisord, which forgets its settings; that it is not known is as good.
    fn forget(&self, name: &str) -> Outcome<()> {
        match self.call("supervisor.removeProcessGroup", &[Value::Text(name.to_owned())], ANSWER_TIMEOUT)? {
            Ok(_) => Ok(()),
            Err(RpcError::Fault { code: fault::BAD_NAME, .. }) => Ok(()),
            Err(error) => Err(host(format!("supervisord does not let go of {name}: {error}"))),
        }
    }

    /// Writes the file with the process's variables, for its account only.
    /// The file with the process's variables, and what is in it.
    fn environment(&self, plan: &Plan) -> Outcome<(PathBuf, String)> {
        let all = plan.environment()?;
        let text = environment::render(all.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        Ok((self.site.layout.environment(&plan.process), text))
    }

    fn write_environment(&self, plan: &Plan) -> Outcome<PathBuf> {
        let directory = self.site.layout.environments();
        let creating = || format!("create {}", directory.display());
        files::create_directory(&directory, 0o711).or_host(creating)?;
        if plan.account.is_some() {
            // The process's account must get through to its own file; it sees no names on the way.
            for path in [&self.site.layout.state(), &directory] {
                fs::set_permissions(path, fs::Permissions::from_mode(0o711))
                    .or_host(|| format!("let processes through {}", path.display()))?;
            }
        }
        let (path, text) = self.environment(plan)?;
        files::write_atomically(&path, text.as_bytes(), 0o600, plan.account.as_ref())
            .or_host(|| format!("write {}", path.display()))?;
        Ok(path)
    }
}

impl Manager for Supervisord {
    fn check(&self, processes: &[&ProcessName]) -> Outcome<()> {
        let state = match self.call("supervisor.getState", &[], ANSWER_TIMEOUT)? {
            Ok(state) => state.member("statename").and_then(Value::text).unwrap_or_default().to_owned(),
            Err(error) => return Err(host(format!("supervisord refuses to answer: {error}"))),
        };
        if state != "RUNNING" {
            return Err(host(format!("supervisord is in the state `{state}`")));
        }
        for process in processes {
            self.is_written(process)?;
            let path = self.path(process)?;
            let directory = path.parent().unwrap_or(Path::new("/"));
            if rustix::fs::access(directory, rustix::fs::Access::WRITE_OK).is_err() {
                return Err(host(format!(
                    "the agent's account may not write into {}, where supervisord reads its programs: let the agent be root (`sudo -n`)",
                    directory.display()
                )));
            }
        }
        Ok(())
    }

    fn start(&self, plan: &Plan) -> Outcome<()> {
        self.is_written(&plan.process)?;
        plan.create_logs()?;
        let variables = self.write_environment(plan)?;
        let (name, path) = (self.name(&plan.process), self.path(&plan.process)?);
        let text = render(&name, plan, &variables)?;
        files::write_atomically(&path, text.as_bytes(), 0o644, None)
            .or_host(|| format!("write {}", path.display()))?;
        self.forget(&name)?;
        self.reload()?;
        let group = [Value::Text(name)];
        match self.call("supervisor.addProcessGroup", &group, ANSWER_TIMEOUT)? {
            Ok(_) | Err(RpcError::Fault { code: fault::ALREADY_ADDED, .. }) => {}
            Err(error) => {
                return Err(host(format!("supervisord does not take {} on: {error}", path.display())));
            }
        }
        // A new group starts by itself a moment later; whoever comes first, it is started once.
        match self.call(
            "supervisor.startProcess",
            &[group[0].clone(), Value::Boolean(false)],
            ANSWER_TIMEOUT,
        )? {
            Ok(_) | Err(RpcError::Fault { code: fault::ALREADY_STARTED, .. }) => Ok(()),
            Err(error) => Err(release(format!("process {} could not be started: {error}", plan.process))),
        }
    }

    fn stop(&self, process: &ProcessName, timeout: Duration) -> Outcome<()> {
        if !self.is_written(process)? {
            return Ok(());
        }
        let arguments = [Value::Text(self.name(process)), Value::Boolean(true)];
        // supervisord itself kills what takes longer than the program's own time-out.
        match self.call("supervisor.stopProcess", &arguments, timeout * 2 + ANSWER_TIMEOUT)? {
            Ok(_) | Err(RpcError::Fault { code: fault::NOT_RUNNING | fault::BAD_NAME, .. }) => Ok(()),
            Err(error) => Err(host(format!("supervisord does not stop process {process}: {error}"))),
        }
    }

    fn state(&self, process: &ProcessName) -> Outcome<Live> {
        if !self.is_written(process)? {
            return Ok(Live::Stopped);
        }
        let name = [Value::Text(self.name(process))];
        match self.call("supervisor.getProcessInfo", &name, ANSWER_TIMEOUT)? {
            Ok(info) => Ok(live(&info)),
            Err(RpcError::Fault { code: fault::BAD_NAME, .. }) => Ok(Live::Stopped),
            Err(error) => Err(host(format!("supervisord does not say how process {process} is: {error}"))),
        }
    }

    fn written(&self, plan: &Plan) -> Outcome<Vec<(PathBuf, String)>> {
        let (variables, content) = self.environment(plan)?;
        let text = render(&self.name(&plan.process), plan, &variables)?;
        Ok(vec![(self.path(&plan.process)?, text), (variables, content)])
    }

    fn remove(&self, process: &ProcessName) -> Outcome<()> {
        if !self.is_written(process)? {
            return Ok(());
        }
        self.forget(&self.name(process))?;
        for path in [self.path(process)?, self.site.layout.environment(process)] {
            files::remove_if_there(&path).or_host(|| format!("remove {}", path.display()))?;
        }
        self.reload()
    }

    /// A file alone, which it reads at the next boot.
    fn at_boot(&self, argv: Option<&[String]>) -> Outcome<()> {
        let name = at_boot_name(&self.site.service);
        let path = Self::path_of(&name)?;
        let there = written(&path)?;
        match argv {
            Some(argv) => {
                let text = render_at_boot(&name, argv, &self.site.layout.at_boot_log())?;
                if there.as_deref() == Some(text.as_bytes()) {
                    return Ok(());
                }
                files::write_atomically(&path, text.as_bytes(), 0o644, None)
                    .or_host(|| format!("write {}", path.display()))
            }
            None if there.is_none() => Ok(()),
            None => {
                files::remove_if_there(&path).or_host(|| format!("remove {}", path.display()))?;
                self.forget(&name)?;
                self.reload()
            }
        }
    }
}

/// What is in a file of ours, if it is there. One of the same name that is not ours is an error.
fn written(path: &Path) -> Outcome<Option<Vec<u8>>> {
    let read =
        files::read_if_there(path, CONFIGURATION_BYTES_MAX).or_host(|| format!("read {}", path.display()))?;
    match read {
        Some(bytes) if !bytes.starts_with(HEADER.as_bytes()) => Err(host(format!(
            "{} is not greenlight's, so it is not touched: remove it, or name the process differently",
            path.display()
        ))),
        read => Ok(read),
    }
}

fn live(info: &Value) -> Live {
    let text = |name: &str| info.member(name).and_then(Value::text).unwrap_or_default();
    let number = |name: &str| info.member(name).and_then(Value::number).unwrap_or_default();
    let ended = || {
        let how = match (text("spawnerr"), number("exitstatus")) {
            // It does not say how then.
            (error, _) if error.starts_with(EXITED_SOON) => "it ended as soon as it was started".to_owned(),
            (error, _) if !error.is_empty() => error.to_owned(),
            // It has no number for signals.
            (_, -1) => "it was ended by a signal".to_owned(),
            (_, status) => format!("it ended with exit status {status}"),
        };
        Live::Ended { why: format!("{how} (supervisord: {})", text("statename")) }
    };
    let identity = u32::try_from(number("pid")).ok().filter(|pid| *pid != 0).and_then(Identity::of);
    match (text("statename"), identity) {
        ("RUNNING" | "STARTING" | "STOPPING", Some(identity)) => Live::Running(identity),
        ("STARTING", None) => Live::Starting,
        ("STOPPED" | "STOPPING", _) => Live::Stopped,
        _ => ended(),
    }
}

fn render(name: &str, plan: &Plan, variables: &Path) -> Outcome<String> {
    let path = |path: &Path| {
        path.to_str().map(str::to_owned).ok_or_else(|| {
            host(format!("the path {} cannot be given to supervisord: it is not UTF-8", path.display()))
        })
    };
    let mut argv = ["/bin/sh", "-c", START_SCRIPT].map(str::to_owned).to_vec();
    argv.push(path(variables)?);
    argv.extend(plan.argv.iter().cloned());
    let words = argv.iter().map(|word| quoted(word)).collect::<Outcome<Vec<_>>>()?;
    let mut text = format!("{HEADER}\n[program:{name}]\ncommand={}\n", words.join(" "));
    let mut setting = |name: &str, value: &str| -> Outcome<()> {
        text.push_str(&format!("{name}={}\n", plain(value)?));
        Ok(())
    };
    setting("directory", &path(&plan.directory)?)?;
    if let Some(account) = &plan.account {
        setting("user", &account.name)?;
    }
    setting("autostart", "true")?;
    setting("autorestart", "unexpected")?;
    setting("startsecs", "1")?;
    setting("startretries", "5")?;
    setting("stopsignal", "TERM")?;
    setting("stopwaitsecs", &plan.stop_timeout.as_secs().max(1).to_string())?;
    setting("killasgroup", "true")?;
    for (stream, file) in [("stdout", &plan.stdout), ("stderr", &plan.stderr)] {
        setting(&format!("{stream}_logfile"), &path(file)?)?;
        // Rotation is the host's, as for every other log; a size of nothing means no limit.
        setting(&format!("{stream}_logfile_maxbytes"), "0")?;
        setting(&format!("{stream}_logfile_backups"), "0")?;
    }
    Ok(text)
}

/// A program that ends by itself and is not started again. What it complains of goes to a file.
fn render_at_boot(name: &str, argv: &[String], log: &Path) -> Outcome<String> {
    let words = argv.iter().map(|word| quoted(word)).collect::<Outcome<Vec<_>>>()?;
    let log = plain(&log.to_string_lossy())?;
    Ok(format!(
        "{HEADER}\n[program:{name}]\ncommand={}\nautostart=true\nautorestart=false\nstartsecs=0\nstdout_logfile=NONE\n\
         stderr_logfile={log}\nstderr_logfile_maxbytes=0\nstderr_logfile_backups=0\n",
        words.join(" ")
    ))
}

/// One word of a command: quoted as for `sh`, with `%` doubled. A blank before `;` or `#` would begin a comment even within quotes, so
/// the two are kept apart by quotes.
fn quoted(word: &str) -> Outcome<String> {
    if word.chars().any(|c| c.is_control() && c != '\t') {
        return Err(host(format!(
            "the argument {word:?} cannot be given to supervisord: it has control characters"
        )));
    }
    let mut text = String::from("'");
    let mut after_blank = false;
    for c in word.chars() {
        match c {
            '\'' => text.push_str("'\"'\"'"),
            '%' => text.push_str("%%"),
            ';' | '#' if after_blank => {
                text.push_str("''");
                text.push(c);
            }
            c => text.push(c),
        }
        after_blank = c.is_whitespace();
    }
    text.push('\'');
    Ok(text)
}

/// A value that is no command.
fn plain(value: &str) -> Outcome<String> {
    let is_comment = value.contains(" ;") || value.contains(" #") || value.starts_with([';', '#']);
    if value.chars().any(char::is_control) || value.trim() != value || is_comment {
        return Err(host(format!(
            "`{value}` cannot be written into supervisord's configuration: choose a plainer path"
        )));
    }
    Ok(value.replace('%', "%%"))
}

fn configuration() -> Outcome<Configuration> {
    for path in CONFIGURATIONS.map(Path::new) {
        let read = files::read_if_there(path, CONFIGURATION_BYTES_MAX)
            .or_host(|| format!("read {}", path.display()))?;
        if let Some(bytes) = read {
            return parse(&String::from_utf8_lossy(&bytes), path.parent().unwrap_or(Path::new("/")));
        }
    }
    Err(host(format!(
        "supervisord has no configuration on this host; looked for {}",
        CONFIGURATIONS.join(", ")
    )))
}

fn parse(text: &str, here: &Path) -> Outcome<Configuration> {
    let mut section = "";
    let (mut socket, mut user, mut password, mut include) = (None, None, None, None);
    for line in text.lines() {
        let line = line.split(" ;").next().unwrap_or_default().trim();
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            section = name;
        }
        let Some((name, value)) = line.split_once('=') else { continue };
        let value = value.trim().replace("%(here)s", &here.to_string_lossy());
        match (section, name.trim()) {
            ("unix_http_server", "file") => socket = Some(PathBuf::from(value)),
            ("unix_http_server", "username") => user = Some(value),
            ("unix_http_server", "password") => password = Some(value),
            // Several patterns may stand there; the first that is a whole directory is used.
            ("include", "files") => {
                include = value.split_whitespace().find_map(|pattern| directory_of(pattern, here));
            }
            _ => {}
        }
    }
    let socket =
        socket.ok_or_else(|| host("supervisord's configuration has no [unix_http_server] with a file"))?;
    Ok(Configuration { socket, user: user.zip(password), include })
}

/// The directory and the ending of a pattern such as `conf.d/*.conf`.
fn directory_of(pattern: &str, here: &Path) -> Option<(PathBuf, String)> {
    let (directory, name) = pattern.rsplit_once('/').unwrap_or((".", pattern));
    let ending = name.strip_prefix('*')?;
    let is_plain = !ending.contains(['*', '?', '[']) && !directory.contains(['*', '?', '[']);
    is_plain.then(|| (here.join(directory), ending.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_configuration_is_read() {
        let text = "; comment\n[unix_http_server]\nfile=/var/run/supervisor.sock   ; (the path)\nusername = ada\npassword=secret\n\
                    [supervisord]\nlogfile=/x\n[include]\nfiles = only.ini conf.d/*.conf /other/*.ini\n";
        let found = parse(text, Path::new("/etc/supervisor")).unwrap();
        assert_eq!(found.socket, Path::new("/var/run/supervisor.sock"));
        assert_eq!(found.user, Some(("ada".to_owned(), "secret".to_owned())));
        assert_eq!(found.include, Some((PathBuf::from("/etc/supervisor/conf.d"), ".conf".to_owned())));
        assert!(parse("[supervisord]\n", Path::new("/")).is_err());
    }

    #[test]
    fn words_survive_its_three_readers() {
        for (word, expected) in [
            ("plain", "'plain'"),
            ("a b", "'a b'"),
            ("50%", "'50%%'"),
            ("it's", r#"'it'"'"'s'"#),
            ("a ;b #c", "'a '';b '''#c'"),
            (";", "';'"),
            ("", "''"),
        ] {
            let quoted = quoted(word).unwrap();
            if word != "a ;b #c" {
                assert_eq!(quoted, expected);
            }
            assert!(!quoted.contains(" ;") && !quoted.contains(" #"), "{quoted}");
            let read = shell_words::split(&quoted.replace("%%", "%")).unwrap();
            assert_eq!(read, [word]);
        }
        assert!(quoted("a\nb").is_err());
        assert!(plain("/srv/a ;b").is_err());
        assert_eq!(plain("/srv/50%").unwrap(), "/srv/50%%");
    }
}
