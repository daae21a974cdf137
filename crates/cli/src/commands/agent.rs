//! `agent`: the part that runs on a host.

use crate::args::{Agent, AgentRole};
use crate::failure::{Exit, Failure};

pub(crate) fn run(agent: Agent) -> Result<Exit, Failure> {
    let ended = match agent.role {
        None => greenlight_agent::serve_stdio(),
        Some(AgentRole::Supervise { root, process }) => greenlight_agent::supervise(&root, &process),
        Some(AgentRole::RunWith { env_file, command }) => greenlight_agent::run_with(&env_file, &command),
    };
    ended.map(|()| Exit::Done).map_err(|error| Failure::from_error(Exit::Failed, &error))
}
