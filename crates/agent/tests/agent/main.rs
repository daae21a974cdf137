//! The whole agent, over a connection, with a real application.

#[cfg(test)]
mod guard;
#[cfg(test)]
mod managers;
#[cfg(test)]
mod own_supervision;
#[cfg(test)]
mod sampling;
#[cfg(test)]
mod support;
