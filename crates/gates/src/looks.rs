//! `command` and `probe`: what was looked at shortly before. Looking is the controller's; here it is judged.

use std::time::Duration;

use greenlight_model::evidence::{Fact, Recorded};
use greenlight_model::quantity::human_duration;
use greenlight_model::world::{Gate, Light};

use crate::Asked;

/// For how long a look counts. The rollout that it was made for may wait longer before it begins to change something.
pub const FRESH_FOR: Duration = Duration::from_secs(600);

pub(crate) fn gates(asked: &Asked<'_>) -> Vec<Gate> {
    let gates = &asked.environment.gates;
    let commands = gates.commands.keys().map(|name| {
        let is_of_gate = |fact: &Fact| matches!(fact, Fact::Command { name: of, .. } if of == name);
        Gate { name: format!("command {name}"), light: judge(asked, asked.latest_here(is_of_gate)) }
    });
    let probes = gates.probes.keys().map(|name| {
        let is_of_gate = |fact: &Fact| matches!(fact, Fact::Probe { name: of, .. } if of == name);
        Gate { name: format!("probe {name}"), light: judge(asked, asked.latest_here(is_of_gate)) }
    });
    commands.chain(probes).collect()
}

fn judge(asked: &Asked<'_>, latest: Option<&Recorded>) -> Light {
    let again = format!("`greenlight gates {} {}` looks now", asked.environment.name, asked.arguments());
    let Some(recorded) = latest else {
        return Light::Red { why: format!("nobody has looked; {again}") };
    };
    let age = asked.begun.unwrap_or(asked.now).duration_since(recorded.at);
    let age = Duration::try_from(age).unwrap_or_default();
    if age > FRESH_FOR {
        let (age, limit) = (human_duration(age), human_duration(FRESH_FOR));
        return Light::Red { why: format!("the last look is {age} old, and counts for {limit}; {again}") };
    }
    match recorded.fact() {
        Fact::Command { code: Some(0), .. } => Light::Green { why: "it succeeded".to_owned() },
        Fact::Command { code, output, .. } => {
            let ended = match code {
                Some(code) => format!("it ended with exit code {code}"),
                None => "it did not end by itself".to_owned(),
            };
            let said = output.last().map(|line| format!(": {line}")).unwrap_or_default();
            Light::Red { why: format!("{ended}{said}; when that is mended, {again}") }
        }
        Fact::Probe { is_up: true, found, .. } => Light::Green { why: found.clone() },
        fact => Light::Red { why: format!("{}; when that is mended, {again}", fact.summary()) },
    }
}
