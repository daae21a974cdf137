//! A judgement in words: what was counted, how sure it is, and where to look.

use std::fmt;

use crate::judgement::{Finding, FindingState, Judgement, RouteCount, Verdict};
use crate::settings::Metric;

/// Evidence beyond this is written as "more than": its digits say nothing.
const EVIDENCE_SHOWN_MAX: f64 = 1e9;
/// An onset within this is "the first minute".
const MINUTE_MS: u64 = 60_000;
/// Hosts that are listed by name.
const HOSTS_SHOWN_MAX: usize = 4;

impl fmt::Display for Judgement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let after = duration(self.elapsed_ms);
        match self.verdict {
            Verdict::Abort => writeln!(f, "abort: the canary is worse, found after {after}")?,
            Verdict::Pass => writeln!(f, "pass: the canary is no worse, after {after}")?,
            Verdict::Inconclusive => match self.requests_needed {
                Some(needed) => writeln!(
                    f,
                    "inconclusive after {after}: about {} more canary requests needed",
                    grouped(needed)
                )?,
                None => writeln!(f, "inconclusive after {after}: too little to compare yet")?,
            },
        }
        for finding in self.culprits() {
            self.culprit(f, finding)?;
        }
        let of = |state: FindingState| self.findings.iter().filter(move |finding| finding.state == state);
        let healthy: Vec<String> =
            of(FindingState::Healthy).map(|finding| finding.comparison.title()).collect();
        if !healthy.is_empty() {
            writeln!(f, "ok: {}", healthy.join(", "))?;
        }
        for finding in of(FindingState::Undecided) {
            writeln!(f, "inconclusive: {} ({})", finding.comparison.title(), undecided(finding))?;
        }
        Ok(())
    }
}

impl Judgement {
    fn culprit(&self, f: &mut fmt::Formatter<'_>, finding: &Finding) -> fmt::Result {
        writeln!(f, "{}: {}", finding.comparison.title(), counts(finding))?;
        let worse = match (finding.comparison.metric, finding.at_least) {
            (Metric::Traffic, Some(least)) => format!("at least {} missing", percent(1.0 - 1.0 / least)),
            (Metric::Traffic, None) => "requests are missing".to_owned(),
            (_, Some(least)) if least > 1.0 => format!("at least {least:.2}x worse"),
            // Lately, that is: over the whole time it is not sure.
            _ => "worse since its onset".to_owned(),
        };
        let most = match (finding.comparison.metric, finding.at_most) {
            (Metric::Traffic, _) | (_, None) => String::new(),
            (_, Some(most)) => format!(", at most {most:.1}x"),
        };
        let evidence = evidence(self.ln_evidence);
        writeln!(f, "  {worse}{most}; evidence {evidence}, needed {}", self::evidence(self.ln_needed))?;
        let mut places = Vec::new();
        places.extend(routes(finding));
        places.extend(hosts(finding));
        let mut line = Vec::new();
        if !places.is_empty() {
            line.push(format!("where: {}", places.join("; ")));
        }
        line.extend(finding.onset_ms.map(|onset| {
            if onset < MINUTE_MS {
                "onset: first minute".to_owned()
            } else {
                format!("onset: after {}", duration(onset))
            }
        }));
        if finding.burst > 1.0 {
            line.push(format!("bursts: counted as {:.1} times fewer", finding.burst));
        }
        if line.is_empty() { Ok(()) } else { writeln!(f, "  {}", line.join("; ")) }
    }
}

fn counts(finding: &Finding) -> String {
    let counts = &finding.counts;
    if finding.comparison.metric == Metric::Traffic {
        let all = counts.canary + counts.stable;
        return format!(
            "canary {} of {} requests ({}), its weight gives {}",
            grouped(counts.canary),
            grouped(all),
            percent(counts.canary as f64 / all.max(1) as f64),
            finding.share.map_or_else(|| "unknown".to_owned(), percent)
        );
    }
    let arm = |name: &str, bad: u64, all: u64| {
        format!("{name} {} of {} ({})", grouped(bad), grouped(all), percent(bad as f64 / all.max(1) as f64))
    };
    let canary = arm("canary", counts.canary_bad, counts.canary);
    format!("{canary}   {}", arm("stable", counts.stable_bad, counts.stable))
}

/// The routes that make up most of the excess.
fn routes(finding: &Finding) -> Option<String> {
    let excess: f64 = finding.routes.iter().map(|route| route.counts.excess().max(0.0)).sum();
    let mut named = Vec::new();
    let mut explained = 0.0;
    for route in &finding.routes {
        if route.counts.excess() <= 0.0 || explained >= 0.8 * excess {
            break;
        }
        explained += route.counts.excess();
        named.push(route_count(route, finding.counts.canary_bad));
    }
    (!named.is_empty()).then(|| named.join(", "))
}

fn route_count(route: &RouteCount, all: u64) -> String {
    let slow = route.threshold_us.map(|us| format!(" (over {})", milliseconds(us))).unwrap_or_default();
    format!("{} {} of {}{slow}", route.route, grouped(route.counts.canary_bad), grouped(all))
}

fn hosts(finding: &Finding) -> Option<String> {
    if finding.comparison.metric == Metric::Traffic {
        return None;
    }
    match &finding.hosts[..] {
        [] => None,
        [only] => Some(format!("host {}", only.host)),
        several if finding.do_hosts_differ => {
            let rate = |bad: u64, requests: u64| bad as f64 / requests.max(1) as f64;
            let worst = several.iter().max_by(|one, other| {
                rate(one.bad, one.requests).total_cmp(&rate(other.bad, other.requests))
            })?;
            Some(format!(
                "above all host {}: {} of {}",
                worst.host,
                grouped(worst.bad),
                grouped(worst.requests)
            ))
        }
        few if few.len() <= HOSTS_SHOWN_MAX => {
            let names: Vec<&str> = few.iter().map(|host| host.host.as_str()).collect();
            Some(format!("hosts {} alike", names.join(", ")))
        }
        many => Some(format!("all {} canary hosts alike", many.len())),
    }
}

fn undecided(finding: &Finding) -> String {
    let requests = match finding.comparison.metric {
        Metric::Traffic => finding.counts.canary + finding.counts.stable,
        _ => finding.counts.canary,
    };
    let seen = format!("{} requests", grouped(requests));
    match finding.requests_needed {
        Some(needed) => format!("{seen}, about {} more needed", grouped(needed)),
        None if finding.counts.canary_bad + finding.counts.stable_bad == 0 => {
            format!("{seen}, not one of them bad in either release: nothing to compare")
        }
        None => format!("{seen}, too few to say how many more are needed"),
    }
}

/// `5,337:1`.
fn evidence(ln: f64) -> String {
    let odds = ln.exp();
    if odds > EVIDENCE_SHOWN_MAX {
        "more than 1,000,000,000:1".to_owned()
    } else {
        format!("{}:1", grouped(odds.round() as u64))
    }
}

fn percent(share: f64) -> String {
    format!("{:.2}%", share * 100.0)
}

fn milliseconds(us: u64) -> String {
    if us < 10_000 { format!("{:.1} ms", us as f64 / 1000.0) } else { format!("{} ms", us / 1000) }
}

fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..=59 => format!("{seconds}s"),
        60..=3599 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
    }
}

/// A number with its thousands apart.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
