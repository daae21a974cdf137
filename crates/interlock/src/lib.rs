//! World and action in, permit or violated rule out. Knows nothing of the planner.
