//! Balancers: HAProxy and the built-in router behind one trait.
