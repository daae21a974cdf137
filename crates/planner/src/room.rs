//! How many instances of each service may still be taken out of service without breaking the floor.

use std::collections::BTreeMap;

use greenlight_model::action::Verb;
use greenlight_model::decision::Wait;
use greenlight_model::id::{Instance, ServiceName};

use crate::view::{Facts, View};

/// The room of every service, counted down while one decision takes instances out.
pub(crate) struct Rooms<'a>(BTreeMap<&'a ServiceName, Room>);

struct Room {
    /// Serving now, less those that are being, were told to be or will be taken out.
    serving: usize,
    /// Instances in the fleet file.
    instances: usize,
    /// Of those, how many are not this rollout's and do not serve.
    idle: usize,
    floor: usize,
    /// The floor for the way back: no more can be asked than ran before the rollout.
    floor_back: usize,
}

impl<'a> Rooms<'a> {
    pub(crate) fn new(view: &View<'a>) -> Self {
        let world = view.world;
        let baseline = &view.rollout().plan.baseline;
        let mut rooms: BTreeMap<&ServiceName, Room> = BTreeMap::new();
        for (service, hosts) in &view.hosts {
            let room = Room {
                serving: 0,
                instances: hosts.len(),
                idle: 0,
                floor: world.floor(service),
                floor_back: 0,
            };
            rooms.insert(*service, room);
        }
        let mut planned: BTreeMap<&ServiceName, usize> = BTreeMap::new();
        for facts in &view.facts {
            let Some(room) = rooms.get_mut(&facts.instance.service) else { continue };
            *planned.entry(&facts.instance.service).or_default() += 1;
            room.serving += usize::from(facts.serves && facts.is_counted() && !is_leaving(facts));
            room.floor_back += usize::from(facts.baseline.is_some());
        }
        for (service, room) in &mut rooms {
            // Hosts that joined the fleet file after the plan was made serve as well, but are not this rollout's.
            let planned = planned.get(service).copied().unwrap_or(0);
            if planned < room.instances {
                let others = world
                    .environment
                    .instances_of(service)
                    .filter(|instance| !baseline.contains_key(instance) && world.serves(instance))
                    .count();
                room.idle = room.instances.saturating_sub(planned + others);
                room.serving += others;
                room.floor_back += others;
            }
            room.floor_back = room.floor_back.min(room.floor);
        }
        Self(rooms)
    }

    /// Takes one serving instance out, or says why that cannot be now.
    pub(crate) fn take(&mut self, facts: &Facts<'_>, goes_back: bool) -> Result<(), Wait> {
        let service = &facts.instance.service;
        let Some(room) = self.0.get_mut(service) else { return Ok(()) };
        let floor = room.floor(goes_back);
        let counted = usize::from(facts.is_counted());
        if room.serving >= floor + counted {
            room.serving -= counted;
            return Ok(());
        }
        Err(Wait::Floor { service: service.clone(), serving: room.serving, floor })
    }

    /// Whether the floor keeps this instance in service for good, when so many others will not serve again.
    pub(crate) fn is_hopeless(&self, instance: &Instance, lost: usize, goes_back: bool) -> Option<String> {
        let room = self.0.get(&instance.service)?;
        let floor = room.floor(goes_back);
        // A way back has to end, whatever became of instances that it does not change.
        let lost = lost + if goes_back { room.idle } else { 0 };
        (room.instances.saturating_sub(lost + 1) < floor).then(|| {
            format!(
                "taking it out would leave fewer than {floor} of {} instances of {} serving, and {lost} cannot serve again",
                room.instances, instance.service
            )
        })
    }

    /// Why a wave that takes `out` instances of a service out at once can never begin.
    pub(crate) fn never_allows(&self, service: &ServiceName, out: usize) -> Option<String> {
        let room = self.0.get(service)?;
        (room.instances.saturating_sub(out) < room.floor).then(|| {
            format!(
                "the floor asks for {} of {} instances of {service} to keep serving, and the strategy takes out {out} at once: lower the floor, or choose a strategy that changes fewer together",
                room.floor, room.instances
            )
        })
    }

    /// Instances serving, and how many must.
    pub(crate) fn serving(&self, service: &ServiceName, goes_back: bool) -> (usize, usize) {
        self.0.get(service).map_or((0, 0), |room| (room.serving, room.floor(goes_back)))
    }
}

impl Room {
    fn floor(&self, goes_back: bool) -> usize {
        if goes_back { self.floor_back } else { self.floor }
    }
}

/// Whether an action under way takes it out of service.
fn is_leaving(facts: &Facts<'_>) -> bool {
    facts.in_flight.is_some_and(|in_flight| {
        matches!(in_flight.action.verb(), Verb::Drain | Verb::Activate | Verb::Deactivate)
    })
}
