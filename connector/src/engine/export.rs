//! What the daemon is given so that it can copy out of the engine's memory by itself.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvbm_proto::v1;

use super::pool::PoolShape;

/// Whether the daemon is to copy blocks out of the engine's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PoolChoice {
    /// If the memory can be exported.
    #[default]
    Auto,
    /// Always; memory that cannot be exported is refused at the start.
    Ipc,
    /// Never: the engine's process copies.
    Staged,
}

/// Memory that another process can map.
#[derive(Debug)]
pub enum ExportedMemory {
    /// A sealed memfd.
    Shared(OwnedFd),
    /// An allocation of CUDA's ordinary allocator, by its handle.
    CudaIpc {
        /// As the driver made it.
        handle: [u8; 64],
        /// The GPU.
        gpu_uuid: String,
    },
}

/// Memory and its size in bytes.
#[derive(Debug)]
pub struct Export {
    /// What it is.
    pub memory: ExportedMemory,
    /// How long it is.
    pub bytes: u64,
}

/// Where a region of a pool begins in an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportedRegion {
    /// Position among the exports.
    pub export: u32,
    /// Byte of its page 0.
    pub offset: u64,
}

/// The memory of a pool of one layer group.
#[derive(Debug)]
pub struct Exported {
    /// Each once.
    pub exports: Vec<Export>,
    /// One for each region, in the order of the shape.
    pub regions: Vec<ExportedRegion>,
}

impl PoolChoice {
    /// What is exported of a pool, and why nothing is, if that is so. An error where it has to be.
    ///
    /// A block of several layer groups has a page of its own in each: there is no one number, and so no one word, for it.
    pub(crate) fn exported(
        self,
        shape: &PoolShape,
        exported: Result<Exported, String>,
    ) -> Result<Result<Arc<Exported>, String>, String> {
        let exported = match (self, shape.groups().len()) {
            (Self::Staged, _) => Err("it is set so".to_owned()),
            (_, 1) => exported.map(Arc::new),
            (_, groups) => Err(format!("its {groups} layer groups number their pages by themselves")),
        };
        match (self, exported) {
            (Self::Ipc, Err(reason)) => {
                Err(format!("the pool is set to ipc, but the KV memory cannot be exported: {reason}"))
            }
            (_, exported) => Ok(exported),
        }
    }
}

impl Exported {
    /// Names under which memfds are sent on the side channel, one for each export.
    pub(crate) fn names(&self) -> Vec<[u8; 16]> {
        // Unique within the session, which is all that is asked of them.
        (0u128..).take(self.exports.len()).map(|index| (index + 1).to_le_bytes()).collect()
    }

    /// As the wire has them.
    pub(crate) fn messages(&self, shape: &PoolShape) -> (Vec<v1::PoolExport>, Vec<v1::Fragment>) {
        use v1::pool_export::Kind;
        let export = |(export, name): (&Export, [u8; 16])| {
            let (kind, gpu_uuid) = match &export.memory {
                ExportedMemory::Shared(_) => (Kind::Memory(name.to_vec()), String::new()),
                ExportedMemory::CudaIpc { handle, gpu_uuid } => {
                    (Kind::CudaIpc(v1::CudaIpc { handle: handle.to_vec(), offset: 0 }), gpu_uuid.clone())
                }
            };
            v1::PoolExport { kind: Some(kind), bytes: export.bytes, gpu_uuid }
        };
        let fragment = |((_, region), at): ((usize, &super::pool::Region), &ExportedRegion)| v1::Fragment {
            export: at.export,
            offset: at.offset,
            stride: region.stride as u64,
            bytes: region.bytes as u64,
        };
        (
            self.exports.iter().zip(self.names()).map(export).collect(),
            shape.regions().zip(&self.regions).map(fragment).collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::pool::{LayerGroup, Region};

    fn shape(groups: usize) -> PoolShape {
        let region = Region { base: 4096, bytes: 8, stride: 16, pages: 4 };
        PoolShape::new(vec![LayerGroup { regions: vec![region] }; groups]).unwrap()
    }

    fn exported() -> Exported {
        let memory = ExportedMemory::CudaIpc { handle: [7; 64], gpu_uuid: "GPU-1".into() };
        let regions = vec![ExportedRegion { export: 0, offset: 512 }];
        Exported { exports: vec![Export { memory, bytes: 1 << 20 }], regions }
    }

    #[test]
    fn what_cannot_be_exported_is_staged_or_refused_as_it_was_chosen() {
        let no = || Err("no handle".to_owned());
        assert!(PoolChoice::Auto.exported(&shape(1), Ok(exported())).unwrap().is_ok());
        assert!(PoolChoice::Ipc.exported(&shape(1), Ok(exported())).unwrap().is_ok());
        assert_eq!(PoolChoice::Auto.exported(&shape(1), no()).unwrap().unwrap_err(), "no handle");
        assert!(PoolChoice::Auto.exported(&shape(2), Ok(exported())).unwrap().unwrap_err().contains('2'));
        assert!(PoolChoice::Staged.exported(&shape(1), Ok(exported())).unwrap().is_err());
        assert!(PoolChoice::Ipc.exported(&shape(1), no()).unwrap_err().contains("no handle"));
    }

    #[test]
    fn pieces_of_a_block_are_where_the_regions_are() {
        let (exports, fragments) = exported().messages(&shape(1));
        assert_eq!((exports.len(), exports[0].bytes, exports[0].gpu_uuid.as_str()), (1, 1 << 20, "GPU-1"));
        assert_eq!(fragments, [v1::Fragment { export: 0, offset: 512, stride: 16, bytes: 8 }]);
    }
}
