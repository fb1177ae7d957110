//! On which node of the machine's memory a host segment should lie: copies to and from a GPU are fastest, and disturb others
//! least, in memory of the GPU's own node.

/// The nodes of segments, in turn.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SegmentNodes(Vec<u32>);

impl SegmentNodes {
    /// `gpu_nodes`: the node of each GPU that says it. Each node gets segments in proportion to its GPUs; nodes without GPUs
    /// get none. Neighbouring segments lie on different nodes, so that a small part of them is as balanced as all.
    pub fn new(gpu_nodes: &[u32]) -> Self {
        // The first GPU of each node, then the second of each, and so on.
        let mut turns: Vec<(usize, u32)> = gpu_nodes
            .iter()
            .enumerate()
            .map(|(at, node)| (gpu_nodes[..at].iter().filter(|before| *before == node).count(), *node))
            .collect();
        turns.sort_unstable();
        Self(turns.into_iter().map(|(_, node)| node).collect())
    }

    /// Of the segment with this number; `None`: wherever the kernel likes.
    pub fn node_of(&self, segment: u32) -> Option<u32> {
        let turn = (segment as usize).checked_rem(self.0.len())?;
        Some(self.0[turn])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn counts(gpu_nodes: &[u32], segments: u32, node: u32) -> usize {
        let nodes = SegmentNodes::new(gpu_nodes);
        (0..segments).filter(|segment| nodes.node_of(*segment) == Some(node)).count()
    }

    #[test]
    fn machines_with_one_node_or_no_gpu_leave_it_to_the_kernel_or_name_the_one() {
        assert_eq!(SegmentNodes::new(&[]).node_of(5), None);
        assert_eq!((counts(&[0], 7, 0), counts(&[3; 8], 7, 3)), (7, 7));
    }

    /// Eight GPUs on two sockets; and an odd machine with three on one, one on the other.
    #[test]
    fn segments_follow_the_gpus() {
        let even = [0, 0, 0, 0, 1, 1, 1, 1];
        assert_eq!((counts(&even, 64, 0), counts(&even, 64, 1)), (32, 32));
        assert_eq!((counts(&even, 2, 0), counts(&even, 2, 1)), (1, 1));
        let odd = [2, 0, 2, 2];
        assert_eq!((counts(&odd, 64, 0), counts(&odd, 64, 2), counts(&odd, 64, 1)), (16, 48, 0));
    }

    proptest! {
        #[test]
        fn every_node_gets_its_share_up_to_one_turn(gpus in prop::collection::vec(0u32..4, 1..16), segments in 0u32..300) {
            let share = |node| gpus.iter().filter(|gpu| **gpu == node).count();
            for node in 0..4 {
                let fair = segments as usize * share(node) / gpus.len();
                prop_assert!(counts(&gpus, segments, node).abs_diff(fair) <= share(node), "node {}", node);
            }
        }
    }
}
