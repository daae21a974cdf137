//! Builds releases, and places their bytes on a host.
