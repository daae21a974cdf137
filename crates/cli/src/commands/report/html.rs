//! The report as one HTML file: nothing is loaded from elsewhere, and it prints.

use std::time::Duration;

use greenlight_model::quantity::human_duration;

use super::{Issue, Lane, Report, markdown};

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}\
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem;border-bottom:1px solid #ccc}\
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.25rem .75rem .25rem 0}\
pre{margin:.25rem 0;padding:.5rem;background:#f4f4f4;white-space:pre-wrap}\
.nil{color:#555}.degraded{color:#8a5a00}.blocker{color:#b00020;font-weight:600}.blocker-resolved{color:#1b6e3c}\
svg{width:100%;height:auto}svg text{font:11px system-ui,sans-serif}\
@media print{body{margin:0;max-width:none}h2{break-after:avoid}tr,pre{break-inside:avoid}}";

/// The picture's measures, in its own units.
const NAME_WIDTH: u64 = 160;
const PLOT_WIDTH: u64 = 780;
const LANE_HEIGHT: u64 = 22;

pub(super) fn render(report: &Report) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{0}</title>\n<style>{STYLE}</style></head>\n\
<body>\n<h1>{0}</h1>\n<p>{1}</p>\n",
        escape(&report.title),
        escape(&markdown::summary(report).replace('`', ""))
    );
    heading(&mut page, "Hosts and time");
    page.push_str(&picture(report));
    issues(&mut page, "Deployment issues", &report.deployment_issues);
    let patches: Vec<Vec<String>> = report
        .patches
        .iter()
        .flat_map(|(service, commits)| {
            commits.iter().map(move |commit| vec![service.to_string(), commit.clone()])
        })
        .collect();
    rows(&mut page, "Patches", &["service", "commit"], &patches);
    issues(&mut page, "Testing issues", &report.testing_issues);
    let miscellaneous: Vec<Vec<String>> =
        report.miscellaneous.iter().map(|line| vec![line.clone()]).collect();
    rows(&mut page, "Miscellaneous", &["what"], &miscellaneous);
    if !report.miscellaneous_issues.is_empty() {
        issues(&mut page, "Miscellaneous issues", &report.miscellaneous_issues);
    }
    let actions: Vec<Vec<String>> = report
        .actions
        .iter()
        .map(|action| {
            vec![
                action.number.to_string(),
                action.what.clone(),
                action.owner.clone(),
                action.condition.clone(),
                action.state.clone(),
            ]
        })
        .collect();
    rows(&mut page, "Actions", &["number", "what", "owner", "condition", "state"], &actions);
    let debt: Vec<Vec<String>> = report.debt.iter().map(|line| vec![line.clone()]).collect();
    rows(&mut page, "Debt", &["what"], &debt);
    let evidence: Vec<Vec<String>> = report
        .evidence
        .iter()
        .map(|it| vec![it.kind.to_owned(), it.what.clone(), it.by.clone(), it.at.clone()])
        .collect();
    rows(&mut page, "Evidence", &["kind", "what", "by", "at"], &evidence);
    let timeline: Vec<Vec<String>> = markdown::timeline(report).into_iter().map(|line| vec![line]).collect();
    rows(&mut page, "Timeline", &["what"], &timeline);
    let runs: Vec<Vec<String>> = report
        .runs_now
        .iter()
        .map(|(instance, release)| vec![instance.to_string(), release.clone()])
        .collect();
    rows(&mut page, "What ran where at its end", &["instance", "release"], &runs);
    page.push_str("</body></html>\n");
    page
}

fn heading(page: &mut String, title: &str) {
    page.push_str(&format!("<h2>{}</h2>\n", escape(title)));
}

fn rows(page: &mut String, title: &str, columns: &[&str], rows: &[Vec<String>]) {
    heading(page, title);
    if rows.is_empty() {
        page.push_str("<p>None.</p>\n");
        return;
    }
    let head: String = columns.iter().map(|column| format!("<th>{}</th>", escape(column))).collect();
    page.push_str(&format!("<table><tr>{head}</tr>\n"));
    for row in rows {
        let cells: String = row.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect();
        page.push_str(&format!("<tr>{cells}</tr>\n"));
    }
    page.push_str("</table>\n");
}

fn issues(page: &mut String, title: &str, issues: &[Issue]) {
    heading(page, title);
    if issues.is_empty() {
        page.push_str("<p>None.</p>\n");
        return;
    }
    page.push_str("<table><tr><th>impact</th><th>what</th></tr>\n");
    for issue in issues {
        let word = issue.impact.word();
        let number = issue.number.map(|number| format!("{number}: ")).unwrap_or_default();
        let resolved =
            issue.resolved.as_ref().map(|how| format!("<br>resolved: {}", escape(how))).unwrap_or_default();
        let output = match issue.output.is_empty() {
            true => String::new(),
            false => format!("<pre>{}</pre>", escape(&issue.output.join("\n"))),
        };
        page.push_str(&format!(
            "<tr><td class=\"{}\">{word}</td><td>{number}{}{resolved}{output}</td></tr>\n",
            word.replace(' ', "-"),
            escape(&issue.what)
        ));
    }
    page.push_str("</table>\n");
}

/// Each instance a lane, each step a bar: the failed ones red, switches dark, the rest light.
fn picture(report: &Report) -> String {
    let height = LANE_HEIGHT * (u64::try_from(report.lanes.len()).unwrap_or(0) + 1);
    let width = NAME_WIDTH + PLOT_WIDTH;
    let mut picture = format!(
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"steps on each host over time\">\n"
    );
    for (lane, index) in report.lanes.iter().zip(0..) {
        picture.push_str(&draw(lane, index, report.took_ms));
    }
    let (bottom, took) = (height - 6, human_duration(Duration::from_millis(report.took_ms)));
    picture.push_str(&format!(
        "<text x=\"{NAME_WIDTH}\" y=\"{bottom}\">0</text><text x=\"{width}\" y=\"{bottom}\" text-anchor=\"end\">{took}</text>\n</svg>\n"
    ));
    picture
}

fn draw(lane: &Lane, index: u64, took_ms: u64) -> String {
    let top = index * LANE_HEIGHT;
    let mut text =
        format!("<text x=\"0\" y=\"{}\">{}</text>\n", top + 15, escape(&lane.instance.to_string()));
    let at = |ms: u64| NAME_WIDTH + ms.min(took_ms) * PLOT_WIDTH / took_ms.max(1);
    for bar in &lane.bars {
        let (from, until) = (at(bar.from_ms), at(bar.until_ms));
        let colour = match (bar.failed, bar.what.as_str()) {
            (true, _) => "#b00020",
            (false, "activate" | "deactivate") => "#1b6e3c",
            (false, _) => "#9ec9ae",
        };
        let failed = if bar.failed { " failed" } else { "" };
        let took = human_duration(Duration::from_millis(bar.until_ms.saturating_sub(bar.from_ms)));
        text.push_str(&format!(
            "<rect x=\"{from}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{colour}\"><title>{}{failed}, {took}</title></rect>\n",
            top + 4,
            until.saturating_sub(from).max(2),
            LANE_HEIGHT - 8,
            escape(&bar.what)
        ));
    }
    text
}

/// Text that stands in a page as text, whatever it holds.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c if c.is_control() && c != '\n' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}
