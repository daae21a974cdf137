//! Certificates, and clients that speak TLS and HTTP/2 over real sockets.

use std::fs::Permissions;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use greenlight_router::TlsFiles;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::within;

/// A certificate that stands for itself.
pub struct Pair {
    pub certificate: CertificateDer<'static>,
    certificate_pem: String,
    key_pem: String,
}

impl Pair {
    pub fn new() -> Self {
        let made = rcgen::generate_simple_self_signed(["test".to_owned()]).unwrap();
        Self {
            certificate: made.cert.der().clone(),
            certificate_pem: made.cert.pem(),
            key_pem: made.signing_key.serialize_pem(),
        }
    }

    /// Writes both files, as whoever renews certificates does.
    pub fn write(&self, directory: &Path, name: &str) -> TlsFiles {
        let files = TlsFiles {
            certificate: directory.join(format!("{name}.pem")),
            key: directory.join(format!("{name}.key")),
        };
        self.write_certificate(&files.certificate);
        self.write_key(&files.key);
        files
    }

    pub fn write_certificate(&self, path: &Path) {
        replace(path, &self.certificate_pem, 0o644);
    }

    pub fn write_key(&self, path: &Path) {
        replace(path, &self.key_pem, 0o600);
    }
}

fn replace(path: &Path, text: &str, mode: u32) {
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, text).unwrap();
    std::fs::set_permissions(&temporary, Permissions::from_mode(mode)).unwrap();
    std::fs::rename(&temporary, path).unwrap();
}

/// Agrees with the router on TLS and `protocol`, and trusts `pair` only.
pub async fn try_connect(
    address: SocketAddr,
    pair: &Pair,
    protocol: &str,
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(pair.certificate.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("test").unwrap();
    let agreed = TlsConnector::from(Arc::new(config)).connect(name, stream);
    let stream = within("the handshake", agreed).await?;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(protocol.as_bytes()));
    Ok(stream)
}

/// An HTTP/2 connection.
pub struct Client2 {
    pub sender: SendRequest<Full<Bytes>>,
    /// How the connection ended.
    pub ended: JoinHandle<hyper::Result<()>>,
}

impl Client2 {
    pub async fn connect(address: SocketAddr, pair: &Pair) -> Self {
        let stream = try_connect(address, pair, "h2").await.unwrap();
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        Self { sender, ended: tokio::spawn(connection) }
    }

    /// The head of an answer; its body is left to be read.
    pub async fn send(&mut self, request: Request<Full<Bytes>>) -> hyper::Result<Response<Incoming>> {
        self.sender.ready().await?;
        within("an answer", self.sender.send_request(request)).await
    }

    pub async fn get(&mut self, path: &str) -> (u16, String) {
        let answer = self.send(request(path).body(Full::default()).unwrap()).await.unwrap();
        text_of(answer).await
    }
}

pub fn request(path: &str) -> hyper::http::request::Builder {
    Request::builder().uri(format!("https://test{path}"))
}

pub async fn text_of(answer: Response<Incoming>) -> (u16, String) {
    let status = answer.status().as_u16();
    let body = within("a body", answer.into_body().collect()).await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}
