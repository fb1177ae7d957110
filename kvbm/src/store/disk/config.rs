//! What a user decides about the disk tier.

use std::path::PathBuf;

/// Where, how much, how.
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// One file is kept in each; 1..=64. Their order is part of the set.
    pub directories: Vec<PathBuf>,
    /// All files together.
    pub capacity_bytes: u64,
    /// Past the page cache, where the file system can.
    pub direct: bool,
    /// Write zeros where the file system cannot reserve space otherwise.
    pub zerofill: bool,
    /// Discard what is there, whatever it is.
    pub reset: bool,
}
