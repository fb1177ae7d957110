//! How long recovery takes.

use std::time::{Duration, Instant};

use super::*;

/// Reads and decodes the tables of a million blocks, and prints the time. The bound is ten times what it takes on a slow
/// machine; a claim about speed is made from what is printed.
#[test]
#[ignore = "a measurement"]
fn a_million_entries_are_recovered_quickly() {
    let root = tempfile::tempdir().unwrap();
    let mut config = config(directories(root.path(), 1), 4);
    config.capacity_bytes = 4_300_000_000;
    let (store, _) = start(&config);
    let slots = store.slots_in().count(4096);
    let segments = (1_000_000_u32.div_ceil(slots)).min(store.segment_count());
    for segment in 0..segments {
        store.bind(SegmentId(segment), SMALL);
        store.pretend_full(SegmentId(segment));
    }
    store.close().unwrap();
    drop(store);
    for _ in 0..3 {
        let store = open(&config).unwrap();
        let started = Instant::now();
        let recovered = store.prepare(&|| false).unwrap();
        let took = started.elapsed();
        let report = recovered.report;
        println!(
            "{} entries of {} segments, {} bytes: {took:?}",
            report.entries, segments, report.bytes_read
        );
        assert_eq!(report.entries as u32, segments * slots);
        assert!(took < Duration::from_secs(5));
        store.close().unwrap();
    }
}

impl DiskStore {
    /// Entries without blocks.
    fn pretend_full(&self, segment: SegmentId) {
        let mut entry = crate::store::table::Entry {
            namespace: [1; 32],
            key: [0; 16],
            parent: None,
            generation: 0,
            payload_check: 0,
            payload_bytes: 4096,
            priority: 1,
            stored_at_s: 1,
            expires_at_s: None,
        };
        for index in 0..self.slots_in().count(4096) {
            entry.key[..4].copy_from_slice(&index.to_le_bytes());
            entry.generation += 1;
            self.pages().tables().set(DiskPlace { segment, index }, &entry);
        }
    }
}
