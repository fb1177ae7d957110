//! The ledger's key and how it is spread over buckets.

use std::hash::{BuildHasher, Hash, Hasher};

use kvbm_hash::SequenceHash;

/// Number of a namespace within one life of the daemon. Never reused, never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespaceId(pub u32);

/// What a block is found by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Whose.
    pub namespace: NamespaceId,
    /// Which.
    pub hash: SequenceHash,
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let bytes = self.hash.0.first_chunk().expect("8 of 16 bytes");
        state.write_u64(u64::from_le_bytes(*bytes) ^ u64::from(self.namespace.0).rotate_right(16));
    }
}

/// Keys are uniform already; one multiplication with a secret keeps a client from choosing colliding ones.
#[derive(Debug, Clone, Copy)]
pub struct KeyHasher(u64);

impl KeyHasher {
    /// A hasher with a secret of the caller's choice.
    pub fn new(secret: u64) -> Self {
        Self(secret | 1)
    }
}

impl BuildHasher for KeyHasher {
    type Hasher = KeyState;

    fn build_hasher(&self) -> KeyState {
        KeyState { secret: self.0, hash: 0 }
    }
}

/// State of one computation.
#[derive(Debug)]
pub struct KeyState {
    secret: u64,
    hash: u64,
}

impl Hasher for KeyState {
    fn write_u64(&mut self, word: u64) {
        let wide = u128::from(word ^ self.hash)
            .wrapping_mul(u128::from(self.secret) | (0x9E37_79B9_7F4A_7C15 << 64));
        self.hash = (wide >> 64) as u64 ^ wide as u64;
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn finish(&self) -> u64 {
        self.hash
    }
}
