//! Ranks that hold the same bytes.

use super::*;
use crate::tier::Route;

const RANKS: u32 = 4;

fn replicas(manager: &Manager) -> Vec<Rank> {
    let open = |rank| Rank::open_shard(manager, 1, EnginePoolMode::Ipc, (rank, RANKS), (0, 1));
    (0..RANKS).map(open).collect()
}

/// All ranks store; one copy is in host memory.
fn stored(ranks: &[Rank], keys: &[SequenceHash]) {
    let said: Vec<_> = ranks.iter().map(|rank| rank.store(rank.compute(keys), None, false)).collect();
    said.iter().for_each(|said| assert_eq!(said.recv().unwrap().len(), keys.len()));
}

/// Blocks from the 60th on, as they are assigned now.
fn targets(rank: &Rank, count: u32) -> Vec<BlockRef> {
    (0..count).map(|block| rank.block(60 + block)).collect()
}

fn load_all(ranks: &[Rank], lease: LeaseId, count: u32) -> Vec<Result<Outcome, Refused>> {
    load_into(ranks, lease, ranks.iter().map(|rank| targets(rank, count)).collect())
}

fn load_into(ranks: &[Rank], lease: LeaseId, all: Vec<Vec<BlockRef>>) -> Vec<Result<Outcome, Refused>> {
    thread::scope(|scope| {
        let load = |(rank, targets): (&Rank, Vec<BlockRef>)| rank.load(lease, 0, &targets);
        let loads: Vec<_> = ranks.iter().zip(all).map(|of_rank| scope.spawn(move || load(of_rank))).collect();
        loads.into_iter().map(|load| load.join().unwrap()).collect()
    })
}

fn counts(manager: &Manager) -> [u64; 3] {
    let counters = manager.counters();
    [Route::DeviceToHost, Route::HostToDevice, Route::DeviceToDevice].map(|route| counters.blocks(route))
}

#[test]
fn replicated_blocks_are_stored_once_loaded_once_and_handed_from_rank_to_rank() {
    let config = || ManagerConfig { copy_delay: Duration::from_micros(100), ..with_host(4 << 20) };
    replicate(config());
    replicate(on_gpus(config()));
}

fn replicate(config: ManagerConfig) {
    let manager = manager(config);
    let ranks = replicas(&manager);
    let keys = chain(40);
    stored(&ranks, &keys);
    assert_eq!(counts(&manager), [40, 0, 0]);
    let lease = ranks[0].find(&keys, 0, false).matched.lease.unwrap();
    for outcome in load_all(&ranks, lease, 40) {
        assert_eq!(outcome.unwrap().blocks_done, 40);
    }
    assert_eq!(counts(&manager), [40, 40, 40 * u64::from(RANKS - 1)]);
    for rank in &ranks {
        for (block, key) in (60..).zip(&keys) {
            assert!(rank.read(block) == content(*key, 0), "{key:?}");
        }
        manager.release_lease_of(rank.session, lease, false).unwrap();
    }
    assert_eq!(manager.inspect(Ledger::leases), 0);
    manager.inspect(Ledger::check_integrity);
    manager.stop();
}

/// The rank that came first gives its blocks to others, before or after the rest copy out of them.
#[test]
fn blocks_that_the_first_rank_has_reassigned_come_from_host_memory() {
    let manager = manager(with_host(4 << 20));
    let ranks = replicas(&manager);
    let keys = chain(30);
    stored(&ranks, &keys);
    let lease = ranks[0].find(&keys, 0, false).matched.lease.unwrap();
    assert!(load_all(&ranks[..1], lease, 30)[0].is_ok());
    ranks[0].write(75, &[0xEE; BLOCK]);
    assert!(load_all(&ranks[1..2], lease, 30)[0].is_ok());
    assert_eq!(counts(&manager), [30, 30 + 1, 29]);
    for (block, key) in (60..).zip(&keys) {
        assert!(ranks[1].read(block) == content(*key, 0), "{key:?}");
    }
    manager.stop();
}

/// A rank reassigns the blocks of its load, one after the other, while it is loaded and others copy out of them.
#[test]
fn no_rank_gets_what_another_has_written_into_a_reassigned_block() {
    let manager = manager(with_host(4 << 20));
    let ranks = replicas(&manager);
    let keys = chain(30);
    stored(&ranks, &keys);
    for round in 0..20u32 {
        let lease = ranks[0].find(&keys, 0, false).matched.lease.unwrap();
        let all = ranks.iter().map(|rank| targets(rank, 30)).collect();
        thread::scope(|scope| {
            let reassign = || (0..30).for_each(|n| ranks[0].write(60 + (n * 7 + round) % 30, &[0xEE; BLOCK]));
            scope.spawn(reassign);
            // The first loses its blocks; the others get theirs in any case.
            let loaded = load_into(&ranks, lease, all);
            loaded[1..].iter().for_each(|outcome| assert!(outcome.is_ok(), "{outcome:?}"));
        });
        for rank in &ranks[1..] {
            for (block, key) in (60..).zip(&keys) {
                assert!(rank.read(block) == content(*key, 0), "{key:?}");
                rank.words.raise_generation(block);
            }
        }
        ranks.iter().for_each(|rank| _ = manager.release_lease_of(rank.session, lease, false));
    }
    manager.stop();
    manager.inspect(Ledger::check_integrity);
}

/// Some shards of tensor parallel ranks are replicated, others are not: only the same bytes are handed over.
#[test]
fn ranks_with_other_shards_load_by_themselves() {
    let manager = manager(with_host(4 << 20));
    let open = |rank| Rank::open_shard(&manager, 1, EnginePoolMode::Ipc, (rank, 4), (rank % 2, 2));
    let ranks: Vec<_> = (0..4).map(open).collect();
    let keys = chain(20);
    stored(&ranks, &keys);
    let lease = ranks[0].find(&keys, 0, false).matched.lease.unwrap();
    load_all(&ranks, lease, 20).into_iter().for_each(|outcome| assert_eq!(outcome.unwrap().blocks_done, 20));
    assert_eq!(counts(&manager)[1..], [40, 40]);
    for rank in &ranks {
        for (block, key) in (60..).zip(&keys) {
            assert!(rank.read(block) == content(*key, rank.rank), "{key:?} {}", rank.rank);
        }
    }
    manager.stop();
}
