//! The record log: append-only, numbered, compare-and-swap.
