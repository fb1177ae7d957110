//! The order of eviction against a plain list.

use proptest::prelude::*;

use kvbm_hash::Namespace;

use super::*;

const BLOCKS: usize = 5;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn kept(priority: u8, duration_ms: Option<u64>) -> Retention {
    Retention { priority, duration: duration_ms.map(ms) }
}

fn key(name: u8) -> SequenceHash {
    SequenceHash([name; 16])
}

/// A sequence of one block.
fn content(name: u8) -> Content {
    Content { namespace: Namespace([7; 32]), key: key(name), parent: None }
}

/// Has a request use a sequence of one block: found if it is there, else computed. Returns the block, in use.
fn use_block(table: &mut PoolTable, name: u8, said: Option<Retention>) -> u32 {
    if let Some(block) = table.find(&[key(name)], &[said]).first() {
        return *block;
    }
    let block = table.take(1).expect("nothing else is in use")[0];
    table.commit(block, content(name), said.unwrap_or_default());
    block
}

fn run(table: &mut PoolTable, name: u8, said: Option<Retention>) {
    let block = use_block(table, name, said);
    assert_eq!(table.unreference(block), None);
}

/// Who is there, of those that the test used.
fn present(table: &PoolTable) -> Vec<u8> {
    let mut names: Vec<u8> = table.by_key.keys().map(|key| key.0[0]).collect();
    names.sort_unstable();
    names
}

#[test]
fn the_lowest_priority_goes_first_and_then_the_one_left_longest_ago() {
    let mut table = PoolTable::new_private(4);
    for (name, priority) in [(1, 80), (2, 5), (3, 35), (4, 35)] {
        run(&mut table, name, Some(kept(priority, None)));
    }
    for (newcomer, left) in [(5, [1, 3, 4, 5]), (6, [1, 4, 5, 6]), (7, [1, 5, 6, 7]), (8, [1, 6, 7, 8])] {
        run(&mut table, newcomer, None);
        assert_eq!(present(&table), left);
    }
}

#[test]
fn a_leaf_goes_before_what_it_hangs_on_whatever_their_priorities() {
    let mut table = PoolTable::new_private(2);
    let blocks = table.take(2).unwrap();
    table.commit(blocks[0], content(1), kept(0, None));
    table.commit(blocks[1], Content { parent: Some(key(1)), ..content(2) }, kept(100, None));
    blocks.iter().for_each(|block| assert_eq!(table.unreference(*block), None));
    run(&mut table, 3, None);
    assert_eq!(present(&table), [1, 3]);
}

#[test]
fn time_runs_from_the_release_and_then_the_block_is_the_most_recent_of_the_ordinary() {
    let mut table = PoolTable::new_private(3);
    table.advance(ms(100));
    let held = use_block(&mut table, 1, Some(kept(80, Some(30))));
    run(&mut table, 2, None);
    table.advance(ms(1000));
    assert_eq!(table.unreference(held), None);
    run(&mut table, 3, None);
    table.advance(ms(1029));
    run(&mut table, 4, None);
    assert_eq!(present(&table), [1, 3, 4], "it is kept until its time is over");
    table.advance(ms(1030));
    run(&mut table, 5, None);
    assert_eq!(present(&table), [1, 4, 5], "3 and 4 were left before it became ordinary");
    run(&mut table, 6, None);
    assert_eq!(present(&table), [1, 5, 6]);
    run(&mut table, 7, None);
    assert_eq!(present(&table), [5, 6, 7]);
    table.check_integrity().unwrap();
}

#[test]
fn what_is_said_last_counts_also_downwards_and_silence_ends_the_time_only() {
    let mut table = PoolTable::new_private(2);
    run(&mut table, 1, Some(kept(80, Some(10))));
    run(&mut table, 1, None);
    table.advance(ms(100));
    run(&mut table, 2, None);
    run(&mut table, 3, None);
    assert_eq!(present(&table), [1, 3], "80 without an end");
    run(&mut table, 1, Some(kept(5, None)));
    run(&mut table, 4, None);
    assert_eq!(present(&table), [3, 4]);
}

#[test]
fn a_time_that_ran_while_the_daemon_decided_counts_after_a_detach() {
    let mut table = PoolTable::new_granted(3);
    let granted: Vec<_> = (0..3).map(|block| super::super::BlockRef { block, generation: 1 }).collect();
    table.grant(&granted).unwrap();
    for (name, said) in [(1, kept(80, Some(10))), (2, kept(80, Some(1000))), (3, kept(50, None))] {
        let block = table.take(1).unwrap()[0];
        table.commit(block, content(name), said);
        assert!(table.unreference(block).is_some());
    }
    table.advance(ms(500));
    table.check_integrity().unwrap();
    table.detach();
    table.check_integrity().unwrap();
    for (newcomer, left) in [(4, [2, 3, 4]), (5, [2, 3, 5])] {
        run(&mut table, newcomer, None);
        assert_eq!(present(&table), left);
    }
    table.advance(ms(1000));
    run(&mut table, 6, None);
    assert_eq!(present(&table), [2, 3, 6], "2 is ordinary now, and more recent than 5");
}

#[derive(Debug, Clone)]
enum Op {
    Use { name: u8, said: Option<Retention> },
    Wait(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let priority = prop_oneof![Just(0), Just(35), Just(60), Just(100)];
    let said = prop::option::of(
        (priority, prop::option::of(0..40u64)).prop_map(|(priority, duration)| kept(priority, duration)),
    );
    prop_oneof![
        4 => (0..12u8, said).prop_map(|(name, said)| Op::Use { name, said }),
        1 => (1..30u64).prop_map(Op::Wait),
    ]
}

/// In order of their last use or expiry.
#[derive(Debug)]
struct Listed {
    name: u8,
    retention: Retention,
    expires_at: Option<Duration>,
}

proptest! {
    #[test]
    fn the_order_is_that_of_a_plain_list(ops in prop::collection::vec(op(), 1..100)) {
        let mut table = PoolTable::new_private(BLOCKS as u32);
        let mut list: Vec<Listed> = Vec::new();
        let mut now = Duration::ZERO;
        for op in ops {
            match op {
                Op::Wait(by) => {
                    now += ms(by);
                    table.advance(now);
                    let over = |listed: &Listed| listed.expires_at.is_some_and(|at| at <= now);
                    let mut expired: Vec<_> = list.extract_if(.., |listed| over(listed)).collect();
                    // Those of one moment in the order of their blocks, which a list does not know: then any is right.
                    let moments: std::collections::HashSet<_> = expired.iter().map(|of| of.expires_at).collect();
                    prop_assume!(moments.len() == expired.len());
                    expired.sort_by_key(|listed| listed.expires_at);
                    list.extend(expired.into_iter().map(|Listed { name, .. }| Listed {
                        name,
                        retention: Retention::default(),
                        expires_at: None,
                    }));
                }
                Op::Use { name, said } => {
                    let known = list.iter().position(|listed| listed.name == name).map(|at| list.remove(at));
                    if known.is_none() && list.len() == BLOCKS {
                        let victim = (0..list.len()).min_by_key(|at| list[*at].retention.priority).unwrap();
                        list.remove(victim);
                    }
                    let before = known.map_or(Retention::default(), |listed| listed.retention);
                    let retention = said.unwrap_or(Retention { duration: None, ..before });
                    let limited = retention.duration.filter(|_| retention.priority != 35);
                    list.push(Listed { name, retention, expires_at: limited.map(|duration| now + duration) });
                    run(&mut table, name, said);
                }
            }
            table.check_integrity().unwrap();
            let mut names: Vec<u8> = list.iter().map(|listed| listed.name).collect();
            names.sort_unstable();
            prop_assert_eq!(present(&table), names);
        }
    }
}

#[test]
fn what_blocks_are_to_be_kept_like_goes_along_when_the_pool_changes_hands() {
    let mut table = PoolTable::new_private(2);
    let said = kept(80, Some(10));
    run(&mut table, 1, Some(said));
    let adoption = table.adoption(super::super::DaemonId(1));
    assert_eq!(adoption.entries.iter().map(|entry| entry.retention).collect::<Vec<_>>(), [said]);
    let mut successor = PoolTable::new_granted(2);
    successor.inherit([(super::super::BlockRef { block: 0, generation: 1 }, content(1), said)]);
    successor.check_integrity().unwrap();
    successor.detach();
    run(&mut successor, 2, None);
    run(&mut successor, 3, None);
    assert_eq!(present(&successor), [1, 3]);
}

#[test]
fn what_is_said_of_a_block_that_is_computed_again_holds_for_the_one_that_is_there() {
    let mut table = PoolTable::new_private(3);
    run(&mut table, 1, Some(kept(90, None)));
    let twin = table.take(1).unwrap()[0];
    table.commit(twin, content(1), kept(90, Some(10)));
    table.check_integrity().unwrap();
    assert_eq!(table.unreference(twin), None);
    table.advance(ms(10));
    table.check_integrity().unwrap();
    for name in 2..5 {
        run(&mut table, name, None);
    }
    assert_eq!(present(&table), [2, 3, 4]);
    let twin = table.take(1).unwrap()[0];
    table.commit(twin, content(4), Retention::default());
    assert_eq!(table.unreference(twin), None);
    table.check_integrity().unwrap();
}
