//! What a request has at hand while it is worked on.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use greenlight_link::message::{Event, Stream};
use greenlight_model::host::InstanceSpec;
use greenlight_model::id::ProcessName;

use crate::layout::Layout;
use crate::manager::Site;

/// What a request has at hand.
pub(crate) struct Context {
    /// Where its events go.
    pub(crate) events: Box<dyn Fn(Event) + Send + Sync>,
    /// Whether the controller's connection has ended.
    pub(crate) cancelled: Arc<AtomicBool>,
    /// The program that our own supervision is started with.
    pub(crate) program: PathBuf,
}

impl Context {
    /// Says that a step of the request begins.
    pub(crate) fn phase(&self, name: impl Into<String>) {
        (self.events)(Event::Phase { name: name.into() });
    }

    /// Passes a line on.
    pub(crate) fn line(&self, process: Option<&ProcessName>, stream: Stream, text: String) {
        (self.events)(Event::Line { process: process.cloned(), stream, text });
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// The service of `spec` on this host, as managers need it.
    pub(crate) fn site(&self, spec: &InstanceSpec) -> Site {
        Site { service: spec.service.clone(), layout: Layout::new(&spec.root), program: self.program.clone() }
    }
}
