//! Machines whose memory has several nodes, each with a GPU: blocks of a GPU go to memory of its node.

use super::*;

const SEGMENTS: u32 = 8;
/// Of a segment.
const SLOTS: usize = 32;
/// Of each pool.
const BLOCKS: u32 = 64;

/// A ledger with one pool on each of two nodes, and host memory on the nodes that are named in turn.
struct Machine {
    ledger: Ledger,
    session: SessionId,
    namespace: NamespaceId,
    pools: [PoolId; 2],
    chains: u32,
}

impl Machine {
    fn new(nodes: &[u32]) -> Self {
        let mut node =
            node::Node::new(node::Sizes { device: BLOCKS, ..Default::default() }, Quotas::default());
        let namespace = node.namespace("");
        let node::Node { mut ledger, session, pool, .. } = node;
        ledger.set_segments(Some(SlotsIn::bytes(SLOTS * node::BLOCK as usize)));
        for segment in 0..SEGMENTS {
            ledger.add_segment_on(SegmentId(segment), Some(nodes[segment as usize % nodes.len()]));
        }
        let identity = PoolIdentity { uuid: [9; 16], ..ledger.pool(pool).unwrap().identity.clone() };
        let other = ledger.add_pool(session, identity, 1).unwrap();
        let pools = [pool, other];
        (0..2).for_each(|on| ledger.set_pool_node(pools[on as usize], Some(on)));
        Self { ledger, session, namespace, pools, chains: 0 }
    }

    /// A chain is computed on one of the nodes and goes to host memory: on which nodes its blocks are.
    fn serve(&mut self, on: usize, length: u32) -> Vec<u32> {
        let (pool, now) = (self.pools[on], Millis(u64::from(self.chains)));
        self.chains += 1;
        let key = |i: u32| {
            let mut hash = [7; 16];
            hash[..4].copy_from_slice(&self.chains.to_le_bytes());
            hash[4..8].copy_from_slice(&i.to_le_bytes());
            SequenceHash(hash)
        };
        let granted = self.ledger.request_grants(self.session, pool, length as usize, now).unwrap();
        let commits = granted.iter().zip(0..).map(|(block, i): (_, u32)| CommitBlock {
            block: *block,
            hash: key(i),
            parent: i.checked_sub(1).map(key),
            retention: None,
        });
        let commits: Vec<_> = commits.collect();
        self.ledger.commit(self.session, self.namespace, pool, &commits, now).unwrap();
        let held: Vec<_> = granted.iter().map(|block| Held { block: *block, pins: 1 }).collect();
        self.ledger.release(self.session, pool, &held, now).unwrap();
        let mut nodes = Vec::new();
        while let Some(batch) = self.ledger.next_offload(16, now) {
            nodes.extend(batch.copies().filter_map(|(_, place)| self.ledger.segment_node(place.segment)));
            self.ledger.finish_offload(batch, true, now);
        }
        self.ledger.check_integrity();
        nodes
    }
}

/// Also when memory is full, and something goes for each block that comes. Each GPU has as much to store as the other: of
/// what one stores beyond its node's part of memory, the rest has to be elsewhere.
#[test]
fn blocks_go_to_memory_of_their_gpus_node() {
    let mut machine = Machine::new(&[0, 1]);
    let (mut near, mut all) = (0, 0);
    for round in 0..400u32 {
        let on = (round / 3 % 2) as usize;
        let nodes = machine.serve(on, 1 + round % 5);
        if round < 40 {
            assert!(nodes.iter().all(|node| *node as usize == on), "there is room on each node: {nodes:?}");
        }
        near += nodes.iter().filter(|node| **node as usize == on).count();
        all += nodes.len();
    }
    assert!(machine.ledger.evictions(Tier::Host) > 500);
    assert!(near * 100 >= all * 95, "{near} of {all} blocks are near their GPU");
}

/// One GPU alone uses all memory there is.
#[test]
fn memory_of_other_nodes_is_used_before_anything_is_lost() {
    let mut machine = Machine::new(&[0, 1]);
    let mut far = 0;
    for _ in 0..SEGMENTS * SLOTS as u32 / 8 {
        far += machine.serve(0, 8).iter().filter(|node| **node == 1).count();
    }
    let used: usize = machine.ledger.host_summaries().iter().map(|class| class.counts.resident).sum();
    let slots = SEGMENTS as usize * SLOTS;
    assert!(far >= slots / 4 && used >= slots - slots / 8, "{far} far, {used} of {slots} used");
}

#[test]
fn a_node_without_memory_is_served_from_wherever_there_is_some() {
    let mut machine = Machine::new(&[1]);
    for round in 0..100 {
        assert!(machine.serve(0, 1 + round % 6).iter().all(|node| *node == 1));
    }
}
