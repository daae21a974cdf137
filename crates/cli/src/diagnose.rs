//! Problems in the fleet file, as people and programs read them.

use greenlight_config::line_column;
use miette::{GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteDiagnostic, NamedSource, Severity};
use serde_json::{Value, json};

use crate::failure::Mistakes;

/// Every problem with its line, the source around it and what to do.
pub(crate) fn render(mistakes: &Mistakes) -> String {
    let Mistakes { name, text, problems } = mistakes;
    // Colours are added for every terminal and taken out again where the printer finds none.
    let handler = GraphicalReportHandler::new_themed(GraphicalTheme::unicode()).with_context_lines(1);
    let mut out = String::new();
    for problem in problems {
        let length = problem.span.len().max(1);
        let mut diagnostic = MietteDiagnostic::new(problem.message.clone())
            .with_severity(Severity::Error)
            .with_label(LabeledSpan::new_with_span(None, (problem.span.start, length)));
        if let Some(help) = &problem.help {
            diagnostic = diagnostic.with_help(help.clone());
        }
        out.push('\n');
        let report = miette::Report::new(diagnostic).with_source_code(NamedSource::new(name, text.clone()));
        // Writing to a String cannot fail; a report that cannot be drawn is said plainly.
        if handler.render_report(&mut out, report.as_ref()).is_err() {
            let (line, column) = line_column(text, problem.span.start);
            out.push_str(&format!("{name}:{line}:{column}: {}\n", problem.message));
        }
    }
    out
}

/// Every problem as data.
pub(crate) fn json(mistakes: &Mistakes) -> Value {
    let Mistakes { name, text, problems } = mistakes;
    problems
        .iter()
        .map(|problem| {
            let (line, column) = line_column(text, problem.span.start);
            json!({
                "file": name,
                "line": line,
                "column": column,
                "code": problem.code,
                "message": problem.message,
                "help": problem.help,
            })
        })
        .collect()
}
