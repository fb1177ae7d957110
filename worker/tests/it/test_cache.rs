//! A cache and a model to try the scheduler with: the cache answers late, runs out and fails at random; the model notices
//! any token that is computed on wrong KV.

use std::cell::RefCell;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use kvbm_hash::{Namespace, Retention, SequenceHash};
use kvbm_worker::{Allocate, BlockId, Cache, CacheEvent, Chunk, LeaseId, Logits, Model, Onboard, Ticket};

use crate::support::Random;

/// What stands for KV: per token a digest of the sequence up to it. 0 is garbage.
pub type Contents = Rc<RefCell<Vec<Vec<u64>>>>;

type Key = (Namespace, SequenceHash);

/// How a [`TestCache`] behaves.
#[derive(Clone, Copy)]
pub struct Behaviour {
    pub blocks: usize,
    pub tokens_per_block: usize,
    /// Most host blocks; 0: no host tier.
    pub host_blocks: usize,
    /// Most polls until an answer.
    pub delay: usize,
    /// One of so many allocations is put off; 0: none.
    pub pending_in: usize,
    /// One of so many onboards fails; 0: none.
    pub failing_in: usize,
    /// Most polls until blocks have come from disk; `None`: no disk.
    pub disk: Option<usize>,
}

#[derive(Default, Clone)]
struct Slot {
    references: usize,
    key: Option<Key>,
    used: u64,
}

enum Job {
    Look {
        ticket: Ticket,
        namespace: Namespace,
        keys: Vec<SequenceHash>,
    },
    /// Blocks from `begin` on are on their way from disk.
    Promote {
        ticket: Ticket,
        namespace: Namespace,
        keys: Vec<SequenceHash>,
        begin: usize,
        end: usize,
    },
    Onboard {
        ticket: Ticket,
        contents: Vec<(Key, Vec<u64>)>,
        targets: Vec<BlockId>,
    },
    Grant,
}

pub struct TestCache {
    behaviour: Behaviour,
    contents: Contents,
    random: Random,
    slots: Vec<Slot>,
    resident: HashMap<Key, BlockId>,
    host: HashMap<Key, Vec<u64>>,
    host_order: VecDeque<Key>,
    /// What was ever in host memory.
    disk: HashMap<Key, Vec<u64>>,
    /// The drive hangs.
    pub drive_hangs: bool,
    /// All of them.
    pub onboards_fail: bool,
    leases: HashMap<LeaseId, Vec<(Key, Vec<u64>)>>,
    jobs: Vec<(usize, Job)>,
    abandoned: Vec<Ticket>,
    now: u64,
    next_lease: u64,
    pub evictions: usize,
    /// What each lookup said of its keys.
    pub looked_up: Vec<Vec<Option<Retention>>>,
    /// What each block was committed with.
    pub committed: Vec<Retention>,
    pub onboards: usize,
}

impl TestCache {
    pub fn new(behaviour: Behaviour, seed: u64) -> (Self, Contents) {
        let contents: Contents =
            Rc::new(RefCell::new(vec![vec![0; behaviour.tokens_per_block]; behaviour.blocks]));
        let cache = Self {
            behaviour,
            contents: contents.clone(),
            random: Random(seed),
            slots: vec![Slot::default(); behaviour.blocks],
            resident: HashMap::new(),
            host: HashMap::new(),
            host_order: VecDeque::new(),
            disk: HashMap::new(),
            drive_hangs: false,
            onboards_fail: false,
            leases: HashMap::new(),
            jobs: Vec::new(),
            abandoned: Vec::new(),
            now: 0,
            next_lease: 0,
            evictions: 0,
            looked_up: Vec::new(),
            committed: Vec::new(),
            onboards: 0,
        };
        (cache, contents)
    }

    /// Nothing is referenced, leased or under way.
    pub fn assert_nothing_held(&mut self) {
        self.drive_hangs = false;
        while !self.jobs.is_empty() {
            let unanswered = self.poll().into_iter().filter(|event| *event != CacheEvent::Granted).count();
            assert_eq!(unanswered, 0, "all tickets were abandoned or answered");
        }
        assert!(self.slots.iter().all(|slot| slot.references == 0), "no block is held");
        assert!(self.leases.is_empty(), "no lease is held");
    }

    fn later(&mut self, job: Job) {
        let delay = self.random.below(self.behaviour.delay + 1);
        self.jobs.push((delay, job));
    }

    fn one_in(&mut self, n: usize) -> bool {
        n > 0 && self.random.below(n) == 0
    }

    fn take_abandoned(&mut self, ticket: Ticket) -> bool {
        let before = self.abandoned.len();
        self.abandoned.retain(|other| *other != ticket);
        self.abandoned.len() < before
    }

    /// The blocks of these keys that are in the pool, then in host memory, then on disk.
    fn count(&self, namespace: Namespace, keys: &[SequenceHash]) -> (Vec<BlockId>, usize, usize) {
        let mut device = Vec::new();
        while let Some(block) = keys.get(device.len()).and_then(|key| self.resident.get(&(namespace, *key))) {
            device.push(*block);
        }
        let behind = &keys[device.len()..];
        let host = behind.iter().take_while(|key| self.host.contains_key(&(namespace, **key))).count();
        let on_disk = behind[host..].iter().take_while(|key| self.disk.contains_key(&(namespace, **key)));
        let disk = if self.behaviour.disk.is_some() { on_disk.count() } else { 0 };
        (device, host, disk)
    }

    /// A lookup either waits for the disk or is answered.
    fn look(&mut self, ticket: Ticket, namespace: Namespace, keys: Vec<SequenceHash>) -> CacheEvent {
        let (device, host, disk) = self.count(namespace, &keys);
        if disk == 0 {
            return self.answer(ticket, namespace, &keys, 0..0);
        }
        let delay = self.random.below(self.behaviour.disk.unwrap_or(0) + 1);
        let begin = device.len() + host;
        self.jobs.push((delay, Job::Promote { ticket, namespace, keys, begin, end: begin + disk }));
        CacheEvent::Promoting { ticket }
    }

    /// The blocks have come, or where things fail, some of them.
    fn promote(&mut self, namespace: Namespace, keys: &[SequenceHash]) {
        let failing = self.behaviour.failing_in > 0;
        let come = if failing { self.random.below(keys.len() + 1) } else { keys.len() };
        for key in &keys[..come] {
            let content = self.disk[&(namespace, *key)].clone();
            self.keep_in_host((namespace, *key), content);
        }
    }

    fn answer(
        &mut self,
        ticket: Ticket,
        namespace: Namespace,
        keys: &[SequenceHash],
        waited: Range<usize>,
    ) -> CacheEvent {
        let (device, host_blocks, _) = self.count(namespace, keys);
        for block in &device {
            self.slots[block.0 as usize].references += 1;
        }
        let host = device.len()..device.len() + host_blocks;
        let held: Vec<(Key, Vec<u64>)> = keys[host.clone()]
            .iter()
            .map(|key| ((namespace, *key), self.host[&(namespace, *key)].clone()))
            .collect();
        let promoted_blocks = host.filter(|at| waited.contains(at)).count();
        let lease = (host_blocks > 0).then(|| {
            self.next_lease += 1;
            self.leases.insert(LeaseId(self.next_lease), held);
            LeaseId(self.next_lease)
        });
        CacheEvent::Looked { ticket, device, host_blocks, promoted_blocks, lease }
    }

    fn keep_in_host(&mut self, key: Key, content: Vec<u64>) {
        if self.behaviour.host_blocks == 0 || self.host.contains_key(&key) {
            return;
        }
        self.disk.insert(key, content.clone());
        self.host.insert(key, content);
        self.host_order.push_back(key);
        if self.host.len() > self.behaviour.host_blocks {
            let oldest = self.host_order.pop_front().expect("as many as in the map");
            self.host.remove(&oldest);
        }
    }

    /// Everything leaves the pool and host memory for the disk.
    pub fn only_the_disk_remembers(&mut self) {
        for (key, block) in std::mem::take(&mut self.resident) {
            assert_eq!(self.slots[block.0 as usize].references, 0, "{key:?} is in use");
            self.slots[block.0 as usize].key = None;
        }
        self.host_forgets();
    }

    /// Everything leaves host memory.
    pub fn host_forgets(&mut self) {
        self.host.clear();
        self.host_order.clear();
    }

    fn finish_onboard(
        &mut self,
        ticket: Ticket,
        held: Vec<(Key, Vec<u64>)>,
        targets: Vec<BlockId>,
    ) -> CacheEvent {
        self.onboards += 1;
        if self.onboards_fail || self.one_in(self.behaviour.failing_in) {
            self.release(targets);
            return CacheEvent::Onboarded { ticket, outcome: Onboard::Failed };
        }
        for ((key, content), target) in held.into_iter().zip(&targets) {
            self.contents.borrow_mut()[target.0 as usize] = content;
            self.register(*target, key);
        }
        CacheEvent::Onboarded { ticket, outcome: Onboard::Done(Duration::ZERO) }
    }

    fn register(&mut self, block: BlockId, key: Key) {
        if let Entry::Vacant(vacant) = self.resident.entry(key) {
            vacant.insert(block);
            self.slots[block.0 as usize].key = Some(key);
        }
    }

    fn drop_event(&mut self, event: CacheEvent, targets: Vec<BlockId>) {
        match event {
            CacheEvent::Looked { device, lease, .. } => {
                self.release(device);
                if let Some(lease) = lease {
                    self.abandon_lease(lease);
                }
            }
            CacheEvent::Onboarded { outcome: Onboard::Done(_), .. } => self.release(targets),
            CacheEvent::Onboarded { outcome: Onboard::Failed, .. } => {}
            CacheEvent::Promoting { .. } | CacheEvent::Granted => {}
        }
    }
}

impl Cache for TestCache {
    fn lookup(
        &mut self,
        ticket: Ticket,
        namespace: Namespace,
        keys: Vec<SequenceHash>,
        retention: Vec<Option<Retention>>,
    ) {
        assert!(!keys.is_empty() && (retention.is_empty() || retention.len() == keys.len()));
        self.looked_up.push(retention);
        self.later(Job::Look { ticket, namespace, keys });
    }

    fn allocate(&mut self, count: usize) -> Allocate {
        if self.one_in(self.behaviour.pending_in) {
            self.later(Job::Grant);
            return Allocate::Pending;
        }
        let mut free: Vec<usize> = (0..self.slots.len()).filter(|i| self.slots[*i].references == 0).collect();
        if free.len() < count {
            return Allocate::Exhausted;
        }
        // Blocks without a key first, then those not used for the longest time.
        free.sort_by_key(|i| (self.slots[*i].key.is_some(), self.slots[*i].used));
        free.truncate(count);
        for i in &free {
            if let Some(key) = self.slots[*i].key.take() {
                self.resident.remove(&key);
                self.evictions += 1;
            }
            self.slots[*i].references = 1;
            self.contents.borrow_mut()[*i].fill(0);
        }
        Allocate::Blocks(free.into_iter().map(|i| BlockId(i as u32)).collect())
    }

    fn onboard(&mut self, ticket: Ticket, lease: LeaseId, targets: Vec<BlockId>) {
        let contents = self.leases.remove(&lease).expect("the lease is held");
        assert_eq!(contents.len(), targets.len());
        self.later(Job::Onboard { ticket, contents, targets });
    }

    fn commit(
        &mut self,
        block: BlockId,
        namespace: Namespace,
        key: SequenceHash,
        parent: Option<SequenceHash>,
        retention: Retention,
    ) {
        self.committed.push(retention);
        assert!(self.slots[block.0 as usize].references > 0, "committed blocks are held");
        assert_ne!(Some(key), parent);
        let content = self.contents.borrow()[block.0 as usize].clone();
        self.register(block, (namespace, key));
        self.keep_in_host((namespace, key), content);
    }

    fn release(&mut self, blocks: Vec<BlockId>) {
        for block in blocks {
            self.now += 1;
            let slot = &mut self.slots[block.0 as usize];
            slot.references = slot.references.checked_sub(1).expect("released blocks are held");
            slot.used = self.now;
        }
    }

    fn abandon_lease(&mut self, lease: LeaseId) {
        assert!(self.leases.remove(&lease).is_some(), "the lease is held");
    }

    fn abandon(&mut self, ticket: Ticket) {
        self.abandoned.push(ticket);
    }

    fn poll(&mut self) -> Vec<CacheEvent> {
        let mut events = Vec::new();
        let jobs = std::mem::take(&mut self.jobs);
        for (delay, job) in jobs {
            if delay > 0 || (self.drive_hangs && matches!(job, Job::Promote { .. })) {
                self.jobs.push((delay.saturating_sub(1), job));
                continue;
            }
            let (ticket, event, targets) = match job {
                Job::Grant => {
                    events.push(CacheEvent::Granted);
                    continue;
                }
                Job::Look { ticket, .. } | Job::Promote { ticket, .. } if self.take_abandoned(ticket) => {
                    continue;
                }
                Job::Look { ticket, namespace, keys } => (ticket, self.look(ticket, namespace, keys), vec![]),
                Job::Promote { ticket, namespace, keys, begin, end } => {
                    self.promote(namespace, &keys[begin..end]);
                    (ticket, self.answer(ticket, namespace, &keys, begin..end), vec![])
                }
                Job::Onboard { ticket, contents, targets } => {
                    (ticket, self.finish_onboard(ticket, contents, targets.clone()), targets)
                }
            };
            if self.take_abandoned(ticket) {
                self.drop_event(event, targets);
            } else {
                events.push(event);
            }
        }
        events
    }
}

/// A model whose next token is a digest of all tokens before, which it reads from the blocks alone.
pub struct TestModel {
    pub contents: Contents,
    pub tokens_per_block: usize,
}

pub const VOCAB: usize = 97;

fn digest(before: u64, token: u32) -> u64 {
    let mut z = (before ^ u64::from(token).wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_add(1);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) | 1
}

fn fill(digest: u64, row: &mut [f32]) {
    for (token, logit) in row.iter_mut().enumerate() {
        *logit = (digest.rotate_left(token as u32) % 1009) as f32 / 300.0;
    }
}

/// What the model answers to a sequence, without blocks.
pub fn expected(tokens: &[u32]) -> Vec<f32> {
    let mut row = vec![0.0; VOCAB];
    fill(tokens.iter().fold(1, |before, token| digest(before, *token)), &mut row);
    row
}

impl Model for TestModel {
    fn forward(&mut self, batch: &[Chunk<'_>], logits: &mut Logits) -> Result<(), kvbm_worker::Error> {
        let mut contents = self.contents.borrow_mut();
        let wanted = batch.iter().map(|chunk| chunk.want.answers()).sum();
        let mut rows = logits.reset(wanted, VOCAB).chunks_exact_mut(VOCAB);
        for chunk in batch {
            let place = |position: usize| {
                let block = chunk.blocks[position / self.tokens_per_block].0 as usize;
                (block, position % self.tokens_per_block)
            };
            let mut before = match chunk.first_position.checked_sub(1) {
                None => 1,
                Some(last) => contents[place(last).0][place(last).1],
            };
            assert_ne!(before, 0, "computed on garbage");
            for (i, token) in chunk.tokens.iter().enumerate() {
                before = digest(before, *token);
                let (block, slot) = place(chunk.first_position + i);
                contents[block][slot] = before;
                if i >= chunk.tokens.len() - chunk.want.answers() {
                    fill(before, rows.next().expect("one row each"));
                }
            }
        }
        Ok(())
    }
}
