//! The hash chain over the blocks of a sequence.

use std::fmt;

use crate::Namespace;

/// Key of a block within its namespace: it stands for this block's tokens and all tokens before it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceHash(pub [u8; 16]);

impl fmt::Debug for SequenceHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", u64::from_be_bytes(self.0[..8].try_into().expect("8 of 16 bytes")))
    }
}

/// A picture, sound or other input whose embeddings stand in for some tokens of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MultimodalItem {
    /// Digest of the item's content.
    pub digest: [u8; 32],
    /// Position of the item's first token, counted from the first token of the block. Negative when it began earlier.
    pub offset: i32,
}

/// The chain after some blocks: give it the next block's tokens, get that block's key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Chain([u8; 32]);

impl Chain {
    /// The chain of an empty sequence.
    pub fn new(namespace: Namespace) -> Self {
        Self(namespace.0)
    }

    /// Appends one complete block. The number of tokens is part of the namespace, so it is not hashed again.
    pub fn push(&mut self, tokens: &[u32]) -> SequenceHash {
        // Blocks of up to 128 tokens are hashed from the stack in one call.
        let mut bytes = [0u8; 512];
        if let Some(bytes) = bytes.get_mut(..tokens.len() * 4) {
            for (to, token) in bytes.chunks_exact_mut(4).zip(tokens) {
                to.copy_from_slice(&token.to_le_bytes());
            }
            self.0 = *blake3::keyed_hash(&self.0, bytes).as_bytes();
            return self.head();
        }
        self.push_with_items(tokens, &[])
    }

    /// Appends one complete block that `items` overlap, in order of their position.
    pub fn push_with_items(&mut self, tokens: &[u32], items: &[MultimodalItem]) -> SequenceHash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        for item in items {
            hasher.update(&item.digest);
            hasher.update(&item.offset.to_le_bytes());
        }
        self.0 = *hasher.finalize().as_bytes();
        self.head()
    }

    fn head(&self) -> SequenceHash {
        SequenceHash(*self.0.first_chunk().expect("16 of 32 bytes"))
    }
}

/// Keys of all complete blocks of `tokens`; a partial last block has none.
pub fn sequence_hashes(namespace: Namespace, tokens_per_block: usize, tokens: &[u32]) -> Vec<SequenceHash> {
    let mut chain = Chain::new(namespace);
    tokens.chunks_exact(tokens_per_block).map(|block| chain.push(block)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace() -> Namespace {
        Namespace([7; 32])
    }

    #[test]
    fn only_complete_blocks_have_keys() {
        let tokens: Vec<u32> = (0..70).collect();
        assert_eq!(sequence_hashes(namespace(), 32, &tokens).len(), 2);
        assert_eq!(sequence_hashes(namespace(), 32, &tokens[..31]), []);
    }

    #[test]
    fn a_key_stands_for_the_whole_prefix() {
        let mut a: Vec<u32> = (0..96).collect();
        let keys_a = sequence_hashes(namespace(), 32, &a);
        a[0] = 1_000_000;
        let keys_b = sequence_hashes(namespace(), 32, &a);
        for (x, y) in keys_a.iter().zip(&keys_b) {
            assert_ne!(x, y);
        }
    }

    #[test]
    fn one_call_and_streaming_agree_for_every_block_size() {
        for size in [16, 32, 64, 128, 129, 1024] {
            let tokens: Vec<u32> = (0..size).map(|i| i * 7919).collect();
            let (mut a, mut b) = (Chain::new(namespace()), Chain::new(namespace()));
            assert_eq!(a.push(&tokens), b.push_with_items(&tokens, &[]));
        }
    }

    #[test]
    fn multimodal_items_count_with_their_position() {
        let tokens = [5; 32];
        let push = |items: &[MultimodalItem]| Chain::new(namespace()).push_with_items(&tokens, items);
        let item = MultimodalItem { digest: [1; 32], offset: 3 };
        assert_ne!(push(&[]), push(&[item]));
        assert_ne!(push(&[item]), push(&[MultimodalItem { offset: 4, ..item }]));
        assert_ne!(push(&[item]), push(&[MultimodalItem { digest: [2; 32], ..item }]));
    }
}
