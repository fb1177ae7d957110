//! Who has which blocks: from keys to the places that hold them, for routing only.
//!
//! ```text
//! key (first 8 bytes) -> one bit per source       source = device pool | host tier | disk tier, of one daemon
//! plane 0: sources 0..64    plane 1: sources 64..128    ...
//! ```
//!
//! A key already stands for its namespace and for all blocks before it, so nothing else is stored. Eight of its bytes
//! suffice: were two keys ever taken for one, a request would go to a worker that has less than was thought.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use kvbm_hash::SequenceHash;

/// Sources in one plane: bits of its words.
const PLANE: usize = 64;

/// A tier that blocks are found in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// A worker's pool.
    Device,
    /// Host memory of a daemon.
    Host,
    /// Disk of a daemon.
    Disk,
}

/// A place that holds blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    /// Number of the daemon, or of a worker without one, within this frontend.
    pub node: u32,
    /// Which tier.
    pub tier: Tier,
    /// Which pool of that daemon; 0 but for the device tier.
    pub pool: u32,
}

/// Number of a source, while it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SourceId(u16);

impl SourceId {
    fn plane(self) -> usize {
        usize::from(self.0) / PLANE
    }

    fn bit(self) -> u64 {
        1 << (usize::from(self.0) % PLANE)
    }
}

/// What the index keeps of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub u64);

impl From<SequenceHash> for Fingerprint {
    fn from(key: SequenceHash) -> Self {
        Self::of(&key.0)
    }
}

impl Fingerprint {
    /// Of the 16 bytes of a key.
    pub fn of(key: &[u8; 16]) -> Self {
        Self(u64::from_le_bytes(*key.first_chunk().expect("8 of 16 bytes")))
    }
}

/// Keys are the output of a hash function already.
#[derive(Debug, Default, Clone)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only fingerprints are hashed, each one u64");
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

type Plane = HashMap<Fingerprint, u64, BuildHasherDefault<AsItIs>>;

/// See the module.
#[derive(Debug, Default)]
pub struct Index {
    planes: Vec<Plane>,
    sources: HashMap<Source, SourceId>,
    free: Vec<SourceId>,
    known: u16,
}

impl Index {
    /// The number of a source, which is known from now on. `None`: there are too many.
    pub fn source(&mut self, source: Source) -> Option<SourceId> {
        if let Some(id) = self.sources.get(&source) {
            return Some(*id);
        }
        let id = match self.free.pop() {
            Some(id) => id,
            None => {
                let id = SourceId(self.known);
                self.known = self.known.checked_add(1)?;
                id
            }
        };
        if self.planes.len() <= id.plane() {
            self.planes.resize_with(id.plane() + 1, Plane::default);
        }
        self.sources.insert(source, id);
        Some(id)
    }

    /// The number of a source that is known.
    pub fn find(&self, source: Source) -> Option<SourceId> {
        self.sources.get(&source).copied()
    }

    /// All sources of a node.
    pub fn sources_of(&self, node: u32) -> Vec<Source> {
        self.sources.keys().copied().filter(|source| source.node == node).collect()
    }

    /// A block is there.
    pub fn store(&mut self, id: SourceId, key: Fingerprint) {
        *self.planes[id.plane()].entry(key).or_default() |= id.bit();
    }

    /// A block is there no longer.
    pub fn remove(&mut self, id: SourceId, key: Fingerprint) {
        use std::collections::hash_map::Entry;
        if let Entry::Occupied(mut entry) = self.planes[id.plane()].entry(key) {
            *entry.get_mut() &= !id.bit();
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }

    /// Nothing is there any more.
    pub fn clear(&mut self, id: SourceId) {
        let plane = &mut self.planes[id.plane()];
        plane.retain(|_, held| {
            *held &= !id.bit();
            *held != 0
        });
        plane.shrink_to(plane.len() * 2);
    }

    /// The source does not exist any more.
    pub fn forget(&mut self, source: Source) {
        if let Some(id) = self.sources.remove(&source) {
            self.clear(id);
            self.free.push(id);
        }
    }

    /// Of each source, how many of the leading `keys` it has.
    pub fn depths(&self, keys: &[Fingerprint], sources: &[Option<SourceId>]) -> Vec<usize> {
        let mut depths = vec![0; sources.len()];
        for (number, plane) in self.planes.iter().enumerate() {
            let here = |id: &SourceId| id.plane() == number;
            let mut left = sources.iter().flatten().filter(|id| here(id)).fold(0, |bits, id| bits | id.bit());
            if left == 0 {
                continue;
            }
            let mut ends = [0; PLANE];
            let mut depth = 0;
            for key in keys {
                let held = left & plane.get(key).copied().unwrap_or(0);
                each_bit(left & !held, |bit| ends[bit] = depth);
                left = held;
                if left == 0 {
                    break;
                }
                depth += 1;
            }
            each_bit(left, |bit| ends[bit] = depth);
            for (found, id) in depths.iter_mut().zip(sources) {
                if let Some(id) = id.filter(here) {
                    *found = ends[usize::from(id.0) % PLANE];
                }
            }
        }
        depths
    }

    /// Keys that somebody holds; one held in several planes counts in each.
    pub fn blocks(&self) -> usize {
        self.planes.iter().map(Plane::len).sum()
    }
}

fn each_bit(mut bits: u64, mut visit: impl FnMut(usize)) {
    while bits != 0 {
        visit(bits.trailing_zeros() as usize);
        bits &= bits - 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn source(node: u32) -> Source {
        Source { node, tier: Tier::Host, pool: 0 }
    }

    #[derive(Debug, Clone)]
    enum Op {
        Store(u32, u64),
        Remove(u32, u64),
        Clear(u32),
        Forget(u32),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        // Over more sources than a plane has, few of which are used much.
        let node = prop_oneof![0..4u32, 60..70u32, 0..150u32];
        let one = (node, 0..40u64, 0..40u32).prop_map(|(node, key, what)| match what {
            0 => Op::Forget(node),
            1 => Op::Clear(node),
            2..12 => Op::Remove(node, key),
            _ => Op::Store(node, key),
        });
        prop::collection::vec(one, 0..300)
    }

    proptest! {
        #[test]
        fn it_answers_as_a_set_per_source_would(ops in ops(), keys in prop::collection::vec(0..40u64, 0..20)) {
            let mut index = Index::default();
            let mut sets: HashMap<u32, HashSet<u64>> = HashMap::new();
            for op in ops {
                match op {
                    Op::Store(node, key) => {
                        let id = index.source(source(node)).unwrap();
                        index.store(id, Fingerprint(key));
                        sets.entry(node).or_default().insert(key);
                    }
                    Op::Remove(node, key) => {
                        let id = index.source(source(node)).unwrap();
                        index.remove(id, Fingerprint(key));
                        sets.entry(node).or_default().remove(&key);
                    }
                    Op::Clear(node) => {
                        let id = index.source(source(node)).unwrap();
                        index.clear(id);
                        sets.remove(&node);
                    }
                    Op::Forget(node) => {
                        index.forget(source(node));
                        sets.remove(&node);
                    }
                }
            }
            let nodes: Vec<u32> = (0..150).collect();
            let ids: Vec<_> = nodes.iter().map(|node| index.find(source(*node))).collect();
            let prints: Vec<_> = keys.iter().map(|key| Fingerprint(*key)).collect();
            let none = HashSet::new();
            let expected: Vec<usize> = nodes.iter().map(|node| {
                let set = sets.get(node).unwrap_or(&none);
                keys.iter().take_while(|key| set.contains(key)).count()
            }).collect();
            prop_assert_eq!(index.depths(&prints, &ids), expected);
        }
    }

    #[test]
    fn what_nobody_holds_takes_no_room() {
        let mut index = Index::default();
        let ids: Vec<_> = (0..3).map(|node| index.source(source(node)).unwrap()).collect();
        for id in &ids {
            (0..100).for_each(|key| index.store(*id, Fingerprint(key)));
        }
        assert_eq!(index.blocks(), 100);
        index.clear(ids[0]);
        (0..100).for_each(|key| index.remove(ids[1], Fingerprint(key)));
        assert_eq!(index.blocks(), 100);
        index.forget(source(2));
        assert_eq!(index.blocks(), 0);
        assert_eq!(index.source(source(9)), Some(ids[2]), "its number is used again");
    }
}
