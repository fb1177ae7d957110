//! What the scheduler half tells the worker halves before each pass, as bytes that the engine carries without looking
//! into them.
//!
//! The halves of one engine are of one build, so there is one version, and another one is refused. Nothing at all is
//! what ranks of some engines are given when there is nothing to say; it means the same here.

use kvbm_hash::{Namespace, SequenceHash};
use prost::Message;
use thiserror::Error;

/// First field of every blob.
const VERSION: u32 = 1;

/// One word per block: page numbers of one layer group, -1 where the group has no page for the block.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Pages {
    #[prost(sint32, repeated, tag = "1")]
    pub pages: Vec<i32>,
}

/// A lease of host slots, as every rank knows it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Message)]
pub(crate) struct Lease {
    #[prost(uint64, tag = "1")]
    pub lease_id: u64,
    /// The entry of each rank's pin table that stands for it.
    #[prost(uint32, tag = "2")]
    pub pin: u32,
}

/// Blocks to bring from host memory into the engine's.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Load {
    /// Unique among the loads of this engine.
    #[prost(uint64, tag = "1")]
    pub load_id: u64,
    #[prost(uint64, tag = "2")]
    pub request_id: u64,
    /// The engine asks for its end; otherwise it is complete before the pass.
    #[prost(bool, tag = "3")]
    pub parked: bool,
    /// Where the blocks are: numbers of host segments, and of slots within them.
    #[prost(uint32, repeated, tag = "4")]
    pub segments: Vec<u32>,
    #[prost(uint32, repeated, tag = "5")]
    pub indices: Vec<u32>,
    /// One list per layer group, each as long as `segments`.
    #[prost(message, repeated, tag = "6")]
    pub pages: Vec<Pages>,
    #[prost(message, required, tag = "7")]
    pub lease: Lease,
    /// The rank is done with the lease after this load.
    #[prost(bool, tag = "8")]
    pub last: bool,
    /// Nobody else is there: the pass may begin before all layers are.
    #[prost(bool, tag = "9")]
    pub in_layers: bool,
}

/// Blocks that are complete once the pass is over.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Save {
    #[prost(uint64, tag = "1")]
    pub request_id: u64,
    #[prost(bytes = "vec", tag = "2")]
    pub namespace: Vec<u8>,
    /// 16 bytes each, neighbours of one sequence.
    #[prost(bytes = "vec", tag = "3")]
    pub keys: Vec<u8>,
    /// Key of the block before the first; empty: the first begins the sequence.
    #[prost(bytes = "vec", tag = "4")]
    pub parent: Vec<u8>,
    /// One list per layer group, as long as there are keys; no -1.
    #[prost(message, repeated, tag = "5")]
    pub pages: Vec<Pages>,
    /// Empty: nothing is said. Else one per key: 0..=100, or 255 where nothing is said.
    #[prost(bytes = "vec", tag = "6")]
    pub priorities: Vec<u8>,
}

/// Before one pass.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Metadata {
    #[prost(uint32, tag = "1")]
    version: u32,
    /// 16 bytes: which engine this is. Ranks attach under this name.
    #[prost(bytes = "vec", tag = "2")]
    pub engine: Vec<u8>,
    /// Pages that belong to another block from now on, per layer group: copies of what was in them are void.
    #[prost(message, repeated, tag = "3")]
    pub reassigned: Vec<Pages>,
    /// Loads that must not write any more, whatever the engine still asks about them.
    #[prost(uint64, repeated, tag = "4")]
    pub voided: Vec<u64>,
    #[prost(message, repeated, tag = "5")]
    pub loads: Vec<Load>,
    #[prost(message, repeated, tag = "6")]
    pub saves: Vec<Save>,
    /// Leases that were begun and are not wanted any more.
    #[prost(message, repeated, tag = "7")]
    pub ended: Vec<Lease>,
}

/// Bytes that no scheduler half of this build has made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("read connector metadata: {0}; all ranks must run the same kvbm-connector")]
pub struct MetadataError(String);

impl Metadata {
    pub fn new(engine: [u8; 16]) -> Self {
        Self { version: VERSION, engine: engine.to_vec(), ..Self::default() }
    }

    pub fn encode(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    /// `None` when there is nothing to do.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, MetadataError> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let read = <Self as Message>::decode(bytes).map_err(|error| MetadataError(error.to_string()))?;
        read.check().map_err(MetadataError)?;
        Ok(Some(read))
    }

    /// The name of the engine.
    pub fn engine(&self) -> [u8; 16] {
        self.engine.as_slice().try_into().expect("checked when it was read")
    }

    fn check(&self) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!("version is {}, this is {VERSION}", self.version));
        }
        if self.engine.len() != 16 {
            return Err(format!("the engine's name has {} bytes instead of 16", self.engine.len()));
        }
        for load in &self.loads {
            let fits = |len: usize| len == load.segments.len();
            if !fits(load.indices.len()) || load.pages.iter().any(|group| !fits(group.pages.len())) {
                return Err(format!("load {} has other numbers of pages than slots", load.load_id));
            }
        }
        for save in &self.saves {
            let (keys, rest) = save.keys.as_chunks::<16>();
            let fits = |len: usize| len == 0 || len == keys.len();
            let whole = rest.is_empty() && save.namespace.len() == 32 && matches!(save.parent.len(), 0 | 16);
            let pages = save.pages.iter().all(|group| group.pages.len() == keys.len());
            if !whole || !pages || !fits(save.priorities.len()) {
                return Err(format!("a save of request {} has parts that do not fit", save.request_id));
            }
        }
        Ok(())
    }
}

impl Save {
    pub fn namespace(&self) -> Namespace {
        Namespace(self.namespace.as_slice().try_into().expect("checked when it was read"))
    }

    pub fn keys(&self) -> Vec<SequenceHash> {
        self.keys.as_chunks::<16>().0.iter().map(|key| SequenceHash(*key)).collect()
    }

    pub fn parent(&self) -> Option<SequenceHash> {
        self.parent.as_slice().try_into().ok().map(SequenceHash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_is_read() {
        let mut said = Metadata::new([5; 16]);
        said.reassigned = vec![Pages { pages: vec![1, 2] }, Pages { pages: vec![] }];
        said.loads = vec![Load {
            load_id: 1,
            request_id: 2,
            parked: true,
            segments: vec![1],
            indices: vec![7],
            pages: vec![Pages { pages: vec![-1] }],
            lease: Lease { lease_id: 9, pin: 1 },
            last: true,
            in_layers: true,
        }];
        assert_eq!(Metadata::decode(&said.encode()), Ok(Some(said)));
        assert_eq!(Metadata::decode(b""), Ok(None));
    }

    #[test]
    fn what_nobody_said_is_refused() {
        let wrong = |change: fn(&mut Metadata)| {
            let mut said = Metadata::new([5; 16]);
            change(&mut said);
            Metadata::decode(&said.encode()).unwrap_err().to_string()
        };
        assert!(wrong(|said| said.version = 2).contains("version is 2, this is 1"));
        assert!(wrong(|said| said.engine.clear()).contains("0 bytes instead of 16"));
        assert!(
            wrong(|said| said.saves.push(Save { keys: vec![0; 15], ..Save::default() }))
                .contains("do not fit")
        );
        assert!(
            wrong(|said| said.loads.push(Load { pages: vec![Pages { pages: vec![1] }], ..Load::default() }))
                .contains("load 0")
        );
        assert!(Metadata::decode(b"\xff\xff").is_err());
    }
}
