//! The keys of one request's blocks, extended as its tokens become known.

use kvbm_hash::{Chain, MultimodalItem, Namespace, SequenceHash};

/// A picture, sound or other input that stands in for tokens `[start, start + tokens)` of the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlacedItem {
    /// Digest of its content.
    pub digest: [u8; 32],
    /// Position of its first token in the prompt.
    pub start: u32,
    /// How many tokens it stands for, at least 1.
    pub tokens: u32,
}

/// Keys of the complete blocks of one request.
#[derive(Clone)]
pub(crate) struct RequestKeys {
    namespace: Namespace,
    tokens_per_block: usize,
    chain: Chain,
    keys: Vec<SequenceHash>,
    /// Tokens behind the last complete block.
    tail: Vec<u32>,
    /// In the order of their starts.
    items: Vec<PlacedItem>,
}

impl RequestKeys {
    pub fn new(namespace: Namespace, tokens_per_block: u32, mut items: Vec<PlacedItem>) -> Self {
        items.sort_by_key(|item| item.start);
        Self {
            namespace,
            tokens_per_block: tokens_per_block as usize,
            chain: Chain::new(namespace),
            keys: Vec::new(),
            tail: Vec::new(),
            items,
        }
    }

    pub fn namespace(&self) -> Namespace {
        self.namespace
    }

    /// Of all blocks that are complete so far.
    pub fn keys(&self) -> &[SequenceHash] {
        &self.keys
    }

    /// Tokens known so far.
    pub fn tokens(&self) -> usize {
        self.keys.len() * self.tokens_per_block + self.tail.len()
    }

    pub fn extend(&mut self, mut tokens: &[u32]) {
        let size = self.tokens_per_block;
        if !self.tail.is_empty() {
            let (completing, rest) = tokens.split_at(tokens.len().min(size - self.tail.len()));
            self.tail.extend_from_slice(completing);
            tokens = rest;
            if self.tail.len() < size {
                return;
            }
            let block = std::mem::take(&mut self.tail);
            self.push(&block);
        }
        let blocks = tokens.chunks_exact(size);
        self.keys.reserve(blocks.len());
        let rest = blocks.remainder();
        for block in blocks {
            self.push(block);
        }
        self.tail.extend_from_slice(rest);
    }

    fn push(&mut self, block: &[u32]) {
        let start = (self.keys.len() * self.tokens_per_block) as i64;
        let end = start + self.tokens_per_block as i64;
        let overlap = |item: &&PlacedItem| {
            let first = i64::from(item.start);
            first < end && first + i64::from(item.tokens) > start
        };
        // Sequences are shorter than 2^31 tokens: the adapter refuses others.
        let items: Vec<MultimodalItem> = self
            .items
            .iter()
            .filter(overlap)
            .map(|item| MultimodalItem {
                digest: item.digest,
                offset: i32::try_from(i64::from(item.start) - start).unwrap_or(i32::MIN),
            })
            .collect();
        let key =
            if items.is_empty() { self.chain.push(block) } else { self.chain.push_with_items(block, &items) };
        self.keys.push(key);
    }
}

#[cfg(test)]
mod tests {
    use kvbm_hash::sequence_hashes;
    use proptest::prelude::*;

    use super::*;

    const NAMESPACE: Namespace = Namespace([3; 32]);

    proptest! {
        #[test]
        fn keys_do_not_depend_on_how_the_tokens_arrive(
            tokens in prop::collection::vec(any::<u32>(), 0..200),
            cuts in prop::collection::vec(0usize..50, 0..20),
            size in 1u32..40,
        ) {
            let mut keys = RequestKeys::new(NAMESPACE, size, Vec::new());
            let mut rest = tokens.as_slice();
            for cut in cuts {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                keys.extend(now);
                rest = later;
            }
            keys.extend(rest);
            prop_assert_eq!(keys.tokens(), tokens.len());
            prop_assert_eq!(keys.keys(), sequence_hashes(NAMESPACE, size as usize, &tokens));
        }
    }

    #[test]
    fn an_item_counts_in_the_blocks_it_overlaps_and_all_behind() {
        let tokens = [7; 64];
        let of = |items: &[PlacedItem]| {
            let mut keys = RequestKeys::new(NAMESPACE, 16, items.to_vec());
            keys.extend(&tokens);
            keys.keys().to_vec()
        };
        let plain = of(&[]);
        // Tokens 31 to 33: the blocks 1 and 2.
        let item = PlacedItem { digest: [9; 32], start: 31, tokens: 3 };
        let with = of(&[item]);
        assert_eq!(with[0], plain[0]);
        assert!((1..4).all(|block| with[block] != plain[block]));
        let longer = of(&[PlacedItem { tokens: 18, ..item }]);
        assert_eq!(longer[..3], with[..3]);
        assert_ne!(longer[3], with[3], "it reaches into block 3");
        let other = of(&[PlacedItem { digest: [8; 32], ..item }]);
        assert_ne!(other[1], with[1]);
    }
}
