//! The preview: what a rollout would do if nothing goes wrong.

use std::collections::BTreeMap;
use std::fmt::Write;

use greenlight_model::Timestamp;
use greenlight_model::action::{Action, Verb};
use greenlight_model::check::CheckPattern;
use greenlight_model::decision::{Outcome, Wait};
use greenlight_model::id::Instance;
use greenlight_model::migration::Loss;
use greenlight_model::rollout::Note;
use greenlight_model::world::{Gate, Light, World};
use serde::Serialize;

use crate::simulated::Faults;
use crate::simulation::{Simulation, SimulationError, Turn};

/// Turns that a rollout may take per instance before the preview gives up: a dozen actions, each begun and ended, with
/// room for waits and notes. A rollout that takes more does not end.
const TURNS_PER_INSTANCE_MAX: usize = 100;

/// What a rollout would do.
#[derive(Debug, Clone, PartialEq)]
pub struct Preview {
    /// The steps, in the order in which they would begin.
    pub steps: Vec<PreviewStep>,
    /// The turns the rollout would take of its own.
    pub notes: Vec<PreviewNote>,
    /// The checks that would not stop it though they fail.
    pub overrides: Vec<CheckPattern>,
    /// Gates that are not green. The steps are those that follow once they are.
    pub gates: Vec<Gate>,
    /// How it would end; none when it would wait for something that time alone does not bring, a gate among them.
    pub outcome: Option<Outcome>,
    /// What it would wait for in the end: the gates that are not green, or what it cannot get past.
    pub waits: Vec<Wait>,
    /// What its migrations would take away from the database.
    pub losses: Vec<Loss>,
    /// How long it would take, by estimate, in milliseconds.
    pub took_ms: u64,
    /// Why the preview broke off, which is a defect of Greenlight: such a plan must not be performed.
    pub error: Option<SimulationError>,
}

/// One step of a preview.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PreviewStep {
    /// The index of its wave, from 0; none for what comes before and after the waves.
    pub wave: Option<usize>,
    /// What would be done.
    pub action: Action,
    /// Why.
    pub why: String,
    /// When it would begin, by estimate, in milliseconds from the start.
    pub at_ms: u64,
}

/// A turn in the rollout's own course.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PreviewNote {
    /// Which.
    pub note: Note,
    /// When, by estimate, in milliseconds from the start.
    pub at_ms: u64,
}

/// Runs the planner and the interlock against a simulated copy of the world until the rollout ends or cannot move.
///
/// Gates that are not green are listed, and taken as green for the steps: what an approval is asked for must be seen
/// before it is given.
#[must_use]
pub fn preview(world: &World) -> Preview {
    let mut world = world.clone();
    let gates = std::mem::take(&mut world.gates);
    let start = world.now;
    let turns_max = TURNS_PER_INSTANCE_MAX * (world.rollout.plan.baseline.len() + 1);
    let waves = waves_by_instance(&world);
    let mut simulation = Simulation::new(world, Faults::default());
    let mut preview = Preview {
        steps: Vec::new(),
        notes: Vec::new(),
        overrides: simulation.world().rollout.plan.overrides.keys().cloned().collect(),
        waits: Vec::new(),
        gates: Vec::new(),
        outcome: None,
        losses: simulation.world().rollout.plan.losses.clone(),
        took_ms: 0,
        error: None,
    };
    preview.stop_at(&gates);
    for _ in 0..turns_max {
        let at_ms = milliseconds(start, simulation.world().now);
        preview.took_ms = at_ms;
        match simulation.turn() {
            Ok(Turn::Began(steps)) => preview.steps.extend(steps.into_iter().map(|step| {
                PreviewStep {
                    wave: waves
                        .get(step.action.instance())
                        .copied()
                        .filter(|_| is_change(&step.action) && step.action.migration_phase().is_none()),
                    action: step.action,
                    why: step.why,
                    at_ms,
                }
            })),
            Ok(Turn::Noted(note)) => preview.notes.push(PreviewNote { note, at_ms }),
            Ok(Turn::Passed(_)) => {}
            Ok(Turn::Ended(outcome)) => {
                preview.outcome = Some(outcome).filter(|_| preview.gates.is_empty());
                return preview;
            }
            Ok(Turn::Stopped(waits)) => {
                preview.waits.extend(waits);
                return preview;
            }
            Err(error) => {
                preview.error = Some(error);
                return preview;
            }
        }
    }
    preview.error = Some(SimulationError::Endless(turns_max));
    preview
}

impl Preview {
    /// Notes the gates that are not green: the rollout would stop there. For gates that are judged by what the preview shows,
    /// which come after it.
    pub fn stop_at(&mut self, gates: &[Gate]) {
        let shut = gates.iter().filter(|gate| !matches!(gate.light, Light::Green { .. }));
        self.gates.extend(shut.cloned());
        let waits: Vec<Wait> = self.gates.iter().filter_map(gate_wait).collect();
        self.waits.splice(0..0, waits);
        self.outcome = self.outcome.take().filter(|_| self.gates.is_empty());
    }

    /// The preview as canonical text: what an approval binds to, by its hash. It has what would change, in order and by
    /// wave; not what only prepares or tidies up, nor estimates, reasons and lights. So it stays the same when bytes are
    /// staged meanwhile, and differs when something else would be done.
    #[must_use]
    pub fn digest_text(&self) -> String {
        let mut text = String::from("greenlight plan 1\n");
        for step in self.steps.iter().filter(|step| is_change(&step.action)) {
            let action = &step.action;
            let wave = step.wave.map_or("-".to_owned(), |wave| (wave + 1).to_string());
            // Writing to a string does not fail.
            let _ = write!(text, "{wave} {} {}", action.verb(), action.instance());
            if let Some(release) = action.release() {
                let _ = write!(text, " {release}");
            }
            if let Action::Activate { generation, .. }
            | Action::Deactivate { generation, .. }
            | Action::Confirm { generation, .. } = action
            {
                let _ = write!(text, " generation {generation}");
            }
            text.push('\n');
        }
        for pattern in &self.overrides {
            let _ = writeln!(text, "override {pattern}");
        }
        for loss in &self.losses {
            let _ = writeln!(text, "- {} takes away: {}", loss.service, loss.statement);
        }
        text
    }
}

fn gate_wait(gate: &Gate) -> Option<Wait> {
    match &gate.light {
        Light::Green { .. } => None,
        Light::Amber { why } | Light::Red { why } => {
            Some(Wait::Gate { name: gate.name.clone(), why: why.clone() })
        }
    }
}

/// Whether an action changes what runs or gets requests.
fn is_change(action: &Action) -> bool {
    match action.verb() {
        Verb::Migrate
        | Verb::Contract
        | Verb::Drain
        | Verb::Activate
        | Verb::Deactivate
        | Verb::Confirm
        | Verb::Admit
        | Verb::Share => true,
        Verb::Preflight | Verb::Claim | Verb::Stage | Verb::Smoke | Verb::Prune | Verb::Unclaim => false,
    }
}

fn waves_by_instance(world: &World) -> BTreeMap<Instance, usize> {
    let waves = world.rollout.plan.waves.iter().enumerate();
    waves
        .flat_map(|(index, wave)| wave.instances.iter().map(move |instance| (instance.clone(), index)))
        .collect()
}

fn milliseconds(start: Timestamp, now: Timestamp) -> u64 {
    u64::try_from(now.duration_since(start).as_millis()).unwrap_or(0)
}
