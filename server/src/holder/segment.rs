//! One segment of host memory, as the holder keeps it: two descriptors and a label.

use std::os::fd::OwnedFd;

/// What a daemon finds again.
#[derive(Debug)]
pub struct HeldSegment {
    /// Which segment: the number it was kept under.
    pub index: u32,
    /// What the daemon that kept it wrote on it. The holder only compares indexes.
    pub fingerprint: [u8; 32],
    /// The memfd of the blocks.
    pub memory: OwnedFd,
    /// The memfd of the table that says which of them are whole.
    pub table: OwnedFd,
}
