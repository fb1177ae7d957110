//! The form in which slots are written down, on disk and in memory that outlives the daemon: one header page that says
//! what a segment is bound to, then pages of entries, each with a check of its own.
//!
//! Invariants:
//! * what is decoded was encoded as such, for that binding and that slot; anything else is `Free` or `Damaged`;
//! * no bytes make anything here panic.
//!
//! The bytes are specified in docs/disk-format.md.

mod binding;
mod entry;
mod fields;
mod payload;
mod segment_table;

pub(crate) use binding::Binding;
pub(crate) use entry::{Decoded, ENTRIES_PER_PAGE, ENTRY_BYTES, Entry, FREE, STATE_BYTES};
pub(crate) use fields::{PAGE_BYTES, checked, put, seal_page, take};
pub(crate) use payload::payload_check;
pub(crate) use segment_table::SegmentTable;

#[cfg(test)]
mod tests;
