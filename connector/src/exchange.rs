//! What passes between the engine's thread and the link's: commands one way, arrivals the other.
//!
//! Commands go through a bounded queue that the engine never waits for. Arrivals need no bound of their own: each is the
//! answer to one command, or one of a handful per session, and no session opens before the engine took note of the end
//! of the one before.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use kvbm_hash::{Namespace, Retention, SequenceHash};
use kvbm_proto::v1::{self, TraceContext};
use kvbm_shm::PoolMemory;
use parking_lot::{Condvar, Mutex};

use crate::pool_table::{AdoptionTable, BlockRef, Content, DaemonId, Release};
use crate::{ClientError, DetachReason};

/// Called when there is something to [`crate::DeviceCache::poll`] for. It runs on the link's thread and must not block.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// An attempt to attach: 1, 2, ... Everything that belongs to another attempt is ignored.
pub(crate) type Attempt = u64;

/// A question of the engine's, numbered without repetition.
pub(crate) type QuestionId = u64;

/// To the link.
#[derive(Debug)]
pub(crate) enum Command {
    /// Open the pool. Sent once per attempt, first.
    Open(Opening),
    Match {
        question: QuestionId,
        namespace: Namespace,
        keys: Vec<SequenceHash>,
        /// Empty, or one for each key.
        retention: Vec<Option<Retention>>,
        trace: Option<TraceContext>,
    },
    Onboard {
        question: QuestionId,
        lease_id: u64,
        targets: Vec<BlockRef>,
        trace: Option<TraceContext>,
    },
    RequestGrants {
        question: QuestionId,
        count: u32,
    },
    /// Answered when what is being promoted has arrived or failed.
    Prefetch {
        question: QuestionId,
        namespace: Namespace,
        keys: Vec<SequenceHash>,
        trace: Option<TraceContext>,
    },
    Notes(Vec<Note>),
    ReleaseLease(u64),
}

/// Which pool to open.
#[derive(Debug)]
pub(crate) enum Opening {
    /// One of the daemon's making.
    Fresh,
    /// The one that the engine kept.
    Adoption { memory: Arc<PoolMemory>, epoch: u64, table: AdoptionTable },
}

/// What needs no answer, in the order in which it happened.
#[derive(Debug)]
pub(crate) enum Note {
    Commit { block: BlockRef, content: Content, retention: Retention },
    Release(Release),
}

/// An opened pool.
#[derive(Debug)]
pub(crate) struct Opened {
    pub pool_id: u32,
    /// Not after an adoption.
    pub memory: Option<PoolMemory>,
    pub inherited: Vec<(BlockRef, Content, Retention)>,
}

/// From the link.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// A daemon answered; it waits for `Command::Open`.
    Reachable { daemon: DaemonId },
    /// The pool is open.
    Opened(Box<Opened>),
    /// The attempt is over.
    Down { reason: DetachReason, daemon_dead: bool },
    /// The answer to a match.
    Matched { question: QuestionId, result: Result<v1::MatchReply, ClientError> },
    /// What is promoted has arrived or failed.
    Prefetched { question: QuestionId, result: Result<v1::PrefetchReply, ClientError> },
    /// The deadline of a match, or of a promotion, passed.
    Missed { question: QuestionId },
    /// The outcome of an onboard.
    Onboarded { question: QuestionId, result: Result<v1::TransferDone, ClientError> },
    /// Blocks to fill.
    Granted { question: QuestionId, result: Result<Vec<BlockRef>, ClientError> },
    /// A daemon process is dead; it may have been dead for a while. Of no attempt.
    DaemonDead { daemon: DaemonId },
}

/// Where the engine finds arrivals.
pub(crate) struct Inbox {
    arrivals: Mutex<VecDeque<(Attempt, Arrival)>>,
    arrived: Condvar,
    waker: Waker,
}

impl Inbox {
    pub fn new(waker: Waker) -> Self {
        Self { arrivals: Mutex::default(), arrived: Condvar::new(), waker }
    }

    pub fn push(&self, attempt: Attempt, arrival: Arrival) {
        self.arrivals.lock().push_back((attempt, arrival));
        self.arrived.notify_one();
        (self.waker)();
    }

    pub fn drain(&self) -> VecDeque<(Attempt, Arrival)> {
        std::mem::take(&mut *self.arrivals.lock())
    }

    /// Waits for one arrival, until `deadline`.
    pub fn wait(&self, deadline: Instant) -> Option<(Attempt, Arrival)> {
        let mut arrivals = self.arrivals.lock();
        while arrivals.is_empty() {
            if self.arrived.wait_until(&mut arrivals, deadline).timed_out() {
                break;
            }
        }
        arrivals.pop_front()
    }
}
