//! The log files of processes: their last lines, and what is appended to them, also across a rotation.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use greenlight_link::message::{LINE_BYTES_MAX, Stream};
use greenlight_model::fleet::Process;
use greenlight_model::host::InstanceSpec;
use greenlight_model::id::ProcessName;

use crate::context::Context;
use crate::failure::{OrHost as _, Outcome, host};
use crate::layout::Layout;
use crate::poll;

/// Most lines of one file that are given at once.
const LINES_MAX: usize = 100_000;
/// Most bytes of one file that are read for its last lines.
const TAIL_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// How much is read at a time, going backwards.
const BLOCK_BYTES: u64 = 64 * 1024;
/// How often a followed file is looked at.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(250);
/// A `logs --follow` that was forgotten ends after this.
const FOLLOW_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// How much of a followed file is read at a time.
const FOLLOW_BYTES_MAX: u64 = 1024 * 1024;

/// A place in a log file that may be rotated: which file it was, and how far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Position {
    file: Option<(u64, u64)>,
    offset: u64,
}

/// The end of a file; the beginning when it is not there.
pub(crate) fn end_of(path: &Path) -> io::Result<Position> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(Position { file: Some((metadata.dev(), metadata.ino())), offset: metadata.len() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Position::default()),
        Err(error) => Err(error),
    }
}

/// The last `count` lines that were written after `position`.
pub(crate) fn last_lines_since(path: &Path, position: Position, count: usize) -> io::Result<Vec<String>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        file => file?,
    };
    let metadata = file.metadata()?;
    let is_same =
        position.file == Some((metadata.dev(), metadata.ino())) && position.offset <= metadata.len();
    tail(&file, if is_same { position.offset } else { 0 }, metadata.len(), count)
}

/// Reads backwards from `end`, not beyond `start`, as far as is needed.
fn tail(mut file: &File, start: u64, end: u64, count: usize) -> io::Result<Vec<String>> {
    let start = start.max(end.saturating_sub(TAIL_BYTES_MAX));
    let mut bytes = Vec::new();
    let mut at = end;
    // A line more than asked for, since the first may be cut.
    while at > start && bytes.iter().filter(|byte| **byte == b'\n').count() <= count {
        let from = at.saturating_sub(BLOCK_BYTES).max(start);
        let length = usize::try_from(at - from).map_err(io::Error::other)?;
        let mut block = vec![0u8; length];
        file.seek(SeekFrom::Start(from))?;
        file.read_exact(&mut block)?;
        block.append(&mut bytes);
        bytes = block;
        at = from;
    }
    let complete = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    if complete.is_empty() && bytes.is_empty() {
        return Ok(Vec::new());
    }
    let lines: Vec<String> = complete.split(|byte| *byte == b'\n').map(text_of).collect();
    Ok(lines[lines.len().saturating_sub(count)..].to_vec())
}

fn text_of(line: &[u8]) -> String {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    String::from_utf8_lossy(&line[..line.len().min(LINE_BYTES_MAX)]).into_owned()
}

struct Followed {
    process: ProcessName,
    stream: Stream,
    path: PathBuf,
    /// The file as it was opened, whatever its name stands for by now.
    file: Option<File>,
    position: Position,
    /// A line whose end has not been written yet.
    begun: Vec<u8>,
}

/// Gives the last lines of the chosen logs as events, and with `follow` what is appended, until the connection ends.
pub(crate) fn show(
    context: &Context,
    spec: &InstanceSpec,
    process: Option<&ProcessName>,
    stream: Option<Stream>,
    lines: u32,
    follow: bool,
) -> Outcome<()> {
    let layout = Layout::new(&spec.root);
    if let Some(name) = process
        && !spec.processes.contains_key(name)
    {
        let known: Vec<&str> = spec.processes.keys().map(ProcessName::as_str).collect();
        return Err(host(format!(
            "service {} has no process {name}; it has: {}",
            spec.service,
            known.join(", ")
        )));
    }
    let mut followed = Vec::new();
    let chosen = spec.processes.values().filter(|stated| process.is_none_or(|name| stated.name == *name));
    for (stated, kind) in
        chosen.flat_map(|stated: &Process| [(stated, Stream::Stdout), (stated, Stream::Stderr)])
    {
        if stream.is_some_and(|wanted| wanted != kind) {
            continue;
        }
        let relative = match kind {
            Stream::Stdout => &stated.stdout,
            Stream::Stderr => &stated.stderr,
        };
        let path = layout.under_root(relative);
        let reading = || format!("read the log {}", path.display());
        let (file, position) = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => (None, Position::default()),
            file => {
                let file = file.or_host(reading)?;
                let metadata = file.metadata().or_host(reading)?;
                let position =
                    Position { file: Some((metadata.dev(), metadata.ino())), offset: metadata.len() };
                let count = usize::try_from(lines).unwrap_or(usize::MAX).min(LINES_MAX);
                for line in tail(&file, 0, position.offset, count).or_host(reading)? {
                    context.line(Some(&stated.name), kind, line);
                }
                (Some(file), position)
            }
        };
        let (process, stream) = (stated.name.clone(), kind);
        followed.push(Followed { process, stream, path, file, position, begun: Vec::new() });
    }
    if !follow {
        return Ok(());
    }
    poll::until(FOLLOW_INTERVAL, Instant::now() + FOLLOW_MAX, || {
        for log in &mut followed {
            log.pass_on(context).or_host(|| format!("follow the log {}", log.path.display()))?;
        }
        Ok(context.is_cancelled().then_some(()))
    })?;
    Ok(())
}

impl Followed {
    /// Gives what was appended since the last look; when the name stands for another file by now, the rest of the old one first.
    fn pass_on(&mut self, context: &Context) -> io::Result<()> {
        self.read_on(context)?;
        let now = match fs::metadata(&self.path) {
            // Between two files of a rotation there is none.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            metadata => metadata?,
        };
        if self.position.file != Some((now.dev(), now.ino())) {
            self.read_on(context)?;
            let file = File::open(&self.path)?;
            let opened = file.metadata()?;
            self.position = Position { file: Some((opened.dev(), opened.ino())), offset: 0 };
            self.file = Some(file);
            self.read_on(context)?;
        }
        Ok(())
    }

    fn read_on(&mut self, context: &Context) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        if file.metadata()?.len() < self.position.offset {
            // It was cut short, as some rotate: it is read from its beginning.
            self.position.offset = 0;
        }
        file.seek(SeekFrom::Start(self.position.offset))?;
        let mut bytes = std::mem::take(&mut self.begun);
        let read = file.take(FOLLOW_BYTES_MAX).read_to_end(&mut bytes)?;
        self.position.offset += read as u64;
        let mut rest = &bytes[..];
        while let Some(length) = rest.iter().position(|byte| *byte == b'\n') {
            context.line(Some(&self.process), self.stream, text_of(&rest[..length]));
            rest = &rest[length + 1..];
        }
        if rest.len() > LINE_BYTES_MAX {
            context.line(Some(&self.process), self.stream, text_of(rest));
            rest = &[];
        }
        self.begun = rest.to_vec();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture;
    use greenlight_link::message::Event;
    use std::io::Write as _;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::channel;

    #[test]
    fn the_last_lines_are_found_from_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        assert!(last_lines_since(&path, Position::default(), 3).unwrap().is_empty());
        let many: String = (0..50_000).map(|number| format!("line {number}\n")).collect();
        for (content, count, expected) in [
            ("", 3, vec![]),
            ("a", 3, vec!["a"]),
            ("a\nb\n", 1, vec!["b"]),
            ("a\n\nb", 3, vec!["a", "", "b"]),
            ("\n", 3, vec![""]),
            (&many, 2, vec!["line 49998", "line 49999"]),
        ] {
            fs::write(&path, content).unwrap();
            assert_eq!(last_lines_since(&path, Position::default(), count).unwrap(), expected);
        }
        assert_eq!(last_lines_since(&path, Position::default(), 40_000).unwrap().len(), 40_000);
        let before = end_of(&path).unwrap();
        fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"new\n").unwrap();
        assert_eq!(last_lines_since(&path, before, 5).unwrap(), ["new"]);
    }

    #[test]
    fn following_goes_on_across_a_rotation() {
        let root = tempfile::tempdir().unwrap();
        let spec = fixture::spec(root.path().to_str().unwrap(), [fixture::process("web", &["app"])]);
        let log = root.path().join("logs/web.stdout");
        fs::create_dir(root.path().join("logs")).unwrap();
        fs::write(&log, "old\nlast\n").unwrap();
        let (sender, lines) = channel();
        let cancelled = Arc::new(AtomicBool::new(false));
        let context = Context {
            events: Box::new(move |event| {
                let Event::Line { text, .. } = event else { return };
                sender.send(text).unwrap();
            }),
            cancelled: Arc::clone(&cancelled),
            program: PathBuf::new(),
        };
        let following =
            std::thread::spawn(move || show(&context, &spec, None, Some(Stream::Stdout), 1, true));
        let next = || lines.recv_timeout(Duration::from_secs(30)).unwrap();
        let append = |text: &str| {
            fs::OpenOptions::new()
                .append(true)
                .create(true)
                .open(&log)
                .unwrap()
                .write_all(text.as_bytes())
                .unwrap();
        };
        assert_eq!(next(), "last");
        append("one\nha");
        assert_eq!(next(), "one");
        append("lf\n");
        assert_eq!(next(), "half");
        fs::rename(&log, root.path().join("logs/web.stdout.1")).unwrap();
        append("rotated\n");
        assert_eq!(next(), "rotated");
        fs::write(&log, "cut\n").unwrap();
        assert_eq!(next(), "cut");
        cancelled.store(true, Ordering::Relaxed);
        following.join().unwrap().unwrap();
    }
}
