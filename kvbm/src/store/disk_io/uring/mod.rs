//! The engine over io_uring: one thread that owns the ring, and sleeps in the kernel whenever there is nothing to do.
//!
//! ```text
//!   submit ── backlog, under the lock ── (eventfd, only if the owner sleeps and could start something)
//!                                             │
//!   owner:  ┌► completions ─ lock: end, start ┴─ one io_uring_enter for all that is new, and to sleep ─┐
//!           └──────────────────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! The eventfd is read through the ring itself, so there is one place to sleep. `ring` is the only code that the kernel's
//! access to memory depends on: it keeps every I/O, and with it its memory, until the kernel reported that it ended.
#![allow(unsafe_code)]

mod owner;
mod plain;
mod ring;
mod table;

pub use plain::{PlainFigures, PlainLoop};

use std::fmt;
use std::fs::File;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvbm_shm::SharedMemory;
use owner::Owner;
use parking_lot::Mutex;
use ring::{Ring, Waker};

use super::backlog::Backlog;
use super::engine::check;
use super::{DiskIo, IoBatch, IoLoad, IoOptions, Overdue, StartError};

/// See the header.
pub(super) struct UringEngine {
    shared: Arc<Shared>,
    files_count: usize,
    owner: Mutex<Option<JoinHandle<()>>>,
}

/// What the owner of the ring and everybody else meet in.
struct Shared {
    inbox: Mutex<Inbox>,
    waker: Arc<Waker>,
    deadline: Duration,
    overdue: Overdue,
}

struct Inbox {
    backlog: Backlog,
    /// To be registered. Not more than the table has room for.
    memories: Vec<Arc<SharedMemory>>,
    memories_max: usize,
    registered_count: usize,
    /// The owner will not look here again before it is woken, or an I/O ends.
    asleep: bool,
}

impl UringEngine {
    /// Starts the owner. Fails where the kernel does not permit io_uring, or has too old a one.
    pub fn start(files: Arc<Vec<File>>, options: IoOptions) -> Result<Self, StartError> {
        let depth = options.depth.max(1);
        let waker = Arc::new(Waker::new().map_err(StartError::at("make an eventfd"))?);
        let inbox = Inbox {
            backlog: Backlog::new(depth, &options),
            memories: Vec::new(),
            memories_max: options.memories_registered_max as usize,
            registered_count: 0,
            asleep: false,
        };
        let shared = Arc::new(Shared {
            inbox: Mutex::new(inbox),
            waker: Arc::clone(&waker),
            deadline: options.deadline,
            overdue: options.overdue,
        });
        let files_count = files.len();
        let (answer, started) = mpsc::sync_channel(1);
        let mine = Arc::clone(&shared);
        // The ring is made by the thread that will use it: the kernel then knows that there is only this one.
        let body = move || match Ring::new(depth, files, waker, options.memories_registered_max) {
            Ok(ring) => {
                // Nobody listens any more only if the starter is gone; then it closed what it shares with us.
                let _ = answer.send(Ok(()));
                Owner::new(ring, mine).run();
            }
            Err(refused) => drop(answer.send(Err(refused))),
        };
        let owner = thread::Builder::new().name("kvbm-disk".into()).spawn(body);
        let owner = owner.map_err(StartError::at("start a thread for disk i/o"))?;
        started.recv().expect("the owner answers before it ends")?;
        Ok(Self { shared, files_count, owner: Mutex::new(Some(owner)) })
    }
}

impl DiskIo for UringEngine {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn submit(&self, batch: IoBatch) -> Result<(), IoBatch> {
        check(&batch, self.files_count);
        let mut inbox = self.shared.inbox.lock();
        inbox.backlog.accept(batch)?;
        // With no room in flight the owner looks here anyway, when an I/O ends.
        let wake = inbox.asleep && (inbox.backlog.can_start() || inbox.backlog.has_ended());
        inbox.asleep &= !wake;
        drop(inbox);
        if wake {
            self.shared.waker.wake();
        }
        Ok(())
    }

    fn register(&self, memory: &Arc<SharedMemory>) {
        let mut inbox = self.shared.inbox.lock();
        // More than this at once could not be registered; the owner says so when it comes to the last of these.
        if inbox.memories.len() <= inbox.memories_max {
            inbox.memories.push(Arc::clone(memory));
        }
        drop(inbox);
        self.shared.waker.wake();
    }

    fn memories_registered(&self) -> usize {
        self.shared.inbox.lock().registered_count
    }

    fn abandon_waiting(&self) {
        self.shared.inbox.lock().backlog.abandon_waiting();
        self.shared.waker.wake();
    }

    fn load(&self) -> IoLoad {
        self.shared.inbox.lock().backlog.load(Instant::now(), self.shared.deadline)
    }

    fn close(&self) {
        self.shared.close();
        if let Some(owner) = self.owner.lock().take() {
            // A panic of the owner with I/Os under way ends the process; another has been printed.
            let _ = owner.join();
        }
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        // The owner ends by itself, with what was accepted; a hung drive must not hang whoever lets go of it.
        self.shared.close();
    }
}

impl Shared {
    fn close(&self) {
        self.inbox.lock().backlog.close();
        self.waker.wake();
    }
}

impl fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringEngine").field("load", &self.load()).finish_non_exhaustive()
    }
}
