//! What the world does with its disk: blocks go there and come back, are looked at, and are found again after a restart.

use super::*;

impl World {
    pub(super) fn demote(&mut self, blocks: usize) {
        let limit = BatchLimit { blocks, bytes: usize::MAX };
        let batch = self.ledger.next_demote(limit, Millis(self.now));
        for (bound, _) in self.ledger.take_bound(Tier::Disk) {
            self.disk.retain(|(segment, _), _| *segment != bound.0);
        }
        let Some(batch) = batch else { return };
        assert!((1..=blocks).contains(&batch.copies().len()));
        let stride = batch.stride();
        let host = |copy: &DemoteCopy| self.host[&(copy.from.segment.0, copy.from.offset(stride))];
        let bytes: Vec<Bytes> = batch.copies().map(|copy| host(&copy)).collect();
        for (copy, bytes) in batch.copies().zip(&bytes) {
            let n = u16::from_le_bytes([copy.key.0[0], copy.key.0[1]]);
            assert_eq!(*bytes, Some((copy.namespace, n)), "what is written is what it is called");
            self.disk.insert((copy.to.segment.0, copy.to.offset(stride)), None);
        }
        self.demotes.push((batch, bytes));
    }

    pub(super) fn end_demote(&mut self, outcomes: u64) {
        if self.demotes.is_empty() {
            return;
        }
        let (batch, planned) = self.demotes.remove(0);
        let written: Vec<bool> = (0..planned.len()).map(|i| outcomes >> i & 3 != 0).collect();
        for ((copy, planned), written) in batch.copies().zip(planned).zip(&written) {
            let now = self.host[&(copy.from.segment.0, copy.from.offset(batch.stride()))];
            assert_eq!(now, planned, "a source changed while it was written");
            if *written {
                self.disk.insert((copy.to.segment.0, copy.to.offset(batch.stride())), now);
            }
        }
        self.ledger.finish_demote(batch, &written, Millis(self.now));
    }

    pub(super) fn promote(&mut self, i: usize, namespace: usize, n: u16, blocks: usize) {
        let worker = &self.workers[i];
        let (session, (digest, id)) = (worker.session, worker.namespaces[namespace]);
        let hashes: Vec<_> = path(n).into_iter().map(hash).collect();
        let found =
            self.ledger.find_prefix(session, id, &hashes, Millis(self.now)).expect("all is registered");
        let limit = BatchLimit { blocks, bytes: usize::MAX };
        let batches = self.ledger.begin_promote(session, id, &hashes, limit, Millis(self.now));
        let batches = batches.expect("all is registered");
        let planned: usize = batches.iter().map(|batch| batch.copies().len()).sum();
        assert!(planned <= found.disk_blocks);
        for batch in batches {
            assert!(batch.copies().len() <= blocks && batch.namespace() == digest);
            let place = |place: Place| (place.segment.0, place.offset(batch.stride()));
            let bytes: Vec<Bytes> = batch.copies().map(|copy| self.disk[&place(copy.from)]).collect();
            for (copy, bytes) in batch.copies().zip(&bytes) {
                let n = u16::from_le_bytes([copy.key.0[0], copy.key.0[1]]);
                assert_eq!(*bytes, Some((digest, n)), "disk holds what is promoted");
                self.host.insert(place(copy.to), None);
            }
            self.promotes.push((batch, bytes));
        }
    }

    pub(super) fn end_promote(&mut self, outcomes: u64) {
        if self.promotes.is_empty() {
            return;
        }
        let (batch, planned) = self.promotes.remove(0);
        let mut promoted = Vec::new();
        for (i, (copy, planned)) in batch.copies().zip(planned).enumerate() {
            let now = self.disk[&(copy.from.segment.0, copy.from.offset(batch.stride()))];
            assert_eq!(now, planned, "a source changed while it was read");
            promoted.push(match outcomes >> (2 * i) & 15 {
                0 => Promoted::Corrupt,
                1 => Promoted::Failed,
                _ => {
                    self.host.insert((copy.to.segment.0, copy.to.offset(batch.stride())), now);
                    Promoted::Arrived
                }
            });
        }
        self.ledger.finish_promote(batch, &promoted, Millis(self.now));
    }

    pub(super) fn end_scrub(&mut self, i: usize, intact: bool) {
        if !self.scrubs.is_empty() {
            let item = self.scrubs.remove(i % self.scrubs.len());
            let n = u16::from_le_bytes([item.key.0[0], item.key.0[1]]);
            let bytes = self.disk[&(item.place.segment.0, item.place.offset(item.stride()))];
            assert_eq!(bytes, Some((item.namespace, n)), "disk holds what is looked at");
            self.ledger.finish_scrub(vec![(item, intact)], Millis(self.now));
        }
    }

    /// The disk goes away and comes back with what was on it, but for some blocks.
    pub(super) fn restart_disk(&mut self, lost: u64) {
        if self.disk_segments == 0 || !self.ledger.drop_disk() {
            return;
        }
        self.follow_events();
        let mut classes = HashMap::new();
        for ((segment, offset), bytes) in &self.disk {
            let (digest, n) = match bytes {
                Some((digest, n)) if lost >> (n % 64) & 1 == 0 => (*digest, *n),
                _ => continue,
            };
            // Digests tell the model, and so the size of blocks; the domain is not in the bytes.
            let stride = layout((digest[0] - 1) / 2).stride();
            let class = Class { domain: TrustDomain(1), stride };
            let found = classes.entry(*segment).or_insert_with(|| (class, Vec::new()));
            if found.0 == class && offset % stride == 0 {
                found.1.push(FoundBlock {
                    namespace: digest,
                    index: (offset / stride) as u32,
                    key: hash(n),
                    parent: path(n).iter().rev().nth(1).map(|n| hash(*n)),
                    retention: Retention { priority: 50, duration: None },
                    stored: u64::from(n),
                });
            }
        }
        let slots_in = SlotsIn::bytes(4 * 4096);
        self.ledger.add_disk(slots_in.clone());
        let found: Vec<FoundSegment> = classes
            .into_iter()
            .map(|(segment, (class, blocks))| FoundSegment { segment: SegmentId(segment), class, blocks })
            .collect();
        let known: HashSet<SegmentId> = found.iter().map(|found| found.segment).collect();
        let names = self.ledger.name_found(&found, Millis(self.now));
        let tables = names.tables(found, &slots_in);
        self.ledger.install_found(Tier::Disk, names, tables);
        for event in self.ledger.residents_of(Tier::Disk) {
            if let EventKind::Stored { namespace, key, .. } = event.kind {
                self.resident.insert((event.tier, event.pool, namespace, key));
            }
        }
        for segment in (0..self.disk_segments).map(SegmentId).filter(|id| !known.contains(id)) {
            self.disk.retain(|(of, _), _| *of != segment.0);
            self.ledger.add_disk_segment(segment);
        }
        self.ledger.set_disk_service(true);
    }
}
