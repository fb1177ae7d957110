//! HOLDS: the memory behind the ledger's slots.

pub(crate) mod disk;
pub mod disk_io;
mod engine_memory;
mod gpu_memory;
mod host;
mod nodes;
mod pools;
mod table;
pub(crate) mod wall_time;
mod warm;

pub use engine_memory::{
    EngineMemory, Export, Fragment, MapExports, MapShared, NoDeviceMemory, Pace, PeerCopy, RangeCopy,
};
pub(crate) use engine_memory::{EnginePoolMemory, MappedBlocks};
pub use gpu_memory::MapGpus;
#[cfg(test)]
pub(crate) use gpu_memory::StandInGpus;
pub(crate) use host::{HostSegments, segment_plan};
pub(crate) use nodes::SegmentNodes;
pub use pools::is_gpu;
pub(crate) use pools::{OwnedPool, Pools};
pub(crate) use warm::WarmTables;
pub use warm::{Keeper, WarmHost, WarmSegment, WarmWords};
