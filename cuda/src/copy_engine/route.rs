//! One direction of a GPU: what waits, what is in flight, and how each batch ends.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use super::batch::{CopyBatch, CopyEnd, CopyFailure};
use super::device::CopyDevice;
use super::lanes::{BatchId, Lanes};
use super::{Allowance, LaneId, Urgency};
use crate::Error;

/// Copies of the first piece when nothing is in flight. Issuing one copy takes about as long as moving 32 KiB, and a GPU may
/// not begin before a call has ended: pieces grow with what is in flight, so that it begins soon and is never out of work.
const FIRST_COPIES: usize = 32;

/// How much is issued at a time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Bytes with one call.
    pub piece_bytes: u64,
    /// Bytes that the GPU has been given and not yet moved.
    pub in_flight_bytes: u64,
}

/// A batch that has not ended.
struct Active {
    batch: CopyBatch,
    submitted: Instant,
    /// When its first piece was issued.
    begun: Option<Instant>,
    /// Copies issued so far.
    issued: usize,
    failure: Option<CopyFailure>,
}

/// Copies of one batch that were issued together, or the end of a batch of which nothing more is issued.
struct Piece<M> {
    batch: BatchId,
    /// `None`: nothing to wait for, except its place in the order.
    mark: Option<M>,
    copies: usize,
    bytes: u64,
    is_last: bool,
}

/// One direction.
pub(super) struct Route<D: CopyDevice> {
    lanes: Lanes,
    active: HashMap<BatchId, Active>,
    in_flight: VecDeque<Piece<D::Mark>>,
    in_flight_bytes: u64,
    in_flight_copies: usize,
    next_id: BatchId,
}

/// Something ended: the batch's callback is to be called with it.
pub(super) type Ended = (CopyBatch, CopyEnd);

impl<D: CopyDevice> Route<D> {
    pub fn new() -> Self {
        Self {
            lanes: Lanes::default(),
            active: HashMap::new(),
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            in_flight_copies: 0,
            next_id: 0,
        }
    }

    /// True if no batch is left.
    pub fn is_idle(&self) -> bool {
        self.active.is_empty()
    }

    /// True if the device is at work.
    pub fn is_in_flight(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// True if somebody waits for what the device does next.
    pub fn is_demanded(&self) -> bool {
        let next = self.in_flight.front().and_then(|piece| self.active.get(&piece.batch));
        next.is_some_and(|active| active.batch.urgency == Urgency::Demanded)
    }

    pub fn accept(&mut self, batch: CopyBatch, now: Instant) {
        let (id, lane) = (self.next_id, batch.lane);
        self.next_id += 1;
        let active = Active { batch, submitted: now, begun: None, issued: 0, failure: None };
        self.active.insert(id, active);
        self.lanes.push(lane, id);
    }

    /// Issues one piece, if there is room and one need not wait. Returns its size, and whether it is in the background. An
    /// error is one after which the device is of no more use.
    pub fn issue(
        &mut self,
        device: &mut D,
        limits: Limits,
        now: Instant,
        background: Allowance,
    ) -> Result<Option<(u64, Urgency)>, Error> {
        if self.in_flight_bytes >= limits.in_flight_bytes {
            return Ok(None);
        }
        let Some((lane, id)) = self.next_ready(now, background) else { return Ok(None) };
        let urgency = self.active[&id].batch.urgency;
        let piece_bytes = match (urgency, background) {
            (Urgency::Background, Allowance::Bytes(bytes)) => bytes.min(limits.piece_bytes),
            (Urgency::Background, Allowance::Unlimited) | (Urgency::Demanded, _) => limits.piece_bytes,
        };
        let bytes = self.issue_piece(device, lane, id, piece_bytes, now)?;
        Ok(Some((bytes, urgency)))
    }

    /// The next batch in turn that need not wait. Batches whose fence is late fail.
    fn next_ready(&mut self, now: Instant, background: Allowance) -> Option<(LaneId, BatchId)> {
        let late: Vec<_> = self
            .lanes
            .heads()
            .filter_map(|(lane, id)| {
                let active = &self.active[&id];
                let fence = active.batch.fence.as_ref().filter(|_| active.issued == 0)?;
                let is_late = !fence.is_reached() && now.duration_since(active.submitted) >= fence.limit;
                is_late.then_some((lane, id, fence.limit))
            })
            .collect();
        for (lane, id, limit) in late {
            self.lanes.pop(lane);
            self.give_up(id, CopyFailure::FenceLate(limit));
        }
        self.lanes.heads().find(|(_, id)| {
            let Active { batch, issued, .. } = &self.active[id];
            let may_begin = *issued > 0 || batch.fence.as_ref().is_none_or(super::Fence::is_reached);
            let may_go = match batch.urgency {
                Urgency::Demanded => true,
                Urgency::Background => !background.is_exhausted(),
            };
            may_begin && may_go
        })
    }

    fn issue_piece(
        &mut self,
        device: &mut D,
        lane: LaneId,
        id: BatchId,
        piece_bytes: u64,
        now: Instant,
    ) -> Result<u64, Error> {
        let active = self.active.get_mut(&id).expect("waiting batches are active");
        active.begun.get_or_insert(now);
        let rest = &active.batch.copies[active.issued..];
        let (mut count, mut bytes) = (0, 0);
        for copy in rest.iter().take(self.in_flight_copies.max(FIRST_COPIES)) {
            if count > 0 && bytes + copy.bytes as u64 > piece_bytes {
                break;
            }
            count += 1;
            bytes += copy.bytes as u64;
        }
        // SAFETY: the batch holds the memories that its copies were checked against, until its last piece has ended.
        let issued = unsafe { device.issue(&rest[..count]) };
        active.issued += count;
        let mut is_last = active.issued == active.batch.copies.len();
        if let Err(error) = issued {
            if error.is_sticky() {
                return Err(error);
            }
            // Of this piece some copies may be under way: the batch ends behind the mark.
            active.failure = Some(CopyFailure::Refused(Arc::new(error)));
            is_last = true;
        }
        if is_last {
            self.lanes.pop(lane);
        } else {
            self.lanes.turn_taken(lane);
        }
        // Without a mark nobody would know when the copies end.
        let mark = Some(device.mark()?);
        self.in_flight.push_back(Piece { batch: id, mark, copies: count, bytes, is_last });
        self.in_flight_bytes += bytes;
        self.in_flight_copies += count;
        Ok(bytes)
    }

    /// What has ended since the last time, in order.
    pub fn settle(&mut self, device: &mut D, now: Instant, ended: &mut Vec<Ended>) -> Result<(), Error> {
        while let Some(piece) = self.in_flight.front() {
            // A mark that cannot be asked for says nothing about the memory: whatever the error is, the device is given up.
            let reached = piece.mark.as_ref().map_or(Ok(true), |mark| device.is_reached(mark))?;
            if !reached {
                break;
            }
            let piece = self.in_flight.pop_front().expect("looked at above");
            self.in_flight_bytes -= piece.bytes;
            self.in_flight_copies -= piece.copies;
            if let Some(mark) = piece.mark {
                device.recycle(mark);
            }
            if piece.is_last {
                ended.push(self.end(piece.batch, now));
            }
        }
        Ok(())
    }

    /// Nothing more is issued for a lane.
    pub fn close_lane(&mut self, lane: LaneId) {
        for id in self.lanes.close(lane) {
            self.give_up(id, CopyFailure::Cancelled);
        }
    }

    /// Nothing more is issued at all.
    pub fn close(&mut self) {
        for lane in self.lanes.ids() {
            for id in self.lanes.close(lane) {
                self.give_up(id, CopyFailure::Stopped);
            }
        }
    }

    /// Ends everything. Only when the device does nothing any more.
    pub fn abandon(&mut self, failure: &CopyFailure, ended: &mut Vec<Ended>) {
        self.lanes = Lanes::default();
        self.in_flight.clear();
        self.in_flight_bytes = 0;
        self.in_flight_copies = 0;
        let mut left: Vec<_> = self.active.drain().collect();
        left.sort_by_key(|(id, _)| *id);
        for (_, active) in left {
            let failure = active.failure.unwrap_or_else(|| failure.clone());
            ended.push((active.batch, CopyEnd::Failed(failure)));
        }
    }

    /// The batch, which waits no more, ends behind what was issued before.
    fn give_up(&mut self, id: BatchId, failure: CopyFailure) {
        let active = self.active.get_mut(&id).expect("waiting batches are active");
        active.failure = Some(failure);
        self.in_flight.push_back(Piece { batch: id, mark: None, copies: 0, bytes: 0, is_last: true });
    }

    fn end(&mut self, id: BatchId, now: Instant) -> Ended {
        let active = self.active.remove(&id).expect("a batch ends once");
        let took = active.begun.map(|begun| now.duration_since(begun)).unwrap_or_default();
        let end = match active.failure {
            Some(failure) => CopyEnd::Failed(failure),
            None => CopyEnd::Done { bytes: active.batch.bytes, took },
        };
        (active.batch, end)
    }
}
