//! What a copy may read and write.

use std::sync::Arc;

use kvbm_shm::SharedMemory;

use crate::memory::check;
use crate::{DeviceAddress, DeviceRange, RegisteredMemory};

/// Mapped memory. A batch holds what it copies from and to until it has ended.
#[derive(Debug, Clone)]
pub enum CopyMemory {
    /// Of a GPU.
    Device(Arc<dyn DeviceRange>),
    /// Of the host, known to the driver.
    Registered(Arc<RegisteredMemory>),
    /// Of the host, without a GPU.
    Shared(Arc<SharedMemory>),
}

impl CopyMemory {
    /// Size, as far as it can be copied, bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Device(memory) => memory.bytes(),
            Self::Registered(memory) => memory.registered(),
            Self::Shared(memory) => memory.bytes(),
        }
    }

    /// Address of the byte at `offset`, and how many from there on one copy may cover.
    pub(super) fn place(&self, offset: usize) -> (DeviceAddress, usize) {
        check(offset, 1, self.bytes());
        let left = self.bytes() - offset;
        match self {
            Self::Device(memory) => (memory.address().plus(offset), left),
            Self::Registered(memory) => {
                let chunk = memory.chunk_bytes();
                (memory.device_address(offset), left.min(chunk - offset % chunk))
            }
            Self::Shared(memory) => {
                (DeviceAddress(memory.address().as_ptr().expose_provenance() as u64).plus(offset), left)
            }
        }
    }

    /// True if both are the same mapping.
    pub(super) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Device(a), Self::Device(b)) => Arc::ptr_eq(a, b),
            (Self::Registered(a), Self::Registered(b)) => Arc::ptr_eq(a, b),
            (Self::Shared(a), Self::Shared(b)) => Arc::ptr_eq(a, b),
            (Self::Device(_) | Self::Registered(_) | Self::Shared(_), _) => false,
        }
    }
}
