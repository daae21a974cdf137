//! How a balancer's control interface is reached: something that takes a text and returns the answer.
//!
//! The controller has a second one besides [`TcpTransport`]: through the agent of the balancer's host.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use greenlight_link::message::{Lease, SOCKET_OUTPUT_BYTES_MAX};
use greenlight_model::quantity::human_duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// A future in a box, for a trait that is used as an object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A control interface that answers a text with a text and closes.
pub trait Transport: Send + Sync {
    /// Writes `input`, closes the writing side, and returns everything that is answered until the other side closes.
    fn exchange<'a>(&'a self, input: &'a str) -> BoxFuture<'a, Result<String, TransportError>>;

    /// Sees to it that what is lent goes back when the lease is not renewed, also when whoever lent it has died by then. False when
    /// there is nobody on the way who could.
    fn lease<'a>(&'a self, _what: &'a str, _lease: Lease) -> BoxFuture<'a, Result<bool, TransportError>> {
        Box::pin(async { Ok(false) })
    }
}

/// Why there was no answer, complete in itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct TransportError {
    message: String,
}

impl TransportError {
    /// Wraps the reason.
    #[must_use]
    pub fn new(message: String) -> Self {
        Self { message }
    }
}

/// A control interface over TCP.
#[derive(Debug, Clone)]
pub struct TcpTransport {
    address: String,
    timeout: Duration,
}

impl TcpTransport {
    /// The interface at `address:port`; `timeout` is for one whole exchange.
    #[must_use]
    pub fn new(address: String, timeout: Duration) -> Self {
        Self { address, timeout }
    }

    async fn ask(&self, input: &str) -> Result<String, TransportError> {
        let failed = |what: &str, error: std::io::Error| {
            TransportError::new(format!("{what} {} failed: {error}", self.address))
        };
        let mut stream =
            TcpStream::connect(&self.address).await.map_err(|error| failed("connecting to", error))?;
        stream.write_all(input.as_bytes()).await.map_err(|error| failed("writing to", error))?;
        stream.shutdown().await.map_err(|error| failed("writing to", error))?;
        let mut answer = Vec::new();
        let limit = SOCKET_OUTPUT_BYTES_MAX as u64 + 1;
        stream.take(limit).read_to_end(&mut answer).await.map_err(|error| failed("reading from", error))?;
        if answer.len() > SOCKET_OUTPUT_BYTES_MAX {
            let message = format!("{} answered more than {SOCKET_OUTPUT_BYTES_MAX} bytes", self.address);
            return Err(TransportError::new(message));
        }
        String::from_utf8(answer)
            .map_err(|_| TransportError::new(format!("the answer of {} is not UTF-8", self.address)))
    }
}

impl Transport for TcpTransport {
    fn exchange<'a>(&'a self, input: &'a str) -> BoxFuture<'a, Result<String, TransportError>> {
        Box::pin(async move {
            tokio::time::timeout(self.timeout, self.ask(input)).await.unwrap_or_else(|_| {
                let within = human_duration(self.timeout);
                Err(TransportError::new(format!("{} did not answer within {within}", self.address)))
            })
        })
    }
}
