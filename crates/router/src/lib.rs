//! The built-in data plane: an HTTP router in front of the releases.
