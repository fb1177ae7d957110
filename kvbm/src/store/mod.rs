//! HOLDS: the memory behind the ledger's slots.

pub mod disk_io;
mod host;
mod pools;

pub(crate) use host::{HostSegments, segment_plan};
pub(crate) use pools::Pools;
