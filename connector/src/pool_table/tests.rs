//! A random walk of requests, detaches and re-attachments against a plain daemon, with bytes that tell when a block was
//! handed out twice, taken away too early, or found under a key that is not its own.

use std::collections::{BTreeMap, HashMap, HashSet};

use proptest::prelude::*;

use super::*;

const BLOCKS: u32 = 12;

/// A daemon's ledger as docs/wire.md describes it, as plainly as possible.
#[derive(Debug, Clone)]
enum Ledger {
    Free,
    Filling,
    Resident(Content),
}

#[derive(Debug)]
struct Daemon {
    id: DaemonId,
    blocks: Vec<(u32, u32, Ledger)>, // generation, pins, state
}

impl Daemon {
    fn find(&self, key: SequenceHash) -> Option<u32> {
        (0..BLOCKS).find(
            |block| matches!(&self.blocks[*block as usize].2, Ledger::Resident(content) if content.key == key),
        )
    }

    fn has_child(&self, key: SequenceHash) -> bool {
        self.blocks.iter().any(|(_, _, state)| matches!(state, Ledger::Resident(c) if c.parent == Some(key)))
    }

    fn grant(&mut self, count: usize) -> Vec<BlockRef> {
        let mut granted = Vec::new();
        while granted.len() < count {
            let free = (0..BLOCKS).find(|block| match &self.blocks[*block as usize] {
                (_, 0, Ledger::Free) => true,
                (_, 0, Ledger::Resident(content)) => !self.has_child(content.key),
                _ => false,
            });
            let Some(block) = free else { break };
            let (generation, pins, state) = &mut self.blocks[block as usize];
            (*generation, *pins, *state) = (*generation + 1, 1, Ledger::Filling);
            granted.push(BlockRef { block, generation: *generation });
        }
        granted
    }

    fn matched(&mut self, keys: &[SequenceHash]) -> Vec<BlockRef> {
        let blocks: Vec<u32> = keys.iter().map_while(|key| self.find(*key)).collect();
        let pin = |block| {
            let (generation, pins, _) = &mut self.blocks[block as usize];
            *pins += 1;
            BlockRef { block, generation: *generation }
        };
        blocks.into_iter().map(pin).collect()
    }

    fn commit(&mut self, block: BlockRef, content: Content) {
        assert_eq!(self.blocks[block.block as usize].0, block.generation);
        let parent_is_there = content.parent.is_none_or(|parent| self.find(parent).is_some());
        if self.find(content.key).is_none() && parent_is_there {
            self.blocks[block.block as usize].2 = Ledger::Resident(content);
        }
    }

    fn release(&mut self, release: Release) {
        let (generation, pins, state) = &mut self.blocks[release.block.block as usize];
        assert_eq!(*generation, release.block.generation);
        *pins = pins.checked_sub(release.pins).expect("no more pins come back than were given");
        if *pins == 0 && matches!(state, Ledger::Filling) {
            *state = Ledger::Free;
        }
    }
}

/// A request: blocks of a prefix of one of a few sequences. The first `filled` are complete.
#[derive(Debug)]
struct Request {
    sequence: u8,
    blocks: Vec<u32>,
    filled: usize,
}

struct World {
    table: PoolTable,
    daemon: Option<Daemon>,
    requests: Vec<Request>,
    quarantine: BTreeMap<u32, DaemonId>,
    /// What the block's memory holds: the key it was filled for, or noise.
    bytes: Vec<u128>,
    noise: u128,
    daemons: u64,
    now: Duration,
}

fn key(sequence: u8, at: usize) -> SequenceHash {
    // Sequences 0 and 1 share their first two blocks.
    let branch = if at < 2 { sequence / 2 } else { sequence };
    SequenceHash(((u128::from(branch) << 64) + at as u128 + 1).to_le_bytes())
}

fn content(sequence: u8, at: usize) -> Content {
    let parent = at.checked_sub(1).map(|before| key(sequence, before));
    Content { namespace: Namespace([7; 32]), key: key(sequence, at), parent }
}

#[derive(Debug, Clone)]
enum Op {
    Grant(usize),
    Start { sequence: u8, length: usize, ask_daemon: bool },
    Fill(usize, Retention),
    Wait(u64),
    End(usize),
    LateMatch { sequence: u8, length: usize },
    Detach { onboarding: usize, dead: bool },
    Attach { same_daemon: bool },
    AttachFails,
    DaemonDies,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (1..6usize).prop_map(Op::Grant),
        6 => (0..4u8, 1..5usize, any::<bool>())
            .prop_map(|(sequence, length, ask_daemon)| Op::Start { sequence, length, ask_daemon }),
        8 => (0..8usize, 30..40u8, prop::option::of(0..20u64)).prop_map(|(request, priority, duration_ms)| {
            Op::Fill(request, Retention { priority, duration: duration_ms.map(Duration::from_millis) })
        }),
        3 => (1..20u64).prop_map(Op::Wait),
        4 => (0..8usize).prop_map(Op::End),
        1 => (0..4u8, 1..5usize).prop_map(|(sequence, length)| Op::LateMatch { sequence, length }),
        1 => (0..8usize, any::<bool>()).prop_map(|(onboarding, dead)| Op::Detach { onboarding, dead }),
        2 => any::<bool>().prop_map(|same_daemon| Op::Attach { same_daemon }),
        1 => Just(Op::AttachFails),
        1 => Just(Op::DaemonDies),
    ]
}

impl World {
    fn new(attached: bool) -> Self {
        let fresh = Daemon { id: DaemonId(1), blocks: vec![(0, 0, Ledger::Free); BLOCKS as usize] };
        Self {
            table: if attached { PoolTable::new_granted(BLOCKS) } else { PoolTable::new_private(BLOCKS) },
            daemon: attached.then_some(fresh),
            requests: Vec::new(),
            quarantine: BTreeMap::new(),
            bytes: vec![0; BLOCKS as usize],
            noise: 1 << 100,
            daemons: 1,
            now: Duration::ZERO,
        }
    }

    fn write_noise(&mut self, block: u32) {
        self.noise += 1;
        self.bytes[block as usize] = self.noise;
    }

    fn release(&mut self, blocks: &[u32]) {
        for &block in blocks {
            let release = self.table.unreference(block);
            match (&mut self.daemon, release) {
                (Some(daemon), Some(release)) => daemon.release(release),
                (None, Some(_)) => panic!("there is nobody to release to"),
                (_, None) => {}
            }
        }
    }

    fn look_up(&mut self, keys: &[SequenceHash], ask_daemon: bool) -> Vec<u32> {
        let Some(daemon) = self.daemon.as_mut().filter(|_| ask_daemon) else {
            return self.table.find(keys, &[]);
        };
        let matched = daemon.matched(keys);
        let (accepted, doubted) = self.table.matched(Namespace([7; 32]), keys, &matched, &[]);
        assert!(doubted.is_empty(), "what an honest daemon says is believed");
        accepted
    }

    fn start(&mut self, sequence: u8, length: usize, ask_daemon: bool) {
        let keys: Vec<_> = (0..length).map(|at| key(sequence, at)).collect();
        let mut blocks = self.look_up(&keys, ask_daemon);
        for (block, key) in blocks.iter().zip(&keys) {
            assert_eq!(self.bytes[*block as usize], u128::from_le_bytes(key.0), "block {block}");
        }
        let filled = blocks.len();
        let unused =
            (0..BLOCKS).filter(|b| !self.in_use().contains_key(b) && !self.quarantine.contains_key(b));
        let unused = unused.filter(|block| !blocks.contains(block)).count();
        let stash = self.table.free_count();
        match self.table.take(length - filled) {
            Some(taken) => {
                for &block in &taken {
                    assert!(
                        !self.in_use().contains_key(&block) && !blocks.contains(&block),
                        "handed out twice"
                    );
                    assert!(!self.quarantine.contains_key(&block), "handed out of quarantine");
                    self.write_noise(block);
                }
                blocks.extend(taken);
                self.requests.push(Request { sequence, blocks, filled });
            }
            None => {
                let available = if self.daemon.is_some() { stash } else { unused };
                assert!(available < length - filled, "blocks are lost: {available} were available");
                self.release(&blocks);
            }
        }
    }

    fn fill(&mut self, request: usize, retention: Retention) {
        let Some(request) = self.requests.get_mut(request) else { return };
        let Some(&block) = request.blocks.get(request.filled) else { return };
        let content = content(request.sequence, request.filled);
        request.filled += 1;
        self.bytes[block as usize] = u128::from_le_bytes(content.key.0);
        self.table.commit(block, content, retention);
        if let Some(daemon) = &mut self.daemon {
            daemon.commit(self.table.block_ref(block), content);
        }
    }

    fn detach(&mut self, onboarding: usize, dead: bool) {
        let Some(daemon) = self.daemon.take() else { return };
        if let Some(request) = self.requests.get_mut(onboarding).filter(|_| !dead) {
            let targets = request.blocks.split_off(request.filled);
            self.table.quarantine(&targets, daemon.id);
            self.quarantine.extend(targets.into_iter().map(|block| (block, daemon.id)));
        }
        self.table.detach();
    }

    fn attach(&mut self, id: DaemonId) {
        let mut blocks: Vec<_> =
            (0..BLOCKS).map(|block| (self.table.block_ref(block).generation, 0, Ledger::Free)).collect();
        let table = self.table.adoption(id);
        let mut seen = HashSet::new();
        for AdoptionEntry { block, content, held, .. } in table.entries {
            assert!(content.parent.is_none_or(|parent| seen.contains(&parent)), "a parent is missing");
            assert!(seen.insert(content.key), "a key is listed twice");
            assert_eq!(self.bytes[block.block as usize], u128::from_le_bytes(content.key.0));
            blocks[block.block as usize] = (block.generation, u32::from(held), Ledger::Resident(content));
        }
        for block in table.held {
            blocks[block.block as usize] = (block.generation, 1, Ledger::Filling);
        }
        self.table.check_integrity().unwrap();
        self.table.attached(id);
        self.quarantine.retain(|_, by| *by != id);
        self.daemon = Some(Daemon { id, blocks });
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Grant(count) => {
                let Some(daemon) = &mut self.daemon else { return };
                let granted = daemon.grant(count);
                self.table.grant(&granted).unwrap();
            }
            Op::Start { sequence, length, ask_daemon } => self.start(sequence, length, ask_daemon),
            Op::Fill(request, retention) => self.fill(request, retention),
            Op::Wait(ms) => {
                self.now += Duration::from_millis(ms);
                self.table.advance(self.now);
            }
            Op::End(request) if request < self.requests.len() => {
                let request = self.requests.swap_remove(request);
                self.release(&request.blocks);
            }
            Op::End(_) => {}
            Op::LateMatch { sequence, length } => {
                let keys: Vec<_> = (0..length).map(|at| key(sequence, at)).collect();
                let blocks = self.look_up(&keys, true);
                self.release(&blocks);
            }
            Op::Detach { onboarding, dead } => self.detach(onboarding, dead),
            Op::Attach { same_daemon } if self.daemon.is_none() => {
                self.daemons += u64::from(!same_daemon);
                self.attach(DaemonId(self.daemons));
            }
            Op::AttachFails if self.daemon.is_none() => {
                let _ = self.table.adoption(DaemonId(self.daemons));
                self.table.check_integrity().unwrap();
                self.table.detach();
            }
            Op::Attach { .. } | Op::AttachFails => {}
            Op::DaemonDies => {
                let Some(id) = self.quarantine.values().next().copied() else { return };
                if self.daemon.as_ref().is_some_and(|daemon| daemon.id == id) {
                    return;
                }
                for release in self.table.clear_quarantine(id) {
                    self.daemon.as_mut().expect("pins are a daemon's").release(release);
                }
                self.quarantine.retain(|_, by| *by != id);
            }
        }
    }

    fn in_use(&self) -> HashMap<u32, u32> {
        let mut users = HashMap::new();
        for block in self.requests.iter().flat_map(|request| &request.blocks) {
            *users.entry(*block).or_default() += 1;
        }
        users
    }

    fn check(&mut self) {
        self.table.check_integrity().unwrap();
        let users = self.in_use();
        for block in 0..BLOCKS {
            assert_eq!(self.table.refs(block), users.get(&block).copied().unwrap_or(0), "users of {block}");
        }
        assert_eq!(self.table.quarantined_count(), self.quarantine.len());
        if let Some(daemon) = &self.daemon {
            let pinned = daemon.blocks.iter().filter(|(_, pins, _)| *pins > 0).count();
            assert_eq!(pinned, users.len() + self.table.free_count() + self.quarantine.len());
        }
        // A daemon that hangs in the middle of a copy may go on with it at any time.
        for block in self.quarantine.keys().copied().collect::<Vec<_>>() {
            self.write_noise(block);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_table_agrees_with_a_plain_daemon(attached: bool, ops in prop::collection::vec(op(), 1..120)) {
        let mut world = World::new(attached);
        for op in ops {
            world.apply(op);
            world.check();
        }
    }
}

fn chain(sequence: u8, length: usize) -> Vec<SequenceHash> {
    (0..length).map(|at| key(sequence, at)).collect()
}

/// A private table in which one sequence of three blocks is complete and unused.
fn cached() -> PoolTable {
    let mut table = PoolTable::new_private(4);
    let blocks = table.take(3).unwrap();
    for (at, block) in blocks.iter().enumerate() {
        table.commit(*block, content(0, at), Retention::default());
    }
    for block in blocks {
        assert_eq!(table.unreference(block), None);
    }
    table
}

#[test]
fn eviction_takes_leaves_and_keeps_the_prefix() {
    let mut table = cached();
    let taken = table.take(2).unwrap();
    assert_eq!(table.find(&chain(0, 3), &[]).len(), 2);
    assert_eq!(table.take(1), None);
    assert_eq!(taken.len(), 2);
}

#[test]
fn generations_rise_with_each_local_allocation_only() {
    let mut table = PoolTable::new_private(1);
    for generation in 1..4 {
        assert_eq!(table.take(1).unwrap(), [0]);
        assert_eq!(table.block_ref(0).generation, generation);
        assert_eq!(table.unreference(0), None);
    }
    let _ = table.adoption(DaemonId(1));
    table.attached(DaemonId(1));
    table.grant(&[BlockRef { block: 0, generation: 40 }]).unwrap();
    table.take(1).unwrap();
    assert_eq!(table.unreference(0), Some(Release { block: BlockRef { block: 0, generation: 40 }, pins: 1 }));
}

#[test]
fn the_last_user_gives_back_every_pin() {
    let mut table = PoolTable::new_granted(2);
    let block = BlockRef { block: 1, generation: 5 };
    table.grant(&[block]).unwrap();
    assert_eq!(table.take(1).unwrap(), [1]);
    table.commit(1, content(0, 0), Retention::default());
    let (accepted, doubted) = table.matched(Namespace([7; 32]), &chain(0, 1), &[block], &[]);
    assert_eq!((accepted, doubted), (vec![1], vec![]));
    assert_eq!(table.find(&chain(0, 1), &[]), [1]);
    assert_eq!(table.unreference(1), None);
    assert_eq!(table.unreference(1), None);
    assert_eq!(table.unreference(1), Some(Release { block, pins: 2 }));
    assert!(table.find(&chain(0, 1), &[]).is_empty(), "attached, the daemon may evict what nobody uses");
    let (accepted, doubted) = table.matched(Namespace([7; 32]), &chain(0, 1), &[block], &[]);
    assert_eq!((accepted, doubted), (vec![1], vec![]), "what was released is believed all the same");
}

#[test]
fn a_grant_of_a_block_in_use_is_a_contradiction() {
    let mut table = PoolTable::new_granted(2);
    let block = BlockRef { block: 1, generation: 5 };
    table.grant(&[block]).unwrap();
    assert_eq!(table.grant(&[block]), Err(Contradiction { block: 1 }));
    assert_eq!(table.grant(&[BlockRef { block: 2, generation: 1 }]), Err(Contradiction { block: 2 }));
    table.check_integrity().unwrap();
}

#[test]
fn a_match_that_contradicts_the_table_is_a_miss_and_its_pins_go_back() {
    let mut table = PoolTable::new_granted(3);
    let granted: Vec<_> = (0..2).map(|block| BlockRef { block, generation: 1 }).collect();
    table.grant(&granted).unwrap();
    let blocks = table.take(2).unwrap();
    assert_eq!(blocks, [0, 1]);
    table.commit(0, content(0, 0), Retention::default());
    let stale = BlockRef { block: 0, generation: 9 };
    let (accepted, doubted) = table.matched(Namespace([7; 32]), &chain(0, 2), &[stale, granted[1]], &[]);
    assert!(accepted.is_empty());
    assert_eq!(doubted, [Release { block: stale, pins: 1 }, Release { block: granted[1], pins: 1 }]);
    table.check_integrity().unwrap();
}

#[test]
fn a_matched_block_that_was_never_seen_complete_is_a_miss() {
    let mut table = PoolTable::new_granted(3);
    let known = BlockRef { block: 0, generation: 1 };
    table.grant(&[known]).unwrap();
    assert_eq!(table.take(1).unwrap(), [0]);
    table.commit(0, content(0, 0), Retention::default());
    let unseen = BlockRef { block: 2, generation: 0 };
    let (accepted, doubted) = table.matched(Namespace([7; 32]), &chain(0, 2), &[known, unseen], &[]);
    assert_eq!((accepted, doubted), (vec![0], vec![Release { block: unseen, pins: 1 }]));
    assert_eq!(table.content(2), None);
    table.check_integrity().unwrap();
}

#[test]
fn twins_are_found_once_and_either_may_go() {
    let mut table = PoolTable::new_private(3);
    let blocks = table.take(2).unwrap();
    table.commit(blocks[0], content(0, 0), Retention::default());
    table.commit(blocks[1], content(0, 0), Retention::default());
    assert_eq!(table.unreference(blocks[0]), None);
    let adoption = table.adoption(DaemonId(1));
    assert_eq!(adoption.entries.len(), 1);
    assert!(adoption.entries[0].held, "the one in use speaks for the key");
    assert!(adoption.held.is_empty());
    table.check_integrity().unwrap();
}

#[test]
fn what_a_dead_worker_left_is_found_after_the_next_detach() {
    let mut table = PoolTable::new_granted(3);
    let entry = |block, at| (BlockRef { block, generation: 3 }, content(0, at), Retention::default());
    assert_eq!(table.inherit([entry(2, 0), entry(0, 1), entry(0, 2), entry(7, 2)]), 2);
    table.check_integrity().unwrap();
    table.detach();
    assert_eq!(table.find(&chain(0, 3), &[]), [2, 0]);
}

#[test]
fn quarantine_of_a_daemon_outlives_the_answer_of_another() {
    let mut table = PoolTable::new_private(2);
    let blocks = table.take(1).unwrap();
    table.quarantine(&blocks, DaemonId(1));
    table.detach();
    let adoption = table.adoption(DaemonId(2));
    assert_eq!(adoption.held, [table.block_ref(blocks[0])], "the new daemon must not hand it out");
    table.attached(DaemonId(2));
    assert_eq!(table.quarantined_count(), 1);
    assert_eq!(table.clear_quarantine(DaemonId(1)), [Release { block: table.block_ref(blocks[0]), pins: 1 }]);
    table.check_integrity().unwrap();
}
