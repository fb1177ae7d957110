//! Opens the tier, watches the drive, takes it out of service and back.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use kvbm_hash::SequenceHash;

use super::{DiskState, DiskTier, Recovery, Shared};
use crate::ledger::{FoundBlock, FoundSegment, SegmentId};
use crate::store::disk::{DiskError, DiskStore, Recovered};
use crate::store::wall_time::{self, now_s};
use crate::tier::Tier;

/// How often the drive is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// How long after a failure it is tried again, at first; doubled up to the maximum.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// After so long in service a failure is a new one.
const STEADY: Duration = Duration::from_secs(20);
/// Times that tables which cannot be read are tried again before what is in them is given up.
const UNREAD_MAX: u32 = 3;

/// Until the manager stops.
pub(super) fn run(shared: &Shared, tier: &DiskTier) {
    let mut retry = RETRY_MIN;
    let mut again = Instant::now();
    let mut on_since = None;
    while !shared.stopping.load(Ordering::SeqCst) {
        let state = tier.state.lock().clone();
        match state {
            DiskState::Off => return,
            DiskState::On => {
                let since: Instant = *on_since.get_or_insert_with(Instant::now);
                if since.elapsed() > STEADY {
                    retry = RETRY_MIN;
                }
                // Should it go out now, it has this long to recover.
                again = Instant::now() + retry;
                watch(shared, tier);
            }
            DiskState::Opening if tier.capacity_bytes.lock().is_none() => {}
            DiskState::Opening | DiskState::Out(_) if Instant::now() >= again => {
                on_since = None;
                bring_back(shared, tier);
                again = Instant::now() + retry;
                retry = (retry * 2).min(RETRY_MAX);
            }
            DiskState::Opening | DiskState::Out(_) => {}
        }
        thread::sleep(LOOK);
    }
}

fn watch(shared: &Shared, tier: &DiskTier) {
    let Some(store) = tier.store() else { return };
    let load = store.load();
    if load.overdue > 0 {
        let reason = format!("the drive has not answered {} requests for {:?}", load.overdue, load.oldest);
        shared.disk_fault(tier, &reason);
    } else if let Err(error) = store.files_are_there() {
        shared.disk_fault(tier, &error.to_string());
    }
}

fn bring_back(shared: &Shared, tier: &DiskTier) {
    let done = match tier.store() {
        Some(store) if tier.recovered() && store.files_are_there().is_ok() => reuse(shared, tier, &store),
        Some(store) if !tier.recovered() => prepare(shared, tier, &store),
        _ => reopen(shared, tier),
    };
    match done {
        Ok(()) | Err(DiskError::Stopped) => {}
        Err(error) => {
            tier.is_out(&error.to_string());
            // A store is prepared once: another attempt begins with the files.
            let unprepared = if tier.recovered() { None } else { tier.store.write().take() };
            if let Some(store) = unprepared {
                store.abandon();
            }
        }
    }
}

/// What is known of the blocks is still true: only the drive has to answer.
fn reuse(shared: &Shared, tier: &DiskTier, store: &Arc<DiskStore>) -> Result<(), DiskError> {
    if store.load().overdue > 0 {
        return Err(DiskError::Config("the drive still does not answer".into()));
    }
    store.probe()?;
    in_service(shared, tier);
    tracing::info!("the drive answers: the disk tier is in service again");
    Ok(())
}

fn in_service(shared: &Shared, tier: &DiskTier) {
    tier.reads_in_vain.store(0, Ordering::SeqCst);
    shared.with_ledger(|ledger, _| {
        *tier.state.lock() = DiskState::On;
        ledger.set_disk_service(true);
    });
}

/// The files are gone, or never were there: what was on them is forgotten.
fn reopen(shared: &Shared, tier: &DiskTier) -> Result<(), DiskError> {
    if tier.store().is_some() {
        if !shared.with_ledger(|ledger, _| ledger.drop_disk()) {
            return Err(DiskError::Config("the drive still works on what was asked of it".into()));
        }
        if let Some(store) = tier.store.write().take() {
            store.abandon();
        }
        *tier.recovery.lock() = Recovery::default();
        tier.is_recovered.store(false, Ordering::SeqCst);
    }
    let capacity = tier.capacity_bytes.lock().expect("it is known before anything is opened");
    let store = tier.open_store(capacity)?;
    *tier.store.write() = Some(Arc::clone(&store));
    prepare(shared, tier, &store)
}

/// Gives the files their space, reads their tables and takes up service.
fn prepare(shared: &Shared, tier: &DiskTier, store: &Arc<DiskStore>) -> Result<(), DiskError> {
    let started = Instant::now();
    let recovered = store.prepare(&|| shared.stopping.load(Ordering::SeqCst))?;
    let report = recovered.report;
    let unreadable = (report.reads_failed + report.segments_lost) as u64;
    // A busy drive may do better later.
    if report.reads_failed > 0 && tier.unread.fetch_add(1, Ordering::SeqCst) < UNREAD_MAX {
        let reason = format!("{} reads of the disk cache's tables failed", report.reads_failed);
        return Err(DiskError::Config(reason));
    }
    shared.host.segments().iter().for_each(|memory| store.register(memory));
    let (damaged, unclean) = (report.damaged as u64, report.unclean);
    let (found, unbound) = found(recovered, store.segment_count());
    let slots_in = store.slots_in();
    let names = shared.with_ledger(|ledger, now| ledger.name_found(&found, now));
    let tables = names.tables(found, &slots_in);
    let left_out = tables.left_out as u64;
    let blocks = shared.with_ledger(|ledger, _| {
        ledger.add_disk(slots_in.clone());
        let blocks = ledger.install_found(Tier::Disk, names, tables);
        unbound.into_iter().for_each(|segment| ledger.add_disk_segment(segment));
        // Too many to tell of one by one: watchers ask for everything.
        shared.events.skip(blocks as u64);
        blocks as u64
    });
    let seconds = started.elapsed().as_secs_f64();
    *tier.recovery.lock() = Recovery { blocks, damaged, left_out, unreadable, unclean, seconds };
    tier.is_recovered.store(true, Ordering::SeqCst);
    in_service(shared, tier);
    tracing::info!(
        blocks,
        damaged,
        left_out,
        unreadable,
        unclean,
        seconds,
        segments = store.segment_count(),
        bytes = store.capacity_bytes(),
        engine = store.engine(),
        "the disk tier is in service"
    );
    Ok(())
}

/// Splits what was recovered into segments with a class and those without.
fn found(recovered: Recovered, segment_count: u32) -> (Vec<FoundSegment>, Vec<SegmentId>) {
    let now_s = now_s();
    let mut unbound: Vec<SegmentId> = (0..segment_count).map(SegmentId).collect();
    let mut found = Vec::with_capacity(recovered.segments.len());
    for segment in recovered.segments {
        // A segment in which nothing is may as well be anybody's.
        if segment.entries.is_empty() {
            continue;
        }
        unbound.retain(|id| *id != segment.segment);
        let blocks = segment.entries.into_iter().map(|(index, entry)| FoundBlock {
            namespace: entry.namespace,
            index,
            key: SequenceHash(entry.key),
            parent: entry.parent.map(SequenceHash),
            retention: wall_time::found(entry.priority, entry.stored_at_s, entry.expires_at_s, now_s),
            stored: entry.stored_at_s,
        });
        let (segment_id, class, blocks) = (segment.segment, segment.class, blocks.collect());
        found.push(FoundSegment { segment: segment_id, class, blocks });
    }
    (found, unbound)
}
