//! Which block of the pool goes to which place in host memory, the same in both processes.

use std::sync::Arc;

use kvbm_cuda::copy_engine::{CopyBatch, CopyEnd, CopyMemory, Direction, LaneId, Urgency};
use kvbm_shm::SharedMemory;
use serde::{Deserialize, Serialize};

use super::{SEGMENT_BYTES, pattern};

/// Blocks in one batch: what the ledger hands out at a time.
const BATCH_BLOCKS: usize = 256;
/// What is where before a copy.
const POOL_SEED: u64 = 1;
const HOST_SEED: u64 = 2;

/// Which way blocks go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Way {
    /// From the pool to host memory.
    Out,
    /// From host memory to the pool.
    Back,
    /// Half of them out, half of them back, at the same time.
    Both,
}

impl Way {
    pub fn name(self) -> &'static str {
        match self {
            Self::Out => "d2h",
            Self::Back => "h2d",
            Self::Both => "duplex",
        }
    }
}

/// Scattered blocks, each with its place in host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Plan {
    blocks: usize,
    block_bytes: usize,
    way: Way,
}

impl Plan {
    pub fn new(blocks: usize, block_bytes: usize, way: Way) -> Self {
        Self { blocks, block_bytes, way }
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }

    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    pub fn way(&self) -> Way {
        self.way
    }

    pub fn bytes(&self) -> usize {
        self.blocks * self.block_bytes
    }

    /// (block of the pool, slot of host memory, which way), in the order in which they are copied.
    fn pairs(&self) -> Vec<(usize, usize, Direction)> {
        let direction = |index: usize| match self.way {
            Way::Out => Direction::Offload,
            Way::Back => Direction::Onboard,
            Way::Both if index.is_multiple_of(2) => Direction::Offload,
            Way::Both => Direction::Onboard,
        };
        let (pool, host) = (scatter(self.blocks, 0x2545_F491_4F6C_DD1D), scatter(self.blocks, 0x9E37_79B9));
        pool.into_iter().zip(host).enumerate().map(|(i, (pool, host))| (pool, host, direction(i))).collect()
    }

    /// Segment and offset of a slot of host memory.
    fn slot(&self, slot: usize) -> (usize, usize) {
        let at = slot * self.block_bytes;
        (at / SEGMENT_BYTES, at % SEGMENT_BYTES)
    }

    /// The copies in batches, whose ends are told to `done`.
    pub fn batches(
        &self,
        pool: &CopyMemory,
        host: &[CopyMemory],
        done: impl Fn(CopyEnd) + Clone + Send + 'static,
    ) -> Vec<CopyBatch> {
        let mut batches = Vec::new();
        let pairs = self.pairs();
        for direction in [Direction::Offload, Direction::Onboard] {
            let own: Vec<_> = pairs.iter().filter(|(.., way)| *way == direction).collect();
            for piece in own.chunks(BATCH_BLOCKS) {
                let mut batch = CopyBatch::new(direction, LaneId(1), Urgency::Demanded, done.clone());
                for (block, slot, _) in piece {
                    let (segment, offset) = self.slot(*slot);
                    let (pool, host) = ((pool, block * self.block_bytes), (&host[segment], offset));
                    let (from, to) = match direction {
                        Direction::Offload => (pool, host),
                        Direction::Onboard => (host, pool),
                    };
                    batch.copy(from, to, self.block_bytes);
                }
                batches.push(batch);
            }
        }
        in_turn(batches)
    }

    /// As many bytes both ways, but as few long copies.
    pub fn contiguous(&self, pool: &CopyMemory, host: &[CopyMemory]) -> Vec<CopyBatch> {
        let half = self.bytes() / 2;
        let ranges: &[_] = match self.way {
            Way::Out => &[(Direction::Offload, 0, self.bytes())],
            Way::Back => &[(Direction::Onboard, 0, self.bytes())],
            Way::Both => &[(Direction::Offload, 0, half), (Direction::Onboard, half, 2 * half)],
        };
        let mut batches = Vec::new();
        for (direction, start, end) in ranges {
            let mut batch = CopyBatch::new(*direction, LaneId(1), Urgency::Demanded, |_| ());
            let mut at = *start;
            while at < *end {
                let (segment, offset) = (at / SEGMENT_BYTES, at % SEGMENT_BYTES);
                let bytes = (end - at).min(SEGMENT_BYTES - offset);
                let (pool, host) = ((pool, at), (&host[segment], offset));
                match direction {
                    Direction::Offload => batch.copy(pool, host, bytes),
                    Direction::Onboard => batch.copy(host, pool, bytes),
                }
                at += bytes;
            }
            batches.push(batch);
        }
        batches
    }

    /// Sources get their bytes, targets other ones.
    pub fn fill_host(&self, host: &[Arc<SharedMemory>]) -> Result<(), String> {
        let pairs = self.pairs();
        pattern::in_parallel(pairs.len(), |index| {
            let (_, slot, direction) = pairs[index];
            let (segment, offset) = self.slot(slot);
            match direction {
                Direction::Onboard => {
                    pattern::fill(HOST_SEED, slot, self.block_bytes, &host[segment], offset);
                }
                Direction::Offload => host[segment].write(offset, &vec![0; self.block_bytes]),
            }
            Ok(())
        })
    }

    /// What was copied out is what the pool held.
    pub fn check_host(&self, host: &[Arc<SharedMemory>]) -> Result<(), String> {
        let pairs = self.pairs();
        pattern::in_parallel(pairs.len(), |index| {
            let (block, slot, direction) = pairs[index];
            let (segment, offset) = self.slot(slot);
            let (seed, from) = match direction {
                Direction::Offload => (POOL_SEED, block),
                Direction::Onboard => (HOST_SEED, slot),
            };
            if pattern::holds(seed, from, self.block_bytes, &host[segment], offset) {
                return Ok(());
            }
            Err(format!("slot {slot} of host memory does not hold the bytes of block {from}"))
        })
    }

    /// What must be in each block of the pool before the copy, or after it: seed and number of the pattern.
    pub fn pool_contents(&self, copied: bool) -> Vec<(u64, usize)> {
        let mut contents = vec![(POOL_SEED, 0); self.blocks];
        for (block, slot, direction) in self.pairs() {
            contents[block] = match direction {
                Direction::Onboard if copied => (HOST_SEED, slot),
                Direction::Onboard | Direction::Offload => (POOL_SEED, block),
            };
        }
        contents
    }
}

/// The two directions one after the other, so that neither waits for all of the other to be issued.
fn in_turn(batches: Vec<CopyBatch>) -> Vec<CopyBatch> {
    let (out, back): (Vec<_>, Vec<_>) =
        batches.into_iter().partition(|batch| batch.direction() == Direction::Offload);
    let (mut out, mut back) = (out.into_iter(), back.into_iter());
    let mut all = Vec::new();
    loop {
        let before = all.len();
        all.extend(out.next());
        all.extend(back.next());
        if all.len() == before {
            return all;
        }
    }
}

/// A fixed permutation without locality.
fn scatter(count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    let mut random = seed;
    for i in (1..count).rev() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        order.swap(i, (random % (i as u64 + 1)) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The whole plan over memory of the host: what the benchmark does on a GPU, byte for byte.
    #[test]
    fn a_plan_is_carried_out_and_its_check_notices_a_wrong_byte() {
        use kvbm_cuda::copy_engine::{CopyEngine, CopyEngineConfig};
        let (blocks, block_bytes) = (24, 64 << 10);
        for way in [Way::Out, Way::Back, Way::Both] {
            let plan = Plan::new(blocks, block_bytes, way);
            let memory = || Arc::new(SharedMemory::create("test", plan.bytes()).unwrap());
            let (pool, host) = (memory(), vec![memory()]);
            for (block, (seed, from)) in plan.pool_contents(false).into_iter().enumerate() {
                pattern::fill(seed, from, block_bytes, &pool, block * block_bytes);
            }
            plan.fill_host(&host).unwrap();
            if way != Way::Back {
                assert!(plan.check_host(&host).is_err(), "nothing was copied yet");
            }
            let engine = CopyEngine::start_on_host(CopyEngineConfig::default());
            let places = (CopyMemory::Shared(pool.clone()), [CopyMemory::Shared(host[0].clone())]);
            let batches = plan.batches(&places.0, &places.1, |end| {
                assert!(matches!(end, CopyEnd::Done { .. }), "{end:?}");
            });
            assert_eq!(batches.iter().map(CopyBatch::bytes).sum::<u64>(), plan.bytes() as u64);
            let long = plan.contiguous(&places.0, &places.1);
            assert_eq!(long.iter().map(CopyBatch::bytes).sum::<u64>(), plan.bytes() as u64);
            batches.into_iter().for_each(|batch| engine.submit(batch).unwrap());
            while engine.figures().bytes.iter().sum::<u64>() < plan.bytes() as u64 {
                assert_eq!(engine.figures().failed, [0, 0]);
                std::thread::yield_now();
            }
            plan.check_host(&host).unwrap();
            for (block, (seed, from)) in plan.pool_contents(true).into_iter().enumerate() {
                assert!(
                    pattern::holds(seed, from, block_bytes, &pool, block * block_bytes),
                    "{way:?} {block}"
                );
            }
            host[0].write(
                block_bytes - 1,
                &[host[0].word32(block_bytes - 4).load(std::sync::atomic::Ordering::Relaxed) as u8 ^ 1],
            );
            assert!(plan.check_host(&host).is_err(), "{way:?}");
        }
    }
}
