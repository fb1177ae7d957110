//! HOLDS: the memory behind the ledger's slots.

pub(crate) mod disk;
pub mod disk_io;
mod host;
mod pools;
mod table;
pub(crate) mod wall_time;
mod warm;

pub(crate) use host::{HostSegments, Pages, segment_plan};
pub(crate) use pools::Pools;
pub(crate) use warm::WarmTables;
pub use warm::{Keeper, WarmHost, WarmSegment};
