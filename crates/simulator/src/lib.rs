//! A simulated fleet, for the preview and for the tests of the planner.
