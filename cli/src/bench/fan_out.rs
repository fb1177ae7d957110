//! Blocks that every rank of an engine holds whole (as with multi-head latent attention, MLA): stored once, loaded from host
//! memory once, and copied from GPU to GPU. How long until all ranks have them, beside the time that one takes.
//!
//! This process plays all ranks, with a pool on each device; the daemon is another one.

use std::time::{Duration, Instant};

use clap::Args;
use kvbm_connector::Client;
use kvbm_cuda::{Context, DeviceMemory, DeviceRange, Driver};
use kvbm_hash::{SequenceHash, sequence_hashes};
use kvbm_proto::{pack_keys, v1};
use kvbm_shm::{PoolWords, SharedMemory};
use tokio::runtime::Runtime;

use super::Row;
use super::daemon::{BenchDaemon, bench_base};

/// Longer than anything takes that works.
const PATIENCE: Duration = Duration::from_secs(60);
/// Blocks in one message.
const STORE_BLOCKS: usize = 4096;
/// Beside one device, all of them may take so many times as long.
const LIMIT: f64 = 1.2;
/// What a block's bytes look like where nothing was loaded.
const CLEARED: u8 = 0xEE;

/// What is measured.
#[derive(Debug, Args)]
pub(crate) struct FanOutArgs {
    /// One for each rank: cuda:0, GPU-<uuid>, or cpu for memory of the host in its place
    #[arg(long, value_delimiter = ',', default_value = "cuda:0,cuda:1")]
    devices: Vec<String>,
    /// Blocks that are loaded
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    blocks: u32,
    /// KiB of each
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u64).range(4..=1_048_576))]
    block_kib: u64,
    /// Turns; their medians are told
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
}

impl FanOutArgs {
    fn block_bytes(&self) -> usize {
        (self.block_kib as usize) << 10
    }

    fn bytes(&self) -> usize {
        self.blocks as usize * self.block_bytes()
    }

    /// One long prefix.
    fn keys(&self) -> Vec<SequenceHash> {
        let namespace = bench_base(self.block_bytes()).namespace(None, None);
        let tokens: Vec<u32> = (0..self.blocks * 32).collect();
        sequence_hashes(namespace, 32, &tokens)
    }
}

pub(super) fn measure(args: &FanOutArgs) -> Result<Vec<Row>, String> {
    if args.devices.len() < 2 {
        return Err("--devices: expected at least two".into());
    }
    Runtime::new().map_err(|error| error.to_string())?.block_on(run(args))
}

async fn run(args: &FanOutArgs) -> Result<Vec<Row>, String> {
    let daemon = BenchDaemon::start(args.bytes() as u64 * 21 / 20 + (1 << 30))?;
    let client = Client::connect(daemon.socket()).await.map_err(text)?;
    daemon.populated(&client).await?;
    let (mut ranks, keys) = (Vec::new(), args.keys());
    for rank in 0..args.devices.len() {
        ranks.push(Rank::open(args, &daemon, rank as u32).await?);
    }
    let stored_before = daemon.metric("kvbm_offload_blocks_d2h", "")?;
    for rank in &ranks {
        rank.write(args)?;
        rank.store(&keys).await?;
    }
    let stored = daemon.metric("kvbm_offload_blocks_d2h", "")? - stored_before;
    let (mut one, mut all) = (Vec::new(), Vec::new());
    let route = |name| daemon.metric("kvbm_transfer_bytes_total", name);
    // The first turn warms everything up and does not count.
    for round in 0..=args.rounds {
        let alone = load(&ranks[..1], &keys).await?;
        let before = (route("h2d")?, route("device_to_device")?);
        let together = load(&ranks, &keys).await?;
        if round > 0 {
            one.push(alone);
            all.push(together);
        }
        let moved = (route("h2d")? - before.0, route("device_to_device")? - before.1);
        let expected = (args.bytes() as f64, (args.bytes() * (ranks.len() - 1)) as f64);
        if moved != expected {
            return Err(format!(
                "bytes from host and from device to device: {moved:?}, expected {expected:?}"
            ));
        }
    }
    for rank in &ranks {
        rank.check(args)?;
    }
    let (one, all) = (median(&mut one), median(&mut all));
    let gb = args.bytes() as f64 / 1e9;
    let times = all / one;
    let row = Row::new("fanout.ratio", times, "x");
    let on_gpus = args.devices.iter().all(|device| device != "cpu");
    let row = if on_gpus { row.at_most(LIMIT) } else { row };
    let count = ranks.len();
    Ok(vec![
        Row::new("fanout.one", one * 1e3, "ms").detail(format!("{gb:.2} GB, {:.1} GB/s", gb / one)),
        Row::new("fanout.all", all * 1e3, "ms").detail(format!(
            "{count} ranks; {gb:.2} GB from host memory, the rest from device to device; every byte compared"
        )),
        row.detail("all ranks beside one alone"),
        Row::new("fanout.stored", stored / f64::from(args.blocks), "x")
            .at_most(1.0)
            .detail(format!("copies of each block in host memory, after all {count} ranks stored it")),
    ])
}

/// Seconds until the blocks are in all of these ranks' pools, in cleared blocks.
async fn load(ranks: &[Rank], keys: &[SequenceHash]) -> Result<f64, String> {
    for rank in ranks {
        rank.reassign()?;
    }
    let first = &ranks[0];
    let found = first.client.match_prefix(first.namespace_id, keys, 0).await.map_err(text)?;
    if found.host_blocks as usize != keys.len() {
        return Err(format!("{} of {} blocks are in host memory", found.host_blocks, keys.len()));
    }
    let started = Instant::now();
    let loads = ranks.iter().map(|rank| rank.load(found.lease_id));
    let loads: Vec<_> = loads.map(|load| tokio::spawn(load)).collect();
    for load in loads {
        let done = load.await.map_err(|error| error.to_string())??;
        if done.blocks_done as usize != keys.len() {
            return Err(format!("a rank could not load: {done:?}"));
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    first.client.release_lease(found.lease_id).await.map_err(text)?;
    Ok(seconds)
}

/// Where a rank has its blocks.
enum Memory {
    Gpu(DeviceMemory),
    Host(SharedMemory),
}

impl Memory {
    fn on(device: &str, bytes: usize) -> Result<Self, String> {
        if device == "cpu" {
            let memory = SharedMemory::create("bench-rank", bytes).map_err(|error| error.to_string())?;
            return Ok(Self::Host(memory));
        }
        let open = || {
            let driver = Driver::load()?;
            let context = Context::open(&driver, &driver.device(&device.parse()?)?)?;
            DeviceMemory::allocate(&context, bytes)
        };
        open().map(Self::Gpu).map_err(|error| error.to_string())
    }

    fn write(&self, at: usize, bytes: &[u8]) -> Result<(), String> {
        match self {
            Self::Gpu(memory) => memory.write(at, bytes).map_err(|error| error.to_string()),
            Self::Host(memory) => {
                memory.write(at, bytes);
                Ok(())
            }
        }
    }

    fn read(&self, at: usize, bytes: &mut [u8]) -> Result<(), String> {
        match self {
            Self::Gpu(memory) => memory.read(at, bytes).map_err(|error| error.to_string()),
            Self::Host(memory) => {
                memory.read(at, bytes);
                Ok(())
            }
        }
    }

    fn clear(&self) -> Result<(), String> {
        match self {
            Self::Gpu(memory) => memory.fill(0, CLEARED, memory.bytes()).map_err(|error| error.to_string()),
            Self::Host(memory) => {
                memory.write(0, &vec![CLEARED; memory.bytes()]);
                Ok(())
            }
        }
    }
}

/// One rank of the engine.
struct Rank {
    client: Client,
    namespace_id: u32,
    pool_id: u32,
    words: PoolWords,
    memory: Memory,
    blocks: u32,
}

impl Rank {
    async fn open(args: &FanOutArgs, daemon: &BenchDaemon, rank: u32) -> Result<Self, String> {
        let device = &args.devices[rank as usize];
        let memory = Memory::on(device, args.bytes())?;
        let name = format!("kvbm-bench-{rank}");
        let client = Client::connect_as(daemon.socket(), &name, PATIENCE).await.map_err(text)?;
        let client = client.with_deadline(PATIENCE);
        let block_bytes = args.block_bytes();
        let base = bench_base(block_bytes);
        let namespace = base.namespace(None, None);
        let namespace_id = client.register_namespace(namespace, base, "", "bench").await.map_err(text)?;
        let (kind, gpu_uuid) = match &memory {
            Memory::Gpu(memory) => {
                let handle = memory.ipc_handle().map_err(|error| error.to_string())?.0.to_vec();
                let kind = v1::pool_export::Kind::CudaIpc(v1::CudaIpc { handle, offset: 0 });
                (kind, memory.context().device().uuid.clone())
            }
            Memory::Host(memory) => {
                let name = [rank as u8 + 1; 16];
                client.send_memory(name, memory.fd()).await.map_err(text)?;
                (v1::pool_export::Kind::Memory(name.to_vec()), String::new())
            }
        };
        let export = v1::PoolExport { kind: Some(kind), bytes: args.bytes() as u64, gpu_uuid };
        let (stride, bytes) = (block_bytes as u64, block_bytes as u64);
        let open = v1::OpenPool {
            mode: v1::PoolMode::Ipc.into(),
            base: base.0.to_vec(),
            block_bytes: block_bytes as u64,
            block_count: args.blocks,
            tokens_per_block: 32,
            device: if export.gpu_uuid.is_empty() { "cpu:0".into() } else { export.gpu_uuid.clone() },
            // Each rank has all of every block.
            shard: 0,
            shard_count: 1,
            engine: vec![1; 16],
            rank,
            rank_count: args.devices.len() as u32,
            exports: vec![export],
            fragments: vec![v1::Fragment { export: 0, offset: 0, stride, bytes }],
            ..v1::OpenPool::default()
        };
        let (words, reply) = client.open_engine_pool(open).await.map_err(text)?;
        let (pool_id, blocks) = (reply.pool_id, args.blocks);
        let opened = Self { client, namespace_id, pool_id, words, memory, blocks };
        opened.reassign()?;
        Ok(opened)
    }

    /// All blocks are another request's from now on, and hold nothing of value.
    fn reassign(&self) -> Result<(), String> {
        (0..self.blocks).for_each(|block| _ = self.words.raise_generation(block));
        self.memory.clear()
    }

    fn block(&self, block: u32) -> v1::BlockRef {
        v1::BlockRef { block, generation: self.words.generation(block) }
    }

    fn write(&self, args: &FanOutArgs) -> Result<(), String> {
        let bytes = args.block_bytes();
        (0..self.blocks)
            .try_for_each(|block| self.memory.write(block as usize * bytes, &content(block, bytes)))
    }

    /// The blocks are those of the prefix, in order, byte for byte.
    fn check(&self, args: &FanOutArgs) -> Result<(), String> {
        let mut seen = vec![0; args.block_bytes()];
        for block in 0..self.blocks {
            self.memory.read(block as usize * seen.len(), &mut seen)?;
            if seen != content(block, seen.len()) {
                return Err(format!("block {block} of pool {} holds other bytes", self.pool_id));
            }
        }
        Ok(())
    }

    /// Returns when all blocks are in host memory, whoever brought them there.
    async fn store(&self, keys: &[SequenceHash]) -> Result<(), String> {
        for first in (0..keys.len()).step_by(STORE_BLOCKS) {
            let piece = first..(first + STORE_BLOCKS).min(keys.len());
            let parent = |at: usize| at.checked_sub(1).map_or([0; 16], |before| keys[before].0);
            let parents: Vec<[u8; 16]> = piece.clone().map(parent).collect();
            let store = v1::Store {
                namespace_id: self.namespace_id,
                pool_id: self.pool_id,
                blocks: piece.clone().map(|block| self.block(block as u32)).collect(),
                keys: pack_keys(keys[piece].iter().map(|key| &key.0)),
                parents: pack_keys(&parents),
                ..v1::Store::default()
            };
            let verdicts = self.client.store(store).await.map_err(text)?.verdicts;
            let there = [v1::StoreVerdict::Stored as u8, v1::StoreVerdict::Resident as u8];
            if let Some(verdict) = verdicts.iter().find(|verdict| !there.contains(verdict)) {
                return Err(format!("a block was not stored: verdict {verdict}"));
            }
        }
        Ok(())
    }

    fn load(&self, lease: u64) -> impl Future<Output = Result<v1::TransferDone, String>> + Send + 'static {
        let (client, pool) = (self.client.clone(), self.pool_id);
        let targets = (0..self.blocks).map(|block| self.block(block)).collect();
        async move { client.onboard(lease, pool, targets).await.map_err(text) }
    }
}

fn text(error: kvbm_connector::ClientError) -> String {
    error.to_string()
}

/// Different for every block and place.
fn content(block: u32, bytes: usize) -> Vec<u8> {
    let start = (u64::from(block) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (0..bytes as u64 / 8).flat_map(|word| start.wrapping_mul(2 * word + 1).to_le_bytes()).collect()
}

fn median(seconds: &mut [f64]) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
