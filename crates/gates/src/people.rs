//! `approval`, `checklist` and `release_note`: what people agree to, see to and say.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_model::evidence::{Fact, Recorded};
use greenlight_model::gate::{ApprovalGate, Checklist, holds, user};
use greenlight_model::id::{ReleaseId, ServiceName};
use greenlight_model::world::{Gate, Light};

use crate::{Asked, some};

pub(crate) fn gates(asked: &Asked<'_>) -> Vec<Gate> {
    let gates = &asked.environment.gates;
    let mut lights = Vec::new();
    if gates.release_note {
        lights.extend(asked.targets.iter().map(|(service, release)| note(asked, service, *release)));
    }
    lights.extend(gates.checklist.iter().map(|list| checklist(asked, list)));
    lights.extend(gates.approvals.iter().map(|gate| {
        let light = match approval(asked, gate) {
            Ok(why) => Light::Green { why },
            Err(why) => Light::Red { why },
        };
        Gate { name: format!("approval {}", gate.role), light }
    }));
    lights
}

fn note(asked: &Asked<'_>, service: &ServiceName, release: ReleaseId) -> Gate {
    let light = match asked.latest_of(service, release, |fact| matches!(fact, Fact::Note { .. })) {
        Some(note) => Light::Green { why: format!("{}: {}", note.by, note.evidence.fact.summary()) },
        None => Light::Red {
            why: format!(
                "{} has no note; write one: greenlight evidence add {} --note FILE",
                asked.label(release),
                asked.argument(service, release)
            ),
        },
    };
    Gate { name: format!("release_note ({service})"), light }
}

fn checklist(asked: &Asked<'_>, list: &Checklist) -> Gate {
    let ticked: BTreeSet<&str> = asked
        .here()
        .filter_map(|recorded| match recorded.fact() {
            Fact::Tick { item, .. } => Some(item.as_str()),
            _ => None,
        })
        .collect();
    let open = |items: &[String]| -> Vec<String> {
        items
            .iter()
            .filter(|item| !ticked.contains(item.as_str()))
            .map(|item| format!("\"{item}\""))
            .collect()
    };
    let (missing, optional) = (open(&list.required), open(&list.optional));
    let light = if let Some(first) = missing.first() {
        let why = format!(
            "not ticked: {}; tick what you saw to: greenlight tick {} {first} {}",
            missing.join(", "),
            asked.environment.name,
            asked.arguments()
        );
        Light::Red { why }
    } else {
        let count = list.required.len();
        let rest = if optional.is_empty() {
            String::new()
        } else {
            format!("; optional and open: {}", optional.join(", "))
        };
        Light::Green { why: format!("all {count} required items are ticked{rest}") }
    };
    Gate { name: "checklist".to_owned(), light }
}

fn approval(asked: &Asked<'_>, gate: &ApprovalGate) -> Result<String, String> {
    let role = &gate.role;
    let mut latest: BTreeMap<&str, &Recorded> = BTreeMap::new();
    for recorded in asked.here() {
        if matches!(recorded.fact(), Fact::Approval { role: given, .. } if given == role) {
            latest.entry(user(&recorded.by)).or_insert(recorded);
        }
    }
    let digest = asked.plan.map(|plan| plan.digest);
    let mut approved = Vec::new();
    let mut aside = Vec::new();
    let mut moved = None;
    for (name, recorded) in latest {
        if !holds(&asked.fleet.roles, role, &recorded.by) {
            aside.push(format!("{name} is no {role} any more"));
        } else if let Some(why) = own_doing(asked, gate, name) {
            aside.push(format!("{name} {why}, and four eyes are asked for"));
        } else if digest.is_none() || recorded.evidence.digest != digest {
            moved = Some((name, recorded));
        } else {
            approved.push(name.to_owned());
        }
    }
    let wanted = usize::try_from(gate.count).unwrap_or(usize::MAX);
    if approved.len() >= wanted {
        return Ok(format!("{} approved this plan", approved.join(", ")));
    }
    let how = format!("greenlight approve {} {} --role {role}", asked.environment.name, asked.arguments());
    let mut why = match moved {
        Some((name, recorded)) => {
            format!("the plan is not the one that {name} approved: {}; ", what_moved(asked, recorded))
        }
        None => String::new(),
    };
    why.push_str(&match approved.len() {
        0 => format!("{wanted} of role {role} must approve this plan, and nobody has"),
        count => format!("{count} of {wanted} of role {role} approved this plan ({})", approved.join(", ")),
    });
    for aside in aside {
        why.push_str(&format!("; {aside}"));
    }
    Err(format!("{why}; another one approves it with: {how}"))
}

/// Why somebody's approval would be of their own doing.
fn own_doing(asked: &Asked<'_>, gate: &ApprovalGate, name: &str) -> Option<&'static str> {
    if !gate.four_eyes {
        return None;
    }
    if asked.asked_by.is_some_and(|by| user(by) == name) {
        return Some("asks for the rollout");
    }
    let built = |release: &ReleaseId| asked.release(*release).is_some_and(|it| user(&it.built_by) == name);
    asked.targets.values().any(built).then_some("built the release")
}

/// The difference between the plan that was approved and the one that is.
fn what_moved(asked: &Asked<'_>, recorded: &Recorded) -> String {
    let Fact::Approval { plan: before, .. } = recorded.fact() else { return String::new() };
    let Some(now) = asked.plan.and_then(|plan| plan.text) else { return "it was made anew".to_owned() };
    let lines = |of: &str, other: &str| -> Vec<String> {
        let other: BTreeSet<&str> = other.lines().collect();
        of.lines().filter(|line| !other.contains(line)).map(|line| format!("`{}`", shortened(line))).collect()
    };
    let (gone, new) = (lines(before, now), lines(now, before));
    match (gone.is_empty(), new.is_empty()) {
        (true, true) => "its steps come in another order".to_owned(),
        (true, false) => format!("new is {}", some(&new)),
        (false, true) => format!("{} is gone", some(&gone)),
        (false, false) => format!("{} became {}", some(&gone), some(&new)),
    }
}

/// A line of a plan with ids as people see them.
fn shortened(line: &str) -> String {
    let words = line.split(' ').map(|word| match word.parse::<ReleaseId>() {
        Ok(release) => release.short(),
        Err(_) => word.to_owned(),
    });
    words.collect::<Vec<_>>().join(" ")
}
