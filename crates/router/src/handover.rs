//! Taking over from the router before: its listening sockets, its state, its lease. No connection is refused in between.
//!
//! 1. The new router asks over the control socket. The old one answers with its state and copies of its listening sockets, and
//!    goes on as before.
//! 2. The new one makes everything ready that could fail, without letting a client in, and says that it takes over.
//! 3. The old one agrees if nothing was changed since it was asked, stops accepting and lets its requests end; its idle
//!    connections are ended behind their next answer. From its word on, the new one accepts what waits in the same sockets, and
//!    the control socket's file becomes its own.
//!
//! Whatever ends the new one before step 3, the old one goes on. Counts begin anew: readers see another `instance`.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::{Deserialize, Serialize};

use crate::canary::Alert;
use crate::keep::Kept;
use crate::protocol::{
    ControlAnswer, ControlError, ControlRequest, EXCHANGE_TIMEOUT, MAX_LINE_BYTES, Nothing,
};
use crate::state::RouterState;

/// Sockets that one message can carry; the system's limit is 253.
pub(crate) const MAX_SOCKETS: usize = 250;

/// What a router that is replaced tells its successor, beside its sockets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Handover {
    /// To be said when taking over.
    pub(crate) token: u64,
    pub(crate) state: RouterState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) alert: Option<Alert>,
    /// Of the canary, in thousandths.
    pub(crate) share_in_force_per_mille: u32,
    pub(crate) lease_left_ms: u64,
    /// The last of the sockets is that of the metrics.
    pub(crate) has_metrics: bool,
}

/// Step 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TakingOver {
    pub(crate) token: u64,
}

/// Why a running router could not be taken over. It goes on as before.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The connection to it.
    #[error("the connection to it broke: {0}")]
    Broken(#[from] io::Error),
    /// It said something that this version does not understand.
    #[error("its answer is not understood: {0}; is it of another version? stop it, and start this one")]
    NotUnderstood(#[from] serde_json::Error),
    /// It refused.
    #[error("{0}")]
    Refused(ControlError),
    /// It listens elsewhere.
    #[error("it listens on {present}, and {wanted} was asked for; stop it, and start this one")]
    OtherAddress {
        /// Where it listens.
        present: SocketAddr,
        /// What was asked for.
        wanted: SocketAddr,
    },
    /// It sent no sockets.
    #[error("it sent no listening sockets")]
    NoSockets,
}

/// The router that is to be replaced, as its successor sees it.
#[derive(Debug)]
pub(crate) struct Predecessor {
    stream: UnixStream,
    handover: Handover,
}

/// What it handed over.
#[derive(Debug)]
pub(crate) struct Inherited {
    pub(crate) predecessor: Predecessor,
    /// One for each worker.
    pub(crate) listeners: Vec<TcpListener>,
    pub(crate) metrics: Option<TcpListener>,
}

impl Inherited {
    /// Asks the router behind `control`; `None` when none is there.
    pub(crate) fn ask(control: &Path, listen: SocketAddr) -> Result<Option<Self>, HandoverError> {
        let mut stream = match UnixStream::connect(control) {
            Ok(stream) => stream,
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        stream.set_read_timeout(Some(EXCHANGE_TIMEOUT))?;
        stream.set_write_timeout(Some(EXCHANGE_TIMEOUT))?;
        say(&mut stream, &ControlRequest::Handover(Nothing {}))?;
        let (first, sockets) = receive_sockets(&stream)?;
        let handover = match hear(&mut stream, first)? {
            ControlAnswer::Handover(handover) => *handover,
            ControlAnswer::Error(error) => return Err(HandoverError::Refused(error)),
            _ => return Err(HandoverError::NoSockets),
        };
        let mut listeners: Vec<TcpListener> = sockets.into_iter().map(TcpListener::from).collect();
        let metrics = if handover.has_metrics { listeners.pop() } else { None };
        let Some(one) = listeners.first() else { return Err(HandoverError::NoSockets) };
        let present = one.local_addr()?;
        if present != listen && !(listen.port() == 0 && present.ip() == listen.ip()) {
            return Err(HandoverError::OtherAddress { present, wanted: listen });
        }
        Ok(Some(Self { predecessor: Predecessor { stream, handover }, listeners, metrics }))
    }
}

impl Predecessor {
    /// What it was told.
    pub(crate) fn kept(&self) -> Kept {
        Kept::new(&self.handover.state, self.handover.alert.as_ref())
    }

    pub(crate) fn state(&self) -> &RouterState {
        &self.handover.state
    }

    /// The canary's share, and for how long it is still lent, in milliseconds.
    pub(crate) fn lease(&self) -> (u32, u64) {
        (self.handover.share_in_force_per_mille, self.handover.lease_left_ms)
    }

    /// Step 2. When this returns, the old one accepts no more.
    pub(crate) fn take_over(mut self) -> Result<(), HandoverError> {
        say(&mut self.stream, &ControlRequest::Takeover(TakingOver { token: self.handover.token }))?;
        match hear(&mut self.stream, Vec::new())? {
            ControlAnswer::Ok(_) => Ok(()),
            ControlAnswer::Error(error) => Err(HandoverError::Refused(error)),
            _ => Err(HandoverError::NoSockets),
        }
    }
}

fn say(stream: &mut UnixStream, request: &ControlRequest) -> Result<(), HandoverError> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    Ok(stream.write_all(&line)?)
}

/// Reads a line whose beginning is `line`.
fn hear(stream: &mut UnixStream, mut line: Vec<u8>) -> Result<ControlAnswer, HandoverError> {
    let mut piece = [0; 4096];
    while !line.ends_with(b"\n") && line.len() < MAX_LINE_BYTES {
        match stream.read(&mut piece)? {
            0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            count => line.extend_from_slice(&piece[..count]),
        }
    }
    Ok(serde_json::from_slice(&line)?)
}

/// Sends the first byte of an answer with the sockets. `WouldBlock` when the stream takes nothing now.
pub(crate) fn send_sockets(stream: BorrowedFd<'_>, first: u8, sockets: &[OwnedFd]) -> io::Result<()> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
    if !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::other("too many sockets for one message"));
    }
    rustix::net::sendmsg(stream, &[IoSlice::new(&[first])], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// The first byte of an answer, and the sockets that came with it.
fn receive_sockets(stream: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut first = [0];
    let received = rustix::net::recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut first)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut sockets = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(came) = message {
            sockets.extend(came);
        }
    }
    Ok((first[..received.bytes].to_vec(), sockets))
}
