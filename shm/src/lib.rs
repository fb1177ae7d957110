//! Shared memory between the daemon and the processes it serves: sealed memfds, descriptor passing, mapped ranges,
//! shared words, and the kernel's word on whether a process is still alive.
//!
//! Memory that another process maps can change under our hands at any time. So nothing here hands out references to
//! its bytes: they are copied in and out, or reached through an address by code that is allowed unsafe.

mod error;
mod lent_memory;
mod memory;
mod pool_memory;
mod pool_words;
mod process_watch;
mod reading_copy;
mod side_socket;
mod streaming_copy;

pub use error::Error;
pub use lent_memory::LentMemory;
pub use memory::{Copies, LARGE_PAGE, SharedMemory};
pub use pool_memory::{DeviceMemory, POOL_HEADER_BYTES, POOL_STEPS_OFFSET, PoolLayout, PoolMemory};
pub use pool_words::{PinState, PinnedSlot, PoolWords};
pub use process_watch::ProcessWatch;
pub use side_socket::{Packet, Peer, Received, SideListener, SideSocket};
