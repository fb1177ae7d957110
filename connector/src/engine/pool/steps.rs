//! Loads that a pass begins before they are whole: the steps in which layers arrive.

use std::ops::Range;

use super::PoolShape;

/// Layers that lie together are brought in pieces of at least so many bytes: copy engines reach their rate with them,
/// and giving them smaller ones would take longer than what the first layers wait for.
const PIECE_BYTES_MIN: usize = 256 << 10;

/// How a block is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Steps {
    layers: usize,
    layers_per_step: usize,
    layer_bytes: usize,
}

impl Steps {
    /// `None` where blocks come whole.
    pub fn of(shape: &PoolShape) -> Option<Self> {
        let (layers, regions) = (shape.layers(), shape.regions().count());
        let layer_bytes = shape.block_bytes() / layers;
        let together = layers.div_ceil(regions);
        let layers_per_step = PIECE_BYTES_MIN.div_ceil(layer_bytes.max(1)).clamp(1, together);
        (layers > layers_per_step).then_some(Self { layers, layers_per_step, layer_bytes })
    }

    pub fn layers(&self) -> usize {
        self.layers
    }

    /// The step that brings this layer.
    pub fn of_layer(&self, layer: usize) -> usize {
        layer / self.layers_per_step
    }

    /// The bytes of a block that each brings.
    pub fn ranges(&self) -> Vec<Range<usize>> {
        let at = |layer: usize| layer.min(self.layers) * self.layer_bytes;
        let step = |first: usize| at(first)..at(first + self.layers_per_step);
        (0..self.layers).step_by(self.layers_per_step).map(step).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::pool::{LayerGroup, Region};

    fn steps(layers: usize, regions: usize, bytes: usize) -> Option<Steps> {
        let region = Region { base: 4096, bytes, stride: bytes, pages: 4 };
        let shape = PoolShape::new(vec![LayerGroup { regions: vec![region; regions] }]).unwrap();
        Steps::of(&shape.of_layers(layers))
    }

    #[test]
    fn layers_that_lie_together_come_in_pieces_that_are_worth_it() {
        let together = steps(32, 1, 2 << 20).unwrap();
        assert_eq!((together.ranges().len(), together.of_layer(3), together.of_layer(4)), (8, 0, 1));
        assert_eq!(together.ranges()[1], 256 << 10..512 << 10);
        let apart = steps(32, 32, 64 << 10).unwrap();
        assert_eq!((apart.ranges().len(), apart.of_layer(31)), (32, 31));
        let uneven = steps(5, 1, 5 * (128 << 10)).unwrap();
        assert_eq!(uneven.ranges(), [0..256 << 10, 256 << 10..512 << 10, 512 << 10..640 << 10]);
    }

    #[test]
    fn what_cannot_be_cut_comes_whole() {
        assert_eq!(steps(1, 1, 2 << 20), None);
        assert_eq!(steps(3, 1, 2 << 20), None, "layers of different sizes");
        assert_eq!(steps(32, 1, 64 << 10), None, "small blocks");
    }
}
