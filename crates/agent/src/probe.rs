//! Whether a process works, and as which release.
//!
//! A start is believed only when one and the same process lives through two proofs. A proof is a healthy answer that names the release,
//! or, where the service has no endpoint for that, the process itself: it works in the release's directory.

use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, Instant};

use greenlight_link::message::AgentError;
use greenlight_model::fleet::{Health, Process};
use greenlight_model::host::{Answer, ReleaseMark};
use greenlight_model::id::{ProcessName, ReleaseId};
use greenlight_model::quantity::human_duration;

use crate::failure::{Outcome, release, with_sources};
use crate::logs::{self, Position};
use crate::manager::{Live, Manager};
use crate::poll;
use crate::process::Identity;

/// How often a process that starts is asked.
const PROBE_INTERVAL: Duration = Duration::from_millis(100);
/// For how long a process that does not prove itself is asked again before that counts. Applications refuse a request now and
/// then for reasons that are gone a moment later (a lock, a conflict of two health checks in one database); one such
/// answer must not turn a rollout back.
const HICCUP: Duration = Duration::from_secs(1);
/// How often it is asked in that time.
const HICCUP_INTERVAL: Duration = Duration::from_millis(200);
/// How long one answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a process must go on after its first proof, when it answers as the release.
const STEADY: Duration = Duration::from_millis(500);
/// The same when it only lives: what fails while loading must have had the time to.
const STEADY_WITHOUT_ENDPOINT: Duration = Duration::from_secs(2);
/// A version endpoint's answer is short; the rest of a longer one is not looked at.
const ANSWER_BYTES_MAX: u64 = 64 * 1024;
/// What of an answer is shown.
const SAID_CHARS_MAX: usize = 200;
/// Shorter prefixes of a commit or id could be anything.
const PREFIX_DIGITS_MIN: usize = 7;

/// What is to be proven.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) process: &'a ProcessName,
    pub(crate) port: Option<u16>,
    pub(crate) health: Option<&'a Health>,
    /// The directory that holds the directories of all releases.
    pub(crate) releases: &'a Path,
    /// The release that it should be.
    pub(crate) mark: &'a ReleaseMark,
    /// Others that it might be.
    pub(crate) others: &'a [ReleaseMark],
}

impl<'a> Target<'a> {
    pub(crate) fn new(
        process: &'a Process,
        releases: &'a Path,
        mark: &'a ReleaseMark,
        others: &'a [ReleaseMark],
    ) -> Self {
        Self {
            process: &process.name,
            port: process.port,
            health: process.health.as_ref(),
            releases,
            mark,
            others,
        }
    }

    fn has_endpoint(&self) -> bool {
        self.health.is_some_and(|health| health.http.is_some() || health.release.is_some())
    }
}

/// Looks once at a living process.
pub(crate) fn look(target: &Target<'_>, identity: Identity) -> Answer {
    answer_of(target, identity).unwrap_or_else(|why| Answer::None { why })
}

/// Looks at a process that may have been proven before: what is wrong only for a moment is not taken for its state. An
/// answer that names another release counts at once, and so does one that takes as long as a hiccup may.
pub(crate) fn look_past_hiccups(target: &Target<'_>, identity: Identity) -> Answer {
    let deadline = Instant::now() + HICCUP;
    let mut last = look(target, identity);
    let is_wrong = |answer: &Answer| matches!(answer, Answer::None { .. });
    // The loop asks at least once more, which is too much for what does not answer at all.
    if is_wrong(&last) && Instant::now() < deadline {
        let settled = poll::until(HICCUP_INTERVAL, deadline, || {
            last = look(target, identity);
            Ok((!is_wrong(&last)).then_some(()))
        });
        debug_assert!(settled.is_ok(), "a look does not fail");
    }
    last
}

fn answer_of(target: &Target<'_>, identity: Identity) -> Result<Answer, String> {
    let endpoints = target.health.map(|health| (health.http.as_deref(), health.release.as_deref()));
    let (http, version) = endpoints.unwrap_or((None, None));
    if let Some(path) = http {
        get(target.port, path)?;
    }
    let Some(path) = version else { return by_the_process(target, identity) };
    let body = get(target.port, path)?;
    let known = std::iter::once(target.mark).chain(target.others);
    match known.into_iter().find(|mark| names_release(&body, mark)) {
        Some(mark) => Ok(Answer::Release { release: mark.id, proof: "version endpoint".to_owned() }),
        None => Ok(Answer::Other { said: body.trim().chars().take(SAID_CHARS_MAX).collect() }),
    }
}

/// What the process itself proves: its directory, its program, or the environment that it was started with.
fn by_the_process(target: &Target<'_>, identity: Identity) -> Result<Answer, String> {
    let directory =
        identity.directory().map_err(|error| format!("its working directory cannot be read: {error}"))?;
    let program = identity.program().map_err(|error| format!("its program cannot be read: {error}"))?;
    for (path, proof) in [(&directory, "working directory"), (&program, "program")] {
        if let Some(release) = release_of(path, target.releases) {
            return Ok(Answer::Release { release, proof: proof.to_owned() });
        }
    }
    if let Some(release) = release_in_environment(identity) {
        return Ok(Answer::Release { release, proof: "environment".to_owned() });
    }
    Err(format!("it works in {}, which is no release", directory.display()))
}

/// The release whose directory a path lies in.
fn release_of(path: &Path, releases: &Path) -> Option<ReleaseId> {
    // The kernel shows paths without links; the service's root may be reached over one.
    let resolved = fs::canonicalize(releases).ok()?;
    let inside = path.strip_prefix(&resolved).or_else(|_| path.strip_prefix(releases)).ok()?;
    inside.components().next()?.as_os_str().to_str()?.parse().ok()
}

fn release_in_environment(identity: Identity) -> Option<ReleaseId> {
    let bytes = fs::read(format!("/proc/{}/environ", identity.pid)).ok()?;
    let value =
        bytes.split(|byte| *byte == 0).find_map(|variable| variable.strip_prefix(b"GREENLIGHT_RELEASE="))?;
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// Asks the process itself, on this host; what it says when the answer is 2xx.
fn get(port: Option<u16>, path: &str) -> Result<String, String> {
    let port = port.ok_or("it has no port to be asked on")?;
    let slash = if path.starts_with('/') { "" } else { "/" };
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(ANSWER_TIMEOUT))
        .http_status_as_error(false)
        .max_redirects(0)
        .proxy(None)
        .build()
        .into();
    let mut response = agent
        .get(format!("http://127.0.0.1:{port}{slash}{path}"))
        .call()
        .map_err(|error| format!("GET {path} on port {port} failed: {}", with_sources(&error)))?;
    // The whole answer is read, also of one that is no success: a server that writes to a closed connection complains in
    // its log, just where somebody will look for what is wrong.
    let mut body = Vec::new();
    response
        .body_mut()
        .as_reader()
        .take(ANSWER_BYTES_MAX)
        .read_to_end(&mut body)
        .map_err(|error| format!("GET {path} on port {port} broke off: {error}"))?;
    let status = response.status();
    if !status.is_success() {
        return Err(format!("GET {path} on port {port} answered {}", status.as_u16()));
    }
    Ok(String::from_utf8_lossy(&body).into_owned())
}

/// Whether an answer names the release: its id, label or commit, as a whole value of JSON or a whole word of text.
pub(crate) fn names_release(body: &str, mark: &ReleaseMark) -> bool {
    match serde_json::from_str::<serde_json::Value>(body) {
        Ok(value) => is_in_json(&value, mark),
        Err(_) => {
            let ends_word = |c: char| c.is_whitespace() || ",;=()[]<>\"'".contains(c);
            is_release(body.trim(), mark) || body.split(ends_word).any(|word| is_release(word, mark))
        }
    }
}

fn is_in_json(value: &serde_json::Value, mark: &ReleaseMark) -> bool {
    match value {
        serde_json::Value::String(text) => is_release(text.trim(), mark),
        serde_json::Value::Number(number) => number.to_string() == mark.label,
        serde_json::Value::Array(values) => values.iter().any(|value| is_in_json(value, mark)),
        serde_json::Value::Object(values) => values.values().any(|value| is_in_json(value, mark)),
        serde_json::Value::Null | serde_json::Value::Bool(_) => false,
    }
}

fn is_release(text: &str, mark: &ReleaseMark) -> bool {
    let is_prefix_of = |whole: &str| text.len() >= PREFIX_DIGITS_MIN && whole.starts_with(text);
    !text.is_empty()
        && (text == mark.label || is_prefix_of(&mark.commit) || is_prefix_of(&mark.id.to_string()))
}

/// What a start is measured against.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start<'a> {
    /// When it was asked for.
    pub(crate) at: Instant,
    /// The clock tick before which no process of this start can have begun.
    pub(crate) ticks: u64,
    /// How long it may take to be proven.
    pub(crate) timeout: Duration,
    /// The process's standard error, and where this start's lines begin in it.
    pub(crate) stderr: (&'a Path, Position),
}

/// Waits until the process is proven to run as the release. Fails at once when it ends or is started again meanwhile.
pub(crate) fn prove(manager: &dyn Manager, target: &Target<'_>, start: &Start<'_>) -> Outcome<Identity> {
    prove_by(&mut || manager.state(target.process), target, start)
}

/// The same for anything that can tell how the process is.
pub(crate) fn prove_by(
    state: &mut dyn FnMut() -> Outcome<Live>,
    target: &Target<'_>,
    start: &Start<'_>,
) -> Outcome<Identity> {
    let steady = if target.has_endpoint() { STEADY } else { STEADY_WITHOUT_ENDPOINT };
    let failed = |why: String| failure(target, start, &why);
    let mut watched: Option<Identity> = None;
    let mut proven_since: Option<Instant> = None;
    let mut last_why = "it was not seen to run".to_owned();
    let proven = poll::until(PROBE_INTERVAL, start.at + start.timeout, || {
        let identity = match (state()?, watched) {
            (Live::Running(identity), None) if identity.start_ticks < start.ticks => {
                return Err(failed(format!(
                    "process {} was already running before this start",
                    identity.pid
                )));
            }
            (Live::Running(identity), Some(before)) if identity != before => {
                return Err(failed(format!(
                    "it ended and was started again (process {}, then {})",
                    before.pid, identity.pid
                )));
            }
            (Live::Running(identity), _) => identity,
            (Live::Ended { why }, _) => return Err(failed(why)),
            (Live::Stopped, _) => {
                return Err(failed("it does not run: it ended, or was stopped by somebody else".to_owned()));
            }
            (Live::Starting, Some(before)) => return Err(failed(format!("process {} ended", before.pid))),
            (Live::Starting, None) => return Ok(None),
        };
        watched = Some(identity);
        match look(target, identity) {
            Answer::Release { release, .. } if release == target.mark.id => {
                let since = *proven_since.get_or_insert_with(Instant::now);
                return Ok((since.elapsed() >= steady).then_some(identity));
            }
            Answer::Release { release, .. } => {
                last_why = format!("it answers as release {}", release.short());
            }
            Answer::Other { said } => last_why = format!("it answers as `{said}`"),
            Answer::None { why } => last_why = why,
        }
        proven_since = None;
        Ok(None)
    })?;
    proven.ok_or_else(|| failed(format!("not proven within {}: {last_why}", human_duration(start.timeout))))
}

fn failure(target: &Target<'_>, start: &Start<'_>, why: &str) -> AgentError {
    let (path, position) = start.stderr;
    let mut error =
        release(format!("process {} does not run as {}: {why}", target.process, target.mark.label));
    match logs::last_lines_since(path, position, crate::failure::OUTPUT_LINES_MAX) {
        Ok(lines) => error.output = lines,
        Err(unreadable) => {
            error.message.push_str(&format!(" (its log {} cannot be read: {unreadable})", path.display()));
        }
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;
    use std::io::Write as _;
    use std::net::TcpListener;

    #[test]
    fn only_the_whole_name_counts() {
        let mut mark = fixture::mark(0xab, "v1");
        mark.commit = "0123456789abcdef0123456789abcdef01234567".to_owned();
        let id = mark.id.to_string();
        for yes in [
            "v1",
            " v1\n",
            "\"v1\"",
            r#"{"version":"v1"}"#,
            r#"{"a":[{"deep":"0123456"}]}"#,
            "0123456789abcdef0123456789abcdef01234567",
            "release: v1 (0123456)",
            "<p>v1</p>",
            "version=v1",
            &id,
            &id[..12],
        ] {
            assert!(names_release(yes, &mark), "{yes}");
        }
        for no in [
            "",
            "v10",
            "v1.2",
            "v1-rc1",
            "xv1",
            r#"{"version":"v10"}"#,
            r#"{"v1":"v2"}"#,
            r#"{"version":"v1 beta"}"#,
            "012345",
            "01234567x",
            "0123456789abcdef0123456789abcdef012345678",
            "null",
        ] {
            assert!(!names_release(no, &mark), "{no}");
        }
        mark.label = "42".to_owned();
        assert!(names_release(r#"{"build":42}"#, &mark));
        assert!(!names_release(r#"{"build":420}"#, &mark));
        mark.commit = String::new();
        assert!(!names_release("\"\"", &mark));
    }

    /// Answers requests on a port with one answer after another, the last for ever, as long as the test lives.
    fn server(answers: &'static [&'static str]) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let mut stream = stream.unwrap();
                let mut request = [0u8; 1024];
                let _read = stream.read(&mut request).unwrap();
                stream.write_all(answers[number.min(answers.len() - 1)].as_bytes()).unwrap();
            }
        });
        port
    }

    fn check(answer: &'static str, expected: &str) {
        check_by(look, vec![answer].leak(), expected);
    }

    fn check_by(
        look: impl Fn(&Target<'_>, Identity) -> Answer,
        answers: &'static [&'static str],
        expected: &str,
    ) {
        let port = server(answers);
        let (mark, others) = (fixture::mark(1, "v1"), [fixture::mark(2, "v2")]);
        let health = Health { http: Some("/health".to_owned()), release: Some("/version".to_owned()) };
        let name = "web".parse().unwrap();
        let target = Target {
            process: &name,
            port: Some(port),
            health: Some(&health),
            releases: Path::new("/srv/web/releases"),
            mark: &mark,
            others: &others,
        };
        let found = format!("{:?}", look(&target, Identity::own().unwrap()));
        assert!(found.contains(expected), "{answers:?}: {found}");
    }

    #[test]
    fn one_bad_answer_is_not_a_state() {
        const GOOD: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nv1";
        const OTHER: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nv2";
        const REFUSED: &str = "HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n";
        let (ours, theirs) = (fixture::mark(1, "").id.short(), fixture::mark(2, "").id.short());
        check_by(look, &[REFUSED, GOOD], "answered 503");
        check_by(look_past_hiccups, &[REFUSED, GOOD], &ours);
        check_by(look_past_hiccups, &[REFUSED], "answered 503");
        check_by(look_past_hiccups, &[OTHER, OTHER, GOOD], &theirs);
    }

    #[test]
    fn answers_are_read_as_they_are() {
        check("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nv1", &fixture::mark(1, "").id.short());
        check("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nv2", &fixture::mark(2, "").id.short());
        check("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nv10", "Other { said: \"v10\" }");
        check("HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\nv1", "answered 503");
        check("HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 2\r\n\r\nv1", "answered 302");
        check("not http at all\r\n\r\n", "failed");
        check("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nv1", "broke off");
        check("", "failed");
    }

    #[test]
    fn without_an_endpoint_the_process_itself_is_asked() {
        let (mark, name) = (fixture::mark(1, "v1"), "web".parse().unwrap());
        let here = fs::canonicalize(std::env::current_dir().unwrap()).unwrap();
        let target = Target {
            process: &name,
            port: None,
            health: None,
            releases: here.as_path(),
            mark: &mark,
            others: &[],
        };
        let found = format!("{:?}", look(&target, Identity::own().unwrap()));
        assert!(found.contains("which is no release"), "{found}");
        assert_eq!(release_of(&here.join(mark.id.to_string()).join("bin"), &here), Some(mark.id));
        assert_eq!(release_of(Path::new("/elsewhere"), &here), None);
    }
}
