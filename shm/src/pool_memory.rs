//! Memory of a device pool on a CPU: a header page, then the blocks, one stride apart.
//!
//! ```text
//! byte  0 magic "kvbmpool"   8 version   16 uuid (16 bytes)   32 block bytes   40 block count   64 epoch
//! byte  4096 block 0,  4096 + stride block 1, ...                             all words u64, little endian
//! ```
//!
//! The *epoch* says who may write: the engine raises it when it stops listening to the daemon, before it reuses any
//! block. Whoever copies out of the pool reads the epoch again after the copy and discards what it copied if the epoch
//! has moved (a seqlock of which only the reader retries, by giving up).

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::{Error, SharedMemory};

/// Bytes before block 0.
pub const POOL_HEADER_BYTES: usize = 4096;

const MAGIC: u64 = u64::from_le_bytes(*b"kvbmpool");
const VERSION: u64 = 1;

/// Offsets of the header's 8-byte words.
mod field {
    pub const MAGIC: usize = 0;
    pub const VERSION: usize = 8;
    pub const UUID: usize = 16;
    pub const BLOCK_BYTES: usize = 32;
    pub const BLOCK_COUNT: usize = 40;
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

/// A mapped pool.
#[derive(Debug)]
pub struct PoolMemory {
    memory: SharedMemory,
    layout: PoolLayout,
    uuid: [u8; 16],
}

impl PoolMemory {
    /// Creates a pool with epoch 1 and unpopulated pages.
    pub fn create(uuid: [u8; 16], layout: PoolLayout) -> Result<Self, Error> {
        let memory = SharedMemory::create("kvbm-pool", layout.check()?)?;
        let word = |offset| memory.word64(offset);
        memory.write(field::UUID, &uuid);
        word(field::BLOCK_BYTES).store(layout.block_bytes as u64, Ordering::Relaxed);
        word(field::BLOCK_COUNT).store(layout.block_count.into(), Ordering::Relaxed);
        word(field::VERSION).store(VERSION, Ordering::Relaxed);
        word(field::EPOCH).store(1, Ordering::Relaxed);
        word(field::MAGIC).store(MAGIC, Ordering::Release);
        Ok(Self { memory, layout, uuid })
    }

    /// Maps a pool received from another process and checks its header.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, Error> {
        let memory = SharedMemory::from_fd(fd)?;
        let read = |offset| memory.word64(offset).load(Ordering::Acquire);
        if read(field::MAGIC) != MAGIC || read(field::VERSION) != VERSION {
            return Err(Error::refused("it has no pool header of version 1"));
        }
        let block_bytes = usize::try_from(read(field::BLOCK_BYTES)).unwrap_or(0);
        let block_count = u32::try_from(read(field::BLOCK_COUNT)).unwrap_or(0);
        let layout = PoolLayout { block_bytes, block_count };
        if layout.check()? != memory.bytes() {
            return Err(Error::refused(format!(
                "its header promises {layout:?}, it has {} bytes",
                memory.bytes()
            )));
        }
        let mut uuid = [0; 16];
        memory.read(field::UUID, &mut uuid);
        Ok(Self { memory, layout, uuid })
    }

    /// Name of the pool, chosen by its creator.
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// Sizes.
    pub fn layout(&self) -> PoolLayout {
        self.layout
    }

    /// The whole memory, header included.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
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
