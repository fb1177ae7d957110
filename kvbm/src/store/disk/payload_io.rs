//! Writing and reading blocks.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use kvbm_shm::SharedMemory;

use super::block::{DiskPlace, DiskRead, DiskWrite, ReadFailure, WriteFailure};
use super::exchange::Started;
use super::store::DiskStore;
use super::tables::PageId;
use crate::store::disk_io::{Buffer, Io, IoFailure};
use crate::store::table::{Binding, Decoded, Entry, PAGE_BYTES, payload_check};

/// Reads that are judged together, while the drive is busy with the next.
const READ_GROUP: usize = 8;

/// A block that is being written.
struct Writing {
    /// Its position in the caller's list.
    at: usize,
    /// Of the segment's binding when it began.
    seal: u64,
    entry: Entry,
}

impl DiskStore {
    /// Writes blocks into slots that the caller owns, and waits. Each counts as written only if its result says so.
    pub fn write(&self, blocks: &[DiskWrite]) -> Vec<Result<(), WriteFailure>> {
        let mut results = vec![Ok(()); blocks.len()];
        let bindings = self.empty_slots(blocks, &mut results);
        let arrived = self.write_payloads(blocks, &bindings, &mut results);
        self.write_entries(blocks, &arrived, &mut results);
        results
    }

    /// Takes the entries of what is overwritten off the disk, so that after a crash none of them is in front of other
    /// bytes. Answers with what each block's segment is bound to.
    fn empty_slots(
        &self,
        blocks: &[DiskWrite],
        results: &mut [Result<(), WriteFailure>],
    ) -> Vec<Option<Binding>> {
        let segments: BTreeSet<_> = blocks.iter().map(|block| block.place.segment).collect();
        let mut bindings = vec![None; blocks.len()];
        let mut pages: Vec<(usize, PageId)> = Vec::new();
        {
            let mut tables = self.pages().tables_without_ghosts(&segments);
            for (at, block) in blocks.iter().enumerate() {
                let Some(binding) = tables.binding_for(block.place, block.bytes) else {
                    results[at] = Err(WriteFailure::Unbound);
                    continue;
                };
                bindings[at] = Some(binding);
                // In every file: a segment whose headers differ is not bound.
                for file in 0..self.geometry().files {
                    let header = PageId { segment: block.place.segment, file, page: 0 };
                    pages.extend(tables.wanted(header).map(|_| (at, header)));
                }
                pages.extend(tables.clear(block.place).map(|page| (at, page)));
            }
        }
        let failures = self.pages().write(pages.iter().map(|(_, page)| *page));
        for (at, page) in pages {
            if let Some(failure) = failures.get(&page) {
                results[at] = Err(WriteFailure::Io(*failure));
            }
        }
        bindings
    }

    /// Writes the bytes and meanwhile computes what is to be said of them.
    fn write_payloads(
        &self,
        blocks: &[DiskWrite],
        bindings: &[Option<Binding>],
        results: &mut [Result<(), WriteFailure>],
    ) -> Vec<Writing> {
        let mut going: Vec<(usize, Binding)> = (0..blocks.len())
            .filter(|at| results[*at].is_ok())
            .filter_map(|at| bindings[at].map(|binding| (at, binding)))
            .collect();
        if going.is_empty() {
            return Vec::new();
        }
        // What lies side by side goes to the drive as one.
        going.sort_by_key(|(at, _)| blocks[*at].place);
        let io = |(at, binding): &(usize, Binding)| {
            let block = &blocks[*at];
            let (file, offset) = self.position(block.place, binding.stride);
            let buffer = buffer(&block.source, block.source_offset, block.bytes);
            Io::Write { file, offset, buffer }
        };
        let started = Started::new(self.pages().engine(), going.iter().map(io).collect());
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let describe = |(at, binding): (usize, Binding)| Writing {
            at,
            seal: binding.seal,
            entry: self.describe(&blocks[at], now_s),
        };
        let writing: Vec<Writing> = going.into_iter().map(describe).collect();
        let ended = started.wait(self.pages().engine());
        self.pages().unsynced(writing.iter().map(|writing| self.file_of(blocks[writing.at].place)));
        let mut arrived = Vec::with_capacity(writing.len());
        for (writing, result) in writing.into_iter().zip(ended) {
            match result {
                Ok(()) => arrived.push(writing),
                Err(failure) => results[writing.at] = Err(WriteFailure::Io(failure)),
            }
        }
        arrived
    }

    fn describe(&self, block: &DiskWrite, now_s: u64) -> Entry {
        let generation = self.generation().fetch_add(1, Ordering::Relaxed);
        let (source, offset) = (&block.source, block.source_offset);
        Entry {
            namespace: block.namespace,
            key: block.key,
            parent: block.parent,
            generation,
            payload_check: payload_check(
                &block.namespace,
                &block.key,
                generation,
                source,
                offset,
                block.bytes,
            ),
            payload_bytes: u32::try_from(block.bytes).expect("a slot is smaller than a segment"),
            priority: block.priority,
            stored_at_s: now_s,
            expires_at_s: block.expires_at_s,
        }
    }

    /// Names the blocks that have arrived.
    fn write_entries(
        &self,
        blocks: &[DiskWrite],
        arrived: &[Writing],
        results: &mut [Result<(), WriteFailure>],
    ) {
        let mut pages: Vec<(&Writing, PageId)> = Vec::with_capacity(arrived.len());
        {
            let mut tables = self.pages().tables();
            for writing in arrived {
                let block = &blocks[writing.at];
                let binding = tables.binding_for(block.place, block.bytes);
                if binding.is_some_and(|binding| binding.seal == writing.seal) {
                    pages.push((writing, tables.set(block.place, &writing.entry)));
                } else {
                    results[writing.at] = Err(WriteFailure::Unbound);
                }
            }
        }
        let failures = self.pages().write(pages.iter().map(|(_, page)| *page));
        for (writing, page) in pages {
            if let Some(failure) = failures.get(&page) {
                // Whether it is on disk nobody knows. Here it is not, and the page will be written again.
                self.pages().tables().clear(blocks[writing.at].place);
                results[writing.at] = Err(WriteFailure::Io(*failure));
            }
        }
    }

    /// Reads blocks, waits, and checks what arrived.
    pub fn read(&self, blocks: &[DiskRead]) -> Vec<Result<(), ReadFailure>> {
        let mut results = vec![Err(ReadFailure::Absent); blocks.len()];
        let mut found: Vec<(usize, Entry, Io)> = {
            let tables = self.pages().tables();
            let wanted = |block: &DiskRead| match tables.entry(block.place) {
                Decoded::Stored(entry) if is_of(&entry, block) => Some(entry),
                Decoded::Stored(_) | Decoded::Free | Decoded::Damaged => None,
            };
            let find = |(at, block): (usize, &DiskRead)| {
                let entry = wanted(block)?;
                let stride = tables.bound(block.place.segment)?.binding.stride;
                let (file, offset) = self.position(block.place, stride);
                let buffer = buffer(&block.target, block.target_offset, block.bytes);
                Some((at, entry, Io::Read { file, offset, buffer }))
            };
            blocks.iter().enumerate().filter_map(find).collect()
        };
        // What lies side by side goes to the drive as one.
        found.sort_by_key(|(at, _, _)| blocks[*at].place);
        let engine = self.pages().engine();
        let start = |group: &[(usize, Entry, Io)]| {
            Started::new(engine, group.iter().map(|(_, _, io)| io.clone()).collect())
        };
        let started: Vec<Started> = found.chunks(READ_GROUP).map(start).collect();
        for (group, started) in found.chunks(READ_GROUP).zip(started) {
            for ((at, entry, _), result) in group.iter().zip(started.wait(engine)) {
                results[*at] = match result {
                    Ok(()) => self.judge(&blocks[*at], entry),
                    Err(failure) => Err(ReadFailure::Io(failure)),
                };
            }
        }
        results
    }

    fn judge(&self, block: &DiskRead, entry: &Entry) -> Result<(), ReadFailure> {
        let (target, offset) = (&block.target, block.target_offset);
        let found =
            payload_check(&block.namespace, &block.key, entry.generation, target, offset, block.bytes);
        if found == entry.payload_check {
            return Ok(());
        }
        // What was overwritten meanwhile is not damaged.
        match self.pages().tables().entry(block.place) {
            Decoded::Stored(now) if now.generation == entry.generation => Err(ReadFailure::Corrupt),
            Decoded::Stored(_) | Decoded::Free | Decoded::Damaged => Err(ReadFailure::Absent),
        }
    }

    /// A bad slot: its entry does not count any more. It is off the disk when this returns, before the block can be stored
    /// anew elsewhere: of two entries of one block, the next daemon might believe the bad one. After a failure the next
    /// flush makes up for it.
    pub fn forget(&self, place: DiskPlace) -> Result<(), IoFailure> {
        let page = self.pages().tables().clear(place);
        self.pages().write(page).into_values().next().map_or(Ok(()), Err)
    }

    fn file_of(&self, place: DiskPlace) -> usize {
        self.geometry().split(place.index).0 as usize
    }

    fn position(&self, place: DiskPlace, stride: usize) -> (usize, u64) {
        let (file, local) = self.geometry().split(place.index);
        (file as usize, self.geometry().slot_offset(place.segment, local, stride))
    }
}

fn is_of(entry: &Entry, block: &DiskRead) -> bool {
    entry.namespace == block.namespace
        && entry.key == block.key
        && entry.payload_bytes as usize == block.bytes
}

/// Whole pages: what a slot has beyond its block is read and written too.
fn buffer(memory: &Arc<SharedMemory>, offset: usize, bytes: usize) -> Buffer {
    Buffer { memory: Arc::clone(memory), offset, len: bytes.next_multiple_of(PAGE_BYTES) }
}
