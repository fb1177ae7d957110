//! Memory of a device pool: a header page, then, on a CPU, the blocks, one stride apart. Blocks in a GPU's memory are behind
//! a descriptor of their own, which goes with the header wherever that goes; block 0 is at its start.
//!
//! ```text
//! byte  0 magic "kvbmpool"   8 version   16 uuid (16 bytes)   32 block bytes   40 block count
//! byte  48 bytes of the GPU's memory (0: blocks follow here)  64 epoch   128 steps (a line of 64 bytes, the engine's)
//! byte  4096 block 0,  4096 + stride block 1, ...                             all words u64, little endian
//! ```
//!
//! The *epoch* says who may write: the engine raises it when it stops listening to the daemon, before it reuses any
//! block. Whoever copies out of the pool reads the epoch again after the copy and discards what it copied if the epoch
//! has moved (a seqlock of which only the reader retries, by giving up).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::{Error, SharedMemory};

/// Bytes before block 0.
pub const POOL_HEADER_BYTES: usize = 4096;
/// Where in the header an engine tells how fast it decodes.
pub const POOL_STEPS_OFFSET: usize = 128;

const MAGIC: u64 = u64::from_le_bytes(*b"kvbmpool");
const VERSION: u64 = 1;

/// Offsets of the header's 8-byte words.
mod field {
    pub const MAGIC: usize = 0;
    pub const VERSION: usize = 8;
    pub const UUID: usize = 16;
    pub const BLOCK_BYTES: usize = 32;
    pub const BLOCK_COUNT: usize = 40;
    pub const DEVICE_BYTES: usize = 48;
    pub const EPOCH: usize = 64;
}

/// Sizes of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolLayout {
    /// KV bytes of one block.
    pub block_bytes: usize,
    /// Blocks in the pool.
    pub block_count: u32,
}

impl PoolLayout {
    /// Bytes from one block to the next: the block rounded up to a page.
    pub fn stride(&self) -> usize {
        self.block_bytes.next_multiple_of(4096)
    }

    /// Bytes from the start of the memory to `block`.
    pub fn offset(&self, block: u32) -> usize {
        assert!(block < self.block_count, "block {block} is not one of {}", self.block_count);
        POOL_HEADER_BYTES + block as usize * self.stride()
    }

    /// Bytes of a pool, header included; `None` if no memory could have them.
    pub fn memory_bytes(&self) -> Option<usize> {
        if self.block_bytes == 0 || self.block_count == 0 {
            return None;
        }
        let padded = self.block_bytes.checked_next_multiple_of(4096)?;
        padded.checked_mul(self.block_count as usize)?.checked_add(POOL_HEADER_BYTES)
    }

    fn check(&self) -> Result<usize, Error> {
        self.memory_bytes().ok_or_else(|| Error::refused(format!("a pool of {self:?} is not possible")))
    }
}

/// Memory of a GPU that other processes can map too.
#[derive(Debug)]
pub struct DeviceMemory {
    /// To be imported by whoever maps it.
    pub descriptor: OwnedFd,
    /// Its size, bytes, which is no less than that of all blocks.
    pub bytes: usize,
}

/// A mapped pool. Of one on a GPU only the header is mapped here.
#[derive(Debug)]
pub struct PoolMemory {
    memory: Arc<SharedMemory>,
    layout: PoolLayout,
    uuid: [u8; 16],
    device: Option<DeviceMemory>,
}

impl PoolMemory {
    /// Creates a pool with epoch 1 and unpopulated pages.
    pub fn create(uuid: [u8; 16], layout: PoolLayout) -> Result<Self, Error> {
        Self::write_header(uuid, layout, layout.check()?, None)
    }

    /// Creates the header of a pool with epoch 1 whose blocks are in `device`.
    pub fn create_on_device(uuid: [u8; 16], layout: PoolLayout, device: DeviceMemory) -> Result<Self, Error> {
        let needed = layout.check()? - POOL_HEADER_BYTES;
        if device.bytes < needed {
            let reason = format!("{} bytes of a GPU are less than the {needed} of {layout:?}", device.bytes);
            return Err(Error::refused(reason));
        }
        Self::write_header(uuid, layout, POOL_HEADER_BYTES, Some(device))
    }

    fn write_header(
        uuid: [u8; 16],
        layout: PoolLayout,
        bytes: usize,
        device: Option<DeviceMemory>,
    ) -> Result<Self, Error> {
        let memory = Arc::new(SharedMemory::create("kvbm-pool", bytes)?);
        let word = |offset| memory.word64(offset);
        let device_bytes = device.as_ref().map_or(0, |device| device.bytes);
        memory.write(field::UUID, &uuid);
        word(field::BLOCK_BYTES).store(layout.block_bytes as u64, Ordering::Relaxed);
        word(field::BLOCK_COUNT).store(layout.block_count.into(), Ordering::Relaxed);
        word(field::DEVICE_BYTES).store(device_bytes as u64, Ordering::Relaxed);
        word(field::VERSION).store(VERSION, Ordering::Relaxed);
        word(field::EPOCH).store(1, Ordering::Relaxed);
        word(field::MAGIC).store(MAGIC, Ordering::Release);
        Ok(Self { memory, layout, uuid, device })
    }

    /// Maps a pool received from another process and checks its header.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, Error> {
        Self::from_fds(fd, None)
    }

    /// As [`PoolMemory::from_fd`]; `device` is the GPU's memory that came with it.
    pub fn from_fds(fd: OwnedFd, device: Option<OwnedFd>) -> Result<Self, Error> {
        let memory = Arc::new(SharedMemory::from_fd(fd)?);
        let read = |offset| memory.word64(offset).load(Ordering::Acquire);
        if read(field::MAGIC) != MAGIC || read(field::VERSION) != VERSION {
            return Err(Error::refused("it has no pool header of version 1"));
        }
        let block_bytes = usize::try_from(read(field::BLOCK_BYTES)).unwrap_or(0);
        let block_count = u32::try_from(read(field::BLOCK_COUNT)).unwrap_or(0);
        let layout = PoolLayout { block_bytes, block_count };
        let whole = layout.check()?;
        let device_bytes = usize::try_from(read(field::DEVICE_BYTES)).unwrap_or(usize::MAX);
        let device = match (device, device_bytes) {
            (None, 0) => None,
            (Some(descriptor), bytes @ 1..) => Some(DeviceMemory { descriptor, bytes }),
            (None, _) => return Err(Error::refused("its blocks are on a GPU, of which no descriptor came")),
            (Some(_), 0) => {
                return Err(Error::refused("a descriptor of a GPU came with it, which it does not need"));
            }
        };
        let (here, there) = match &device {
            None => (whole, 0),
            Some(_) => (POOL_HEADER_BYTES, whole - POOL_HEADER_BYTES),
        };
        if here != memory.bytes() || there > device_bytes {
            return Err(Error::refused(format!(
                "its header promises {layout:?}, it has {} bytes, and {device_bytes} of a GPU",
                memory.bytes()
            )));
        }
        let mut uuid = [0; 16];
        memory.read(field::UUID, &mut uuid);
        Ok(Self { memory, layout, uuid, device })
    }

    /// Name of the pool, chosen by its creator.
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// Sizes.
    pub fn layout(&self) -> PoolLayout {
        self.layout
    }

    /// The header and, on a CPU, the blocks.
    pub fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    /// The GPU's memory that has the blocks: its descriptor and its size, bytes. `None`: they follow the header.
    pub fn device(&self) -> Option<(BorrowedFd<'_>, usize)> {
        self.device.as_ref().map(|device| (device.descriptor.as_fd(), device.bytes))
    }

    /// Bytes from the start of the memory that has the blocks to block 0.
    pub fn blocks_offset(&self) -> usize {
        if self.device.is_some() { 0 } else { POOL_HEADER_BYTES }
    }

    /// The descriptor, to be passed on.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }

    fn epoch_word(&self) -> &AtomicU64 {
        self.memory.word64(field::EPOCH)
    }

    /// The current epoch. Bytes copied out before this call were those of this epoch if it has not moved since.
    pub fn epoch(&self) -> u64 {
        fence(Ordering::Acquire);
        self.epoch_word().load(Ordering::SeqCst)
    }

    /// Begins a new epoch, before any block is written again, and returns it.
    pub fn raise_epoch(&self) -> u64 {
        let epoch = self.epoch_word().fetch_add(1, Ordering::SeqCst) + 1;
        fence(Ordering::SeqCst);
        epoch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: PoolLayout = PoolLayout { block_bytes: 5000, block_count: 3 };

    #[test]
    fn a_pool_is_adopted_with_its_layout_name_and_epoch() {
        let pool = PoolMemory::create([9; 16], LAYOUT).unwrap();
        assert_eq!(pool.raise_epoch(), 2);
        let other = PoolMemory::from_fd(pool.fd().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!((other.layout(), other.uuid(), other.epoch()), (LAYOUT, [9; 16], 2));
        assert_eq!(LAYOUT.offset(2), 4096 + 2 * 8192);
    }

    #[test]
    fn memory_without_header_or_with_a_lying_one_is_refused() {
        let plain = SharedMemory::create("test", 8192).unwrap();
        assert!(PoolMemory::from_fd(plain.fd().try_clone_to_owned().unwrap()).is_err());
        let pool = PoolMemory::create([1; 16], LAYOUT).unwrap();
        pool.memory().word64(field::BLOCK_COUNT).store(u64::MAX, Ordering::Relaxed);
        assert!(PoolMemory::from_fd(pool.fd().try_clone_to_owned().unwrap()).is_err());
        pool.memory().word64(field::BLOCK_COUNT).store(4, Ordering::Relaxed);
        assert!(PoolMemory::from_fd(pool.fd().try_clone_to_owned().unwrap()).is_err());
    }

    #[test]
    fn blocks_on_a_gpu_go_with_their_header_and_only_so() {
        let descriptor = || SharedMemory::create("gpu", 4096).unwrap().fd().try_clone_to_owned().unwrap();
        let on_device = |bytes| DeviceMemory { descriptor: descriptor(), bytes };
        assert!(PoolMemory::create_on_device([7; 16], LAYOUT, on_device(3 * 8192 - 1)).is_err());
        let pool = PoolMemory::create_on_device([7; 16], LAYOUT, on_device(2 << 20)).unwrap();
        assert_eq!((pool.memory().bytes(), pool.blocks_offset()), (POOL_HEADER_BYTES, 0));
        let fd = || pool.fd().try_clone_to_owned().unwrap();
        let other = PoolMemory::from_fds(fd(), Some(descriptor())).unwrap();
        assert_eq!(other.device().map(|(_, bytes)| bytes), Some(2 << 20));
        assert!(PoolMemory::from_fd(fd()).is_err());
        let on_host = PoolMemory::create([7; 16], LAYOUT).unwrap();
        assert!(
            PoolMemory::from_fds(on_host.fd().try_clone_to_owned().unwrap(), Some(descriptor())).is_err()
        );
        pool.memory().word64(field::DEVICE_BYTES).store(8192, Ordering::Relaxed);
        assert!(PoolMemory::from_fds(fd(), Some(descriptor())).is_err());
    }

    #[test]
    fn impossible_layouts_are_refused() {
        for layout in [
            PoolLayout { block_bytes: 0, block_count: 1 },
            PoolLayout { block_bytes: 1, block_count: 0 },
            PoolLayout { block_bytes: usize::MAX - 5, block_count: 2 },
        ] {
            assert!(PoolMemory::create([0; 16], layout).is_err(), "{layout:?}");
        }
    }
}
