//! The holder of warm host memory: a small process that keeps duplicates of the descriptors of the daemon's host
//! segments, so that a daemon that was killed finds its memory again. [`Holder`] is `kvbm hold`, [`Client`] is the
//! daemon's end.
//!
//! ```text
//!  kvbm daemon ── Client ──► Hello ──────────────► Holder ── BTreeMap<index, HeldSegment>
//!                        ◄── Welcome, Held..., Done            │
//!                        ──► Keep, Drop, DropAll               └─ ends after a while without a daemon,
//!                                                                 and all memory that only it held with it
//! ```
//!
//! The holder never reads or maps what it keeps, and does not know what a block is: whether memory is still right is
//! told by the table that lies beside it. It serves one daemon at a time, and the next one only when the process of the
//! last is dead: two processes that believe to own the same memory would corrupt it. The bytes are in `docs/wire.md`.

mod client;
mod error;
mod limit;
mod message;
mod place;
mod segment;
mod serve;
mod watched;

pub use client::Client;
pub use error::HolderError;
pub use segment::HeldSegment;
pub use serve::{Ended, Holder};

/// Most segments that are kept.
pub const SEGMENTS_MAX: u32 = 65_536;

#[cfg(test)]
mod tests;
