//! How fast the daemon's copy engine moves blocks between an engine's pool on a GPU and host memory, against the same
//! copies straight through the driver. This process is the daemon; the pool is in another one, which this program starts.

mod mover;
mod order;
mod owner;
mod pattern;
mod plan;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use kvbm_cuda::copy_engine::CopyMemory;
use kvbm_cuda::{
    Context, DeviceName, DeviceRange, Driver, IpcHandle, IpcMemory, RegisteredMemory, VmmMemory,
};
use kvbm_shm::SharedMemory;
use mover::{Method, Mover};
use order::{Order, Reply};
use owner::OwnerProcess;
use plan::{Plan, Way};

use super::Row;

/// Host memory comes in segments of at most this size, as in the daemon.
const SEGMENT_BYTES: usize = 1 << 30;
/// Share of the best raw method that the project demands.
const LIMIT: f64 = 0.95;

/// What is measured, and on which GPU
#[derive(Debug, Args)]
pub(super) struct GpuCopyArgs {
    /// GPU: a number, GPU-<uuid> or a place on the PCI bus
    #[arg(long, default_value = "0", value_name = "GPU")]
    gpu: String,
    /// Blocks that are copied each time; with blocks of 4 MiB, pool and host memory need 4 GiB for every 1024
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(16..=65_536))]
    blocks: u32,
    /// Turns of each method; their medians are told
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// How the daemon reaches the pool
    #[arg(long, value_enum, value_delimiter = ',', default_value = "owned,ipc,staged")]
    modes: Vec<Mode>,
    /// Sizes of blocks
    #[arg(long, value_enum, value_delimiter = ',', default_value = "64KiB,256KiB,2MiB,4MiB")]
    sizes: Vec<BlockSize>,
    /// Only compare every byte, with 256 blocks and one turn
    #[arg(long)]
    verify_only: bool,
    /// Streams for each direction
    #[arg(long, hide = true, default_value_t = 1)]
    streams: usize,
    /// The owner of the pool, started by this program
    #[arg(long, hide = true, value_name = "SOCKET")]
    owner: Option<PathBuf>,
}

/// Bytes of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum BlockSize {
    #[value(name = "64KiB")]
    Kib64,
    #[value(name = "256KiB")]
    Kib256,
    #[value(name = "2MiB")]
    Mib2,
    #[value(name = "4MiB")]
    Mib4,
}

impl BlockSize {
    fn bytes(self) -> usize {
        match self {
            Self::Kib64 => 64 << 10,
            Self::Kib256 => 256 << 10,
            Self::Mib2 => 2 << 20,
            Self::Mib4 => 4 << 20,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Kib64 => "64KiB",
            Self::Kib256 => "256KiB",
            Self::Mib2 => "2MiB",
            Self::Mib4 => "4MiB",
        }
    }
}

/// Whose memory the pool is, and who copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Mode {
    /// The daemon allocates the pool and hands it over by descriptor
    Owned,
    /// The engine allocates it, and the daemon opens it by handle
    Ipc,
    /// The engine keeps it to itself, and copies to and from the daemon's host memory
    Staged,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Owned => "owned",
            Self::Ipc => "ipc",
            Self::Staged => "staged",
        })
    }
}

pub(super) fn measure(args: &GpuCopyArgs) -> Result<Vec<Row>, String> {
    if let Some(socket) = &args.owner {
        owner::serve(socket, &args.gpu, args.streams)?;
        return Ok(Vec::new());
    }
    let (driver, context) = open(&args.gpu)?;
    let (blocks, rounds) = if args.verify_only { (256, 1) } else { (args.blocks as usize, args.rounds) };
    let bytes = blocks * args.sizes.iter().map(|size| size.bytes()).max().unwrap_or_default();
    let (free, _) = context.memory().map_err(text)?;
    if (bytes as u64) > free {
        let (wanted, free) = (bytes as f64 / 1e9, free as f64 / 1e9);
        return Err(format!(
            "a pool of {wanted:.1} GB does not fit the GPU's {free:.1} GB free; use fewer --blocks"
        ));
    }
    eprintln!("populating and registering {:.1} GB of host memory", bytes as f64 / 1e9);
    let host = populate(bytes)?;
    let mut registered = Vec::new();
    for memory in &host {
        registered.push(Arc::new(RegisteredMemory::new(&context, memory.clone()).map_err(text)?));
    }
    let host_memory: Vec<_> = registered.iter().cloned().map(CopyMemory::Registered).collect();
    let mut rows = Vec::new();
    for mode in &args.modes {
        eprintln!("measuring {mode} pools");
        let mut owner = OwnerProcess::start(&args.gpu, args.streams)?;
        let pool = attach(*mode, &context, &mut owner, bytes, &host)?;
        let mut mover = match pool {
            Some(pool) => Some(Mover::start(&driver, &context, pool, host_memory.clone(), args.streams)?),
            None => None,
        };
        for size in &args.sizes {
            for way in [Way::Out, Way::Back, Way::Both] {
                let plan = Plan::new(blocks, size.bytes(), way);
                let figures = alternate(&plan, rounds, &mut mover, &mut owner, &host)?;
                rows.push(figures.row(
                    format!("gpu.{}.{}.{mode}", way.name(), size.name()),
                    &plan,
                    args.verify_only,
                ));
            }
        }
        // The mapping goes before the memory.
        drop(mover);
        owner.finish()?;
    }
    Ok(rows)
}

/// The driver and the GPU.
fn open(gpu: &str) -> Result<(Driver, Context), String> {
    let name: DeviceName = gpu.parse().map_err(text)?;
    let driver = Driver::load().map_err(text)?;
    let device = driver.device(&name).map_err(text)?;
    let context = Context::open(&driver, &device).map_err(text)?;
    Ok((driver, context))
}

/// Shared memory in segments, with all pages there.
fn populate(bytes: usize) -> Result<Vec<Arc<SharedMemory>>, String> {
    let mut segments = Vec::new();
    for start in (0..bytes).step_by(SEGMENT_BYTES) {
        let size = SEGMENT_BYTES.min(bytes - start);
        let memory = SharedMemory::create("bench-segment", size).map_err(|error| error.to_string())?;
        segments.push(Arc::new(memory));
    }
    pattern::in_parallel(segments.len(), |index| {
        let memory = &segments[index];
        memory.populate(0..memory.bytes()).map_err(|error| error.to_string())
    })?;
    Ok(segments)
}

/// Makes the pool, in whatever process; returns the daemon's mapping, if it has one.
fn attach(
    mode: Mode,
    context: &Context,
    owner: &mut OwnerProcess,
    bytes: usize,
    host: &[Arc<SharedMemory>],
) -> Result<Option<Arc<dyn DeviceRange>>, String> {
    match mode {
        Mode::Owned => {
            let pool = VmmMemory::create(context, bytes).map_err(text)?;
            let descriptor = pool.export().map_err(text)?;
            owner.ask(&Order::Map { bytes: pool.bytes() }, Some(&descriptor))?;
            Ok(Some(Arc::new(pool)))
        }
        Mode::Ipc => {
            let Reply::Handle { hex } = owner.ask(&Order::Allocate { bytes }, None)? else {
                return Err("the owner of the pool gave no handle".into());
            };
            let handle = IpcHandle(order::unhex(&hex).ok_or("a handle has 64 bytes")?);
            Ok(Some(Arc::new(IpcMemory::open(context, handle, bytes).map_err(text)?)))
        }
        Mode::Staged => {
            owner.ask(&Order::Allocate { bytes }, None)?;
            for segment in host {
                let descriptor = segment.fd().try_clone_to_owned().map_err(|error| error.to_string())?;
                owner.ask(&Order::Segment, Some(&descriptor))?;
            }
            owner.ask(&Order::Start, None)?;
            Ok(None)
        }
    }
}

/// What the turns of each method took, seconds.
struct Figures {
    engine: Vec<f64>,
    raw: Vec<(Method, Vec<f64>)>,
}

/// All methods in turn. The engine's last turn copies into cleared memory, and every byte of it is compared.
fn alternate(
    plan: &Plan,
    rounds: u32,
    mover: &mut Option<Mover>,
    owner: &mut OwnerProcess,
    host: &[Arc<SharedMemory>],
) -> Result<Figures, String> {
    let mut run = |owner: &mut OwnerProcess, method| match mover {
        Some(mover) => mover.run(plan, method),
        None => owner.run(plan, method),
    };
    let raw = [Method::Loop, Method::Batch, Method::Contiguous];
    let mut figures = Figures { engine: Vec::new(), raw: raw.map(|method| (method, Vec::new())).to_vec() };
    // The first round warms everything up and does not count.
    for round in 0..=rounds {
        let engine = run(owner, Method::Engine)?;
        let mut others = Vec::new();
        for method in raw {
            others.push(run(owner, method)?);
        }
        if round > 0 {
            figures.engine.push(engine);
            figures.raw.iter_mut().zip(others).for_each(|((_, all), seconds)| all.push(seconds));
        }
    }
    plan.fill_host(host)?;
    owner.ask(&Order::Fill { plan: *plan }, None)?;
    run(owner, Method::Engine)?;
    plan.check_host(host)?;
    owner.ask(&Order::Check { plan: *plan }, None)?;
    Ok(figures)
}

impl Figures {
    fn row(&self, name: String, plan: &Plan, verify_only: bool) -> Row {
        let gb = plan.bytes() as f64 / 1e9;
        let rate = |seconds: &[f64]| gb / median(seconds);
        let rates: Vec<_> = self.raw.iter().map(|(method, seconds)| (*method, rate(seconds))).collect();
        // Of methods that move scattered blocks the best is the measure. Where blocks are large, long copies are one, too; not
        // both ways at once, when each small copy waits longer for the bus.
        let long = plan.block_bytes() > 64 << 10 && plan.way() != Way::Both;
        let counts = |method| method != Method::Contiguous || long;
        let ceiling =
            rates.iter().filter(|(method, _)| counts(*method)).map(|(_, rate)| *rate).fold(0.0, f64::max);
        let told: Vec<_> = rates.iter().map(|(method, rate)| format!("{method} {rate:.1}")).collect();
        let detail = format!(
            "{} scattered blocks, every byte compared; medians of {} turns; raw in GB/s: {}",
            plan.blocks(),
            self.engine.len(),
            told.join(", ")
        );
        let row = Row::new(name, rate(&self.engine), "GB/s").ceiling(ceiling).detail(detail);
        if verify_only { row } else { row.ratio_at_least(LIMIT) }
    }
}

fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn text(error: kvbm_cuda::Error) -> String {
    error.to_string()
}
