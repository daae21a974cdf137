//! Real services on hosts of a bed.

pub(crate) mod haproxy;
pub(crate) mod postgres;
