//! Whether outside services let this host in: each is asked in its own protocol, with the credentials that the processes have, and
//! nothing is changed there. Passwords are sent to the service that they are for, and nowhere else; nothing here shows one.
//!
//! No encryption is spoken: an address that asks for it does not parse.

mod amqp;
mod postgresql;
mod redis;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::thread;
use std::time::{Duration, Instant};

use greenlight_link::message::SecretValue;
use greenlight_model::check::Check;
use greenlight_model::id::VariableName;
use greenlight_model::quantity::human_duration;
use greenlight_model::requirements::{Protocol, Reach, ServiceUrl};

use super::{Found, conclude, wrong};
use crate::failure::{Outcome, host, with_sources};

/// How long one service may take for all of it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(8);
/// The most that is read from a service: greetings and refusals are far shorter.
const ANSWER_BYTES_MAX: u64 = 256 * 1024;

/// Asks each, all at once.
pub(super) fn check(
    reach: &BTreeMap<String, Reach>,
    secrets: &BTreeMap<VariableName, SecretValue>,
) -> Vec<Check> {
    thread::scope(|scope| {
        let asked: Vec<_> =
            reach.iter().map(|(name, reach)| (name, scope.spawn(move || ask(reach, secrets)))).collect();
        let answered = asked.into_iter().map(|(name, asked)| {
            let found = asked
                .join()
                .unwrap_or_else(|_| Err(host("asking it ended with an error of the agent itself")));
            conclude(format!("reach {name}"), found)
        });
        answered.collect()
    })
}

fn ask(reach: &Reach, secrets: &BTreeMap<VariableName, SecretValue>) -> Outcome<Found> {
    let value = |name: &VariableName| {
        let value = secrets.get(name).map(SecretValue::reveal);
        value.ok_or_else(|| host(format!("the secret {name} has no value")))
    };
    let url = match reach {
        Reach::Secret { secret } => ServiceUrl::parse(value(secret)?)
            .map_err(|why| host(format!("the secret {secret} is no address of a service: {why}")))?,
        Reach::Url { url, password } => {
            let url = ServiceUrl::parse(url).map_err(host)?;
            let password = password.as_ref().map(value).transpose()?.map(str::to_owned);
            ServiceUrl { password, ..url }
        }
    };
    let says = match url.protocol {
        Protocol::Tcp => "accepts a connection",
        Protocol::Http => "answers GET with success",
        Protocol::Postgresql | Protocol::Redis | Protocol::Amqp => "lets this host log in",
    };
    let asked = match url.protocol {
        Protocol::Tcp => Connection::open(&url).map(|_| "it does".to_owned()),
        Protocol::Http => get(&url),
        Protocol::Postgresql => Connection::open(&url).and_then(|on| postgresql::log_in(on, &url)),
        Protocol::Redis => Connection::open(&url).and_then(|on| redis::log_in(on, &url)),
        Protocol::Amqp => Connection::open(&url).and_then(|on| amqp::log_in(on, &url)),
    };
    let result = asked.map_err(|why| {
        wrong(
            why,
            "see to the service, to the network between, or to the credentials that the fleet file names",
        )
    });
    Ok(Found::new(format!("{} {says}", url.shown()), result))
}

/// A connection that ends at its deadline, whoever dawdles.
struct Connection {
    stream: TcpStream,
    deadline: Instant,
    left_bytes: u64,
}

impl Connection {
    fn open(url: &ServiceUrl) -> Result<Self, String> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let addresses = (url.host.as_str(), url.port)
            .to_socket_addrs()
            .map_err(|error| format!("the name {} cannot be resolved here: {error}", url.host))?;
        let mut last = format!("the name {} stands for no address", url.host);
        for address in addresses {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            match TcpStream::connect_timeout(&address, left) {
                Ok(stream) => {
                    return Ok(Self { stream, deadline, left_bytes: ANSWER_BYTES_MAX });
                }
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    last = format!("{address} did not answer within {}", human_duration(ANSWER_TIMEOUT));
                }
                Err(error) => last = format!("no connection to {address}: {error}"),
            }
        }
        Err(last)
    }

    fn limit(&self) -> Result<(), String> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(late());
        }
        let limited =
            self.stream.set_read_timeout(Some(left)).and_then(|()| self.stream.set_write_timeout(Some(left)));
        limited.map_err(|error| format!("its time cannot be limited: {error}"))
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.limit()?;
        self.stream.write_all(bytes).map_err(|error| broken(&error))
    }

    /// Exactly so many bytes.
    fn read(&mut self, count: usize) -> Result<Vec<u8>, String> {
        let count_bytes = u64::try_from(count).unwrap_or(u64::MAX);
        self.left_bytes = self
            .left_bytes
            .checked_sub(count_bytes)
            .ok_or_else(|| format!("it answered more than {ANSWER_BYTES_MAX} bytes"))?;
        let mut bytes = vec![0; count];
        let mut filled = 0;
        while filled < count {
            self.limit()?;
            match self.stream.read(&mut bytes[filled..]) {
                Ok(0) => return Err("it closed the connection".to_owned()),
                Ok(more) => filled += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(broken(&error)),
            }
        }
        Ok(bytes)
    }

    fn read_u16(&mut self) -> Result<u16, String> {
        Ok(self.read(2)?.iter().fold(0, |number, byte| number << 8 | u16::from(*byte)))
    }

    fn read_u32(&mut self) -> Result<u32, String> {
        Ok(self.read(4)?.iter().fold(0, |number, byte| number << 8 | u32::from(*byte)))
    }
}

fn late() -> String {
    format!("it did not answer within {}", human_duration(ANSWER_TIMEOUT))
}

fn broken(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => late(),
        _ => format!("the connection broke off: {error}"),
    }
}

fn get(url: &ServiceUrl) -> Result<String, String> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(ANSWER_TIMEOUT))
        .http_status_as_error(false)
        .max_redirects(0)
        .proxy(None)
        .build()
        .into();
    let host = if url.host.contains(':') { format!("[{}]", url.host) } else { url.host.clone() };
    let mut request =
        agent.get(format!("http://{host}:{}/{}", url.port, url.path.as_deref().unwrap_or_default()));
    if let Some(user) = &url.user {
        use base64ct::Encoding as _;
        let login = format!("{user}:{}", url.password.as_deref().unwrap_or_default());
        let login = base64ct::Base64::encode_string(login.as_bytes());
        request = request.header("authorization", format!("Basic {login}"));
    }
    let mut response = request.call().map_err(|error| with_sources(&error))?;
    let status = response.status();
    // A server that writes to a closed connection complains in its log; what comes is of no interest.
    let read = io::copy(&mut response.body_mut().as_reader().take(ANSWER_BYTES_MAX), &mut io::sink());
    read.map_err(|error| broken(&error))?;
    if status.is_success() || status.is_redirection() {
        Ok(format!("it answers {}", status.as_u16()))
    } else {
        Err(format!("it answers {}", status.as_u16()))
    }
}

/// Text of a service, for people: one line of no great length, whatever it sent.
fn said(bytes: &[u8]) -> String {
    const SAID_CHARS_MAX: usize = 300;
    let text = String::from_utf8_lossy(bytes);
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(SAID_CHARS_MAX)
        .collect::<String>()
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests;
