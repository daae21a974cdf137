//! Balancers as they truly are, and the clients that send requests through them all the time.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_model::quantity::Percent;
use greenlight_model::traffic::{Admission, BalancerReport, Server, ServerHealth, weights};

use super::agent::{From, Purpose};
use super::scenario::{Badness, Ms};
use super::trial::{Event, Trial};

/// How often a balancer checks its servers.
pub(super) const HEALTH_INTERVAL_MS: Ms = 500;
/// How often clients send.
pub(super) const CLIENTS_INTERVAL_MS: Ms = 350;
/// How long the controller waits for a balancer's answer.
pub(super) const BALANCER_TIMEOUT_MS: Ms = 1_500;
/// How long a canary's share is lent without being renewed.
pub(super) const LEASE_MS: Ms = 4_000;

pub(super) struct BalancerTruth {
    pub(super) service: usize,
    /// By host; none where the service does not run.
    pub(super) servers: Vec<Option<ServerTruth>>,
    turn: usize,
    /// The share of the traffic that a canary was given last.
    pub(super) lent: Option<Lent>,
    /// By host, since it was started.
    pub(super) counts: Vec<Counted>,
    /// When it was started again last.
    pub(super) restarted_at: Option<Ms>,
    /// When nobody could see it last: out of reach, or no controller was there.
    pub(super) unseen_at: Ms,
}

/// A canary's share at a balancer.
#[derive(Debug, Clone)]
pub(super) struct Lent {
    pub(super) hosts: BTreeSet<usize>,
    pub(super) share: Percent,
    /// When it returns to stable; never where nothing is lent.
    pub(super) until: Option<Ms>,
}

impl Lent {
    pub(super) fn is_over(&self, now: Ms) -> bool {
        self.until.is_some_and(|until| until <= now)
    }
}

/// What a balancer counted for a host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) requests: u64,
    pub(super) errors: u64,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct ServerTruth {
    pub(super) admission: Admission,
    pub(super) health: ServerHealth,
    pub(super) sessions: u64,
    /// Whether something else than Greenlight set it last.
    pub(super) is_foreign: bool,
    /// Counts its lives, so that sessions of an earlier one are known.
    life: u32,
}

/// What a balancer is asked.
#[derive(Debug, Clone)]
pub(super) enum Command {
    Read,
    Set {
        host: usize,
        admission: Admission,
    },
    /// Gives hosts a share of the traffic; without one all servers get their usual part.
    Share {
        hosts: BTreeSet<usize>,
        share: Option<Percent>,
    },
    /// Asks what was counted, and lends for longer what is lent.
    Count {
        renews: bool,
    },
}

impl BalancerTruth {
    pub(super) fn new(service: usize, hosts: usize, members: &[usize], is_up: bool) -> Self {
        let health = if is_up { ServerHealth::Up } else { ServerHealth::Down };
        let server =
            ServerTruth { admission: Admission::Ready, health, sessions: 0, is_foreign: false, life: 0 };
        let servers = (0..hosts).map(|host| members.contains(&host).then_some(server)).collect();
        let counts = vec![Counted::default(); hosts];
        Self { service, servers, turn: 0, lent: None, counts, restarted_at: None, unseen_at: 0 }
    }

    /// Whether it sends requests to a host.
    pub(super) fn sends_to(&self, host: usize) -> bool {
        self.servers[host]
            .is_some_and(|server| server.admission == Admission::Ready && server.health == ServerHealth::Up)
    }
}

impl Trial<'_> {
    pub(super) fn balancers_of(&self, service: usize) -> impl Iterator<Item = (usize, &BalancerTruth)> {
        self.balancers.iter().enumerate().filter(move |(_, balancer)| balancer.service == service)
    }

    pub(super) fn sessions(&self, host: usize, service: usize) -> u64 {
        let of_service = self.balancers_of(service);
        of_service.filter_map(|(_, balancer)| balancer.servers[host]).map(|server| server.sessions).sum()
    }

    pub(super) fn cut_sessions(&mut self, host: usize, service: usize) {
        for balancer in self.balancers.iter_mut().filter(|balancer| balancer.service == service) {
            if let Some(server) = &mut balancer.servers[host] {
                server.sessions = 0;
                server.life += 1;
            }
        }
    }

    /// Every balancer looks at its servers.
    pub(super) fn check_health(&mut self) {
        for index in 0..self.balancers.len() {
            let service = self.balancers[index].service;
            for host in 0..self.hosts.len() {
                let answers = self.hosts[host].is_up && self.hosts[host].instances[service].answers();
                if let Some(server) = &mut self.balancers[index].servers[host] {
                    server.health = if answers { ServerHealth::Up } else { ServerHealth::Down };
                }
            }
        }
    }

    /// Clients send a request to each service through each of its balancers.
    pub(super) fn clients_send(&mut self) {
        for index in 0..self.balancers.len() {
            let Some(host) = self.choose(index) else { continue };
            self.balancers[index].turn = host + 1;
            self.request(index, host);
        }
    }

    /// The server that gets the next request.
    fn choose(&mut self, index: usize) -> Option<usize> {
        let now = self.now;
        let percent = self.balancers[index].lent.as_ref().map(|lent| match lent.is_over(now) {
            true => 0,
            false => u64::from(lent.share.get()),
        });
        let wants_canary = percent.map(|percent| percent > 0 && self.numbers.chance(percent));
        let balancer = &self.balancers[index];
        let count = self.hosts.len();
        let find = |is_wanted: &dyn Fn(usize) -> bool| {
            let places = (0..count).map(|step| (balancer.turn + step) % count);
            places.into_iter().find(|host| balancer.sends_to(*host) && is_wanted(*host))
        };
        let (Some(lent), Some(wants_canary)) = (&balancer.lent, wants_canary) else { return find(&|_| true) };
        let is_canary = |host: usize| lent.hosts.contains(&host);
        let canary = || find(&is_canary);
        let stable = || find(&|host| !is_canary(host));
        // A canary that cannot take a request is stood in for by stable; where nothing is lent, also the other way round.
        match (wants_canary, lent.until) {
            (true, _) => canary().or_else(stable),
            (false, Some(_)) => stable(),
            (false, None) => stable().or_else(canary),
        }
    }

    fn request(&mut self, balancer: usize, host: usize) {
        let service = self.balancers[balancer].service;
        let is_up = self.hosts[host].is_up;
        self.requests += 1;
        self.balancers[balancer].counts[host].requests += 1;
        let Some(process) = self.hosts[host].instances[service].process.filter(|one| is_up && one.is_ready)
        else {
            // Lost. That a process is never stopped while requests come is judged where it is stopped.
            self.requests_lost += 1;
            self.balancers[balancer].counts[host].errors += 1;
            return;
        };
        self.check_answer(balancer, host, service, process.release);
        self.check_share(balancer, host, process.release);
        if let Some(Badness::AnswersWrongly(percent)) = self.badness(host, service, process.release)
            && self.numbers.chance(u64::from(percent))
        {
            self.balancers[balancer].counts[host].errors += 1;
        }
        if let Some(left) = process.requests_left {
            let serial = process.serial;
            match left.checked_sub(1) {
                Some(left) => {
                    if let Some(process) = &mut self.hosts[host].instances[service].process {
                        process.requests_left = Some(left);
                    }
                }
                None => self.process_ends(host, service, serial),
            }
        }
        if self.numbers.chance(25) {
            let ms = self.numbers.between(300, 7_000);
            if let Some(server) = &mut self.balancers[balancer].servers[host] {
                server.sessions += 1;
                let life = server.life;
                self.after(ms, Event::SessionEnds { balancer, host, life });
            }
        }
    }

    pub(super) fn session_ends(&mut self, balancer: usize, host: usize, life: u32) {
        if let Some(server) = &mut self.balancers[balancer].servers[host]
            && server.life == life
        {
            server.sessions = server.sessions.saturating_sub(1);
        }
    }

    /// A controller's command arrives at a balancer.
    pub(super) fn commanded(&mut self, from: From, balancer: usize, command: Command) {
        let result = match command {
            Command::Read => Ok(()),
            Command::Set { host, admission } => self.set(from, balancer, host, admission),
            Command::Share { hosts, share } => {
                self.share(from, balancer, hosts, share);
                Ok(())
            }
            Command::Count { renews } => return self.count_for(from, balancer, renews),
        };
        let report = result.map(|()| self.balancer_report(balancer));
        let latency = self.latency(from.controller);
        if self.is_balancer_cut(balancer) || self.is_lost() {
            return;
        }
        self.after(latency, Event::BalancerAnswered { from, balancer, result: report.map(Box::new) });
    }

    fn set(&mut self, from: From, balancer: usize, host: usize, admission: Admission) -> Result<(), String> {
        let service = self.balancers[balancer].service;
        let Some(server) = self.balancers[balancer].servers[host] else {
            return Err("it has no such server".to_owned());
        };
        match (server.admission, admission) {
            (Admission::Maintenance, Admission::Ready) => return Err("it is in maintenance".to_owned()),
            (Admission::Maintenance, _) => return Ok(()),
            (now, wanted) if now == wanted => return Ok(()),
            _ => {}
        }
        if admission == Admission::Ready {
            self.check_admission(host, service, from.began);
        }
        let served = self.serves(host, service);
        if let Some(server) = &mut self.balancers[balancer].servers[host] {
            server.admission = admission;
            server.is_foreign = false;
        }
        self.say(|trial| format!("balancer {balancer}: {} is {admission:?} now", trial.place(host, service)));
        if served && !self.serves(host, service) {
            let goes_back = self.check.goes_back_now(&self.site, host, service);
            self.check_floor(host, service, from.began, goes_back);
        }
        Ok(())
    }

    fn share(&mut self, from: From, balancer: usize, hosts: BTreeSet<usize>, share: Option<Percent>) {
        if let Some(share) = share {
            self.check_lent(balancer, &hosts, share, from.began);
        }
        let until = self.scenario.lends.then_some(self.now + LEASE_MS);
        self.say(|_| format!("balancer {balancer}: {share:?} for {hosts:?}"));
        self.balancers[balancer].lent = share.map(|share| Lent { hosts, share, until });
    }

    /// Tells what was counted. What is lent is lent for longer, unless it has returned to stable.
    fn count_for(&mut self, from: From, balancer: usize, renews: bool) {
        let now = self.now;
        let truth = &mut self.balancers[balancer];
        if let Some(lent) = &mut truth.lent
            && let Some(until) = &mut lent.until
            && renews
            && *until > now
        {
            *until = now + LEASE_MS;
            self.check_renewed(balancer, from.began);
        }
        let counts = self.balancers[balancer].counts.clone();
        let latency = self.latency(from.controller);
        if !self.is_balancer_cut(balancer) && !self.is_lost() {
            self.after(latency, Event::Counted { controller: from.controller, balancer, counts });
        }
    }

    pub(super) fn balancer_report(&self, balancer: usize) -> BalancerReport {
        let mut servers: BTreeMap<_, _> = self.balancers[balancer]
            .servers
            .iter()
            .enumerate()
            .filter_map(|(host, server)| {
                let ServerTruth { admission, health, sessions, .. } = (*server)?;
                let server = Server { admission, health, sessions, weight: 100, normal_weight: 100 };
                Some((self.site.hosts[host].clone(), server))
            })
            .collect();
        if let Some(lent) = &self.balancers[balancer].lent {
            let canaries = lent.hosts.iter().map(|host| self.site.hosts[*host].clone()).collect();
            let weights = weights(&servers, &canaries, lent.share);
            for (host, server) in &mut servers {
                let is_over = lent.is_over(self.now) && canaries.contains(host);
                server.weight = if is_over { 0 } else { weights.get(host).copied().unwrap_or(0) };
            }
        }
        BalancerReport::Servers(servers)
    }

    /// Sends a command to a balancer.
    pub(super) fn command(
        &mut self,
        controller: usize,
        purpose: Purpose,
        began: Ms,
        balancer: usize,
        command: Command,
    ) {
        let from = From { controller, purpose, began };
        // One that arrives after its sender has given it up is not modelled: nothing at a balancer fences it.
        let latency = self.latency(controller).min(BALANCER_TIMEOUT_MS - 1);
        if self.is_balancer_cut(balancer) || self.is_lost() {
            return;
        }
        self.after(latency, Event::BalancerCommanded { from, balancer, command });
    }

    pub(super) fn restart_balancer(&mut self, balancer: usize, has_state: bool) {
        let service = self.balancers[balancer].service;
        let (now, hosts) = (self.now, self.hosts.len());
        let truth = &mut self.balancers[balancer];
        truth.restarted_at = Some(now);
        truth.counts = vec![Counted::default(); hosts];
        match &mut truth.lent {
            // A lease is not kept: the canary gets nothing until somebody lends it something again.
            Some(Lent { until: Some(until), .. }) => *until = now,
            // Saved states have weights as well.
            Some(_) if has_state => {}
            lent => *lent = None,
        }
        for host in 0..self.hosts.len() {
            let answers = self.hosts[host].is_up && self.hosts[host].instances[service].answers();
            let Some(server) = &mut self.balancers[balancer].servers[host] else { continue };
            if !has_state && server.admission != Admission::Ready {
                server.admission = Admission::Ready;
                server.is_foreign = true;
            }
            server.sessions = 0;
            server.life += 1;
            // Without checks that have passed it takes them for up until they have failed.
            server.health = if answers { ServerHealth::Up } else { ServerHealth::Down };
            self.hit(host, service);
        }
    }

    pub(super) fn set_by_hand(&mut self, balancer: usize, host: usize, admission: Admission) {
        let service = self.balancers[balancer].service;
        if let Some(server) = &mut self.balancers[balancer].servers[host]
            && server.admission != admission
        {
            server.admission = admission;
            server.is_foreign = true;
            self.hit(host, service);
        }
    }
}
