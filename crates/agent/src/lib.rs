//! What runs on a host: places, activates, supervises, observes.
