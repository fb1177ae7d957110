//! Pins of users.

use super::node::{BLOCK, Chain, Node, Sizes, keep};
use super::*;

const SIZES: Sizes = Sizes { device: 4, host: 8, disk: 8 };

fn flood(node: &mut Node, names: std::ops::Range<u8>) {
    for name in names {
        node.serve(Chain(name, 2), &[keep(100, None); 2]);
        node.settle();
    }
}

fn node_with(chain: Chain) -> (Node, NamespaceId) {
    let mut node = Node::new(SIZES, Quotas::default());
    node.serve(chain, &[keep(0, None)].repeat(chain.1.into()));
    node.settle();
    let namespace = node.namespace("");
    (node, namespace)
}

#[test]
fn pinned_blocks_outlive_a_flood_of_dearer_ones_until_the_pin_ends() {
    let chain = Chain(1, 3);
    let (mut node, namespace) = node_with(chain);
    let pinned = node.ledger.pin_blocks(namespace, PinWhat::Prefix(&chain.keys()), Millis(100), node.now);
    let pinned = pinned.unwrap();
    // Of a pool of four, no more than two.
    let by_tier = [(Tier::Device, 2), (Tier::Host, 3), (Tier::Disk, 3)];
    assert_eq!((pinned.blocks_by_tier, pinned.bytes, pinned.missing), (by_tier.into(), 3 * BLOCK, 0));
    node.wait(99);
    flood(&mut node, 10..20);
    let held = |node: &mut Node| [Tier::Device, Tier::Host, Tier::Disk].map(|tier| node.held(tier, chain));
    assert_eq!(held(&mut node), [2, 3, 3]);
    assert_eq!(node.ledger.pins().len(), 1);
    node.wait(1);
    assert_eq!((node.ledger.pins().len(), node.ledger.pinned_bytes(namespace).0), (0, 0));
    flood(&mut node, 20..30);
    assert_eq!(held(&mut node), [0, 0, 0]);
}

#[test]
fn a_budget_is_obeyed_and_says_what_it_is() {
    let chain = Chain(1, 4);
    let (mut node, namespace) = node_with(chain);
    let now = node.now;
    let mut pin =
        |keys: &[SequenceHash]| node.ledger.pin_blocks(namespace, PinWhat::Keys(keys), Millis(100), now);
    // With the blocks before it.
    let first = pin(&[chain.key(3)]).unwrap();
    assert_eq!(first.bytes, 4 * BLOCK);
    let second = pin(&[chain.key(2)]).unwrap();
    assert_eq!(second.bytes, 3 * BLOCK, "counted once in each pin");
    let refused = pin(&[chain.key(1)]).unwrap_err();
    let expected = Refused::OverBudget {
        what: "pins of the namespace",
        budget: 8 * BLOCK,
        used: 7 * BLOCK,
        wanted: 2 * BLOCK,
    };
    assert_eq!(refused, expected);
    node.ledger.unpin(first.id, now).unwrap();
    assert_eq!(node.ledger.unpin(first.id, now), Err(Refused::Unknown { what: "pin" }));
    node.ledger.check_integrity();
    flood(&mut node, 10..20);
    assert_eq!(node.held(Tier::Host, chain), 3, "the second pin is still there");
}

#[test]
fn what_is_nowhere_is_told_and_what_makes_no_sense_is_refused() {
    let chain = Chain(1, 2);
    let (mut node, namespace) = node_with(chain);
    let (now, until) = (node.now, Millis(100));
    let strangers = Chain(99, 2).keys();
    let mixed = [chain.key(0), strangers[0], strangers[1]];
    let mut pin = |what, until| node.ledger.pin_blocks(namespace, what, until, now);
    let some = pin(PinWhat::Keys(&mixed), until).unwrap();
    assert_eq!((some.missing, some.bytes), (2, BLOCK));
    let longer = Chain(1, 5).keys();
    assert_eq!(pin(PinWhat::Prefix(&longer), until).unwrap().missing, 3);
    assert!(matches!(pin(PinWhat::Keys(&strangers), until), Err(Refused::Invalid { field: "keys", .. })));
    assert!(matches!(pin(PinWhat::Keys(&mixed), now), Err(Refused::Invalid { field: "until", .. })));
    let unknown = node.ledger.pin_blocks(NamespaceId(77), PinWhat::Keys(&mixed), until, now);
    assert_eq!(unknown, Err(Refused::Unknown { what: "namespace" }));
}

#[test]
fn a_pin_follows_its_block_to_another_tier() {
    let chain = Chain(1, 2);
    let (mut node, namespace) = node_with(chain);
    flood(&mut node, 10..20);
    assert_eq!((node.held(Tier::Host, chain), node.held(Tier::Disk, chain)), (0, 0));
    node.serve(chain, &[keep(100, None); 2]);
    node.settle();
    // On disk only: host and pool lose it.
    let on_disk = |node: &mut Node| node.held(Tier::Disk, chain);
    assert_eq!(on_disk(&mut node), 2);
    let pinned = node.ledger.pin_blocks(namespace, PinWhat::Prefix(&chain.keys()), Millis(1000), node.now);
    let pinned = pinned.unwrap().id;
    node.ledger.unpin(pinned, node.now).unwrap();
    for name in 30..40 {
        node.serve(Chain(name, 2), &[keep(100, None); 2]);
        // To host, and no further.
        while let Some(batch) = node.ledger.next_offload(16, node.now) {
            node.ledger.finish_offload(batch, true, node.now);
        }
    }
    assert_eq!((node.held(Tier::Host, chain), on_disk(&mut node)), (0, 2));
    let pinned = node.ledger.pin_blocks(namespace, PinWhat::Prefix(&chain.keys()), Millis(1000), node.now);
    assert_eq!(pinned.unwrap().blocks_by_tier, [(Tier::Disk, 2)].into());
    assert_eq!(node.promote("", chain), 2);
    flood(&mut node, 40..60);
    assert_eq!((node.held(Tier::Host, chain), on_disk(&mut node)), (2, 2));
}

/// A class that has no memory takes the segment of another, unless something pinned is in it.
#[test]
fn a_segment_with_pinned_blocks_is_not_taken() {
    for is_pinned in [false, true] {
        let chain = Chain(1, 2);
        let (mut node, namespace) = node_with(chain);
        if is_pinned {
            let keys = chain.keys();
            node.ledger.pin_blocks(namespace, PinWhat::Keys(&keys), Millis(1000), node.now).unwrap();
        }
        let identity = PoolIdentity { base: base(1), layout: layout(1), ..World::identity(1, 1, 2) };
        node.pool = node.ledger.add_pool(node.session, identity, 1).unwrap();
        let other =
            node.ledger.register_namespace(node.session, [9; 32], base(1), "", "m", node.now).unwrap();
        let block = node.ledger.request_grants(node.session, node.pool, 1, node.now).unwrap()[0];
        let (hash, retention) = (Chain(9, 1).key(0), Retention::default());
        let commit = CommitBlock { block, hash, parent: None, retention: Some(retention) };
        node.ledger.commit(node.session, other, node.pool, &[commit], node.now).unwrap();
        node.settle();
        let expected = if is_pinned { 2 } else { 0 };
        assert_eq!(node.held(Tier::Host, chain), expected);
        node.ledger.check_integrity();
    }
}

/// The daemon forgets a namespace that nobody uses and nothing is in; a pin is a use.
#[test]
fn a_pin_outlives_the_session_that_asked_for_it() {
    let chain = Chain(1, 2);
    let (mut node, namespace) = node_with(chain);
    let pinned =
        node.ledger.pin_blocks(namespace, PinWhat::Prefix(&chain.keys()), Millis(50), node.now).unwrap();
    node.ledger.session_dead(node.session, node.now);
    assert_eq!(node.ledger.pins()[0].id, pinned.id);
    node.wait(50);
    node.ledger.check_integrity();
    assert!(node.ledger.pins().is_empty());
}
