//! The loop: world in, decision out, actions performed and recorded.
