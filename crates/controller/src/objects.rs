//! The objects of one rollout's releases on their way to all of its hosts.
//!
//! Guarantees: hosts that want the same objects at about the same time share one reading of each, and one making of each
//! difference; what is held for that has a limit, whatever the releases and however many hosts.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use greenlight_depot::{Depot, DepotError, EncodedObject};
use greenlight_link::connection::ObjectSource;
use greenlight_link::frame::Encoding;
use greenlight_model::id::ContentHash;

/// Most bytes that are held for hosts which are behind. Hosts of one wave begin together and are seldom further apart.
const HELD_BYTES_MAX: usize = 32 << 20;

/// An object, and what it is sent as the difference to.
type Key = (ContentHash, Option<ContentHash>);

/// Reads from the depot for many hosts.
pub(crate) struct DepotObjects {
    depot: Arc<Depot>,
    held: Mutex<Held>,
}

/// What was read last, oldest first.
#[derive(Default)]
struct Held {
    objects: HashMap<Key, Arc<EncodedObject>>,
    order: VecDeque<Key>,
    bytes: usize,
}

impl Held {
    fn keep(&mut self, key: Key, object: &Arc<EncodedObject>) {
        // Two hosts may have read it at the same time.
        if self.objects.insert(key, Arc::clone(object)).is_some() {
            return;
        }
        self.order.push_back(key);
        self.bytes += object.data.len();
        while self.bytes > HELD_BYTES_MAX {
            let oldest = self.order.pop_front().and_then(|oldest| self.objects.remove(&oldest));
            self.bytes -= oldest.map_or(0, |oldest| oldest.data.len());
        }
    }
}

impl DepotObjects {
    pub(crate) fn new(depot: Arc<Depot>) -> Arc<Self> {
        Arc::new(Self { depot, held: Mutex::default() })
    }

    fn get(&self, key: Key) -> Result<Arc<EncodedObject>, DepotError> {
        // Nothing panics while it is held; if something did, what is held would still be objects.
        let held = || self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(object) = held().objects.get(&key) {
            return Ok(Arc::clone(object));
        }
        let object = Arc::new(match key {
            (hash, Some(base)) => self.depot.object_as_difference(hash, base)?,
            (hash, None) => self.depot.object(hash)?,
        });
        held().keep(key, &object);
        Ok(object)
    }
}

impl ObjectSource for DepotObjects {
    fn object(&self, hash: ContentHash, base: Option<ContentHash>) -> io::Result<(Encoding, Vec<u8>)> {
        let object = self.get((hash, base)).map_err(io::Error::other)?;
        let encoding = match object.encoding {
            greenlight_depot::Encoding::Raw => Encoding::Raw,
            greenlight_depot::Encoding::Zstd => Encoding::Zstd,
            greenlight_depot::Encoding::Delta => Encoding::Delta,
        };
        Ok((encoding, object.data.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_has_a_limit_and_goes_oldest_first() {
        let mut held = Held::default();
        let key = |n: u8| (ContentHash::from_bytes([n; 32]), None);
        let object = |bytes| {
            Arc::new(EncodedObject { encoding: greenlight_depot::Encoding::Raw, data: vec![0; bytes] })
        };
        for n in 0..40 {
            held.keep(key(n), &object(1 << 20));
            held.keep(key(n), &object(1 << 20));
        }
        assert_eq!((held.bytes, held.objects.len(), held.order.len()), (32 << 20, 32, 32));
        assert!(!held.objects.contains_key(&key(7)) && held.objects.contains_key(&key(8)));
        held.keep(key(99), &object(HELD_BYTES_MAX + 1));
        assert_eq!(
            (held.bytes, held.objects.len(), held.order.len()),
            (0, 0, 0),
            "one that is too large stays out"
        );
    }
}
