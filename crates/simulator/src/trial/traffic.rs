//! Balancers as they truly are, and the clients that send requests through them all the time.

use std::collections::BTreeMap;

use greenlight_model::traffic::{Admission, BalancerReport, Server, ServerHealth};

use super::agent::{From, Purpose};
use super::scenario::Ms;
use super::trial::{Event, Trial};

/// How often a balancer checks its servers.
pub(super) const HEALTH_INTERVAL_MS: Ms = 500;
/// How often clients send.
pub(super) const CLIENTS_INTERVAL_MS: Ms = 350;
/// How long the controller waits for a balancer's answer.
pub(super) const BALANCER_TIMEOUT_MS: Ms = 1_500;

pub(super) struct BalancerTruth {
    pub(super) service: usize,
    /// By host; none where the service does not run.
    pub(super) servers: Vec<Option<ServerTruth>>,
    turn: usize,
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
#[derive(Debug, Clone, Copy)]
pub(super) enum Command {
    Read,
    Set { host: usize, admission: Admission },
}

impl BalancerTruth {
    pub(super) fn new(service: usize, hosts: usize, members: &[usize], is_up: bool) -> Self {
        let health = if is_up { ServerHealth::Up } else { ServerHealth::Down };
        let server =
            ServerTruth { admission: Admission::Ready, health, sessions: 0, is_foreign: false, life: 0 };
        let servers = (0..hosts).map(|host| members.contains(&host).then_some(server)).collect();
        Self { service, servers, turn: 0 }
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
            let count = self.hosts.len();
            let from = self.balancers[index].turn;
            let chosen = (0..count)
                .map(|step| (from + step) % count)
                .find(|host| self.balancers[index].sends_to(*host));
            let Some(host) = chosen else { continue };
            self.balancers[index].turn = host + 1;
            self.request(index, host);
        }
    }

    fn request(&mut self, balancer: usize, host: usize) {
        let service = self.balancers[balancer].service;
        let is_up = self.hosts[host].is_up;
        self.requests += 1;
        let Some(process) = self.hosts[host].instances[service].process.filter(|one| is_up && one.is_ready)
        else {
            // Lost. That a process is never stopped while requests come is judged where it is stopped.
            self.requests_lost += 1;
            return;
        };
        self.check_answer(balancer, host, service, process.release);
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

    pub(super) fn balancer_report(&self, balancer: usize) -> BalancerReport {
        let servers: BTreeMap<_, _> = self.balancers[balancer]
            .servers
            .iter()
            .enumerate()
            .filter_map(|(host, server)| {
                let ServerTruth { admission, health, sessions, .. } = (*server)?;
                let server = Server { admission, health, sessions, weight: 100, normal_weight: 100 };
                Some((self.site.hosts[host].clone(), server))
            })
            .collect();
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
