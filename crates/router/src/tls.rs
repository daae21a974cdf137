//! TLS towards clients: which certificate is shown, and when it is read anew.
//!
//! A [`Certificate`] is a pair of files. Whoever renews it writes the files; [`Certificate::look`] sees that they are others and
//! reads them, and connections that begin from then on are shown the new one. A pair that cannot be read, or whose halves do
//! not belong together, is not used: the one before it stays, and the read-back says why. Renewing both files one after the
//! other is therefore safe in either order.
//!
//! It does not look at the dates in a certificate, and does not ask clients for one.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// Longest file of a certificate or a key, in bytes: a chain of many certificates is a tenth of it.
pub const MAX_PEM_BYTES: u64 = 256 * 1024;
/// The protocols that are offered, the better one first.
const HTTP_2: &[u8] = b"h2";
const HTTP_1: &[u8] = b"http/1.1";
/// Permission bits of users who are neither the owner nor of the file's group.
const OTHERS: u32 = 0o007;

/// The files of a certificate. Both are PEM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The certificate, and behind it those that lead to its root.
    pub certificate: PathBuf,
    /// Its private key. Others than its owner and group must not be able to read it.
    pub key: PathBuf,
}

/// What clients are shown, as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsStatus {
    /// Where it was read.
    pub files: TlsFiles,
    /// When.
    pub read_at: jiff::Timestamp,
    /// Why what is there now is not used, as a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Why a pair of files is not used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is longer than [`MAX_PEM_BYTES`].
    #[error("{path} is longer than {MAX_PEM_BYTES} bytes, which no certificate and no key is")]
    TooLong {
        /// Which.
        path: PathBuf,
    },
    /// Everyone on the machine can read or change the key.
    #[error(
        "the key {path} is open to every user of this machine (mode {mode:o}); make it private: chmod o= {path}"
    )]
    OpenKey {
        /// The key.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file does not hold what it should.
    #[error("{path} holds no {what} in PEM: {source}")]
    NotPem {
        /// Which.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// What is wrong.
        source: rustls::pki_types::pem::Error,
    },
    /// The two do not belong together, or are of a kind that cannot be used.
    #[error("the certificate {} cannot be used with the key {}: {source}", files.certificate.display(), files.key.display())]
    Refused {
        /// The files.
        files: TlsFiles,
        /// What is wrong.
        source: rustls::Error,
    },
}

/// A certificate with its key, ready to be shown.
#[derive(Debug)]
pub(crate) struct Certificate {
    files: TlsFiles,
    seen: Seen,
    config: Arc<ServerConfig>,
    read_at: jiff::Timestamp,
    problem: Option<String>,
}

impl Certificate {
    pub(crate) fn read(files: TlsFiles) -> Result<Self, TlsError> {
        // Looked at before they are read: a change in between is seen at the next look.
        let seen = Seen::of(&files);
        let config = config_of(&files)?;
        Ok(Self { files, seen, config, read_at: jiff::Timestamp::now(), problem: None })
    }

    pub(crate) fn files(&self) -> &TlsFiles {
        &self.files
    }

    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }

    pub(crate) fn status(&self) -> TlsStatus {
        TlsStatus { files: self.files.clone(), read_at: self.read_at, problem: self.problem.clone() }
    }

    /// Reads the files anew when they are others than at the last look. Whether there is something new to show.
    pub(crate) fn look(&mut self) -> bool {
        let seen = Seen::of(&self.files);
        if seen == self.seen {
            return false;
        }
        self.seen = seen;
        match config_of(&self.files) {
            Ok(config) => {
                (self.config, self.problem) = (config, None);
                self.read_at = jiff::Timestamp::now();
                true
            }
            Err(error) => {
                self.problem = Some(error.to_string());
                false
            }
        }
    }
}

/// What tells one version of the files from another.
#[derive(Debug, PartialEq, Eq)]
struct Seen([Option<FileVersion>; 2]);

/// Device and inode, length, times of content and of anything, in nanoseconds, and permission bits.
type FileVersion = (u64, u64, u64, (i64, i64), (i64, i64), u32);

impl Seen {
    fn of(files: &TlsFiles) -> Self {
        let version = |path: &Path| {
            let found = std::fs::metadata(path).ok()?;
            let (changed, touched) =
                ((found.mtime(), found.mtime_nsec()), (found.ctime(), found.ctime_nsec()));
            Some((found.dev(), found.ino(), found.len(), changed, touched, found.mode()))
        };
        Self([version(&files.certificate), version(&files.key)])
    }
}

fn config_of(files: &TlsFiles) -> Result<Arc<ServerConfig>, TlsError> {
    let not_pem = |path: &Path, what| {
        let path = path.to_owned();
        move |source| TlsError::NotPem { path, what, source }
    };
    let text = contents(&files.certificate, false)?;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(not_pem(&files.certificate, "certificate"))?;
    let key = PrivateKeyDer::from_pem_slice(&contents(&files.key, true)?)
        .map_err(not_pem(&files.key, "private key"))?;
    let refused = |source| TlsError::Refused { files: files.clone(), source };
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(refused)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(refused)?;
    config.alpn_protocols = vec![HTTP_2.to_vec(), HTTP_1.to_vec()];
    Ok(Arc::new(config))
}

/// A whole file; of a key, unless everyone could read it.
fn contents(path: &Path, is_key: bool) -> Result<Vec<u8>, TlsError> {
    let unreadable = |source| TlsError::Unreadable { path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    let mode = file.metadata().map_err(unreadable)?.mode() & 0o777;
    if is_key && mode & OTHERS != 0 {
        return Err(TlsError::OpenKey { path: path.to_owned(), mode });
    }
    let mut text = Vec::new();
    file.take(MAX_PEM_BYTES + 1).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_PEM_BYTES {
        return Err(TlsError::TooLong { path: path.to_owned() });
    }
    Ok(text)
}

/// A client's connection, in the clear or not.
#[derive(Debug)]
pub(crate) enum Transport {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Transport {
    /// Agrees with the client on keys and protocol.
    pub(crate) async fn agreed(stream: TcpStream, config: Arc<ServerConfig>) -> io::Result<Self> {
        Ok(Self::Tls(Box::new(TlsAcceptor::from(config).accept(stream).await?)))
    }

    pub(crate) fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// Whether both sides agreed to speak HTTP/2.
    pub(crate) fn is_http_2(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(stream) => stream.get_ref().1.alpn_protocol() == Some(HTTP_2),
        }
    }
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
