//! The releases of one rollout on their way to all of its hosts.
//!
//! Guarantees: all hosts that a release goes to share one reading of its manifest, and what [`Shipment`] shares.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use greenlight_depot::{Depot, Shipment};
use greenlight_link::connection::{Lacking, Parcel, Parcels, ReleaseSource};
use greenlight_link::frame::Encoding;
use greenlight_model::id::ReleaseId;

/// The releases of one depot, by those that were asked for.
pub(crate) struct Shipments {
    depot: Arc<Depot>,
    known: Mutex<HashMap<ReleaseId, Arc<Shipment>>>,
}

impl Shipments {
    pub(crate) fn new(depot: Arc<Depot>) -> Arc<Self> {
        Arc::new(Self { depot, known: Mutex::default() })
    }

    /// A release, to be read when it is first sent.
    pub(crate) fn of(self: &Arc<Self>, release: ReleaseId) -> Arc<dyn ReleaseSource> {
        Arc::new(Source { shipments: Arc::clone(self), release })
    }

    fn get(&self, release: ReleaseId) -> io::Result<Arc<Shipment>> {
        // Held while one is made: the others wait for the same. A panic then leaves what was there.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shipment) = known.get(&release) {
            return Ok(Arc::clone(shipment));
        }
        let shipment = Shipment::new(Arc::clone(&self.depot), release).map_err(io::Error::other)?;
        known.insert(release, Arc::clone(&shipment));
        Ok(shipment)
    }
}

struct Source {
    shipments: Arc<Shipments>,
    release: ReleaseId,
}

impl ReleaseSource for Source {
    fn manifest(&self) -> io::Result<Parcel> {
        let parcel = self.shipments.get(self.release)?.manifest().map_err(io::Error::other)?;
        Ok(Parcel { encoding: Encoding::Manifest, ..on_the_wire(parcel) })
    }

    fn parcels(&self, lacking: Lacking) -> io::Result<Box<dyn Parcels>> {
        let Lacking { objects, bases } = lacking;
        let lacking = greenlight_depot::Lacking { objects, bases };
        let parcels = self.shipments.get(self.release)?.parcels(lacking).map_err(io::Error::other)?;
        Ok(Box::new(OfOneHost(parcels)))
    }
}

struct OfOneHost(greenlight_depot::Parcels);

impl Parcels for OfOneHost {
    fn next(&mut self) -> io::Result<Option<Parcel>> {
        self.0.next().map(|parcel| parcel.map(on_the_wire)).transpose().map_err(io::Error::other)
    }

    fn left_bytes(&self) -> u64 {
        self.0.left_bytes()
    }
}

fn on_the_wire(parcel: greenlight_depot::Parcel) -> Parcel {
    let greenlight_depot::Parcel { hash, encoding, objects, bytes, content } = parcel;
    let encoding = match encoding {
        greenlight_depot::Encoding::Raw => Encoding::Raw,
        greenlight_depot::Encoding::Zstd => Encoding::Zstd,
        greenlight_depot::Encoding::Delta => Encoding::Delta,
        greenlight_depot::Encoding::Pack => Encoding::Pack,
    };
    Parcel { hash, encoding, objects, bytes, content }
}
