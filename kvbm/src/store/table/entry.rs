//! What is known of one slot, in 128 bytes.

use crc_fast::crc64_nvme;

use super::fields::{put, take};

/// Bytes of an entry: a divisor of a sector, so that a cut of power never mixes two versions of one.
pub const ENTRY_BYTES: usize = 128;
/// Entries in a page.
pub const ENTRIES_PER_PAGE: u32 = 32;
/// Bytes of the state word, which an entry begins with.
pub const STATE_BYTES: usize = 4;
/// State of a slot without a block: nothing behind the word counts.
pub const FREE: u32 = 0;
/// State of a slot with a block.
pub(super) const STORED: u32 = u32::from_le_bytes(*b"STOR");

/// State of a slot into which a drive may be writing. Only in memory.
pub(super) const READING: u32 = u32::from_le_bytes(*b"READ");

const HAS_PARENT: u8 = 1;
const HAS_EXPIRY: u8 = 2;
const CHECK_AT: usize = 120;

/// A block in a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Digest of the block's namespace.
    pub namespace: [u8; 32],
    /// Its sequence hash.
    pub key: [u8; 16],
    /// Sequence hash of its predecessor.
    pub parent: Option<[u8; 16]>,
    /// Different for each time that any slot was filled.
    pub generation: u64,
    /// See [`super::payload_check`].
    pub payload_check: u64,
    /// Bytes of the block, at the start of the slot.
    pub payload_bytes: u32,
    /// Retention priority, 0..=100.
    pub priority: u8,
    /// When it was stored, in seconds since 1970.
    pub stored_at_s: u64,
    /// When its priority ends if nobody uses it, in seconds since 1970.
    pub expires_at_s: Option<u64>,
}

/// What the bytes of an entry say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// No block: never stored, cleared, or stored before the segment was bound anew.
    Free,
    /// Not what was written.
    Damaged,
    /// A block.
    Stored(Entry),
}

impl Entry {
    /// The bytes, for slot `index` of the binding with this seal.
    pub fn encode(&self, seal: u64, index: u32) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        let flags = if self.parent.is_some() { HAS_PARENT } else { 0 }
            | if self.expires_at_s.is_some() { HAS_EXPIRY } else { 0 };
        put(&mut bytes, 0, &STORED.to_le_bytes());
        put(&mut bytes, 4, &[self.priority, flags]);
        put(&mut bytes, 8, &self.key);
        put(&mut bytes, 24, &self.parent.unwrap_or_default());
        put(&mut bytes, 40, &self.namespace);
        put(&mut bytes, 72, &self.generation.to_le_bytes());
        put(&mut bytes, 80, &self.payload_check.to_le_bytes());
        put(&mut bytes, 88, &self.payload_bytes.to_le_bytes());
        put(&mut bytes, 96, &self.stored_at_s.to_le_bytes());
        put(&mut bytes, 104, &self.expires_at_s.unwrap_or_default().to_le_bytes());
        put(&mut bytes, 112, &seal.to_le_bytes());
        let check = check_of(&bytes, index);
        put(&mut bytes, CHECK_AT, &check.to_le_bytes());
        bytes
    }
}

impl Decoded {
    /// Judges the bytes found for slot `index` of the binding with this seal.
    pub fn of(bytes: &[u8; ENTRY_BYTES], seal: u64, index: u32) -> Self {
        let state = u32::from_le_bytes(take(bytes, 0));
        if state == FREE {
            return Self::Free;
        }
        let flags = bytes[5];
        if state != STORED
            || flags & !(HAS_PARENT | HAS_EXPIRY) != 0
            || u64::from_le_bytes(take(bytes, CHECK_AT)) != check_of(bytes, index)
        {
            return Self::Damaged;
        }
        if u64::from_le_bytes(take(bytes, 112)) != seal {
            return Self::Free;
        }
        Self::Stored(Entry {
            namespace: take(bytes, 40),
            key: take(bytes, 8),
            parent: (flags & HAS_PARENT != 0).then(|| take(bytes, 24)),
            generation: u64::from_le_bytes(take(bytes, 72)),
            payload_check: u64::from_le_bytes(take(bytes, 80)),
            payload_bytes: u32::from_le_bytes(take(bytes, 88)),
            priority: bytes[4],
            stored_at_s: u64::from_le_bytes(take(bytes, 96)),
            expires_at_s: (flags & HAS_EXPIRY != 0).then(|| u64::from_le_bytes(take(bytes, 104))),
        })
    }
}

/// Over the slot's index and all bytes before the check.
fn check_of(bytes: &[u8; ENTRY_BYTES], index: u32) -> u64 {
    let mut judged = [0; 4 + CHECK_AT];
    put(&mut judged, 0, &index.to_le_bytes());
    put(&mut judged, 4, &bytes[..CHECK_AT]);
    crc64_nvme(&judged)
}
