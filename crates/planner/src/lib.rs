//! World in, decision out: which step may come next, and why not.
