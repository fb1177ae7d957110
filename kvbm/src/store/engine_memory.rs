//! KV memory that belongs to an engine, mapped by the daemon.
//!
//! The seam between the block manager and whatever memory it is: [`MapExports`] maps what an engine exported, and
//! [`EngineMemory`] copies ranges of it from and to host memory. On a CPU it is a sealed memfd and a memcpy.

use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use kvbm_cuda::Context;
use kvbm_cuda::copy_engine::{CopyMemory, Copying};
use kvbm_shm::{Copies, DeviceMemory, PoolWords, SharedMemory};
use parking_lot::Mutex;

/// Memory that an engine lets the daemon map.
#[derive(Debug)]
pub enum Export {
    /// A sealed memfd.
    Shared(OwnedFd),
    /// An allocation of a GPU, by the handle of the driver's interprocess interface.
    CudaIpc {
        /// The handle.
        handle: [u8; 64],
        /// Bytes from the start of the allocation.
        offset: u64,
        /// Bytes of the memory.
        bytes: u64,
        /// Of which GPU.
        gpu_uuid: String,
    },
    /// An allocation of a GPU, by a descriptor of virtual memory management.
    CudaVmm {
        /// The descriptor.
        descriptor: OwnedFd,
        /// Bytes of the memory.
        bytes: u64,
        /// Of which GPU.
        gpu_uuid: String,
    },
}

/// A piece of each block: block b has [offset + b * stride, + bytes) of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment {
    /// Which export.
    pub export: usize,
    /// Of block 0, bytes.
    pub offset: usize,
    /// From one block to the next, bytes.
    pub stride: usize,
    /// Its length.
    pub bytes: usize,
}

/// One range of an export, and where in host memory it comes from or goes to.
#[derive(Debug, Clone, Copy)]
pub struct RangeCopy<'a> {
    /// Which export.
    pub export: usize,
    /// Its first byte.
    pub offset: usize,
    /// A host segment.
    pub host: &'a Arc<SharedMemory>,
    /// The first byte there.
    pub host_offset: usize,
    /// How many.
    pub bytes: usize,
}

/// One range of an export of another memory, and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerCopy {
    /// Which export of the other.
    pub from_export: usize,
    /// Its first byte.
    pub from_offset: usize,
    /// Which export of this one.
    pub export: usize,
    /// The first byte there.
    pub offset: usize,
    /// How many.
    pub bytes: usize,
}

/// How fast copies out of an engine's memory go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// So that the engine's steps suffer no more than their share.
    Background,
    /// As fast as they can.
    Full,
}

/// Why memory of a GPU cannot be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoDeviceMemory {
    /// There is less: so many bytes are free.
    Exhausted(u64),
    /// Anything else.
    Impossible(String),
}

/// Mapped memory of an engine. Copies are complete when they return, or are waited for; one that fails says why.
pub trait EngineMemory: Debug + Send + Sync {
    /// Bytes of an export; `None`: there is no such export.
    fn bytes(&self, export: usize) -> Option<usize>;

    /// Bytes that are best copied by one call, at least one block. A generation is compared before and after each call.
    fn bytes_at_once(&self) -> usize;

    /// Begins to copy out of the engine's memory.
    fn begin_copy_out(&self, pace: Pace, copies: &[RangeCopy<'_>]) -> Result<Copying, String>;

    /// Begins to copy into the engine's memory.
    fn begin_copy_in(&self, copies: &[RangeCopy<'_>]) -> Result<Copying, String>;

    /// Out of the engine's memory.
    fn copy_out(&self, pace: Pace, copies: &[RangeCopy<'_>]) -> Result<(), String> {
        self.begin_copy_out(pace, copies)?.wait().map(|_| ())
    }

    /// Into the engine's memory.
    fn copy_in(&self, copies: &[RangeCopy<'_>]) -> Result<(), String> {
        self.begin_copy_in(copies)?.wait().map(|_| ())
    }

    /// An export as the copy engines of a GPU take it, `None`: of no GPU, and where it begins there. `None`: there is no such
    /// export. Or why there is no way to it.
    fn piece(&self, export: usize, reader: Option<&Context>) -> Result<Option<(CopyMemory, usize)>, String>;

    /// Makes sure that copies from another memory can reach it, or says why they cannot.
    fn connect(&self, from: &dyn EngineMemory) -> Result<(), String>;

    /// Out of another memory to which this one is connected.
    fn copy_from(&self, from: &dyn EngineMemory, copies: &[PeerCopy]) -> Result<(), String>;

    /// Host memory will be copied from and to: what has to be done about it first, and takes long, is done now.
    fn prepare(&self, _host: &Arc<SharedMemory>) {}

    /// The engine tells there how fast it decodes, at that byte: copies in the background are paced by it from now on.
    fn pace_by(&self, _words: &Arc<SharedMemory>, _offset: usize) {}
}

/// Maps what engines export.
pub trait MapExports: Debug + Send + Sync {
    /// All exports of one pool, or why that cannot be.
    fn map(&self, exports: Vec<Export>) -> Result<Arc<dyn EngineMemory>, String>;

    /// The node of the machine's memory that a device is closest to; `None`: there is only one, or it is not known.
    fn node_of(&self, _device: &str) -> Option<u32> {
        None
    }

    /// New memory of a GPU, zeroed, of at least so many bytes; and what others need to map it too.
    fn allocate(
        &self,
        gpu_uuid: &str,
        bytes: usize,
    ) -> Result<(Arc<dyn EngineMemory>, DeviceMemory), NoDeviceMemory>;
}

/// Maps memfds, and nothing of a GPU.
#[derive(Debug, Clone, Copy, Default)]
pub struct MapShared;

impl MapExports for MapShared {
    fn map(&self, exports: Vec<Export>) -> Result<Arc<dyn EngineMemory>, String> {
        let map = |export| match export {
            Export::Shared(fd) => SharedMemory::from_fd(fd).map(Arc::new).map_err(|error| error.to_string()),
            Export::CudaIpc { .. } | Export::CudaVmm { .. } => {
                Err("this daemon has no CUDA: open the pool as staged".to_owned())
            }
        };
        let mapped: Result<Vec<_>, String> = exports.into_iter().map(map).collect();
        Ok(Arc::new(SharedExports(mapped?)))
    }

    fn allocate(&self, _: &str, _: usize) -> Result<(Arc<dyn EngineMemory>, DeviceMemory), NoDeviceMemory> {
        Err(NoDeviceMemory::Impossible("this daemon has no CUDA".into()))
    }
}

#[derive(Debug)]
struct SharedExports(Vec<Arc<SharedMemory>>);

impl EngineMemory for SharedExports {
    fn bytes(&self, export: usize) -> Option<usize> {
        self.0.get(export).map(|memory| memory.bytes())
    }

    fn bytes_at_once(&self) -> usize {
        0
    }

    fn begin_copy_out(&self, _: Pace, ranges: &[RangeCopy<'_>]) -> Result<Copying, String> {
        let copies = Copies::default();
        for range in ranges {
            let to = (&**range.host, range.host_offset);
            self.0[range.export].copy_in(&copies, range.offset, to, range.bytes, None);
        }
        Ok(Copying::ended())
    }

    fn begin_copy_in(&self, ranges: &[RangeCopy<'_>]) -> Result<Copying, String> {
        let copies = Copies::default();
        for range in ranges {
            let to = (&*self.0[range.export], range.offset);
            range.host.copy_in(&copies, range.host_offset, to, range.bytes, None);
        }
        Ok(Copying::ended())
    }

    fn piece(&self, export: usize, _reader: Option<&Context>) -> Result<Option<(CopyMemory, usize)>, String> {
        Ok(self.0.get(export).map(|memory| (CopyMemory::Shared(Arc::clone(memory)), 0)))
    }

    fn connect(&self, from: &dyn EngineMemory) -> Result<(), String> {
        match from.piece(0, None)? {
            Some((CopyMemory::Shared(_), _)) => Ok(()),
            Some(_) | None => Err("it is in memory of a GPU".into()),
        }
    }

    fn copy_from(&self, from: &dyn EngineMemory, ranges: &[PeerCopy]) -> Result<(), String> {
        let copies = Copies::default();
        for range in ranges {
            let Some((CopyMemory::Shared(memory), start)) = from.piece(range.from_export, None)? else {
                return Err("it is in memory of a GPU".into());
            };
            let to = (&*self.0[range.export], range.offset);
            memory.copy_in(&copies, start + range.from_offset, to, range.bytes, None);
        }
        Ok(())
    }
}

/// Blocks that are copied by one call, however small they are.
const BLOCKS_AT_ONCE_MAX: usize = 1024;

/// A mapped pool: where its blocks are.
#[derive(Debug)]
pub(crate) struct MappedBlocks {
    pub memory: Arc<dyn EngineMemory>,
    fragments: Vec<Fragment>,
}

impl MappedBlocks {
    /// Checks that all blocks lie within the exports, and that their pieces are `block_bytes` together.
    pub fn new(
        memory: Arc<dyn EngineMemory>,
        fragments: Vec<Fragment>,
        block_bytes: usize,
        block_count: u32,
    ) -> Result<Self, String> {
        let whole = fragments.iter().try_fold(0usize, |sum, fragment| sum.checked_add(fragment.bytes));
        if whole != Some(block_bytes) {
            return Err(format!("have {whole:?} bytes, a block has {block_bytes}"));
        }
        for (at, fragment) in fragments.iter().enumerate() {
            let bytes =
                memory.bytes(fragment.export).ok_or(format!("[{at}].export: there is no such export"))?;
            let last = (block_count as usize - 1).checked_mul(fragment.stride);
            let end = last
                .and_then(|last| last.checked_add(fragment.offset))
                .and_then(|last| last.checked_add(fragment.bytes));
            if end.is_none_or(|end| end > bytes) {
                return Err(format!("[{at}]: {block_count} blocks do not fit into {bytes} bytes"));
            }
        }
        Ok(Self { memory, fragments })
    }

    /// Blocks that are best copied by one call.
    pub fn blocks_at_once(&self) -> usize {
        let block_bytes: usize = self.fragments.iter().map(|fragment| fragment.bytes).sum();
        (self.memory.bytes_at_once() / block_bytes.max(1)).clamp(1, BLOCKS_AT_ONCE_MAX)
    }

    /// The pieces of a block beside their places in a host slot, from `host_offset` on.
    pub fn ranges<'a>(
        &'a self,
        block: u32,
        host: &'a Arc<SharedMemory>,
        host_offset: usize,
    ) -> impl Iterator<Item = RangeCopy<'a>> {
        self.fragments.iter().scan(host_offset, move |at, fragment| {
            let host_offset = *at;
            *at += fragment.bytes;
            let offset = fragment.offset + block as usize * fragment.stride;
            Some(RangeCopy { export: fragment.export, offset, host, host_offset, bytes: fragment.bytes })
        })
    }
}

impl MappedBlocks {
    /// Whether the pieces of a block are of the same lengths, one after the other.
    pub fn is_cut_like(&self, other: &Self) -> bool {
        self.fragments.iter().map(|fragment| fragment.bytes).eq(other.fragments.iter().map(|f| f.bytes))
    }

    /// Copies blocks of another pool that is cut alike: (block there, block here).
    pub fn copy_from(&self, from: &Self, blocks: impl Iterator<Item = (u32, u32)>) -> Result<(), String> {
        let at = |fragment: &Fragment, block: u32| fragment.offset + block as usize * fragment.stride;
        let ranges = blocks.flat_map(|(there, here)| {
            self.fragments.iter().zip(&from.fragments).map(move |(to, from)| PeerCopy {
                from_export: from.export,
                from_offset: at(from, there),
                export: to.export,
                offset: at(to, here),
                bytes: to.bytes,
            })
        });
        self.memory.copy_from(&*from.memory, &ranges.collect::<Vec<_>>())
    }
}

/// All that is known of a pool of an engine outside the ledger.
#[derive(Debug)]
pub(crate) struct EnginePoolMemory {
    /// `None`: the engine copies.
    pub blocks: Option<MappedBlocks>,
    pub words: Arc<PoolWords>,
    pub block_bytes: usize,
    pub shard_offset: usize,
    pub tokens_per_block: u32,
    /// Under which number the words are kept for the next daemon.
    pub kept_words: Option<u32>,
    /// Pools of other ranks that were looked at, and whether the same bytes can be copied out of them.
    pub connected: Mutex<Vec<(Weak<Self>, bool)>>,
}

impl EnginePoolMemory {
    /// Bytes of so many blocks of this rank.
    pub fn bytes_of(&self, blocks: usize) -> u64 {
        (blocks * self.block_bytes) as u64
    }

    /// Whether another pool has the same shard of each block, and it can be copied from there. Found out once.
    pub fn connect(&self, from: &Arc<Self>) -> bool {
        let (Some(here), Some(there)) = (&self.blocks, &from.blocks) else { return false };
        let shard = |memory: &Self| (memory.shard_offset, memory.block_bytes);
        if shard(self) != shard(from) || !here.is_cut_like(there) {
            return false;
        }
        let mut connected = self.connected.lock();
        connected.retain(|(other, _)| other.strong_count() > 0);
        let known = connected.iter().find(|(other, _)| other.as_ptr() == Arc::as_ptr(from));
        if let Some((_, can)) = known {
            return *can;
        }
        let made = here.memory.connect(&*there.memory);
        if let Err(reason) = &made {
            tracing::info!(reason, "ranks with the same bytes load them separately");
        }
        connected.push((Arc::downgrade(from), made.is_ok()));
        made.is_ok()
    }

    /// Host memory will be copied from and to, if the daemon copies.
    pub fn prepare(&self, host: &Arc<SharedMemory>) {
        if let Some(blocks) = &self.blocks {
            blocks.memory.prepare(host);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export(bytes: usize) -> Export {
        Export::Shared(SharedMemory::create("test", bytes).unwrap().fd().try_clone_to_owned().unwrap())
    }

    fn fragment(export: usize, offset: usize, stride: usize, bytes: usize) -> Fragment {
        Fragment { export, offset, stride, bytes }
    }

    #[test]
    fn pieces_of_a_block_lie_behind_each_other_in_a_slot() {
        let layers = MapShared.map(vec![export(8192), export(4096)]).unwrap();
        let fragments = vec![fragment(0, 100, 1000, 300), fragment(1, 0, 200, 200)];
        let blocks = MappedBlocks::new(layers, fragments, 500, 4).unwrap();
        let host = Arc::new(SharedMemory::create("host", 4096).unwrap());
        let pattern: Vec<u8> = (0..500).map(|i| (i % 251) as u8).collect();
        host.write(1000, &pattern);
        let into: Vec<_> = blocks.ranges(3, &host, 1000).collect();
        assert_eq!((into[0].offset, into[1].offset, into[1].host_offset), (3100, 600, 1300));
        blocks.memory.copy_in(&into).unwrap();
        let back: Vec<_> = blocks.ranges(3, &host, 2000).collect();
        blocks.memory.copy_out(Pace::Full, &back).unwrap();
        let mut seen = vec![0; 500];
        host.read(2000, &mut seen);
        assert_eq!(seen, pattern);
    }

    #[test]
    fn blocks_that_do_not_fit_their_exports_are_refused() {
        let map = |fragments: Vec<Fragment>, bytes| {
            let memory = MapShared.map(vec![export(8192)]).unwrap();
            MappedBlocks::new(memory, fragments, bytes, 8).map(|_| ()).unwrap_err()
        };
        assert!(map(vec![fragment(0, 0, 1024, 1000)], 1024).contains("a block has 1024"));
        assert!(map(vec![fragment(0, 25, 1024, 1000)], 1000).contains("do not fit"));
        assert!(map(vec![fragment(0, 0, usize::MAX / 2, 1000)], 1000).contains("do not fit"));
        assert!(map(vec![fragment(1, 0, 1000, 1000)], 1000).contains("no such export"));
        let cuda = Export::CudaIpc { handle: [0; 64], offset: 0, bytes: 1, gpu_uuid: String::new() };
        assert!(MapShared.map(vec![cuda]).unwrap_err().contains("no CUDA"));
    }
}
