//! The disk tier's storage: equal segments, each striped over one file per directory, and a table of their slots that
//! comes back after a restart.
//!
//! Invariants:
//! * a block is delivered only if its bytes are those stored under its namespace and key; everything else is a failure;
//! * a block counts as written when its bytes and then its entry have been written, and as durable after the next flush;
//! * a file that is not understood, not complete or in use is left as it is;
//! * nothing is held locked while a drive works.
//!
//! One lock, [`Pages`]'s tables, held for copies of pages and never across an I/O. Which slot is used for what is not
//! decided here: the caller owns a place while it writes or reads there, and binds a segment only when none of its slots
//! is in use. docs/disk-format.md specifies the bytes.

mod allocate;
mod arena;
mod block;
mod config;
mod error;
mod exchange;
mod files;
mod geometry;
mod header;
mod pages;
mod payload_io;
mod prepare;
mod recovery;
mod store;
mod tables;
mod watch;

pub(crate) use block::{DiskPlace, DiskRead, DiskWrite, ReadFailure, WriteFailure};
pub(crate) use config::DiskConfig;
pub use error::DiskError;
pub(crate) use recovery::Recovered;
pub(crate) use store::DiskStore;

use pages::Pages;

#[cfg(test)]
mod recording;
#[cfg(test)]
mod tests;
