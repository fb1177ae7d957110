//! Priorities and durations in all tiers; the scenarios of TensorRT-LLM's tests of its block manager among them.

use super::node::{Chain, Node, Sizes, keep};
use super::*;

fn pool_of(device: u32) -> Node {
    Node::new(Sizes { device, ..Sizes::default() }, Quotas::default())
}

/// Scenario 8, four blocks.
#[test]
fn what_has_priority_is_found_again() {
    let mut node = pool_of(4);
    let (a, b, c) = (Chain(1, 2), Chain(2, 2), Chain(3, 2));
    node.serve(a, &[keep(90, None), keep(10, None)]);
    node.serve(b, &[]);
    node.serve(c, &[keep(20, None); 2]);
    assert_eq!(node.serve(b, &[]), 1);
    assert_eq!(node.serve(a, &[]), 1, "its block of priority 90 survived");
    assert_eq!(node.serve(c, &[]), 0);
}

/// Scenario 9, eight blocks: three of a prompt and one of what was generated.
#[test]
fn decoded_blocks_have_their_own_priority() {
    let mut node = pool_of(8);
    let (a, b) = (Chain(1, 4), Chain(2, 4));
    node.serve(a, &[keep(5, None), keep(5, None), keep(5, None), keep(90, None)]);
    node.serve(b, &[keep(90, None), keep(90, None), keep(90, None), keep(5, None)]);
    node.serve(Chain(3, 3), &[]);
    assert_eq!(node.serve(Chain(1, 3), &[]), 2);
}

/// Scenario 10, eight blocks.
#[test]
fn a_high_priority_that_expired_goes_before_a_lower_one_that_did_not() {
    let mut node = pool_of(8);
    let (a, b) = (Chain(1, 4), Chain(2, 4));
    node.serve(a, &[keep(80, Some(10)); 4]);
    node.serve(b, &[keep(50, None); 4]);
    node.wait(50);
    node.serve(Chain(3, 4), &[]);
    assert_eq!(node.serve(b, &[]), 4);
}

/// Scenario 11, eight blocks.
#[test]
fn decoded_blocks_expire() {
    let mut node = pool_of(8);
    node.serve(Chain(1, 4), &[keep(50, None); 4]);
    let b = [Retention::default(), Retention::default(), Retention::default(), keep(100, Some(20))];
    node.serve(Chain(2, 4), &b);
    node.wait(50);
    node.serve(Chain(3, 2), &[]);
    assert_eq!(node.serve(Chain(2, 3), &[]), 2);
}

/// Nobody calls `tick`: the tables end what has run out before they choose.
#[test]
fn expiry_needs_no_tick() {
    let mut node = pool_of(4);
    node.serve(Chain(1, 2), &[keep(90, Some(10)); 2]);
    node.now = Millis(9);
    node.serve(Chain(2, 2), &[]);
    node.serve(Chain(3, 2), &[]);
    assert_eq!(node.held(Tier::Device, Chain(1, 2)), 2);
    node.now = Millis(11);
    node.serve(Chain(4, 2), &[]);
    node.serve(Chain(5, 2), &[]);
    assert_eq!(node.held(Tier::Device, Chain(1, 2)), 0);
}

fn flood(node: &mut Node, names: std::ops::Range<u8>) {
    for name in names {
        node.serve(Chain(name, 2), &[]);
        node.settle();
    }
}

/// The same in each tier below the pool: what came with priority 90 for 30 ms survives a flood, and not the next.
#[test]
fn a_priority_is_obeyed_in_host_and_on_disk_until_it_ends() {
    for (tier, sizes) in [
        (Tier::Host, Sizes { device: 4, host: 8, disk: 0 }),
        (Tier::Disk, Sizes { device: 4, host: 8, disk: 8 }),
    ] {
        let mut node = Node::new(sizes, Quotas::default());
        let (dear, plain) = (Chain(1, 3), Chain(2, 3));
        node.serve(dear, &[keep(90, Some(30)); 3]);
        node.settle();
        node.serve(plain, &[]);
        node.settle();
        assert_eq!((node.held(tier, dear), node.held(tier, plain)), (3, 3), "{tier}");
        node.wait(29);
        flood(&mut node, 10..20);
        assert_eq!((node.held(tier, dear), node.held(tier, plain)), (3, 0), "{tier}");
        node.wait(2);
        flood(&mut node, 20..30);
        assert_eq!(node.held(tier, dear), 0, "{tier}: expired");
    }
}

/// The clock of a block in host starts again when it is used there.
#[test]
fn a_use_in_host_starts_the_clock_again() {
    let mut node = Node::new(Sizes { device: 2, host: 4, disk: 0 }, Quotas::default());
    let dear = Chain(1, 2);
    node.serve(dear, &[keep(90, Some(30)); 2]);
    node.settle();
    flood(&mut node, 10..12);
    node.wait(20);
    assert_eq!(node.serve(dear, &[keep(90, Some(30)); 2]), 0, "the pool has lost it");
    node.wait(20);
    flood(&mut node, 20..26);
    assert_eq!(node.held(Tier::Host, dear), 2, "used 20 ms ago");
    // Used without a retention: the priority stays, and not for a time only.
    node.serve(dear, &[]);
    node.wait(1000);
    flood(&mut node, 30..36);
    assert_eq!(node.held(Tier::Host, dear), 2);
    // Given again, downwards.
    node.serve(dear, &[Retention::default(); 2]);
    flood(&mut node, 40..46);
    assert_eq!(node.held(Tier::Host, dear), 0);
}

/// Host is full of dearer blocks: a cheaper newcomer is left out, with all that hangs on it, and counted.
#[test]
fn a_newcomer_of_lower_priority_is_left_out_of_host() {
    let mut node = Node::new(Sizes { device: 8, host: 4, disk: 0 }, Quotas::default());
    node.serve(Chain(1, 4), &[keep(50, None); 4]);
    node.settle();
    node.serve(Chain(2, 3), &[]);
    node.settle();
    assert_eq!((node.held(Tier::Host, Chain(1, 4)), node.held(Tier::Host, Chain(2, 3))), (4, 0));
    let tally = node.ledger.tally();
    assert_eq!((tally.host_not_admitted, tally.host_exhausted, tally.orphans), (1, 0, 0), "asked once");
    assert_eq!(node.ledger.backlog(), 0);
    node.serve(Chain(3, 2), &[keep(60, None); 2]);
    node.settle();
    assert_eq!(node.held(Tier::Host, Chain(3, 2)), 2, "a dearer one is not");
    // Used again, and dearer now.
    assert_eq!(node.serve(Chain(2, 2), &[keep(70, None); 2]), 2);
    node.settle();
    assert_eq!(node.held(Tier::Host, Chain(2, 3)), 2);
}

/// A promoted block is as dear in host as it was on disk.
#[test]
fn promotion_and_onboarding_carry_retention() {
    let mut node = Node::new(Sizes { device: 2, host: 2, disk: 8 }, Quotas::default());
    let dear = Chain(1, 2);
    node.serve(dear, &[keep(90, Some(30)), keep(70, None)]);
    node.settle();
    node.wait(31);
    // The first is of default priority by now: it is behind the second, which is not.
    node.serve(Chain(2, 2), &[keep(80, None); 2]);
    node.settle();
    assert_eq!((node.held(Tier::Host, dear), node.held(Tier::Disk, dear)), (0, 2));
    assert_eq!(node.promote("", dear), 1, "half of host at a time");
    let namespace = node.namespace("");
    let kept = |node: &mut Node, tier, i| {
        let key = Key { namespace, hash: dear.key(i) };
        let tables = node.ledger.tables_of(tier);
        let found = tables.iter().find_map(|(_, slots)| slots.resident(key).map(|slot| slots.priority(slot)));
        found.expect("it is there")
    };
    assert_eq!(
        [kept(&mut node, Tier::Disk, 0), kept(&mut node, Tier::Disk, 1)],
        [35, 70],
        "its time was over when it was read"
    );
    assert_eq!(kept(&mut node, Tier::Host, 0), 35);
}

/// What is found in the files is as dear as it was, for what is left of its time.
#[test]
fn what_is_found_after_a_restart_keeps_its_priority() {
    let mut node = Node::new(Sizes { device: 4, host: 8, disk: 0 }, Quotas::default());
    let namespace = node.namespace("");
    let digest = node.ledger.namespace(namespace).expect("it is registered").digest;
    let slots_in = SlotsIn::bytes(8 * node::BLOCK as usize);
    node.ledger.add_disk(slots_in.clone());
    let found = |index: u8, name, retention, stored| {
        let key = Chain(name, 1).key(0);
        FoundBlock { namespace: digest, index: u32::from(index), key, parent: None, retention, stored }
    };
    // The dear ones are the oldest.
    let mut blocks = vec![found(0, 1, keep(90, None), 1), found(1, 2, keep(90, Some(40)), 2)];
    blocks.extend((2..8).map(|i| found(i, 100 + i, Retention::default(), 3)));
    let class = Class { domain: TrustDomain(1), stride: node::BLOCK as usize };
    let found = vec![FoundSegment { segment: SegmentId(0), class, blocks }];
    let names = node.ledger.name_found(&found, node.now);
    let tables = names.tables(found, &slots_in);
    assert_eq!(node.ledger.install_found(Tier::Disk, names, tables), 8);
    node.ledger.set_disk_service(true);
    node.ledger.check_integrity();
    flood(&mut node, 10..20);
    let held = |node: &mut Node| [1, 2].map(|name| node.held(Tier::Disk, Chain(name, 1)));
    assert_eq!(held(&mut node), [1, 1]);
    node.wait(41);
    flood(&mut node, 20..30);
    assert_eq!(held(&mut node), [1, 0]);
}
