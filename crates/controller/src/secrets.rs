//! Where secret values come from: an age-encrypted file of the repository, or a command. They are read once, before
//! anything changes, and live only in memory until they go to the hosts.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use greenlight_link::message::SecretValue;
use greenlight_model::fleet::{Fleet, SecretSource};
use greenlight_model::id::VariableName;

use crate::age;

/// Most bytes a secrets file or a command's answer may have.
const SECRET_BYTES_MAX: u64 = 1 << 20;

/// Why a secret has no value. The value itself is never in here.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The fleet file names no source.
    #[error("secret {0} has no source; write [secret.{0}] in greenlight.toml")]
    NoSource(VariableName),
    /// A file could not be read.
    #[error("secret {name}: cannot read {path}")]
    File {
        /// Which secret.
        name: VariableName,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file could not be opened with the identity.
    #[error("secret {name}: cannot decrypt {path} with {identity}: {why}")]
    Decrypt {
        /// Which secret.
        name: VariableName,
        /// The encrypted file.
        path: PathBuf,
        /// The identity file.
        identity: PathBuf,
        /// Why.
        why: String,
    },
    /// The file has no line for it.
    #[error("secret {name}: {path} has no line `{name}=…`")]
    NotInFile {
        /// Which secret.
        name: VariableName,
        /// The file.
        path: PathBuf,
    },
    /// The command could not be run or failed.
    #[error("secret {name}: `{program}` {why}")]
    Command {
        /// Which secret.
        name: VariableName,
        /// The program; its arguments are left out, they may be private.
        program: String,
        /// How it failed.
        why: String,
    },
    /// The value cannot be given to a process.
    #[error(
        "secret {name}: its value has a line break or a zero byte, which a process's environment cannot hold safely"
    )]
    Unusable {
        /// Which secret.
        name: VariableName,
    },
}

/// The values of these secrets.
///
/// # Errors
/// When one has no source or its source does not give it; the first such one is named.
pub fn resolve(
    fleet: &Fleet,
    names: &BTreeSet<VariableName>,
    project: &Path,
) -> Result<BTreeMap<VariableName, SecretValue>, SecretError> {
    let mut opened: BTreeMap<(String, String), BTreeMap<String, String>> = BTreeMap::new();
    let mut values = BTreeMap::new();
    for name in names {
        let value =
            match fleet.secrets.get(name) {
                None => return Err(SecretError::NoSource(name.clone())),
                Some(SecretSource::Command { argv }) => from_command(name, argv, project)?,
                Some(SecretSource::Age { file, identity }) => {
                    let key = (file.clone(), identity.clone());
                    if !opened.contains_key(&key) {
                        opened.insert(
                            key.clone(),
                            decrypt(name, &project.join(file), &expand_home(identity, project))?,
                        );
                    }
                    opened.get(&key).and_then(|lines| lines.get(name.as_str())).cloned().ok_or_else(|| {
                        SecretError::NotInFile { name: name.clone(), path: project.join(file) }
                    })?
                }
            };
        if value.contains(['\n', '\r', '\0']) {
            return Err(SecretError::Unusable { name: name.clone() });
        }
        values.insert(name.clone(), SecretValue::new(value));
    }
    Ok(values)
}

fn from_command(name: &VariableName, argv: &[String], project: &Path) -> Result<String, SecretError> {
    let (program, arguments) = argv.split_first().ok_or_else(|| SecretError::NoSource(name.clone()))?;
    let failed = |why: String| SecretError::Command { name: name.clone(), program: program.clone(), why };
    let mut child = Command::new(program)
        .args(arguments)
        .current_dir(project)
        .stdin(Stdio::inherit()) // `pass` and `vault` may ask for a passphrase.
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(|error| failed(format!("cannot be run: {error}")))?;
    let mut text = String::new();
    if let Some(stdout) = child.stdout.take() {
        let read = stdout.take(SECRET_BYTES_MAX).read_to_string(&mut text);
        read.map_err(|error| failed(format!("printed what cannot be read as text: {error}")))?;
    }
    let status = child.wait().map_err(|error| failed(format!("cannot be waited for: {error}")))?;
    if !status.success() {
        return Err(failed(format!("ended with {status}")));
    }
    Ok(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

fn decrypt(
    name: &VariableName,
    path: &Path,
    identity: &Path,
) -> Result<BTreeMap<String, String>, SecretError> {
    let unreadable =
        |source, path: &Path| SecretError::File { name: name.clone(), path: path.to_owned(), source };
    let refused = |why: String| SecretError::Decrypt {
        name: name.clone(),
        path: path.to_owned(),
        identity: identity.to_owned(),
        why,
    };
    let file = read_limited(path).map_err(|error| unreadable(error, path))?;
    let keys = read_limited(identity).map_err(|error| unreadable(error, identity))?;
    let keys = String::from_utf8(keys).map_err(|_| refused("the identity file is not text".to_owned()))?;
    let content = age::identities(&keys)
        .and_then(|keys| age::decrypt(&file, &keys))
        .map_err(|error| refused(error.to_string()))?;
    let text = String::from_utf8(content).map_err(|_| refused("its content is not text".to_owned()))?;
    Ok(text
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.trim().to_owned(), value.to_owned()))
        .collect())
}

fn read_limited(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    std::fs::File::open(path)?.take(SECRET_BYTES_MAX + 1).read_to_end(&mut content)?;
    if content.len() as u64 > SECRET_BYTES_MAX {
        return Err(std::io::Error::other("it is larger than 1 MiB, which no file of secrets or keys is"));
    }
    Ok(content)
}

fn expand_home(path: &str, project: &Path) -> PathBuf {
    match (path.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) => Path::new(&home).join(rest),
        _ => project.join(path),
    }
}
