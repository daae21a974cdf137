//! The client of the control socket, for the drivers and the command line.

use std::io;
use std::path::PathBuf;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::protocol::{
    ControlAnswer, ControlError, ControlRequest, EXCHANGE_TIMEOUT, MAX_LINE_BYTES, Nothing,
};
use crate::state::{BackendChange, RouterSnapshot, RouterState};

/// Speaks to one router. Every call opens a connection of its own, so a router that was restarted is no special case.
#[derive(Debug, Clone)]
pub struct RouterClient {
    path: PathBuf,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum RouterClientError {
    /// Nobody listens, or the socket belongs to another user.
    #[error("cannot reach the router at {path}: {source}; is it running, and by this user?")]
    Connect {
        /// The control socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The connection broke. A change may or may not have been made: read the state.
    #[error("the connection to the router at {path} broke: {source}; read its state before going on")]
    Broken {
        /// The control socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No answer in time. A change may or may not have been made: read the state.
    #[error("the router at {path} did not answer within {} s; read its state before going on", EXCHANGE_TIMEOUT.as_secs())]
    TimedOut {
        /// The control socket.
        path: PathBuf,
    },
    /// The answer is not of this protocol.
    #[error("the answer of the router at {path} is not understood: {source}; is it of another version?")]
    NotUnderstood {
        /// The control socket.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The router refused. Nothing was changed.
    #[error("the router refused: {0}")]
    Refused(#[from] ControlError),
}

impl RouterClient {
    /// A client for the router behind the control socket at `path`. Nothing is opened yet.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Reads the router back.
    ///
    /// # Errors
    /// When the router cannot be reached or does not answer.
    pub async fn get(&self) -> Result<RouterSnapshot, RouterClientError> {
        self.call(&ControlRequest::Get(Nothing {})).await
    }

    /// Sets the whole state. When this returns, every core follows it.
    ///
    /// # Errors
    /// When the router cannot be reached, or refuses: [`RouterClientError::Refused`].
    pub async fn set(&self, state: RouterState) -> Result<RouterSnapshot, RouterClientError> {
        self.call(&ControlRequest::Set(state)).await
    }

    /// Changes one backend. When this returns, every core follows it.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub async fn change(&self, change: BackendChange) -> Result<RouterSnapshot, RouterClientError> {
        self.call(&ControlRequest::Backend(change)).await
    }

    async fn call(&self, request: &ControlRequest) -> Result<RouterSnapshot, RouterClientError> {
        timeout(EXCHANGE_TIMEOUT, self.exchange(request))
            .await
            .unwrap_or_else(|_| Err(RouterClientError::TimedOut { path: self.path.clone() }))
    }

    async fn exchange(&self, request: &ControlRequest) -> Result<RouterSnapshot, RouterClientError> {
        let path = || self.path.clone();
        let broken = |source| RouterClientError::Broken { path: path(), source };
        let mut line = serde_json::to_vec(request)
            .map_err(|source| RouterClientError::NotUnderstood { path: path(), source })?;
        line.push(b'\n');
        let mut stream = UnixStream::connect(&self.path)
            .await
            .map_err(|source| RouterClientError::Connect { path: path(), source })?;
        stream.write_all(&line).await.map_err(broken)?;
        let mut answer = Vec::new();
        let mut reader = BufReader::new(stream).take(MAX_LINE_BYTES as u64);
        reader.read_until(b'\n', &mut answer).await.map_err(broken)?;
        if !answer.ends_with(b"\n") {
            return Err(broken(io::ErrorKind::UnexpectedEof.into()));
        }
        let answer = serde_json::from_slice(&answer)
            .map_err(|source| RouterClientError::NotUnderstood { path: path(), source })?;
        match answer {
            ControlAnswer::Ok(snapshot) => Ok(snapshot),
            ControlAnswer::Error(error) => Err(error.into()),
        }
    }
}
