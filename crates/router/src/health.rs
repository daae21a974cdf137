//! Active checks of one backend.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use hyper::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::answer::{AnswerFault, take_head};
use crate::backend::Backend;
use crate::config::HealthSettings;
use crate::state::Health;

/// Why a check failed.
#[derive(Debug, thiserror::Error)]
enum CheckFailure {
    #[error("no connection: {0}")]
    Connect(#[source] std::io::Error),
    #[error("GET {path} broke off: {source}")]
    Broken { path: String, source: std::io::Error },
    #[error("GET {path}: the answer is not valid: {source}")]
    NotHttp { path: String, source: AnswerFault },
    #[error("GET {path} answered {status}")]
    Status { path: String, status: u16 },
    #[error("no answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
}

/// Checks `backend` until dropped. The first check decides at once; later ones by `rise` and `fall`.
pub(crate) async fn keep_checking(backend: Arc<Backend>, path: Option<String>, settings: HealthSettings) {
    let (mut passed, mut failed) = (0u32, 0u32);
    loop {
        let result = timeout(settings.timeout, check(&backend, path.as_deref()))
            .await
            .unwrap_or(Err(CheckFailure::TimedOut(settings.timeout)));
        let before = backend.health();
        match result {
            Ok(()) => {
                (passed, failed) = (passed.saturating_add(1), 0);
                if before == Health::Checking || (before == Health::Down && passed >= settings.rise) {
                    backend.set_health(Health::Up, None);
                }
            }
            Err(failure) => {
                (passed, failed) = (0, failed.saturating_add(1));
                if before != Health::Up || failed >= settings.fall {
                    backend.set_health(Health::Down, Some(failure.to_string()));
                }
            }
        }
        tokio::select! {
            () = sleep(settings.interval) => {}
            // Requests could not connect and took it down: what passed before counts no more.
            () = backend.check_now.notified() => passed = 0,
        }
    }
}

async fn check(backend: &Backend, path: Option<&str>) -> Result<(), CheckFailure> {
    let mut stream = TcpStream::connect(backend.address).await.map_err(CheckFailure::Connect)?;
    let Some(path) = path else { return Ok(()) };
    let broken = |source| CheckFailure::Broken { path: path.to_owned(), source };
    let head = format!(
        "GET {path} HTTP/1.1\r\nhost: {}\r\nuser-agent: greenlight-router\r\nconnection: close\r\n\r\n",
        backend.address
    );
    stream.write_all(head.as_bytes()).await.map_err(broken)?;
    let mut answer = BytesMut::with_capacity(4096);
    loop {
        if stream.read_buf(&mut answer).await.map_err(broken)? == 0 {
            return Err(broken(std::io::ErrorKind::UnexpectedEof.into()));
        }
        let head = take_head(&mut answer, &Method::GET)
            .map_err(|source| CheckFailure::NotHttp { path: path.to_owned(), source })?;
        match head.map(|head| head.status) {
            Some(status) if status.is_success() || status.is_redirection() => return Ok(()),
            Some(status) if !status.is_informational() => {
                return Err(CheckFailure::Status { path: path.to_owned(), status: status.as_u16() });
            }
            _ => {}
        }
    }
}
