//! Offloads hurry when most of a pool is nowhere else.

use super::node::{Chain, Node, Sizes};
use super::*;

#[test]
fn offloads_hurry_while_more_than_half_of_a_pool_is_nowhere_else() {
    let mut node = Node::new(Sizes { device: 16, host: 64, disk: 0 }, Quotas::default());
    let mut pressed = |chain| {
        node.serve(chain, &[]);
        let batch = node.ledger.next_offload(16, node.now).expect("there is something to copy");
        let pressed = batch.pressed;
        node.ledger.finish_offload(batch, true, node.now);
        node.settle();
        pressed
    };
    assert!(!pressed(Chain(1, 8)));
    assert!(pressed(Chain(2, 9)));
    assert!(!pressed(Chain(3, 2)));
}
