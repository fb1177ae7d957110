//! Blocks on their way between host memory and disk.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::{Duration, Instant};

use kvbm_hash::SequenceHash;

use super::{DiskTier, Shared};
use crate::error::Refused;
use crate::ledger::{DemoteBatch, Ledger, Millis, NamespaceId, Place, PromoteBatch, Promoted, SessionId};
use crate::store::disk::{DiskPlace, DiskRead, DiskStore, DiskWrite, ReadFailure, WriteFailure};
use crate::store::disk_io::IoFailure;
use crate::store::wall_time::{expires_at_s, now_s};
use crate::tier::Route;

/// Batches one after the other of which nothing could be read, after which the drive is to blame and not the place.
const READS_IN_VAIN_MAX: u32 = 4;

/// Host to disk.
pub(in crate::manager) struct DemoteJob {
    number: u64,
    batch: DemoteBatch,
    store: Arc<DiskStore>,
}

/// Disk to host.
pub(in crate::manager) struct PromoteJob {
    number: u64,
    batch: PromoteBatch,
    store: Arc<DiskStore>,
}

pub(super) struct DemoteEnd {
    batch: DemoteBatch,
    written: Vec<bool>,
    took: Duration,
}

pub(super) struct PromoteEnd {
    batch: PromoteBatch,
    outcomes: Vec<Promoted>,
    took: Duration,
}

pub(super) fn disk_place(place: Place) -> DiskPlace {
    DiskPlace { segment: place.segment, index: place.index }
}

impl Shared {
    /// Hands writes that are due to the threads that write. Under the ledger's lock.
    pub(in crate::manager) fn queue_demotes(&self, ledger: &mut Ledger, now: Millis) {
        let Some(tier) = &self.disk else { return };
        while ledger.demote_backlog() > 0 && tier.demotes.has_room() {
            let Some(batch) = ledger.next_demote(tier.config.batch, now) else { break };
            self.bind_segments(ledger);
            let Some(store) = tier.store() else {
                let none = vec![false; batch.copies().len()];
                ledger.finish_demote(batch, &none, now);
                break;
            };
            let number = tier.demotes_planned.fetch_add(1, Relaxed);
            let pushed = tier.demotes.push(DemoteJob { number, batch, store });
            if let Err(job) = pushed {
                // Closed: nothing follows that would wait for its number.
                let none = vec![false; job.batch.copies().len()];
                ledger.finish_demote(job.batch, &none, now);
                break;
            }
        }
    }

    /// Begins to read what disk has of a prefix behind what host has of it. Under the ledger's lock.
    pub(in crate::manager) fn queue_promotes(
        &self,
        ledger: &mut Ledger,
        session: SessionId,
        namespace: NamespaceId,
        keys: &[SequenceHash],
        now: Millis,
    ) -> Result<(), Refused> {
        let Some(tier) = &self.disk else { return Ok(()) };
        let Some(store) = tier.store() else { return Ok(()) };
        if !tier.promotes.has_room() {
            self.counters.was_busy("promote");
            return Ok(());
        }
        let batches = ledger.begin_promote(session, namespace, keys, tier.config.batch, now)?;
        self.bind_segments(ledger);
        for batch in batches {
            if !tier.promotes.has_room() {
                self.counters.was_busy("promote");
                cancel(ledger, batch, now);
                continue;
            }
            let number = tier.promotes_planned.fetch_add(1, Relaxed);
            let store = Arc::clone(&store);
            if let Err(job) = tier.promotes.push(PromoteJob { number, batch, store }) {
                cancel(ledger, job.batch, now);
            }
        }
        Ok(())
    }

    fn settle_demote(&self, tier: &DiskTier, end: DemoteEnd) {
        let DemoteEnd { batch, written, took } = end;
        let (blocks, stride) = (written.len(), batch.stride() as u64);
        let arrived = written.iter().filter(|written| **written).count();
        tier.write_failures.fetch_add((blocks - arrived) as u64, Relaxed);
        self.with_ledger(|ledger, now| {
            let stored = ledger.finish_demote(batch, &written, now);
            if stored > 0 {
                self.counters.moved(Route::HostToDisk, stored, stored as u64 * stride, took);
            }
            if arrived < blocks {
                self.counters.failed(Route::HostToDisk);
            }
        });
    }

    fn settle_promote(&self, tier: &DiskTier, end: PromoteEnd) {
        let PromoteEnd { batch, outcomes, took } = end;
        let count = |wanted| outcomes.iter().filter(|outcome| **outcome == wanted).count();
        let (blocks, stride) = (outcomes.len(), batch.stride() as u64);
        tier.corrupt.fetch_add(count(Promoted::Corrupt) as u64, Relaxed);
        tier.read_failures.fetch_add(count(Promoted::Failed) as u64, Relaxed);
        if count(Promoted::Arrived) < blocks {
            self.counters.failed(Route::DiskToHost);
        }
        if let Some(warm) = &self.warm {
            // The drive is done with all of them.
            let arrived = |outcome: &Promoted| *outcome == Promoted::Arrived;
            let blocks = || batch.stored().zip(&outcomes);
            warm.clear(blocks().filter(|(_, outcome)| !arrived(outcome)).map(|((place, _), _)| place));
            warm.set(
                batch.stride(),
                blocks().filter(|(_, outcome)| arrived(outcome)).map(|(stored, _)| stored),
            );
        }
        self.with_ledger(|ledger, now| {
            let arrived = ledger.finish_promote(batch, &outcomes, now);
            if arrived > 0 {
                self.counters.moved(Route::DiskToHost, arrived, arrived as u64 * stride, took);
            }
        });
    }
}

fn cancel(ledger: &mut Ledger, batch: PromoteBatch, now: Millis) {
    let none = vec![Promoted::Failed; batch.copies().len()];
    ledger.finish_promote(batch, &none, now);
}

/// A thread that panics here may leave I/O under way into slots that nobody waits for any more, and batches that wait for
/// the turn of one that never ends. The process ends instead: engines go on without it, and the next daemon finds what
/// was stored.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("a thread of the disk tier panicked: the process ends");
            std::process::abort();
        }
    }
}

/// Writes batches until the queue is closed.
pub(super) fn run_demotes(shared: &Shared, tier: &DiskTier) {
    let _crash = AbortOnPanic;
    while let Some(DemoteJob { number, batch, store }) = tier.demotes.next() {
        let started = Instant::now();
        let written = write(shared, tier, &store, &batch);
        let end = DemoteEnd { batch, written, took: started.elapsed() };
        tier.demoted.ended(number, end, |end| shared.settle_demote(tier, end));
        tier.demotes.finished();
    }
}

fn write(shared: &Shared, tier: &DiskTier, store: &DiskStore, batch: &DemoteBatch) -> Vec<bool> {
    let (segments, stride) = (shared.host.segments(), batch.stride());
    let stored_at_s = now_s();
    let writes: Vec<DiskWrite> = batch
        .copies()
        .map(|copy| DiskWrite {
            place: disk_place(copy.to),
            namespace: copy.namespace,
            key: copy.key.0,
            parent: copy.parent.map(|parent| parent.0),
            priority: copy.retention.priority,
            expires_at_s: expires_at_s(copy.retention, stored_at_s),
            source: Arc::clone(&segments[copy.from.segment.0 as usize]),
            source_offset: copy.from.offset(stride),
            bytes: stride,
        })
        .collect();
    if !tier.is_on() || shared.stopping.load(SeqCst) {
        return vec![false; writes.len()];
    }
    let results = store.write(&writes);
    shared.copy_delay(writes.len());
    if let Some(failure) = results.iter().find_map(|result| match result {
        Err(WriteFailure::Io(failure)) => Some(failure),
        Ok(()) | Err(WriteFailure::Unbound) => None,
    }) {
        shared.disk_fault(tier, &format!("write to disk: {failure}"));
    }
    results.into_iter().map(|result| result.is_ok()).collect()
}

/// Reads batches until the queue is closed.
pub(super) fn run_promotes(shared: &Shared, tier: &DiskTier) {
    let _crash = AbortOnPanic;
    while let Some(PromoteJob { number, batch, store }) = tier.promotes.next() {
        let started = Instant::now();
        let outcomes = read(shared, tier, &store, &batch);
        let end = PromoteEnd { batch, outcomes, took: started.elapsed() };
        tier.promoted.ended(number, end, |end| shared.settle_promote(tier, end));
        tier.promotes.finished();
    }
}

fn read(shared: &Shared, tier: &DiskTier, store: &DiskStore, batch: &PromoteBatch) -> Vec<Promoted> {
    let (segments, stride) = (shared.host.segments(), batch.stride());
    let reads: Vec<DiskRead> = batch
        .copies()
        .map(|copy| DiskRead {
            place: disk_place(copy.from),
            namespace: batch.namespace(),
            key: copy.key.0,
            target: Arc::clone(&segments[copy.to.segment.0 as usize]),
            target_offset: copy.to.offset(stride),
            bytes: stride,
        })
        .collect();
    if !tier.is_on() || shared.stopping.load(SeqCst) {
        return vec![Promoted::Failed; reads.len()];
    }
    if let Some(warm) = &shared.warm {
        warm.mark_reading(batch.copies().map(|copy| copy.to));
    }
    let results = store.read(&reads);
    shared.copy_delay(reads.len());
    shared.judge(tier, store, &reads, &results)
}

impl Shared {
    /// What reads say about the blocks, and about the drive: one that cannot deliver some blocks has bad places, one that
    /// delivers nothing of what it was asked for, again and again, or takes too long, does not behave.
    pub(super) fn judge(
        &self,
        tier: &DiskTier,
        store: &DiskStore,
        reads: &[DiskRead],
        results: &[Result<(), ReadFailure>],
    ) -> Vec<Promoted> {
        let in_vain = |result: &Result<(), ReadFailure>| matches!(result, Err(ReadFailure::Io(_)));
        if !results.iter().all(in_vain) {
            tier.reads_in_vain.store(0, Relaxed);
        } else if !results.is_empty() {
            tier.reads_in_vain.fetch_add(1, Relaxed);
        }
        let judge = |(result, read): (&Result<(), ReadFailure>, &DiskRead)| match *result {
            Ok(()) => Promoted::Arrived,
            Err(ReadFailure::Io(failure @ (IoFailure::Os(_) | IoFailure::Short { .. })))
                if tier.reads_in_vain.load(Relaxed) < READS_IN_VAIN_MAX =>
            {
                self.forget(tier, store, read, &failure)
            }
            Err(ReadFailure::Io(failure)) => {
                self.disk_fault(tier, &format!("read from disk: {failure}"));
                Promoted::Failed
            }
            Err(failure @ (ReadFailure::Corrupt | ReadFailure::Absent)) => {
                self.forget(tier, store, read, &failure)
            }
        };
        results.iter().zip(reads).map(judge).collect()
    }

    fn forget(
        &self,
        tier: &DiskTier,
        store: &DiskStore,
        read: &DiskRead,
        failure: &dyn std::fmt::Display,
    ) -> Promoted {
        let (segment, slot) = (read.place.segment.0, read.place.index);
        tracing::warn!(segment, slot, %failure, "a block on disk is not what was stored: it is a miss");
        if let Err(failure) = store.forget(read.place) {
            self.disk_fault(tier, &format!("write to disk: {failure}"));
        }
        Promoted::Corrupt
    }
}
