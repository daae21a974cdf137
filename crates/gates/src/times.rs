//! `window`, `freeze` and `traffic`: what time brings by itself.

use greenlight_model::calendar::left;
use greenlight_model::gate::TrafficGate;
use greenlight_model::quantity::human_duration;
use greenlight_model::traffic::BalancerReport;
use greenlight_model::world::{Gate, Light};

use crate::Asked;

pub(crate) fn gates(asked: &Asked<'_>) -> Vec<Gate> {
    let gates = &asked.environment.gates;
    let mut lights = Vec::new();
    if !gates.windows.is_empty() {
        lights.push(Gate { name: "window".to_owned(), light: window(asked) });
    }
    if !gates.freezes.is_empty() {
        lights.push(Gate { name: "freeze".to_owned(), light: freeze(asked) });
    }
    if let Some(gate) = &gates.traffic {
        lights.push(Gate { name: "traffic".to_owned(), light: traffic(asked, gate) });
    }
    lights
}

fn window(asked: &Asked<'_>) -> Light {
    let (windows, now) = (&asked.environment.gates.windows, asked.now);
    let open = windows.iter().filter_map(|window| Some((window.closes(now)?, window)));
    if let Some((closes, window)) = open.max_by_key(|(closes, _)| *closes) {
        return Light::Green { why: format!("open until {}", window.shown(closes)) };
    }
    let next = windows.iter().filter_map(|window| Some((window.opens(now)?, window)));
    match next.min_by_key(|(opens, _)| *opens) {
        Some((opens, window)) => Light::Amber {
            why: format!("shut; it opens {}, in {}", window.shown(opens), human_duration(left(now, opens))),
        },
        None => Light::Red { why: "shut, and it never opens; state another window".to_owned() },
    }
}

fn freeze(asked: &Asked<'_>) -> Light {
    let now = asked.now;
    let frozen = asked.environment.gates.freezes.iter().filter_map(|it| Some((it.when.ends(now)?, it)));
    match frozen.max_by_key(|(ends, _)| *ends) {
        None => Light::Green { why: "nothing is frozen now".to_owned() },
        Some((ends, freeze)) => Light::Amber {
            why: format!(
                "frozen until {}, for another {}: {}",
                freeze.when.shown(ends),
                human_duration(left(now, ends)),
                freeze.reason
            ),
        },
    }
}

fn traffic(asked: &Asked<'_>, gate: &TrafficGate) -> Light {
    let limit = gate.sessions_below;
    let mut sessions: u64 = 0;
    for (balancer, report) in asked.environment.balancers.iter().zip(asked.traffic) {
        match report {
            BalancerReport::Servers(servers) => {
                sessions += servers.values().map(|server| server.sessions).sum::<u64>();
            }
            BalancerReport::Unreachable { why } => {
                let title = balancer.title();
                return Light::Red { why: format!("how much there is cannot be read: {title}: {why}") };
            }
        }
    }
    if sessions < limit {
        Light::Green { why: format!("{sessions} sessions, fewer than {limit}") }
    } else {
        Light::Amber { why: format!("{sessions} sessions; it waits until there are fewer than {limit}") }
    }
}
