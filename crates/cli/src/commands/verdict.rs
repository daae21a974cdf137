//! `verdict replay`: the verdict on a canary made again from its evidence file, and the past judged against itself.

use std::fs::File;
use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;

use greenlight_model::Timestamp;
use greenlight_model::quantity::parse_duration;
use greenlight_verdict::evidence::{
    AgainstItself, Conclusion, EvidenceError, LINE_BYTES_MAX, Line, Replay, against_itself, parse,
};
use greenlight_verdict::{Interval, Verdict};
use serde_json::json;

use crate::args::{Replay as Arguments, Verdict as Command, VerdictAction};
use crate::describe::table;
use crate::failure::{Exit, Failure};
use crate::printer::Printer;

/// Pretended canaries after which progress is told.
const TELL_EVERY_RUNS: usize = 50;

pub(crate) fn run(verdict: &Command, printer: &Printer) -> Result<Exit, Failure> {
    let VerdictAction::Replay(arguments) = &verdict.action;
    let mut evidence = Evidence::open(&arguments.evidence)?;
    if arguments.a_a { a_a(arguments, &mut evidence, printer) } else { replay(&mut evidence, printer) }
}

/// The lines of an evidence file, one after the other: a whole day may be larger than memory.
struct Evidence<'a> {
    path: &'a Path,
    reader: BufReader<File>,
    number: usize,
}

impl<'a> Evidence<'a> {
    fn open(path: &'a Path) -> Result<Self, Failure> {
        let file = File::open(path).map_err(|error| {
            Failure::usage(format!("cannot read {}: {error}", path.display()))
                .help("a canary's evidence is in .greenlight/evidence, beside the fleet file")
        })?;
        Ok(Self { path, reader: BufReader::new(file), number: 0 })
    }

    fn next(&mut self) -> Result<Option<String>, Failure> {
        let mut line = Vec::new();
        // One byte more than a line may have, so that one that is too long is told apart.
        let mut limited = (&mut self.reader).take(LINE_BYTES_MAX as u64 + 1);
        let failed =
            |error: std::io::Error| Failure::usage(format!("cannot read {}: {error}", self.path.display()));
        if limited.read_until(b'\n', &mut line).map_err(failed)? == 0 {
            return Ok(None);
        }
        self.number += 1;
        let (path, number) = (self.path.display(), self.number);
        let text = String::from_utf8(line)
            .map_err(|_| Failure::usage(format!("{path}: line {number}: not text in UTF-8")))?;
        Ok(Some(text))
    }

    /// What is wrong with a line, and in which file.
    fn refused(&self, error: &EvidenceError) -> Failure {
        let failure = Failure::from_error(Exit::Usage, error);
        let message = format!("{}: {}", self.path.display(), failure.message);
        Failure::usage(message).help(
            "an evidence file is one JSON object per line, as docs/verdict.md describes; one that was cut off while it was written may be used without its last line",
        )
    }

    fn begin(&mut self) -> Result<Replay, Failure> {
        let first = self.next()?.unwrap_or_default();
        Replay::begin(&first).map_err(|error| self.refused(&error))
    }
}

fn replay(evidence: &mut Evidence<'_>, printer: &Printer) -> Result<Exit, Failure> {
    let mut replay = evidence.begin()?;
    while let Some(line) = evidence.next()? {
        replay.line(evidence.number, &line).map_err(|error| evidence.refused(&error))?;
    }
    let (judgement, conclusion) = (replay.judgement(), replay.conclusion());
    if !replay.title().is_empty() {
        printer.result(format!("{}, {} intervals", replay.title(), replay.intervals()));
    }
    replay.alerts().iter().for_each(|alert| printer.result(format!("abort: {alert}")));
    printer.result(judgement.to_string().trim_end());
    let agrees = replay.recorded().map(|recorded| *recorded == conclusion);
    printer.result(match (replay.recorded(), agrees) {
        (Some(recorded), Some(false)) => {
            format!("NOT the recorded answer, which was: {}", in_words(recorded))
        }
        (Some(_), _) => "the same answer as was recorded".to_owned(),
        (None, _) => "no answer was recorded: the file ends before one".to_owned(),
    });
    printer.json(
        "verdict replay",
        json!({
            "title": replay.title(),
            "intervals": replay.intervals(),
            "conclusion": conclusion,
            "recorded": replay.recorded(),
            "agrees": agrees,
            "judgement": judgement,
            "alerts": replay.alerts(),
        }),
    );
    Ok(if agrees == Some(false) { Exit::Failed } else { Exit::Done })
}

fn in_words(conclusion: &Conclusion) -> String {
    let verdict = match conclusion.verdict {
        Verdict::Pass => "pass",
        Verdict::Abort => "abort",
        Verdict::Inconclusive => "inconclusive",
    };
    let reasons: Vec<&str> =
        conclusion.culprits.iter().chain(&conclusion.alerts).map(String::as_str).collect();
    let reasons = if reasons.is_empty() { String::new() } else { format!(" for {}", reasons.join(", ")) };
    format!("{verdict}{reasons} after {} s", conclusion.elapsed_ms / 1000)
}

fn a_a(arguments: &Arguments, evidence: &mut Evidence<'_>, printer: &Printer) -> Result<Exit, Failure> {
    let stretch = parse_duration(&arguments.stretch)
        .ok()
        .and_then(|stretch| u64::try_from(stretch.as_millis()).ok())
        .filter(|stretch_ms| *stretch_ms > 0)
        .ok_or_else(|| {
            Failure::usage(format!("`{}` is not how long a stretch may be", arguments.stretch))
                .help("a duration such as 10m or 1h")
        })?;
    let (settings, past) = past(evidence)?;
    let tell = |judged: usize, all: usize| {
        if judged.is_multiple_of(TELL_EVERY_RUNS) {
            printer.progress(format!("{judged} of {all} pretended canaries"));
        }
    };
    let found = against_itself(&settings, &past, stretch, tell)
        .map_err(|error| Failure::usage(format!("{}: {error}", evidence.path.display())))?;
    tell_a_a(&found, printer);
    printer.json("verdict replay", json!({ "stretch_ms": stretch, "against_itself": found }));
    Ok(Exit::Done)
}

/// The settings of a file and every interval in it.
fn past(evidence: &mut Evidence<'_>) -> Result<(greenlight_verdict::Settings, Vec<Interval>), Failure> {
    let mut replay = evidence.begin()?;
    let settings = replay.settings().clone();
    let mut past = Vec::new();
    while let Some(line) = evidence.next()? {
        // Replayed as well, so that a file that cannot be is refused here too.
        replay.line(evidence.number, &line).map_err(|error| evidence.refused(&error))?;
        if let Ok(Line::Baseline(interval) | Line::Interval(interval)) = parse(&line) {
            past.push(interval);
        }
    }
    Ok((settings, past))
}

fn tell_a_a(found: &AgainstItself, printer: &Printer) {
    let all = found.runs.len();
    let percent = |count: usize| 100.0 * count as f64 / all.max(1) as f64;
    printer.result(format!(
        "{} of {all} pretended canaries would have been aborted ({:.1} %), {} would have passed; the budget is {:.1} %",
        found.aborted,
        percent(found.aborted),
        found.passed,
        found.false_abort_budget * 100.0
    ));
    let mut rows = vec![["HOST", "FROM", "ABORTED FOR"].map(str::to_owned).to_vec()];
    for run in found.runs.iter().filter(|run| run.verdict == Verdict::Abort) {
        let from = i64::try_from(run.start_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
        rows.push(vec![
            run.host.clone(),
            from.map_or_else(|| run.start_ms.to_string(), |from| from.to_string()),
            run.culprits.join(", "),
        ]);
    }
    if rows.len() > 1 {
        table(&rows).iter().for_each(|row| printer.result(row));
    }
}
