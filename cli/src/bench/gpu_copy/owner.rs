//! The process that owns the pool, and the daemon's end of it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvbm_cuda::copy_engine::{CopyBatch, CopyMemory, Direction, LaneId, RawCopies, RawMethod, Urgency};
use kvbm_cuda::{Context, DeviceMemory, DeviceRange, Driver, RegisteredMemory, VmmMemory};
use kvbm_shm::{SharedMemory, SideListener, SideSocket};

use super::mover::{Method, Mover};
use super::order::{Order, Reply, hex};
use super::plan::Plan;
use super::{pattern, text};
use crate::parent::PARENT_PID;

/// Longer than anything takes that works.
const LIMIT: Duration = Duration::from_secs(120);
/// Through which the owner fills and compares its pool.
const SCRATCH_BYTES: usize = 256 << 20;

/// The other process. Killed when dropped.
pub(super) struct OwnerProcess {
    child: Child,
    socket: SideSocket,
}

impl OwnerProcess {
    pub fn start(gpu: &str, streams: usize) -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|error| format!("make a temporary folder: {error}"))?;
        let path = dir.path().join("owner.sock");
        let listener = SideListener::bind(&path).map_err(|error| error.to_string())?;
        let program = std::env::current_exe().map_err(|error| format!("find own program: {error}"))?;
        let mut child = Command::new(program)
            .args(["bench", "gpu-copy", "--gpu", gpu, "--streams", &streams.to_string(), "--owner"])
            .arg(&path)
            .env(PARENT_PID, std::process::id().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| format!("start the owner of the pool: {error}"))?;
        let deadline = Instant::now() + LIMIT;
        loop {
            match listener.accept() {
                Ok(socket) => return Ok(Self { child, socket }),
                Err(error) if error.is_would_block() => {}
                Err(error) => return Err(error.to_string()),
            }
            if let Ok(Some(status)) = child.try_wait() {
                return Err(format!("the owner of the pool ended: {status}"));
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                return Err("the owner of the pool does not come".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Gives an order and waits until it was carried out.
    pub fn ask(&mut self, order: &Order, descriptor: Option<&OwnedFd>) -> Result<Reply, String> {
        send(&self.socket, order, descriptor)?;
        let (bytes, _) = receive(&self.socket, LIMIT)?.ok_or("the owner of the pool ended")?;
        match serde_json::from_slice(&bytes).map_err(|error| error.to_string())? {
            Reply::Failed { error } => Err(format!("the owner of the pool: {error}")),
            reply @ (Reply::Done | Reply::Handle { .. } | Reply::Took { .. }) => Ok(reply),
        }
    }

    /// Has it copy by itself.
    pub fn run(&mut self, plan: &Plan, method: Method) -> Result<f64, String> {
        match self.ask(&Order::Run { plan: *plan, method }, None)? {
            Reply::Took { seconds } => Ok(seconds),
            other => Err(format!("the owner of the pool answers {other:?}")),
        }
    }

    /// Ends it, and waits until its memory is gone.
    pub fn finish(mut self) -> Result<(), String> {
        self.ask(&Order::End, None)?;
        let status = self.child.wait().map_err(|error| error.to_string())?;
        if status.success() { Ok(()) } else { Err(format!("the owner of the pool ended: {status}")) }
    }
}

impl Drop for OwnerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn send(
    socket: &SideSocket,
    message: &impl serde::Serialize,
    descriptor: Option<&OwnedFd>,
) -> Result<(), String> {
    let bytes = serde_json::to_vec(message).map_err(|error| error.to_string())?;
    socket.send(&bytes, descriptor.map(AsFd::as_fd)).map_err(|error| error.to_string())
}

/// What one packet brings.
type BytesAndFds = (Vec<u8>, Vec<OwnedFd>);

/// `None` at the end of file.
fn receive(socket: &SideSocket, limit: Duration) -> Result<Option<BytesAndFds>, String> {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if socket.wait_readable(Duration::from_secs(1)).map_err(|error| error.to_string())? {
            return socket.receive_fds().map_err(|error| error.to_string());
        }
    }
    Err("the other process says nothing".into())
}

/// The owner itself: carries out orders until it is told to end, or nobody is left to give any.
pub(super) fn serve(socket: &Path, gpu: &str, streams: usize) -> Result<(), String> {
    let socket = SideSocket::connect(socket).map_err(|error| error.to_string())?;
    let mut owner: Option<Owner> = None;
    while let Some((bytes, fds)) = receive(&socket, LIMIT)? {
        let order: Order = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
        if let Order::End = order {
            // Freed before the answer: whoever reads it may look at how much is free.
            drop(owner);
            return send(&socket, &Reply::Done, None);
        }
        let done = match &mut owner {
            Some(owner) => owner.carry_out(order, fds),
            None => Owner::open(gpu, streams).and_then(|opened| owner.insert(opened).carry_out(order, fds)),
        };
        send(&socket, &done.unwrap_or_else(|error| Reply::Failed { error }), None)?;
    }
    Ok(())
}

struct Owner {
    driver: Driver,
    context: Context,
    streams: usize,
    raw: RawCopies,
    scratch: Arc<RegisteredMemory>,
    pool: Option<Arc<dyn DeviceRange>>,
    host: Vec<CopyMemory>,
    mover: Option<Mover>,
}

impl Owner {
    fn open(gpu: &str, streams: usize) -> Result<Self, String> {
        let (driver, context) = super::open(gpu)?;
        let scratch =
            SharedMemory::create("bench-scratch", SCRATCH_BYTES).map_err(|error| error.to_string())?;
        scratch.populate(0..SCRATCH_BYTES).map_err(|error| error.to_string())?;
        let scratch = RegisteredMemory::new(&context, Arc::new(scratch)).map_err(text)?;
        Ok(Self {
            raw: RawCopies::new(&driver, &context).map_err(text)?,
            scratch: Arc::new(scratch),
            driver,
            context,
            streams,
            pool: None,
            host: Vec::new(),
            mover: None,
        })
    }

    fn carry_out(&mut self, order: Order, mut fds: Vec<OwnedFd>) -> Result<Reply, String> {
        match order {
            Order::Map { bytes } => {
                let descriptor = fds.pop().ok_or("no descriptor came with the pool")?;
                let pool = VmmMemory::import(&self.context, descriptor.as_fd(), bytes).map_err(text)?;
                self.pool = Some(Arc::new(pool));
                Ok(Reply::Done)
            }
            Order::Allocate { bytes } => {
                let pool = DeviceMemory::allocate(&self.context, bytes).map_err(text)?;
                let hex = hex(&pool.ipc_handle().map_err(text)?.0);
                self.pool = Some(Arc::new(pool));
                Ok(Reply::Handle { hex })
            }
            Order::Segment => {
                let descriptor = fds.pop().ok_or("no descriptor came with the segment")?;
                let memory = SharedMemory::from_fd(descriptor).map_err(|error| error.to_string())?;
                let memory = RegisteredMemory::new(&self.context, Arc::new(memory)).map_err(text)?;
                self.host.push(CopyMemory::Registered(Arc::new(memory)));
                Ok(Reply::Done)
            }
            Order::Start => {
                let (pool, host) = (self.pool()?.clone(), self.host.clone());
                self.mover = Some(Mover::start(&self.driver, &self.context, pool, host, self.streams)?);
                Ok(Reply::Done)
            }
            Order::Fill { plan } => self.fill(&plan).map(|()| Reply::Done),
            Order::Check { plan } => self.check(&plan).map(|()| Reply::Done),
            Order::Run { plan, method } => {
                let mover = self.mover.as_mut().ok_or("no copy engine was started")?;
                mover.run(&plan, method).map(|seconds| Reply::Took { seconds })
            }
            Order::End => Err("it ends in another place".into()),
        }
    }

    fn pool(&self) -> Result<&Arc<dyn DeviceRange>, String> {
        self.pool.as_ref().ok_or_else(|| "there is no pool yet".into())
    }

    fn fill(&mut self, plan: &Plan) -> Result<(), String> {
        let (contents, scratch, size) = (plan.pool_contents(false), self.scratch.clone(), plan.block_bytes());
        for (index, piece) in contents.chunks(SCRATCH_BYTES / size).enumerate() {
            pattern::in_parallel(piece.len(), |at| {
                let (seed, block) = piece[at];
                pattern::fill(seed, block, size, scratch.memory(), at * size);
                Ok(())
            })?;
            self.through_scratch(Direction::Onboard, index * SCRATCH_BYTES, piece.len() * size)?;
        }
        Ok(())
    }

    fn check(&mut self, plan: &Plan) -> Result<(), String> {
        let (contents, scratch, size) = (plan.pool_contents(true), self.scratch.clone(), plan.block_bytes());
        let per_piece = SCRATCH_BYTES / size;
        for (index, piece) in contents.chunks(per_piece).enumerate() {
            self.through_scratch(Direction::Offload, index * SCRATCH_BYTES, piece.len() * size)?;
            pattern::in_parallel(piece.len(), |at| {
                let (seed, block) = piece[at];
                if pattern::holds(seed, block, size, scratch.memory(), at * size) {
                    return Ok(());
                }
                Err(format!("block {} of the pool holds wrong bytes", index * per_piece + at))
            })?;
        }
        Ok(())
    }

    /// Copies a range of the pool from or to the start of the scratch memory.
    fn through_scratch(&mut self, direction: Direction, at: usize, bytes: usize) -> Result<(), String> {
        let (pool, scratch) =
            (CopyMemory::Device(self.pool()?.clone()), CopyMemory::Registered(self.scratch.clone()));
        let mut batch = CopyBatch::new(direction, LaneId(0), Urgency::Demanded, |_| ());
        match direction {
            Direction::Onboard => batch.copy((&scratch, 0), (&pool, at), bytes),
            Direction::Offload => batch.copy((&pool, at), (&scratch, 0), bytes),
        }
        self.raw.run(RawMethod::Loop, &[batch]).map(|_| ()).map_err(text)
    }
}
