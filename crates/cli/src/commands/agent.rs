//! `agent`: the part that runs on a host.

use crate::args::{Agent, AgentRole};
use crate::failure::{Exit, Failure};

pub(crate) fn run(agent: Agent) -> Result<Exit, Failure> {
    match agent.role {
        None => greenlight_agent::serve(std::io::stdin(), std::io::stdout())
            .map_err(|error| Failure::from_error(Exit::Failed, &error))?,
        Some(AgentRole::Supervise { root, process }) => greenlight_agent::supervise(&root, &process)
            .map_err(|error| Failure::from_error(Exit::Failed, &error))?,
    }
    Ok(Exit::Done)
}
