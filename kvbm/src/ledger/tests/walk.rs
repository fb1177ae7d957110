//! The random walk: what may happen, and that nothing goes wrong then.

use super::*;

#[derive(Debug, Clone)]
pub(super) enum Op {
    NewWorker {
        model: u8,
        domain: u32,
        inherit: bool,
    },
    Grant(usize, usize),
    Compute {
        worker: usize,
        namespace: usize,
        key: u16,
    },
    Chain {
        worker: usize,
        namespace: usize,
        key: u16,
    },
    Release(usize, usize),
    Match {
        worker: usize,
        namespace: usize,
        key: u16,
    },
    Onboard(usize, usize),
    ReleaseLease(usize),
    Plan(usize),
    EndOffload(usize, bool),
    EndOnboard(usize, bool),
    Kill(usize),
    Reattach(usize),
    Tick(u64),
    Segment,
    DiskSegment,
    DiskService(bool),
    Demote(usize),
    EndDemote(u64),
    /// A chain that is computed, let go of, and all the way down to disk.
    Sink {
        worker: usize,
        namespace: usize,
        key: u16,
    },
    /// Something that was written to disk at some time.
    Promote {
        block: usize,
        batch: usize,
    },
    EndPromote(u64),
    Pin {
        worker: usize,
        namespace: usize,
        key: u16,
        ms: u64,
        prefix: bool,
    },
    Unpin(usize),
    Scrub(usize),
    EndScrub(usize, bool),
    RestartDisk(u64),
}

pub(super) fn op() -> impl Strategy<Value = Op> {
    let worker = 0usize..4;
    prop_oneof![
        1 => (0u8..2, 1u32..3, any::<bool>())
            .prop_map(|(model, domain, inherit)| Op::NewWorker { model, domain, inherit }),
        4 => (worker.clone(), 1usize..5).prop_map(|(w, n)| Op::Grant(w, n)),
        8 => (worker.clone(), 0usize..2, 0..KEYS)
            .prop_map(|(worker, namespace, key)| Op::Compute { worker, namespace, key }),
        6 => (worker.clone(), 0usize..2, 0..KEYS)
            .prop_map(|(worker, namespace, key)| Op::Chain { worker, namespace, key }),
        16 => (worker.clone(), any::<usize>()).prop_map(|(w, i)| Op::Release(w, i)),
        6 => (worker.clone(), 0usize..2, 0..KEYS)
            .prop_map(|(worker, namespace, key)| Op::Match { worker, namespace, key }),
        5 => (worker.clone(), 1usize..5).prop_map(|(w, n)| Op::Onboard(w, n)),
        1 => worker.clone().prop_map(Op::ReleaseLease),
        10 => (1usize..5).prop_map(Op::Plan),
        6 => (any::<usize>(), prop::bool::weighted(0.85)).prop_map(|(i, ok)| Op::EndOffload(i, ok)),
        5 => (any::<usize>(), prop::bool::weighted(0.85)).prop_map(|(i, ok)| Op::EndOnboard(i, ok)),
        1 => worker.clone().prop_map(Op::Kill),
        1 => worker.prop_map(Op::Reattach),
        1 => (1u64..60).prop_map(Op::Tick),
        1 => Just(Op::Segment),
        1 => Just(Op::DiskSegment),
        1 => prop::bool::weighted(0.8).prop_map(Op::DiskService),
        8 => (1usize..5).prop_map(Op::Demote),
        6 => any::<u64>().prop_map(Op::EndDemote),
        8 => (0usize..4, 0usize..2, 0..KEYS)
            .prop_map(|(worker, namespace, key)| Op::Sink { worker, namespace, key }),
        6 => (any::<usize>(), 1usize..4).prop_map(|(block, batch)| Op::Promote { block, batch }),
        6 => any::<u64>().prop_map(Op::EndPromote),
        3 => (0usize..4, 0usize..2, 0..KEYS, 1u64..100, any::<bool>()).prop_map(
            |(worker, namespace, key, ms, prefix)| Op::Pin { worker, namespace, key, ms, prefix }
        ),
        1 => any::<usize>().prop_map(Op::Unpin),
        1 => (1usize..4).prop_map(Op::Scrub),
        2 => (any::<usize>(), prop::bool::weighted(0.7)).prop_map(|(i, ok)| Op::EndScrub(i, ok)),
        1 => any::<u64>().prop_map(Op::RestartDisk),
    ]
}

impl World {
    pub(super) fn apply(&mut self, op: &Op) {
        self.may_lose_pinned |= matches!(op, Op::EndPromote(_) | Op::EndScrub(..) | Op::RestartDisk(_));
        match op {
            Op::NewWorker { model, domain, inherit } => self.new_worker(*model, *domain, *inherit),
            Op::Grant(w, n) => {
                if let Some(i) = self.worker(*w) {
                    let (session, pool) = (self.workers[i].session, self.workers[i].pool);
                    for block in self
                        .ledger
                        .request_grants(session, pool, *n, Millis(self.now))
                        .expect("it is its pool")
                    {
                        // The engine may write at once.
                        self.device.insert((pool, block.block), None);
                        self.workers[i].granted.push(block);
                    }
                }
            }
            Op::Compute { worker, namespace, key } => {
                if let Some(i) = self.worker(*worker) {
                    self.compute(i, *namespace, *key);
                }
            }
            Op::Chain { worker, namespace, key } => {
                if let Some(i) = self.worker(*worker) {
                    for key in path(*key) {
                        self.apply(&Op::Grant(i, 1));
                        self.compute(i, *namespace, key);
                    }
                }
            }
            Op::Release(w, k) => {
                if let Some(i) = self.worker(*w) {
                    let worker = &mut self.workers[i];
                    let mut blocks: Vec<BlockRef> = worker.pins.keys().copied().collect();
                    blocks.sort_by_key(|block| (block.block, block.generation));
                    if let Some(block) = (!blocks.is_empty()).then(|| blocks[k % blocks.len()]) {
                        let pins = worker.pins.remove(&block).expect("listed just now");
                        let (session, pool) = (worker.session, worker.pool);
                        let held = [Held { block, pins }];
                        let now = Millis(self.now);
                        self.ledger.release(session, pool, &held, now).expect("it is its pool");
                    }
                }
            }
            Op::Match { worker, namespace, key } => {
                if let Some(i) = self.worker(*worker) {
                    self.find(i, *namespace, *key);
                }
            }
            Op::Onboard(w, n) => {
                if let Some(i) = self.worker(*w) {
                    self.onboard(i, *n);
                }
            }
            Op::ReleaseLease(w) => {
                if let Some((i, lease)) =
                    self.worker(*w).and_then(|i| Some((i, self.workers[i].leases.pop()?.0)))
                {
                    let _ = self.ledger.release_lease(self.workers[i].session, lease, Millis(self.now));
                }
            }
            Op::Plan(max) => self.plan(*max),
            Op::EndOffload(i, ok) => self.end_offload(*i, *ok),
            Op::EndOnboard(i, ok) => self.end_onboard(*i, *ok),
            Op::Kill(w) => {
                if let Some(i) = self.worker(*w) {
                    let worker = self.workers.swap_remove(i);
                    self.ledger.session_silent(worker.session);
                    let idle = self.ledger.pool(worker.pool).expect("it waits").quarantined();
                    assert!(idle >= worker.granted.len(), "a silent holder's blocks are quarantined");
                    assert!(
                        self.ledger.request_grants(worker.session, worker.pool, 1, Millis(self.now)).is_err()
                    );
                    self.ledger.session_dead(worker.session, Millis(self.now));
                }
            }
            Op::Reattach(w) => {
                if let Some(i) = self.worker(*w) {
                    self.reattach(i);
                }
            }
            Op::Tick(ms) => {
                self.now += ms;
                self.ledger.tick(Millis(self.now));
            }
            Op::DiskSegment => {
                if self.disk_segments == 0 {
                    self.ledger.add_disk(SlotsIn::bytes(4 * 4096));
                }
                if self.disk_segments < 4 {
                    self.ledger.add_disk_segment(SegmentId(self.disk_segments));
                    self.disk_segments += 1;
                    self.ledger.set_disk_service(true);
                }
            }
            Op::Sink { worker, namespace, key } => {
                self.apply(&Op::Chain { worker: *worker, namespace: *namespace, key: *key });
                (0..8).for_each(|i| self.apply(&Op::Release(*worker, i)));
                for _ in 0..2 {
                    self.apply(&Op::Plan(4));
                    self.apply(&Op::EndOffload(0, true));
                }
                self.apply(&Op::Tick(6));
                for _ in 0..2 {
                    self.apply(&Op::Demote(4));
                    self.apply(&Op::EndDemote(u64::MAX));
                }
            }
            Op::DiskService(on) => self.ledger.set_disk_service(*on && self.disk_segments > 0),
            Op::Demote(blocks) => self.demote(*blocks),
            Op::EndDemote(outcomes) => self.end_demote(*outcomes),
            Op::Promote { block, batch } => {
                let mut blocks: Vec<_> = self.disk.values().copied().flatten().collect();
                blocks.sort();
                let Some((digest, n)) = (!blocks.is_empty()).then(|| blocks[block % blocks.len()]) else {
                    return;
                };
                let knows = |worker: &Worker| worker.namespaces.iter().position(|(d, _)| *d == digest);
                let found = self.workers.iter().enumerate().find_map(|(i, worker)| Some((i, knows(worker)?)));
                if let Some((i, namespace)) = found {
                    self.promote(i, namespace, n, *batch);
                }
            }
            Op::Pin { worker, namespace, key, ms, prefix } => {
                if let Some(i) = self.worker(*worker) {
                    let hashes: Vec<_> = path(*key).into_iter().map(hash).collect();
                    let what = if *prefix {
                        PinWhat::Prefix(&hashes)
                    } else {
                        PinWhat::Keys(&hashes[hashes.len() - 1..])
                    };
                    let (id, now) = (self.workers[i].namespaces[*namespace].1, Millis(self.now));
                    let _ = self.ledger.pin_blocks(id, what, Millis(self.now + ms), now);
                }
            }
            Op::Unpin(i) => {
                let pins = self.ledger.pins();
                if let Some(pin) = (!pins.is_empty()).then(|| pins[i % pins.len()]) {
                    self.ledger.unpin(pin.id, Millis(self.now)).expect("listed just now");
                }
            }
            Op::EndPromote(outcomes) => self.end_promote(*outcomes),
            Op::Scrub(blocks) => {
                let items = self.ledger.next_scrub(BatchLimit { blocks: *blocks, bytes: usize::MAX });
                assert!(items.len() <= *blocks);
                self.scrubs.extend(items);
            }
            Op::EndScrub(i, intact) => self.end_scrub(*i, *intact),
            Op::RestartDisk(lost) => self.restart_disk(*lost),
            Op::Segment => {
                if self.segments < 2 {
                    self.ledger.add_segment(SegmentId(self.segments));
                    self.segments += 1;
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    #[test]
    fn random_walks_never_serve_other_bytes_and_lose_no_slot(
        ops in prop::collection::vec(op(), 1..300),
        peers in any::<bool>(),
    ) {
        let mut world = World::new(quotas());
        world.peers = peers;
        world.retention = mixed_retention;
        world.apply(&Op::Segment);
        world.apply(&Op::NewWorker { model: 0, domain: 1, inherit: false });
        for op in &ops {
            world.apply(op);
            world.ledger.check_integrity();
            world.follow_events();
            world.check_pins();
        }
        world.settle();
        world.follow_events();
    }
}
