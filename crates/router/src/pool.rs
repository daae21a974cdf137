//! Idle connections of one worker to one backend.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use tokio::net::TcpStream;

/// Connections that ended cleanly and wait for another request. The last one used is taken first, so that under
/// lighter load the others grow old and are closed.
#[derive(Debug)]
pub(crate) struct Pool {
    idle: RefCell<Vec<Idle>>,
    open: Cell<bool>,
    limit: usize,
}

#[derive(Debug)]
struct Idle {
    stream: TcpStream,
    since: Duration,
}

impl Pool {
    pub(crate) fn new(limit: usize) -> Self {
        Self { idle: RefCell::default(), open: Cell::new(true), limit }
    }

    /// Whether the backend takes requests.
    pub(crate) fn is_open(&self) -> bool {
        self.open.get()
    }

    /// A closed pool keeps nothing.
    pub(crate) fn set_open(&self, open: bool) {
        self.open.set(open);
        if !open {
            self.idle.borrow_mut().clear();
        }
    }

    /// A connection that the backend has not closed, as far as this side can know. With `certain` the kernel is asked,
    /// which costs a system call: for requests that must not be sent twice.
    pub(crate) fn take(&self, certain: bool) -> Option<TcpStream> {
        loop {
            let idle = self.idle.borrow_mut().pop()?;
            if is_alive(&idle.stream, certain) {
                return Some(idle.stream);
            }
        }
    }

    pub(crate) fn put(&self, stream: TcpStream, now: Duration) {
        let mut idle = self.idle.borrow_mut();
        if self.open.get() && idle.len() < self.limit {
            idle.push(Idle { stream, since: now });
        }
    }

    /// Closes what has been idle since before `before`.
    pub(crate) fn close_idle(&self, before: Duration) {
        let mut idle = self.idle.borrow_mut();
        // The oldest are in front.
        let old = idle.iter().take_while(|idle| idle.since < before).count();
        idle.drain(..old);
    }
}

/// Whether nothing has come on an idle connection: neither its end nor bytes that nobody asked for.
fn is_alive(stream: &TcpStream, certain: bool) -> bool {
    let nothing = |result: std::io::Result<usize>| matches!(result, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock);
    if certain {
        let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
        return nothing(
            rustix::net::recv(stream, &mut [0u8; 1], flags)
                .map(|(_, count)| count)
                .map_err(std::io::Error::from),
        );
    }
    // Answered from what the event loop already knows, without a system call, unless something came.
    nothing(stream.try_read(&mut [0u8; 1]))
}
