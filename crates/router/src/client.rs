//! The client of the control socket, for the drivers and the command line.

use std::io;
use std::path::PathBuf;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::canary::{AlertRaised, CanaryChange, Conclusion, Enabling, Renewal};
use crate::counts::{CountsRequest, RouterCounts};
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
        self.call(&ControlRequest::Set(Box::new(state))).await
    }

    /// Changes one backend. When this returns, every core follows it.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub async fn change(&self, change: BackendChange) -> Result<RouterSnapshot, RouterClientError> {
        self.call(&ControlRequest::Backend(change)).await
    }

    /// Sets the canary, or changes its share; its lease begins anew.
    ///
    /// # Errors
    /// As [`Self::set`]; [`crate::ControlErrorKind::Held`] while an alert holds the canary.
    pub async fn canary(&self, change: CanaryChange) -> Result<RouterSnapshot, RouterClientError> {
        self.call(&ControlRequest::Canary(change)).await
    }

    /// Lends the canary's present share for longer.
    ///
    /// # Errors
    /// As [`Self::set`]; [`crate::ControlErrorKind::NotOnTrial`] when the lease has ended.
    pub async fn renew(&self, renewal: Renewal) -> Result<RouterSnapshot, RouterClientError> {
        self.call(&ControlRequest::Renew(renewal)).await
    }

    /// Ends the trial: all backends share the traffic by their weights.
    ///
    /// # Errors
    /// As [`Self::canary`].
    pub async fn conclude(&self, conclusion: Conclusion) -> Result<RouterSnapshot, RouterClientError> {
        self.call(&ControlRequest::Conclude(conclusion)).await
    }

    /// Sends all following requests to stable, until a person enables the canary again. When this returns, every core
    /// does.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub async fn alert(&self, alert: AlertRaised) -> Result<RouterSnapshot, RouterClientError> {
        self.call(&ControlRequest::Alert(alert)).await
    }

    /// Lets a canary be set again.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub async fn enable(&self, enabling: Enabling) -> Result<RouterSnapshot, RouterClientError> {
        self.call(&ControlRequest::Enable(enabling)).await
    }

    /// Reads what was counted.
    ///
    /// # Errors
    /// As [`Self::get`]; [`crate::ControlErrorKind::TooMuch`] when there are too many rows.
    pub async fn counts(&self, request: CountsRequest) -> Result<RouterCounts, RouterClientError> {
        match self.ask(&ControlRequest::Counts(request)).await? {
            ControlAnswer::Counts(counts) => Ok(counts),
            _ => Err(self.other_answer()),
        }
    }

    async fn call(&self, request: &ControlRequest) -> Result<RouterSnapshot, RouterClientError> {
        match self.ask(request).await? {
            ControlAnswer::Ok(snapshot) => Ok(*snapshot),
            _ => Err(self.other_answer()),
        }
    }

    fn other_answer(&self) -> RouterClientError {
        let source = serde::de::Error::custom("an answer to another request");
        RouterClientError::NotUnderstood { path: self.path.clone(), source }
    }

    async fn ask(&self, request: &ControlRequest) -> Result<ControlAnswer, RouterClientError> {
        let answer = timeout(EXCHANGE_TIMEOUT, self.exchange(request))
            .await
            .unwrap_or_else(|_| Err(RouterClientError::TimedOut { path: self.path.clone() }))?;
        match answer {
            ControlAnswer::Error(error) => Err(error.into()),
            answer => Ok(answer),
        }
    }

    async fn exchange(&self, request: &ControlRequest) -> Result<ControlAnswer, RouterClientError> {
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
        serde_json::from_slice(&answer)
            .map_err(|source| RouterClientError::NotUnderstood { path: path(), source })
    }
}
