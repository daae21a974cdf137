//! The control socket: who may speak, and how lines become commands.
//!
//! The socket is a file of mode 0600, and a peer of another user than the router's own or root is not listened to.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener as BoundListener, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use crate::authority::Command;
use crate::protocol::{ControlAnswer, ControlError, ControlRequest, MAX_LINE_BYTES};

/// Control connections served at once; more wait. Controllers are few.
const MAX_CONTROL_CONNECTIONS: usize = 32;
/// A control connection that says nothing for this long is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause after a failed accept, as nothing signals that a descriptor is free again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The bound socket. The file is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    listener: Option<BoundListener>,
    path: PathBuf,
}

impl ControlSocket {
    /// Binds it. A file that a dead router left is replaced; a live one is [`io::ErrorKind::AddrInUse`].
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        match StdUnixStream::connect(path) {
            Ok(_) => return Err(io::ErrorKind::AddrInUse.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error),
        }
        // Bound under another name, so that it never has the final one with wider permissions.
        let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        name.push(format!(".{}", std::process::id()));
        let temporary = path.with_file_name(name);
        remove_if_there(&temporary)?;
        let listener = BoundListener::bind(&temporary)?;
        std::fs::set_permissions(&temporary, Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        std::fs::rename(&temporary, path)?;
        Ok(Self { listener: Some(listener), path: path.to_owned() })
    }

    /// Serves connections until dropped.
    pub(crate) fn serve(
        &mut self,
        commands: mpsc::Sender<Command>,
    ) -> io::Result<impl Future<Output = ()> + use<>> {
        let listener = self.listener.take().ok_or(io::ErrorKind::NotConnected)?;
        let listener = UnixListener::from_std(listener)?;
        Ok(accept(listener, commands))
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // Called while the socket still answers, when no successor can have replaced the file. If somebody removed it
        // already, that is what was wanted.
        drop(std::fs::remove_file(&self.path));
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

async fn accept(listener: UnixListener, commands: mpsc::Sender<Command>) {
    let room = Arc::new(Semaphore::new(MAX_CONTROL_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let commands = commands.clone();
                tokio::task::spawn_local(async move {
                    // A peer that goes away or is silent is no event.
                    drop(converse(stream, &commands).await);
                    drop(place);
                });
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn converse(stream: UnixStream, commands: &mpsc::Sender<Command>) -> io::Result<()> {
    let peer = stream.peer_cred()?.uid();
    if peer != 0 && peer != rustix::process::geteuid().as_raw() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let (reading, mut writing) = stream.into_split();
    let mut reader = BufReader::new(reading);
    loop {
        let mut line = Vec::new();
        let mut limited = (&mut reader).take(MAX_LINE_BYTES as u64);
        timeout(IDLE_TIMEOUT, limited.read_until(b'\n', &mut line)).await??;
        if line.is_empty() {
            return Ok(());
        }
        let whole = line.ends_with(b"\n");
        let answer = if whole {
            answer(&line, commands).await
        } else {
            let message = format!("a line of up to {MAX_LINE_BYTES} bytes was expected");
            ControlAnswer::Error(ControlError::malformed(message))
        };
        let mut text = serde_json::to_vec(&answer)?;
        if text.len() >= MAX_LINE_BYTES {
            text = serde_json::to_vec(&ControlAnswer::Error(ControlError::too_much()))?;
        }
        text.push(b'\n');
        timeout(IDLE_TIMEOUT, writing.write_all(&text)).await??;
        if !whole {
            return Ok(());
        }
    }
}

async fn answer(line: &[u8], commands: &mpsc::Sender<Command>) -> ControlAnswer {
    match serde_json::from_slice::<ControlRequest>(line) {
        Ok(request) => Command::ask(commands, request).await,
        Err(error) => ControlAnswer::Error(ControlError::malformed(format!("not a command: {error}"))),
    }
}
