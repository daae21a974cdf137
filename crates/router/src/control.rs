//! The control socket: who may speak, and how lines become commands.
//!
//! The socket is a file of mode 0600, and a peer of another user than the router's own or root is not listened to.

use std::fs::Permissions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener as BoundListener, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use crate::authority::Command;
use crate::handover::send_sockets;
use crate::protocol::{ControlAnswer, ControlError, ControlRequest, MAX_LINE_BYTES};

/// Control connections served at once; more wait. Controllers are few.
const MAX_CONTROL_CONNECTIONS: usize = 32;
/// A control connection that says nothing for this long is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause after a failed accept, as nothing signals that a descriptor is free again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The socket's file. It is removed when this is dropped, if it is this router's.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    path: PathBuf,
    /// Where it is now. None when another router has taken over from this one: what is there then is that one's.
    ours: Mutex<Option<PathBuf>>,
}

/// The socket itself.
#[derive(Debug)]
pub(crate) struct BoundControl(BoundListener);

impl ControlSocket {
    /// Binds it. A file that a dead router left is replaced; a live one is [`io::ErrorKind::AddrInUse`].
    pub(crate) fn bind(path: &Path) -> io::Result<(Self, BoundControl)> {
        match StdUnixStream::connect(path) {
            Ok(_) => return Err(io::ErrorKind::AddrInUse.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error),
        }
        let (socket, bound) = Self::stand_by(path)?;
        socket.publish()?;
        Ok((socket, bound))
    }

    /// Binds it under another name, so that it never has the final one with wider permissions, and so that the router that is to
    /// be replaced keeps its own until then.
    pub(crate) fn stand_by(path: &Path) -> io::Result<(Self, BoundControl)> {
        let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        name.push(format!(".{}", std::process::id()));
        let temporary = path.with_file_name(name);
        remove_if_there(&temporary)?;
        let listener = BoundListener::bind(&temporary)?;
        let socket = Self { path: path.to_owned(), ours: Mutex::new(Some(temporary.clone())) };
        std::fs::set_permissions(&temporary, Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok((socket, BoundControl(listener)))
    }

    /// Takes the place of what was there.
    pub(crate) fn publish(&self) -> io::Result<()> {
        let mut ours = self.ours.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(temporary) = &*ours {
            std::fs::rename(temporary, &self.path)?;
            *ours = Some(self.path.clone());
        }
        Ok(())
    }

    /// Leaves the file to another router.
    pub(crate) fn give_away(&self) {
        self.ours.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

impl BoundControl {
    /// Serves connections until dropped.
    pub(crate) fn serve(
        self,
        commands: mpsc::Sender<Command>,
    ) -> io::Result<impl Future<Output = ()> + use<>> {
        let listener = UnixListener::from_std(self.0)?;
        Ok(accept(listener, commands))
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // Called while the socket still answers, when no successor can have replaced the file. If somebody removed it
        // already, that is what was wanted.
        if let Some(path) = self.ours.lock().unwrap_or_else(PoisonError::into_inner).take() {
            drop(std::fs::remove_file(path));
        }
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
        let mut written = None;
        let answer = if whole {
            match answer(&line, commands).await {
                Answered::Answer(answer) => answer,
                Answered::Takeover(answer, told) => {
                    written = Some(told);
                    answer
                }
                Answered::Handover(handover, sockets) => {
                    writing = hand_over(writing, &handover, &sockets).await?;
                    continue;
                }
            }
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
        if let Some(written) = written {
            // After a refusal nobody waits for it.
            let _ = written.send(());
        }
        if !whole {
            return Ok(());
        }
    }
}

/// What a line is answered with.
enum Answered {
    Answer(ControlAnswer),
    /// With the listening sockets.
    Handover(ControlAnswer, Vec<OwnedFd>),
    /// And who waits for it to be written.
    Takeover(ControlAnswer, oneshot::Sender<()>),
}

async fn answer(line: &[u8], commands: &mpsc::Sender<Command>) -> Answered {
    let answer = match serde_json::from_slice::<ControlRequest>(line) {
        Ok(ControlRequest::Handover(_)) => match Command::hand_over(commands).await {
            Ok((handover, sockets)) => {
                return Answered::Handover(ControlAnswer::Handover(Box::new(handover)), sockets);
            }
            Err(error) => ControlAnswer::Error(error),
        },
        Ok(ControlRequest::Takeover(taking)) => {
            let (written, told) = oneshot::channel();
            let (reply, replied) = oneshot::channel();
            let sent = commands.send(Command::TakeOver { token: taking.token, reply, told }).await;
            let answer = if sent.is_ok() { replied.await.ok() } else { None };
            let ending = || ControlAnswer::Error(ControlError::unavailable("the router is shutting down"));
            return Answered::Takeover(answer.unwrap_or_else(ending), written);
        }
        Ok(request) => Command::ask(commands, request).await,
        Err(error) => ControlAnswer::Error(ControlError::malformed(format!("not a command: {error}"))),
    };
    Answered::Answer(answer)
}

/// Answers with the sockets, which travel with the first byte.
async fn hand_over(
    mut writing: OwnedWriteHalf,
    handover: &ControlAnswer,
    sockets: &[OwnedFd],
) -> io::Result<OwnedWriteHalf> {
    let mut text = serde_json::to_vec(handover)?;
    text.push(b'\n');
    let stream: &UnixStream = writing.as_ref();
    let sending = stream.async_io(Interest::WRITABLE, || send_sockets(stream.as_fd(), text[0], sockets));
    timeout(IDLE_TIMEOUT, sending).await??;
    timeout(IDLE_TIMEOUT, writing.write_all(&text[1..])).await??;
    Ok(writing)
}
