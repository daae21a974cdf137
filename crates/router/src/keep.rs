//! The file in which a router keeps its state over a restart: what it was told, and the alert that holds its canary.
//!
//! A lease is not kept: after a restart the canary has no share until somebody sets it again.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::canary::Alert;
use crate::protocol::MAX_LINE_BYTES;
use crate::state::RouterState;

/// The form of the file. Another one is refused rather than guessed at.
const VERSION: u32 = 1;

/// What is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Kept {
    version: u32,
    pub(crate) state: RouterState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) alert: Option<Alert>,
}

impl Kept {
    pub(crate) fn new(state: &RouterState, alert: Option<&Alert>) -> Self {
        Self { version: VERSION, state: state.clone(), alert: alert.cloned() }
    }

    /// Reads the file; `None` when there is none.
    pub(crate) fn read(path: &Path) -> io::Result<Option<Self>> {
        let text = match std::fs::metadata(path) {
            Ok(file) if file.len() > MAX_LINE_BYTES as u64 => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "it is too large to be a router's state",
                ));
            }
            Ok(_) => std::fs::read(path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let kept: Self = serde_json::from_slice(&text)?;
        if kept.version != VERSION {
            let message = format!("it is of version {}, and this router writes {VERSION}", kept.version);
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        kept.state.validate().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Some(kept))
    }

    /// Replaces the file: it is whole at every moment, and there after a loss of power.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        name.push(format!(".{}", std::process::id()));
        let temporary = path.with_file_name(name);
        let mut file =
            File::options().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_is_read_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kept");
        assert_eq!(Kept::read(&path).unwrap(), None);
        let mut state = RouterState::new(4, Vec::new());
        state.routes = vec!["/a".to_owned()];
        let alert = Alert {
            reason: "errors".to_owned(),
            by: "verdict".to_owned(),
            at: jiff::Timestamp::UNIX_EPOCH,
            release: Some("v2".to_owned()),
        };
        let kept = Kept::new(&state, Some(&alert));
        kept.write(&path).unwrap();
        kept.write(&path).unwrap();
        assert_eq!(Kept::read(&path).unwrap(), Some(kept));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing else is left");
        for bad in ["", "{}", r#"{"version":2,"state":{"generation":1,"backends":[]}}"#] {
            std::fs::write(&path, bad).unwrap();
            assert!(Kept::read(&path).is_err(), "{bad}");
        }
        // What the first version wrote.
        let old =
            r#"{"version":1,"state":{"generation":3,"backends":[{"name":"a","address":"10.99.0.1:80"}]}}"#;
        std::fs::write(&path, old).unwrap();
        assert_eq!(Kept::read(&path).unwrap().unwrap().state.generation, 3);
    }
}
