//! Words for what the model says: one place, so that `plan`, `deploy`, `status` and `history` speak alike.

use greenlight_model::Timestamp;
use greenlight_model::action::{Action, Verb};
use greenlight_model::decision::{Outcome, Wait};
use greenlight_model::id::{HostName, Instance, ReleaseId};
use greenlight_model::quantity::human_duration;
use greenlight_model::rollout::Note;
use greenlight_model::world::InFlight;

use crate::failure::Exit;

/// What an action does, for a line that begins with its instance.
pub(crate) fn action(action: &Action, title: impl Fn(ReleaseId) -> String) -> String {
    match action {
        Action::Preflight { release, .. } => format!("check that {} can go there", title(*release)),
        Action::Claim { .. } => "claim it for this rollout".to_owned(),
        Action::Stage { release, .. } => format!("stage {}", title(*release)),
        Action::Smoke { release, .. } => format!("start {} on its smoke port", title(*release)),
        Action::Migrate { release, .. } => format!("migrate for {}", title(*release)),
        Action::Contract { release, .. } => format!("take away what {} needs no more", title(*release)),
        Action::Drain { .. } => "drain".to_owned(),
        Action::Activate { release, .. } => format!("activate {}", title(*release)),
        Action::Deactivate { .. } => "take the service off".to_owned(),
        Action::Confirm { release, .. } => format!("confirm {}", title(*release)),
        Action::Admit { .. } => "admit".to_owned(),
        Action::Share { share: Some(share), .. } => format!("give the canary {share} of the traffic"),
        Action::Share { share: None, .. } => "share the traffic as usual".to_owned(),
        Action::Prune { .. } => "remove old releases".to_owned(),
        Action::Unclaim { .. } => "give the claim back".to_owned(),
    }
}

/// What an action is called while it is under way.
pub(crate) fn under_way(verb: Verb) -> &'static str {
    match verb {
        Verb::Preflight => "checking",
        Verb::Claim => "claiming",
        Verb::Stage => "staging",
        Verb::Smoke => "smoke start",
        Verb::Migrate => "migrating",
        Verb::Contract => "contracting",
        Verb::Drain => "draining",
        Verb::Activate => "activating",
        Verb::Deactivate => "taking off",
        Verb::Confirm => "confirming",
        Verb::Admit => "admitting",
        Verb::Share => "sharing out",
        Verb::Prune => "pruning",
        Verb::Unclaim => "releasing",
    }
}

/// What is under way, as `activating one/web, draining two/web`; none when nothing is.
pub(crate) fn all_under_way(in_flight: &[InFlight]) -> Option<String> {
    let parts: Vec<String> = in_flight
        .iter()
        .map(|InFlight { action, .. }| format!("{} {}", under_way(action.verb()), action.instance()))
        .collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// Why something does not move.
pub(crate) fn wait(wait: &Wait, now: Timestamp) -> String {
    let left = |until: &Timestamp| human_duration(until.duration_since(now).try_into().unwrap_or_default());
    let gone = |since: &Timestamp| human_duration(now.duration_since(*since).try_into().unwrap_or_default());
    match wait {
        Wait::Action { instance, verb, since } => {
            format!("{instance}: {} for {}", under_way(*verb), gone(since))
        }
        Wait::Sessions { instance, left: sessions, until } => {
            format!("{instance}: {sessions} sessions to end; cut in {}", left(until))
        }
        Wait::BalancerHealth { instance, until } => {
            format!("{instance}: the balancer does not see it up yet; given up in {}", left(until))
        }
        Wait::Floor { service, serving, floor } => {
            format!("{service}: {serving} serving, the floor is {floor}; none may go out now")
        }
        Wait::Fallback { until } => {
            format!("the old half is kept as the way back for another {}", left(until))
        }
        Wait::Learning { until } => {
            format!("the canary's hosts are watched for another {}, to know what is usual", left(until))
        }
        Wait::Verdict { share, why, requests_needed, until } => {
            let needed = match requests_needed {
                Some(count) => format!("; about {count} more of its requests needed"),
                None => String::new(),
            };
            format!("canary at {share}: {why}{needed}; at most {} more", left(until))
        }
        Wait::Wave { number, instances } => {
            let names: Vec<String> = instances.iter().map(ToString::to_string).collect();
            format!("wave {number} is not proven on {}", names.join(", "))
        }
        Wait::Held { by, why } => format!("held by {by}: {why}"),
        Wait::Gate { name, why } => format!("gate `{name}`: {why}"),
        Wait::Unreachable { host, since, why } => {
            format!("{host}: unreachable for {}: {}", gone(since), silence(host, why))
        }
        // A driver's own words begin with the balancer already.
        Wait::Balancer { title, why } if why.starts_with(title.as_str()) => why.clone(),
        Wait::Balancer { title, why } => format!("{title}: {why}"),
        Wait::Claim { instance, holder, rollout, expires_at } => {
            format!("{instance}: claimed by {holder} for {rollout}, another {}", left(expires_at))
        }
    }
}

/// A turn of the rollout's own.
pub(crate) fn note(note: &Note) -> String {
    match note {
        Note::WaveProven { wave } => format!("wave {} is proven", wave + 1),
        Note::StepPassed { step, why, .. } => format!("step {} of the canary is passed: {why}", step + 1),
        Note::Ask { step, why, .. } => {
            format!(
                "step {} of the canary waits for you (`resume` goes on, `abort` goes back): {why}",
                step + 1
            )
        }
        Note::LeaveOut { instance, why } => format!("{instance} is left out: {why}"),
        Note::TurnBack { why, .. } => format!("turning back: {why}"),
        Note::Hold { why } => format!("holding: {why}"),
    }
}

/// How a rollout ended, in one line.
pub(crate) fn outcome(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Done { left_out } if left_out.is_empty() => "DONE".to_owned(),
        Outcome::Done { left_out } => {
            let names: Vec<String> =
                left_out.iter().map(|(instance, why)| format!("{instance} ({why})")).collect();
            format!("DONE, without {}", names.join(", "))
        }
        Outcome::Refused { why } => format!("REFUSED, nothing was changed: {why}"),
        Outcome::TurnedBack { why } => format!("TURNED BACK, all as before: {why}"),
        Outcome::Stuck { why, instances } => {
            // What made it turn back is often what keeps it from going back, and is said once.
            let name = |(instance, reason): (&Instance, &String)| match why.contains(reason.as_str()) {
                true => instance.to_string(),
                false => format!("{instance} ({reason})"),
            };
            let names: Vec<String> = instances.iter().map(name).collect();
            format!("NOT FULLY TURNED BACK: {why}; mend {}, then deploy or roll back again", names.join(", "))
        }
    }
}

/// The exit code that an outcome has.
pub(crate) fn exit(outcome: &Outcome) -> Exit {
    match outcome {
        Outcome::Done { .. } => Exit::Done,
        Outcome::Refused { .. } | Outcome::TurnedBack { .. } => Exit::Failed,
        Outcome::Stuck { .. } => Exit::Stuck,
    }
}

/// Why a host does not answer, for a line that names the host already.
pub(crate) fn silence<'a>(host: &HostName, why: &'a str) -> &'a str {
    why.strip_prefix(host.as_str()).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(why)
}

/// How long ago, for lists.
pub(crate) fn ago(at: Timestamp, now: Timestamp) -> String {
    format!("{} ago", human_duration(now.duration_since(at).try_into().unwrap_or_default()))
}

/// Rows in columns as wide as their widest cell, two spaces between them.
pub(crate) fn table(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| shown(cell)).max().unwrap_or_default()
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    rows.iter()
        .map(|row| {
            let padded =
                |(cell, width): (&String, &usize)| format!("{cell}{}", " ".repeat(width - shown(cell)));
            row.iter().zip(&widths).map(padded).collect::<Vec<_>>().join("  ").trim_end().to_owned()
        })
        .collect()
}

/// How many columns of the screen a cell takes; colours take none.
fn shown(cell: &str) -> usize {
    anstream::adapter::strip_str(cell).to_string().chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use owo_colors::OwoColorize;

    #[test]
    fn columns_align_whatever_their_colour() {
        let rows = [vec!["a".green().to_string(), "x".to_owned()], vec!["long".to_owned(), "y".to_owned()]];
        let lines = table(&rows).into_iter().map(|line| anstream::adapter::strip_str(&line).to_string());
        assert_eq!(lines.collect::<Vec<_>>(), ["a     x", "long  y"]);
    }
}
