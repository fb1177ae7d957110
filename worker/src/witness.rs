//! For drills: what bytes blocks had when they were complete, and whether what the cache gives back is that.
//!
//! Workers of one drill share a file. Before a block is committed, a sum of its bytes goes there, under its key; so the file
//! outlives a worker that is killed. Whatever the cache says is in a block is read back, out of the device's memory, and
//! compared with what was noted: also blocks that another worker computed, or this one in an earlier life.
//!
//! On a GPU the same tokens need not give the same bytes in each batch: several sums may be right for a key.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io::{self, Read, Write};
use std::path::Path;

use kvbm_hash::{Namespace, Retention, SequenceHash};

use crate::{Allocate, BlockId, Cache, CacheEvent, LeaseId, Onboard, Ticket};

/// Reads the bytes of a block out of the memory that the engine computes in.
pub(crate) type ReadBlock = Box<dyn Fn(BlockId) -> crate::Result<Vec<u8>>>;

type Key = (Namespace, SequenceHash);

/// A cache that is looked at, if a drill asks for it.
pub(crate) struct Witnessed<C> {
    cache: C,
    witness: Option<Witness>,
}

/// What is known of the blocks of a drill.
pub(crate) struct Witness {
    notes: Notes,
    read: ReadBlock,
    lookups: HashMap<Ticket, Vec<Key>>,
    leases: HashMap<LeaseId, Vec<Key>>,
    onboards: HashMap<Ticket, Vec<(BlockId, Key)>>,
}

impl Witness {
    /// Notes go to the file, which other workers may be using.
    pub fn open(path: &Path, read: ReadBlock) -> io::Result<Self> {
        let (lookups, leases, onboards) = Default::default();
        Ok(Self { notes: Notes::open(path)?, read, lookups, leases, onboards })
    }

    fn sum(&self, block: BlockId) -> u64 {
        let bytes = (self.read)(block).expect("a drill's blocks can be read");
        let mut hasher = DefaultHasher::new();
        hasher.write(&bytes);
        hasher.finish()
    }

    fn check(&mut self, from: &str, blocks: &[(BlockId, Key)]) {
        let (mut right, mut wrong) = (0, String::new());
        self.notes.read_on();
        for (block, key) in blocks {
            let sum = self.sum(*block);
            match self.notes.known.get(key).is_some_and(|sums| sums.contains(&sum)) {
                true => right += 1,
                false => wrong = format!("WRONG {from} block {} key {:?} sum {sum:x}\n", block.0, key.1),
            }
        }
        self.notes.write(&format!("{wrong}right {from} {right}\n"));
    }

    fn saw(&mut self, event: &CacheEvent) {
        match event {
            CacheEvent::Looked { ticket, device, host_blocks, lease, .. } => {
                let keys = self.lookups.remove(ticket).unwrap_or_default();
                let here: Vec<_> = device.iter().copied().zip(keys.iter().copied()).collect();
                if !here.is_empty() {
                    self.check("device", &here);
                }
                if let Some(lease) = lease {
                    let behind = keys.into_iter().skip(device.len()).take(*host_blocks);
                    self.leases.insert(*lease, behind.collect());
                }
            }
            CacheEvent::Onboarded { ticket, outcome } => {
                let blocks = self.onboards.remove(ticket).unwrap_or_default();
                if matches!(outcome, Onboard::Done(_)) {
                    self.check("loaded", &blocks);
                }
            }
            CacheEvent::Promoting { .. } | CacheEvent::Granted => {}
        }
    }
}

impl<C> Witnessed<C> {
    /// `None`: nothing is looked at.
    pub fn new(cache: C, witness: Option<Witness>) -> Self {
        Self { cache, witness }
    }
}

impl<C: Cache> Cache for Witnessed<C> {
    fn lookup(
        &mut self,
        ticket: Ticket,
        namespace: Namespace,
        keys: Vec<SequenceHash>,
        retention: Vec<Option<Retention>>,
    ) {
        if let Some(witness) = &mut self.witness {
            witness.lookups.insert(ticket, keys.iter().map(|key| (namespace, *key)).collect());
        }
        self.cache.lookup(ticket, namespace, keys, retention);
    }

    fn allocate(&mut self, count: usize) -> Allocate {
        self.cache.allocate(count)
    }

    fn onboard(&mut self, ticket: Ticket, lease: LeaseId, targets: Vec<BlockId>) {
        if let Some(witness) = &mut self.witness {
            let keys = witness.leases.remove(&lease).unwrap_or_default();
            witness.onboards.insert(ticket, targets.iter().copied().zip(keys).collect());
        }
        self.cache.onboard(ticket, lease, targets);
    }

    fn commit(
        &mut self,
        block: BlockId,
        namespace: Namespace,
        key: SequenceHash,
        parent: Option<SequenceHash>,
        retention: Retention,
    ) {
        if let Some(witness) = &mut self.witness {
            let sum = witness.sum(block);
            witness.notes.add((namespace, key), sum);
        }
        self.cache.commit(block, namespace, key, parent, retention);
    }

    fn release(&mut self, blocks: Vec<BlockId>) {
        self.cache.release(blocks);
    }

    fn abandon_lease(&mut self, lease: LeaseId) {
        if let Some(witness) = &mut self.witness {
            witness.leases.remove(&lease);
        }
        self.cache.abandon_lease(lease);
    }

    fn abandon(&mut self, ticket: Ticket) {
        if let Some(witness) = &mut self.witness {
            witness.lookups.remove(&ticket);
            witness.onboards.remove(&ticket);
        }
        self.cache.abandon(ticket);
    }

    fn poll(&mut self) -> Vec<CacheEvent> {
        let events = self.cache.poll();
        if let Some(witness) = &mut self.witness {
            events.iter().for_each(|event| witness.saw(event));
        }
        events
    }
}

/// The file, and what was read of it so far.
struct Notes {
    to: File,
    /// Opened apart: writing at the end would move the place from where is read on.
    from: File,
    known: HashMap<Key, HashSet<u64>>,
    /// The beginning of a line whose end was not there yet.
    rest: String,
}

impl Notes {
    fn open(path: &Path) -> io::Result<Self> {
        // Each line is appended by one call: those of several workers do not mix.
        let to = File::options().create(true).append(true).open(path)?;
        Ok(Self { to, from: File::open(path)?, known: HashMap::new(), rest: String::new() })
    }

    fn write(&mut self, line: &str) {
        self.to.write_all(line.as_bytes()).expect("a drill's notes can be written");
    }

    fn add(&mut self, (namespace, key): Key, sum: u64) {
        let (namespace, key) = (hex(&namespace.0), hex(&key.0));
        self.write(&format!("sum {namespace} {key} {sum:x}\n"));
    }

    /// What others, and this worker, have noted since.
    fn read_on(&mut self) {
        self.from.read_to_string(&mut self.rest).expect("a drill's notes can be read");
        let end = self.rest.rfind('\n').map_or(0, |at| at + 1);
        let lines: String = self.rest.drain(..end).collect();
        for line in lines.lines() {
            if let ["sum", namespace, key, sum] = line.split(' ').collect::<Vec<_>>()[..]
                && let (Some(namespace), Some(key)) = (unhex(namespace), unhex(key))
                && let Ok(sum) = u64::from_str_radix(sum, 16)
            {
                self.known.entry((Namespace(namespace), SequenceHash(key))).or_default().insert(sum);
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    if text.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().as_chunks::<2>().0) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;
    use std::time::Duration;

    use super::*;

    const NAMESPACE: Namespace = Namespace([3; 32]);

    /// Says what it is told to say.
    #[derive(Default)]
    struct Script(Vec<CacheEvent>);

    impl Cache for Script {
        fn lookup(&mut self, _: Ticket, _: Namespace, _: Vec<SequenceHash>, _: Vec<Option<Retention>>) {}
        fn allocate(&mut self, _: usize) -> Allocate {
            Allocate::Exhausted
        }
        fn onboard(&mut self, _: Ticket, _: LeaseId, _: Vec<BlockId>) {}
        fn commit(
            &mut self,
            _: BlockId,
            _: Namespace,
            _: SequenceHash,
            _: Option<SequenceHash>,
            _: Retention,
        ) {
        }
        fn release(&mut self, _: Vec<BlockId>) {}
        fn abandon_lease(&mut self, _: LeaseId) {}
        fn abandon(&mut self, _: Ticket) {}
        fn poll(&mut self) -> Vec<CacheEvent> {
            std::mem::take(&mut self.0)
        }
    }

    #[test]
    fn blocks_of_another_worker_are_compared_and_a_wrong_byte_is_noted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes");
        let memory = Rc::new(RefCell::new(vec![[0u8; 64]; 8]));
        let open = || {
            let memory = memory.clone();
            let read: ReadBlock = Box::new(move |block| Ok(memory.borrow()[block.0 as usize].to_vec()));
            Witnessed::new(Script::default(), Some(Witness::open(&path, read).unwrap()))
        };
        let (mut first, mut second) = (open(), open());
        let keys: Vec<_> = (1..4).map(|n| SequenceHash([n; 16])).collect();
        for (block, key) in keys.iter().enumerate() {
            memory.borrow_mut()[block] = [block as u8 + 10; 64];
            first.commit(BlockId(block as u32), NAMESPACE, *key, None, Retention::default());
        }
        // It has noted something itself since.
        memory.borrow_mut()[7] = [9; 64];
        second.commit(BlockId(7), NAMESPACE, SequenceHash([9; 16]), None, Retention::default());
        // One block is in the pool, two are loaded elsewhere, the last with a wrong byte.
        second.lookup(Ticket(1), NAMESPACE, keys, vec![]);
        second.cache.0.push(CacheEvent::Looked {
            ticket: Ticket(1),
            device: vec![BlockId(0)],
            host_blocks: 2,
            promoted_blocks: 0,
            lease: Some(LeaseId(7)),
        });
        second.poll();
        second.onboard(Ticket(2), LeaseId(7), vec![BlockId(5), BlockId(6)]);
        memory.borrow_mut()[5] = [11; 64];
        memory.borrow_mut()[6] = [12; 64];
        memory.borrow_mut()[6][63] ^= 1;
        second
            .cache
            .0
            .push(CacheEvent::Onboarded { ticket: Ticket(2), outcome: Onboard::Done(Duration::ZERO) });
        second.poll();
        let notes = std::fs::read_to_string(&path).unwrap();
        let lines = |start: &str| notes.lines().filter(|line| line.starts_with(start)).count();
        assert_eq!((lines("sum "), lines("WRONG loaded block 6")), (4, 1), "{notes}");
        assert!(notes.contains("right device 1\n") && notes.contains("right loaded 1\n"), "{notes}");
    }
}
