//! Looking for a gate: its commands run here, its probes are made from here, and what came of it is evidence.
//!
//! Guarantees: every look ends within its limit, with all that it started; what it printed is kept in part, and never how a
//! command was called.

use std::path::Path;
use std::process::{ExitStatus, Stdio};

use bytes::Bytes;
use greenlight_model::evidence::Fact;
use greenlight_model::gate::{CommandGate, Gates, ProbeGate};
use greenlight_model::id::{CheckName, EnvironmentName};
use greenlight_model::quantity::human_duration;
use http_body_util::Empty;
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;

/// Of what a command prints, this much of the end is kept.
const OUTPUT_BYTES_MAX: usize = 16 << 10;
/// And of that so many lines.
const OUTPUT_LINES_MAX: usize = 10;

/// Looks at everything that these gates ask for, at once. Commands run in `directory`, with `GREENLIGHT_ENVIRONMENT` set.
pub async fn look(environment: &EnvironmentName, gates: &Gates, directory: &Path) -> Vec<Fact> {
    let mut looks = JoinSet::new();
    for (name, gate) in gates.commands.clone() {
        let (environment, directory) = (environment.clone(), directory.to_owned());
        looks.spawn(async move { command(name, &gate, &environment, &directory).await });
    }
    for (name, gate) in gates.probes.clone() {
        looks.spawn(async move { probe(name, &gate).await });
    }
    looks.join_all().await
}

async fn command(
    name: CheckName,
    gate: &CommandGate,
    environment: &EnvironmentName,
    directory: &Path,
) -> Fact {
    let program = gate.argv.first().map_or("", String::as_str);
    let started = Command::new(program)
        .args(gate.argv.iter().skip(1))
        .current_dir(directory)
        .env("GREENLIGHT_ENVIRONMENT", environment.as_str())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A group of its own, so that what it starts ends with it.
        .process_group(0)
        .kill_on_drop(true)
        .spawn();
    let mut child = match started {
        Ok(child) => child,
        Err(error) => {
            let output = vec![format!("`{program}` could not be started: {error}")];
            return Fact::Command { name, code: None, output };
        }
    };
    let group = child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?));
    match tokio::time::timeout(gate.timeout, run(&mut child)).await {
        Ok(Ok((status, output))) => Fact::Command { name, code: status.code(), output },
        Ok(Err(error)) => {
            let output = vec![format!("`{program}` could not be followed: {error}")];
            Fact::Command { name, code: None, output }
        }
        Err(_) => {
            if let Some(group) = group {
                // It may have ended by itself this moment.
                let _ = kill_process_group(group, Signal::KILL);
            }
            let _ = child.wait().await;
            let output = vec![format!("it took longer than {} and was ended", human_duration(gate.timeout))];
            Fact::Command { name, code: None, output }
        }
    }
}

async fn run(child: &mut Child) -> std::io::Result<(ExitStatus, Vec<String>)> {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (stdout, stderr, status) = tokio::join!(tail(stdout), tail(stderr), child.wait());
    let mut lines = stdout?;
    lines.extend(stderr?);
    let excess = lines.len().saturating_sub(OUTPUT_LINES_MAX);
    lines.drain(..excess);
    Ok((status?, lines))
}

/// The last lines of what is read, to its end.
async fn tail(reader: Option<impl AsyncRead + Unpin>) -> std::io::Result<Vec<String>> {
    let Some(mut reader) = reader else { return Ok(Vec::new()) };
    let mut kept = Vec::new();
    let mut buffer = vec![0; OUTPUT_BYTES_MAX];
    loop {
        let count = reader.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        kept.extend_from_slice(&buffer[..count]);
        let excess = kept.len().saturating_sub(OUTPUT_BYTES_MAX);
        kept.drain(..excess);
    }
    let text = String::from_utf8_lossy(&kept);
    let lines: Vec<String> =
        text.lines().map(|line| line.trim_end().to_owned()).filter(|line| !line.is_empty()).collect();
    let excess = lines.len().saturating_sub(OUTPUT_LINES_MAX);
    Ok(lines[excess..].to_vec())
}

async fn probe(name: CheckName, gate: &ProbeGate) -> Fact {
    let (is_up, found) = match tokio::time::timeout(gate.timeout, answer(&gate.address)).await {
        Ok(Ok(found)) => (true, found),
        Ok(Err(why)) => (false, why),
        Err(_) => (false, format!("no answer within {}", human_duration(gate.timeout))),
    };
    Fact::Probe { name, is_up, found: format!("{}: {found}", gate.address) }
}

async fn answer(address: &str) -> Result<String, String> {
    if let Some(place) = address.strip_prefix("tcp://") {
        TcpStream::connect(place).await.map_err(|error| error.to_string())?;
        return Ok("it takes connections".to_owned());
    }
    let uri: Uri = address.parse().map_err(|error| format!("it is no address: {error}"))?;
    let host = uri.host().ok_or_else(|| "it names no host".to_owned())?.trim_matches(['[', ']']);
    let port = uri.port_u16().unwrap_or(80);
    let stream = TcpStream::connect((host, port)).await.map_err(|error| error.to_string())?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| error.to_string())?;
    let connection = tokio::spawn(connection);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let authority = uri.authority().map_or(host, |authority| authority.as_str());
    let request = Request::get(path).header("host", authority).body(Empty::<Bytes>::new());
    let request = request.map_err(|error| error.to_string())?;
    let response = sender.send_request(request).await.map_err(|error| error.to_string());
    connection.abort();
    let status = response?.status();
    if status.is_success() { Ok(format!("it answers {status}")) } else { Err(format!("it answers {status}")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::io::Errno;
    use rustix::process::PidfdFlags;
    use std::time::Duration;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    fn gates(commands: &[(&str, &[&str], u64)], probes: &[(&str, String)]) -> Gates {
        let command = |(name, argv, seconds): &(&str, &[&str], u64)| {
            let argv = argv.iter().map(|&word| word.to_owned()).collect();
            (name.parse().unwrap(), CommandGate { argv, timeout: Duration::from_secs(*seconds) })
        };
        let probe = |(name, address): &(&str, String)| {
            let gate = ProbeGate { address: address.clone(), timeout: Duration::from_secs(20) };
            (name.parse().unwrap(), gate)
        };
        Gates {
            commands: commands.iter().map(command).collect(),
            probes: probes.iter().map(probe).collect(),
            ..Gates::default()
        }
    }

    async fn looked(gates: &Gates) -> std::collections::BTreeMap<String, Fact> {
        let facts = look(&"production".parse().unwrap(), gates, Path::new("/")).await;
        let named = facts.into_iter().map(|fact| match &fact {
            Fact::Command { name, .. } | Fact::Probe { name, .. } => (name.to_string(), fact),
            other => panic!("{other:?}"),
        });
        named.collect()
    }

    /// A signal is sent before it is felt: waits until the process is dead, whoever collects it.
    fn await_death(pid: Pid) {
        let handle = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) => handle,
            Err(Errno::SRCH) => return,
            Err(error) => panic!("{error}"),
        };
        let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
        let count = poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&limit)).unwrap();
        assert_eq!(count, 1, "process {pid} lives on");
    }

    #[tokio::test]
    async fn commands_end_within_their_limit_with_what_they_started() {
        let temporary = tempfile::tempdir().unwrap();
        let file = temporary.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {}; wait", file.display());
        let found = looked(&gates(
            &[
                ("good", &["sh", "-c", "echo $GREENLIGHT_ENVIRONMENT; seq 1 100000"], 60),
                ("bad", &["sh", "-c", "echo why >&2; exit 7"], 60),
                ("long", &["sh", "-c", &script], 1),
                ("none", &["/no/such/program"], 60),
            ],
            &[],
        ))
        .await;
        let Fact::Command { code: Some(0), output, .. } = &found["good"] else { panic!("{found:?}") };
        assert_eq!((output.len(), output.last().map(String::as_str)), (OUTPUT_LINES_MAX, Some("100000")));
        let Fact::Command { code: Some(7), output, .. } = &found["bad"] else { panic!("{found:?}") };
        assert_eq!(output, &["why"]);
        let Fact::Command { code: None, output, .. } = &found["long"] else { panic!("{found:?}") };
        assert!(output[0].contains("longer than 1.0s"), "{output:?}");
        let Fact::Command { code: None, output, .. } = &found["none"] else { panic!("{found:?}") };
        assert!(output[0].contains("could not be started"), "{output:?}");
        let pid = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
        await_death(Pid::from_raw(pid).unwrap());
    }

    #[tokio::test]
    async fn probes_see_what_answers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let place = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = vec![0; 4096];
                let count = stream.read(&mut request).await.unwrap();
                let is_good = String::from_utf8_lossy(&request[..count]).contains("GET /good?x=1 ");
                let status = if is_good { "200 OK" } else { "503 Busy" };
                let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
                // The probe of the port alone has closed its end.
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let closed = free.local_addr().unwrap();
        drop(free);
        let found = looked(&gates(
            &[],
            &[
                ("port", format!("tcp://{place}")),
                ("good", format!("http://{place}/good?x=1")),
                ("busy", format!("http://{place}/busy")),
                ("closed", format!("tcp://{closed}")),
            ],
        ))
        .await;
        for (name, up, text) in [
            ("port", true, "takes"),
            ("good", true, "200"),
            ("busy", false, "503"),
            ("closed", false, "refused"),
        ] {
            let Fact::Probe { is_up, found, .. } = &found[name] else { panic!("{found:?}") };
            assert_eq!(*is_up, up, "{name}: {found}");
            assert!(found.contains(text), "{name}: {found}");
        }
        server.abort();
    }
}
