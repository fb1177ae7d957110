//! What has to hold in the world at any time, and at the end.

use super::*;

impl World {
    /// What is pinned and was in host or on disk is still there, unless it was damaged or its segments went with the disk.
    pub(super) fn check_pins(&mut self) {
        let pinned: HashSet<(Tier, Key)> = [Tier::Host, Tier::Disk]
            .into_iter()
            .flat_map(|tier| self.ledger.tables_of(tier).into_iter().map(move |table| (tier, table)))
            .flat_map(|(tier, (_, slots))| slots.residents().into_iter().map(move |(_, key, _)| (tier, key)))
            .filter(|(_, key)| self.ledger.pins.contains(*key))
            .collect();
        let still = |at: &&(Tier, Key)| self.ledger.pins.contains(at.1) && !self.may_lose_pinned;
        let lost = self.pinned.iter().filter(still).find(|at| !pinned.contains(at));
        assert_eq!(lost, None, "a pinned block was lost");
        (self.pinned, self.may_lose_pinned) = (pinned, false);
    }

    /// Events tell exactly what is resident.
    pub(super) fn follow_events(&mut self) {
        let events = std::mem::take(self.ledger.take_events());
        for Event { tier, pool, kind } in events {
            match kind {
                EventKind::Stored { namespace, key, parent } => {
                    if let Some(parent) = parent {
                        assert!(self.resident.contains(&(tier, pool, namespace, parent)), "parent first");
                    }
                    assert!(self.resident.insert((tier, pool, namespace, key)), "stored twice");
                }
                EventKind::Removed { namespace, key } => {
                    assert!(
                        self.resident.remove(&(tier, pool, namespace, key)),
                        "removed without being there"
                    );
                }
                EventKind::Cleared => self.resident.retain(|(t, p, ..)| (*t, *p) != (tier, pool)),
            }
        }
        let listed: HashSet<_> = self
            .ledger
            .residents()
            .into_iter()
            .map(|event| match event.kind {
                EventKind::Stored { namespace, key, .. } => (event.tier, event.pool, namespace, key),
                _ => unreachable!("residents are listed as stored"),
            })
            .collect();
        assert_eq!(listed, self.resident);
    }

    pub(super) fn settle(&mut self) {
        while !self.offloads.is_empty() {
            self.end_offload(0, true);
        }
        while !self.onboards.is_empty() {
            self.end_onboard(0, true);
        }
        while !self.demotes.is_empty() {
            self.end_demote(u64::MAX);
        }
        while !self.promotes.is_empty() {
            self.end_promote(u64::MAX);
        }
        while !self.scrubs.is_empty() {
            self.end_scrub(0, true);
        }
        while let Some(worker) = self.workers.pop() {
            self.ledger.session_dead(worker.session, Millis(self.now));
        }
        for pin in self.ledger.pins() {
            self.ledger.unpin(pin.id, Millis(self.now)).expect("listed just now");
        }
        self.ledger.check_integrity();
        assert_eq!((self.ledger.leases(), self.ledger.quarantined()), (0, 0));
        for summary in self.ledger.host_summaries().into_iter().chain(self.ledger.disk_summaries()) {
            assert_eq!((summary.counts.filling, summary.counts.pinned), (0, 0));
        }
        for (_, pool) in self.ledger.pools() {
            let counts = pool.slots.counts();
            assert_eq!((counts.filling, counts.pinned), (0, 0));
            assert_eq!(counts.free + counts.resident, pool.slots.slots());
        }
    }
}
