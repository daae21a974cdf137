//! `agent`: the part that runs on a host.

use std::time::Duration;

use greenlight_model::id::Generation;

use crate::args::{Agent, AgentRole};
use crate::failure::{Exit, Failure};

pub(crate) fn run(agent: Agent) -> Result<Exit, Failure> {
    match agent.role {
        None => greenlight_agent::serve(std::io::stdin(), std::io::stdout())
            .map_err(|error| Failure::from_error(Exit::Failed, &error))?,
        Some(AgentRole::Supervise { root, process }) => greenlight_agent::supervise(&root, &process)
            .map_err(|error| Failure::from_error(Exit::Failed, &error))?,
        Some(AgentRole::Guard { root, generation, armed_at_ms, after_ms }) => {
            let after = after_ms.map(Duration::from_millis);
            greenlight_agent::guard(&root, Generation(generation), armed_at_ms, after)
                .map_err(|error| Failure::from_error(Exit::Failed, &error))?;
        }
        Some(AgentRole::Rearm { root }) => {
            greenlight_agent::rearm(&root).map_err(|error| Failure::from_error(Exit::Failed, &error))?;
        }
    }
    Ok(Exit::Done)
}
