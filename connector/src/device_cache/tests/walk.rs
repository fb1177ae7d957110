//! A random walk of requests against a daemon with a small pool, host memory and a disk whose promotions are slow, fail,
//! are refused or come too late, and which leaves now and then. Every lookup is answered once, every block found holds
//! what was asked for, and in the end nothing is left behind on either side.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use proptest::prelude::*;
use proptest::strategy::ValueTree;

use super::*;
use crate::exchange::{Opened, Opening};
use crate::pool_table::AdoptionTable;

const BLOCKS: u32 = 16;

#[derive(Debug, Clone)]
enum Op {
    Look {
        sequence: u8,
        length: usize,
    },
    Abandon(usize),
    /// One more block of a request is computed.
    Fill(usize),
    End(usize),
    /// The daemon reads so many commands.
    Serve(usize),
    /// A promotion ends; so many of its blocks have arrived.
    Promoted {
        which: usize,
        blocks: usize,
    },
    /// A deadline passes.
    Miss(usize),
    /// A block leaves host memory for the disk.
    Demote(u8, usize),
    /// Whether waits are refused.
    Busy(bool),
    Turn,
    Down {
        dead: bool,
    },
    Up,
}

fn op() -> impl Strategy<Value = Op> {
    let (sequence, length) = (0..3u8, 1..7usize);
    prop_oneof![
        8 => (sequence.clone(), length.clone()).prop_map(|(sequence, length)| Op::Look { sequence, length }),
        2 => (0..8usize).prop_map(Op::Abandon),
        6 => (0..8usize).prop_map(Op::Fill),
        5 => (0..8usize).prop_map(Op::End),
        16 => (1..6usize).prop_map(Op::Serve),
        6 => (0..4usize, 0..7usize).prop_map(|(which, blocks)| Op::Promoted { which, blocks }),
        2 => (0..4usize).prop_map(Op::Miss),
        6 => (sequence, length).prop_map(|(sequence, at)| Op::Demote(sequence, at - 1)),
        1 => any::<bool>().prop_map(Op::Busy),
        12 => Just(Op::Turn),
        1 => any::<bool>().prop_map(|dead| Op::Down { dead }),
        2 => Just(Op::Up),
    ]
}

fn key(sequence: u8, at: usize) -> SequenceHash {
    // The first two blocks are common to all.
    let branch = if at < 2 { 9 } else { sequence };
    SequenceHash([[branch; 15].as_slice(), &[at as u8]].concat().try_into().unwrap())
}

fn chain(sequence: u8, length: usize) -> Vec<SequenceHash> {
    (0..length).map(|at| key(sequence, at)).collect()
}

/// What the daemon knows of a block: generation, pins, content.
type Slot = (u32, u32, Option<Content>);

struct Daemon {
    slots: Vec<Slot>,
    host: HashSet<SequenceHash>,
    disk: HashSet<SequenceHash>,
    leases: BTreeMap<u64, Vec<SequenceHash>>,
    last_lease: u64,
    /// Waits that are not answered.
    waiting: Vec<(QuestionId, Vec<SequenceHash>)>,
    busy: bool,
}

impl Daemon {
    fn resident(&self, key: SequenceHash) -> Option<u32> {
        (0..BLOCKS).find(|block| self.slots[*block as usize].2.is_some_and(|content| content.key == key))
    }

    fn is_parent(&self, key: SequenceHash) -> bool {
        self.slots.iter().any(|(_, _, content)| content.is_some_and(|content| content.parent == Some(key)))
    }

    fn grant(&mut self, count: u32) -> Vec<BlockRef> {
        let mut granted = Vec::new();
        while granted.len() < count as usize {
            let free = (0..BLOCKS).find(|block| match self.slots[*block as usize] {
                (_, 0, None) => true,
                (_, 0, Some(content)) => !self.is_parent(content.key),
                _ => false,
            });
            let Some(block) = free else { break };
            let (generation, pins, content) = &mut self.slots[block as usize];
            (*generation, *pins, *content) = (*generation + 1, 1, None);
            granted.push(BlockRef { block, generation: *generation });
        }
        granted
    }

    fn find(&mut self, keys: &[SequenceHash]) -> v1::MatchReply {
        let mut reply = v1::MatchReply::default();
        let mut rest = keys;
        while let Some(block) = rest.first().and_then(|key| self.resident(*key)) {
            let (generation, pins, _) = &mut self.slots[block as usize];
            *pins += 1;
            reply.device.push(v1::BlockRef { block, generation: *generation });
            rest = &rest[1..];
        }
        let host: Vec<_> = rest.iter().copied().take_while(|key| self.host.contains(key)).collect();
        let disk = rest[host.len()..].iter().take_while(|key| self.disk.contains(*key)).count();
        (reply.host_blocks, reply.disk_blocks) = (host.len() as u32, disk as u32);
        if !host.is_empty() {
            self.last_lease += 1;
            reply.lease_id = self.last_lease;
            self.leases.insert(self.last_lease, host);
        }
        reply
    }

    fn note(&mut self, note: Note) {
        match note {
            Note::Commit { block, content, .. } => {
                assert_eq!(self.slots[block.block as usize].0, block.generation);
                let parent_is_there = content.parent.is_none_or(|parent| self.resident(parent).is_some());
                if parent_is_there && self.resident(content.key).is_none() {
                    self.slots[block.block as usize].2 = Some(content);
                    self.host.insert(content.key);
                }
            }
            Note::Release(Release { block, pins }) => {
                let (generation, held, _) = &mut self.slots[block.block as usize];
                assert_eq!(*generation, block.generation);
                *held = held.checked_sub(pins).expect("no more pins come back than were given");
            }
        }
    }

    fn adopt(&mut self, table: &AdoptionTable) {
        self.slots = vec![(0, 0, None); BLOCKS as usize];
        for entry in &table.entries {
            self.slots[entry.block.block as usize] =
                (entry.block.generation, u32::from(entry.held), Some(entry.content));
        }
        for held in &table.held {
            self.slots[held.block as usize] = (held.generation, 1, None);
        }
        self.leases.clear();
        self.waiting.clear();
    }
}

/// A request that was answered: the blocks it has.
struct Request {
    sequence: u8,
    length: usize,
    blocks: Vec<u32>,
}

struct World {
    engine: Engine,
    daemon: Daemon,
    attempt: Attempt,
    last_ticket: u64,
    looking: BTreeMap<u64, (u8, usize)>,
    /// Lookups that were said to wait.
    promoting: BTreeSet<u64>,
    onboarding: BTreeMap<u64, (Request, Vec<u32>)>,
    requests: Vec<Request>,
    /// What the memory of a block holds.
    bytes: Vec<Option<SequenceHash>>,
    /// How many blocks came from disk and were used.
    promoted: u64,
}

impl World {
    fn new() -> Self {
        let daemon = Daemon {
            slots: vec![(0, 0, None); BLOCKS as usize],
            host: HashSet::new(),
            disk: (0..3).flat_map(|sequence| chain(sequence, 5)).collect(),
            leases: BTreeMap::new(),
            last_lease: 100,
            waiting: Vec::new(),
            busy: false,
        };
        Self {
            engine: Engine::attached(BLOCKS),
            daemon,
            attempt: ATTEMPT,
            last_ticket: 0,
            looking: BTreeMap::new(),
            promoting: BTreeSet::new(),
            onboarding: BTreeMap::new(),
            requests: Vec::new(),
            bytes: vec![None; BLOCKS as usize],
            promoted: 0,
        }
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Look { sequence, length } => {
                self.last_ticket += 1;
                self.looking.insert(self.last_ticket, (sequence, length));
                self.engine.cache.lookup(self.last_ticket, NAMESPACE, chain(sequence, length), vec![]);
            }
            Op::Abandon(which) => self.abandon(which),
            Op::Fill(which) => self.fill(which),
            Op::End(which) if which < self.requests.len() => {
                let request = self.requests.remove(which);
                self.engine.cache.release(&request.blocks);
            }
            Op::End(_) => {}
            Op::Serve(commands) => (0..commands).for_each(|_| self.serve()),
            Op::Promoted { which, blocks } if which < self.daemon.waiting.len() => {
                let (question, keys) = self.daemon.waiting.remove(which);
                let on_disk = keys.iter().filter(|key| !self.daemon.host.contains(*key));
                let arrived: Vec<_> = on_disk.take(blocks).copied().collect();
                self.daemon.host.extend(arrived);
                let result = Ok(v1::PrefetchReply::default());
                self.push(Arrival::Prefetched { question, result });
            }
            Op::Promoted { .. } => {}
            Op::Miss(which) => {
                let mut open: Vec<_> = self.engine.cache.lookups.keys().copied().collect();
                open.sort_unstable();
                if let Some(&question) = open.get(which) {
                    self.push(Arrival::Missed { question });
                }
            }
            Op::Demote(sequence, at) => {
                if self.daemon.host.remove(&key(sequence, at)) {
                    self.daemon.disk.insert(key(sequence, at));
                }
            }
            Op::Busy(busy) => self.daemon.busy = busy,
            Op::Turn => self.turn(),
            Op::Down { dead } => {
                self.push(Arrival::Down { reason: DetachReason::HungUp, daemon_dead: dead });
                self.turn();
                // One that is only slow goes on with what it has been told, until it is told of the next attempt.
                while dead && self.engine.commands.try_recv().is_ok() {}
            }
            Op::Up => self.up(),
        }
        self.engine.cache.table.check_integrity().unwrap();
    }

    fn push(&self, arrival: Arrival) {
        self.engine.link().inbox.push(self.attempt, arrival);
    }

    fn up(&mut self) {
        if self.engine.cache.state() == CacheState::Detached {
            self.attempt += 1;
            self.push(Arrival::Reachable { daemon: DAEMON });
            self.turn();
        }
    }

    fn abandon(&mut self, which: usize) {
        let open: Vec<u64> = self.looking.keys().chain(self.onboarding.keys()).copied().collect();
        let Some(&ticket) = open.get(which) else { return };
        self.looking.remove(&ticket);
        self.engine.cache.abandon(ticket);
        if let Some((request, _)) = self.onboarding.remove(&ticket) {
            self.engine.cache.release(&request.blocks);
        }
    }

    fn fill(&mut self, which: usize) {
        let Some(request) = self.requests.get_mut(which) else { return };
        let at = request.blocks.len();
        if at == request.length {
            return;
        }
        let Allocate::Blocks(blocks) = self.engine.cache.allocate(1) else { return };
        let parent = at.checked_sub(1).map(|before| key(request.sequence, before));
        self.bytes[blocks[0] as usize] = Some(key(request.sequence, at));
        self.engine.cache.commit(
            blocks[0],
            NAMESPACE,
            key(request.sequence, at),
            parent,
            Retention::default(),
        );
        request.blocks.extend(blocks);
    }

    /// The daemon reads one command. Those of another attempt never reach it.
    fn serve(&mut self) {
        let Ok((attempt, command)) = self.engine.commands.try_recv() else { return };
        if attempt != self.attempt {
            return;
        }
        match command {
            Command::Open(Opening::Adoption { table, .. }) => {
                self.daemon.adopt(&table);
                let opened = Opened { pool_id: 1, memory: None, inherited: Vec::new() };
                self.push(Arrival::Opened(Box::new(opened)));
            }
            Command::Open(Opening::Fresh) => panic!("the engine has a pool"),
            Command::Match { question, keys, .. } => {
                let result = Ok(self.daemon.find(&keys));
                self.push(Arrival::Matched { question, result });
            }
            Command::Prefetch { question, .. } if self.daemon.busy => {
                self.push(Arrival::Prefetched { question, result: Err(refused(Refusal::Busy)) });
            }
            Command::Prefetch { question, keys, .. } => self.daemon.waiting.push((question, keys)),
            Command::Onboard { question, lease_id, targets, .. } => {
                let keys = self.daemon.leases.remove(&lease_id).expect("a lease is used once");
                for (target, key) in targets.iter().zip(keys) {
                    let (generation, pins, content) = &mut self.daemon.slots[target.block as usize];
                    assert_eq!((*generation, *pins), (target.generation, 1));
                    self.bytes[target.block as usize] = Some(key);
                    let at = usize::from(key.0[15]);
                    let sequence = (0..3).find(|sequence| self::key(*sequence, at) == key).unwrap();
                    let parent = at.checked_sub(1).map(|before| self::key(sequence, before));
                    *content = Some(Content { namespace: NAMESPACE, key, parent });
                }
                let blocks_done = targets.len() as u32;
                let result = Ok(v1::TransferDone { blocks_done, ..Default::default() });
                self.push(Arrival::Onboarded { question, result });
            }
            Command::RequestGrants { question, count } => {
                let blocks = self.daemon.grant(count);
                self.push(Arrival::Granted { question, result: Ok(blocks) });
            }
            Command::Notes(notes) => notes.into_iter().for_each(|note| self.daemon.note(note)),
            Command::ReleaseLease(lease) => {
                self.daemon.leases.remove(&lease).expect("a lease is given back once");
            }
        }
    }

    fn turn(&mut self) {
        for event in self.engine.cache.poll() {
            match event {
                CacheEvent::Looked { ticket, device, host_blocks, promoted_blocks, lease, .. } => {
                    self.looked(ticket, device, (host_blocks, promoted_blocks), lease);
                }
                CacheEvent::Promoting { ticket } => {
                    assert!(self.looking.contains_key(&ticket), "nobody waits for {ticket}");
                    assert!(self.promoting.insert(ticket), "it waits once");
                }
                CacheEvent::Onboarded { ticket, ok } => {
                    let (mut request, targets) = self.onboarding.remove(&ticket).expect("it is wanted");
                    if ok {
                        request.blocks.extend(targets);
                    }
                    self.check(&request);
                    self.requests.push(request);
                }
                CacheEvent::Granted | CacheEvent::Attached { .. } | CacheEvent::Detached { .. } => {}
            }
        }
    }

    fn looked(&mut self, ticket: u64, device: Vec<u32>, found: (u32, u32), lease: Option<LeaseId>) {
        let (sequence, length) = self.looking.remove(&ticket).expect("answered once, while it is wanted");
        let (host_blocks, promoted_blocks) = found;
        assert!(promoted_blocks <= host_blocks && device.len() + host_blocks as usize <= length);
        assert!(promoted_blocks == 0 || self.promoting.contains(&ticket));
        assert_eq!(lease.is_some(), host_blocks > 0);
        let request = Request { sequence, length, blocks: device };
        self.check(&request);
        let Some(lease) = lease else { return self.requests.push(request) };
        let Allocate::Blocks(targets) = self.engine.cache.allocate(host_blocks as usize) else {
            self.engine.cache.abandon_lease(lease);
            return self.requests.push(request);
        };
        self.promoted += u64::from(promoted_blocks);
        self.onboarding.insert(ticket, (request, targets.clone()));
        self.engine.cache.onboard(ticket, lease, targets);
    }

    /// What was found holds what was asked for.
    fn check(&self, request: &Request) {
        for (at, block) in request.blocks.iter().enumerate() {
            assert_eq!(self.bytes[*block as usize], Some(key(request.sequence, at)), "block {block}");
        }
    }

    /// Everything under way ends, and all requests. Then both sides hold nothing but blocks granted in advance.
    fn end(mut self) -> (u64, u64) {
        self.up();
        for round in 0.. {
            assert!(round < 1000, "it does not come to rest");
            self.serve();
            self.step(Op::Promoted { which: 0, blocks: 9 });
            self.turn();
            self.step(Op::End(0));
            let cache = &self.engine.cache;
            let open = cache.lookups.len() + cache.onboards.len() + cache.grants.len() + cache.notes.len();
            let quiet = self.engine.commands.is_empty() && !cache.has_events();
            if open == 0 && quiet && self.requests.is_empty() && self.daemon.waiting.is_empty() {
                break;
            }
        }
        assert_eq!((self.looking.len(), self.onboarding.len()), (0, 0), "all are answered");
        assert_eq!((self.engine.cache.leases.len(), self.daemon.leases.len()), (0, 0));
        let pins: u32 = self.daemon.slots.iter().map(|(_, pins, _)| pins).sum();
        assert_eq!(pins as usize, self.engine.cache.table.free_count());
        assert_eq!(self.engine.cache.counters.contradictions.get(), 0);
        (self.engine.cache.counters.disk_waits.get(), self.promoted)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_while_lookups_wait_for_a_disk(ops in prop::collection::vec(op(), 1..200)) {
        let mut world = World::new();
        ops.into_iter().for_each(|op| world.step(op));
        world.end();
    }
}

/// That the walk above goes where it is meant to.
#[test]
fn the_walk_meets_waits_and_promoted_blocks() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (mut waits, mut promoted) = (0, 0);
    for _ in 0..100 {
        let ops = prop::collection::vec(op(), 100..200).new_tree(&mut runner).unwrap().current();
        let mut world = World::new();
        ops.into_iter().for_each(|op| world.step(op));
        let (waited, used) = world.end();
        (waits, promoted) = (waits + waited, promoted + used);
    }
    assert!(waits > 300 && promoted > 100, "{waits} waits, {promoted} blocks");
}
