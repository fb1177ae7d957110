//! What is left of a dead engine's GPU memory: an engine that owns its KV memory (`ipc`) is killed while it reassigns blocks,
//! none of which was offloaded.
//!
//! All that were still valid have to be in host memory soon, byte for byte, and the GPU's memory free. A variant of the engine
//! that does not raise generations shows that this would notice wrong bytes.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use kvbm_connector::{BlockRef, Client, Release};
use kvbm_cuda::copy_engine::Direction;
use kvbm_cuda::{Context, DeviceMemory, DeviceRange, Driver};
use kvbm_hash::{SequenceHash, sequence_hashes};
use kvbm_proto::{pack_keys, v1};
use kvbm_shm::PoolWords;
use tokio::runtime::Runtime;

use super::daemon::{BenchDaemon, BenchEngine, bench_base};
use super::{Row, link};
use crate::parent::PARENT_PID;

/// Longer than anything takes that works.
const PATIENCE: Duration = Duration::from_secs(60);
/// Blocks in one message.
const STORE_BLOCKS: usize = 4096;
/// Blocks of the pool through which what was rescued is looked at.
const LOOK_BLOCKS: u32 = 64;
/// What the rescue may take: so much of the time of its bytes on the link, and this.
const LINK_FACTOR: f64 = 1.2;
const SPARE_SECONDS: f64 = 0.3;

/// What is measured.
#[derive(Debug, Args)]
pub(crate) struct RescueArgs {
    /// The GPU: cuda:0, GPU-<uuid>
    #[arg(long, default_value = "cuda:0")]
    device: String,
    /// Registered blocks
    #[arg(long, default_value_t = 10_000)]
    blocks: u32,
    /// KiB of each
    #[arg(long, default_value_t = 1024)]
    block_kib: usize,
    /// Be the engine: attach there, register, reassign until killed
    #[arg(long, hide = true, value_name = "SOCKET")]
    engine: Option<PathBuf>,
    /// The engine does not raise generations
    #[arg(long, hide = true)]
    silent: bool,
}

impl RescueArgs {
    fn block_bytes(&self) -> usize {
        self.block_kib << 10
    }

    fn context(&self) -> Result<Context, String> {
        let opened = Driver::load().and_then(|driver| {
            let device = driver.device(&self.device.parse()?)?;
            Context::open(&driver, &device)
        });
        opened.map_err(|error| error.to_string())
    }

    /// Each block is a sequence of its own.
    fn keys(&self) -> Vec<SequenceHash> {
        let namespace = bench_base(self.block_bytes()).namespace(None, None);
        (0..self.blocks).map(|block| sequence_hashes(namespace, 32, &[block; 32])[0]).collect()
    }
}

/// What one death came to.
struct Outcome {
    /// Blocks that were still valid when it died.
    valid: usize,
    seconds: f64,
    wrong: usize,
    missing: usize,
    /// Memory of the GPU that came back, bytes.
    freed: u64,
}

pub(super) fn measure(args: &RescueArgs) -> Result<Vec<Row>, String> {
    if args.blocks < 100 || args.block_kib < 4 || !args.block_kib.is_multiple_of(4) {
        return Err("--blocks, --block-kib: expected at least 100, and a multiple of 4".into());
    }
    let runtime = Runtime::new().map_err(|error| error.to_string())?;
    if let Some(socket) = &args.engine {
        return runtime.block_on(be_the_engine(args, socket)).map(|()| vec![]);
    }
    let rate = link::bytes_per_second(&args.device, args.block_bytes(), Direction::Offload)?;
    let right = runtime.block_on(kill_one(args, false))?;
    let silent = runtime.block_on(kill_one(args, true))?;
    let bytes = (right.valid * args.block_bytes()) as f64;
    let limit = LINK_FACTOR * bytes / rate + SPARE_SECONDS;
    let detail = format!(
        "{} of {} blocks were valid, {:.2} GB; the link alone moves {:.1} GB/s",
        right.valid,
        args.blocks,
        bytes / 1e9,
        rate / 1e9
    );
    let pool = args.blocks as f64 * args.block_bytes() as f64;
    Ok(vec![
        Row::new("rescue.seconds", right.seconds, "s").at_most(limit).detail(detail),
        Row::new("rescue.missing", right.missing as f64, "").at_most(0.0).detail("valid, and not found"),
        Row::new("rescue.wrong", right.wrong as f64, "").at_most(0.0).detail("found, with other bytes"),
        Row::new("rescue.freed", right.freed as f64 / 1e9, "GB")
            .at_least(pool / 1e9 * 0.99)
            .detail("memory of the GPU that was free afterwards and not before"),
        Row::new("rescue.silent.wrong", silent.wrong as f64, "")
            .at_least(1.0)
            .detail("the same, of an engine that does not raise generations"),
    ])
}

async fn kill_one(args: &RescueArgs, silent: bool) -> Result<Outcome, String> {
    let text = |error: kvbm_connector::ClientError| error.to_string();
    let free = |context: &Context| context.memory().map(|(free, _)| free).map_err(|error| error.to_string());
    let context = args.context()?;
    let bytes = u64::from(args.blocks) * args.block_bytes() as u64;
    let daemon = BenchDaemon::start(bytes * 21 / 20 + (2 << 30))?;
    let client = Client::connect(daemon.socket()).await.map_err(text)?;
    daemon.populated(&client).await?;
    let (mut engine, words) = start_engine(args, &daemon.socket(), silent)?;
    daemon.registered(&client).await?;
    engine.begin()?;
    let before = free(&context)?;
    let reassigned = || (0..args.blocks).filter(|block| words.generation(*block) > 1).count();
    let started = Instant::now();
    // Until a fifth of them is another's; without generations, for about as long.
    while if silent { started.elapsed() < PATIENCE / 60 } else { reassigned() < args.blocks as usize / 5 } {
        if started.elapsed() > PATIENCE {
            return Err("the engine reassigns nothing".into());
        }
        std::thread::yield_now();
    }
    engine.0.kill().and_then(|()| engine.0.wait()).map_err(|error| format!("kill the engine: {error}"))?;
    let died = Instant::now();
    loop {
        let status = client.status().await.map_err(text)?;
        let status: kvbm_server::status::Status =
            serde_json::from_str(&status).map_err(|error| error.to_string())?;
        if status.engine_pools.is_empty() {
            break;
        }
        if died.elapsed() > PATIENCE {
            return Err(format!("the rescue does not end: {:?}", status.engine_pools));
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let seconds = died.elapsed().as_secs_f64();
    let mut freed = 0;
    while freed < bytes * 99 / 100 && died.elapsed() < Duration::from_secs(10) {
        freed = free(&context)?.saturating_sub(before);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let valid: Vec<u32> = (0..args.blocks).filter(|block| words.generation(*block) == 1).collect();
    let (mut wrong, mut missing) = (0, 0);
    let keys = args.keys();
    let next = BenchEngine::attach(client, args.block_bytes(), LOOK_BLOCKS).await?;
    for block in &valid {
        match recall(&next, keys[*block as usize]).await? {
            None => missing += 1,
            Some(bytes) if bytes != content(*block, args.block_bytes()) => wrong += 1,
            Some(_) => {}
        }
    }
    Ok(Outcome { valid: valid.len(), seconds, wrong, missing, freed })
}

/// What host memory has under a key, as the next engine gets it.
async fn recall(engine: &BenchEngine, key: SequenceHash) -> Result<Option<Vec<u8>>, String> {
    let text = |error: kvbm_connector::ClientError| error.to_string();
    let (client, pool) = (&engine.client, engine.pool.pool_id);
    let found = client.match_prefix(engine.namespace_id, &[key], 0).await.map_err(text)?;
    if found.host_blocks == 0 {
        return Ok(None);
    }
    let targets = client.request_grants(pool, 1).await.map_err(text)?;
    let done = client.onboard(found.lease_id, pool, targets.clone()).await.map_err(text)?;
    let layout = engine.memory.layout();
    let mut bytes = vec![0; layout.block_bytes];
    engine.memory.memory().read(layout.offset(targets[0].block), &mut bytes);
    let back = Release { block: BlockRef::from(targets[0]), pins: 1 };
    client.release(pool, &[back]).await.map_err(text)?;
    Ok((done.blocks_done == 1).then_some(bytes))
}

/// Of a block in its first life.
fn content(block: u32, bytes: usize) -> Vec<u8> {
    let mut state = u64::from(block) + 1;
    let mut content = Vec::with_capacity(bytes);
    while content.len() < bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        content.extend_from_slice(&state.to_le_bytes());
    }
    content.truncate(bytes);
    content
}

/// Killed with its owner.
struct EngineProcess(Child);

impl EngineProcess {
    /// It may reassign its blocks now.
    fn begin(&mut self) -> Result<(), String> {
        let stdin = self.0.stdin.as_mut().ok_or("the engine has no standard input")?;
        writeln!(stdin).map_err(|error| format!("tell the engine to begin: {error}"))
    }
}

impl Drop for EngineProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_engine(
    args: &RescueArgs,
    socket: &Path,
    silent: bool,
) -> Result<(EngineProcess, PoolWords), String> {
    let program = std::env::current_exe().map_err(|error| format!("find own program: {error}"))?;
    let mut command = Command::new(program);
    command.args(["bench", "rescue", "--device", &args.device, "--blocks", &args.blocks.to_string()]);
    command.args(["--block-kib", &args.block_kib.to_string(), "--engine"]).arg(socket);
    command.args(silent.then_some("--silent"));
    let command = command.env(PARENT_PID, std::process::id().to_string());
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut engine = EngineProcess(child.map_err(|error| format!("start the engine: {error}"))?);
    let stdout = engine.0.stdout.take().ok_or("the engine has no standard output")?;
    let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
    let ready = lines.find_map(|line| line.strip_prefix("READY ").map(str::to_owned));
    let ready = ready.ok_or("the engine did not get ready")?;
    let path = format!("/proc/{}/fd/{ready}", engine.0.id());
    let words = std::fs::File::options().read(true).write(true).open(&path);
    let words = words.map_err(|error| format!("open {path}: {error}"))?;
    Ok((engine, PoolWords::from_fd(words.into()).map_err(|error| error.to_string())?))
}

/// Registers its blocks, then gives every other one to somebody else, again and again.
async fn be_the_engine(args: &RescueArgs, socket: &Path) -> Result<(), String> {
    let text = |error: kvbm_connector::ClientError| error.to_string();
    let cuda = |error: kvbm_cuda::Error| error.to_string();
    let block_bytes = args.block_bytes();
    let context = args.context()?;
    let memory = DeviceMemory::allocate(&context, args.blocks as usize * block_bytes).map_err(cuda)?;
    for block in 0..args.blocks {
        memory.write(block as usize * block_bytes, &content(block, block_bytes)).map_err(cuda)?;
    }
    let client = Client::connect_as(socket, "kvbm-bench", PATIENCE).await.map_err(text)?;
    let base = bench_base(block_bytes);
    let namespace_id =
        client.register_namespace(base.namespace(None, None), base, "", "bench").await.map_err(text)?;
    let bytes = memory.bytes() as u64;
    let handle = memory.ipc_handle().map_err(cuda)?.0.to_vec();
    let kind = v1::pool_export::Kind::CudaIpc(v1::CudaIpc { handle, offset: 0 });
    let open = v1::OpenPool {
        mode: v1::PoolMode::Ipc.into(),
        base: base.0.to_vec(),
        block_bytes: block_bytes as u64,
        block_count: args.blocks,
        tokens_per_block: 32,
        device: context.device().uuid.clone(),
        shard_count: 1,
        engine: vec![1; 16],
        rank_count: 1,
        exports: vec![v1::PoolExport { kind: Some(kind), bytes, gpu_uuid: context.device().uuid.clone() }],
        fragments: vec![v1::Fragment {
            export: 0,
            offset: 0,
            stride: block_bytes as u64,
            bytes: block_bytes as u64,
        }],
        ..v1::OpenPool::default()
    };
    let (words, reply) = client.open_engine_pool(open).await.map_err(text)?;
    (0..args.blocks).for_each(|block| {
        words.raise_generation(block);
    });
    let keys = args.keys();
    for first in (0..keys.len()).step_by(STORE_BLOCKS) {
        let piece = first..(first + STORE_BLOCKS).min(keys.len());
        let reference = |block| v1::BlockRef { block: block as u32, generation: 1 };
        let store = v1::Store {
            namespace_id,
            pool_id: reply.pool_id,
            blocks: piece.clone().map(reference).collect(),
            keys: pack_keys(keys[piece.clone()].iter().map(|key| &key.0)),
            parents: pack_keys(std::iter::repeat_n(&[0; 16], piece.len())),
            rescue_only: true,
            ..v1::Store::default()
        };
        let verdicts = client.store(store).await.map_err(text)?.verdicts;
        let registered = v1::StoreVerdict::Registered as u8;
        if verdicts.iter().any(|verdict| *verdict != registered) {
            return Err("not all blocks were registered".into());
        }
    }
    println!("READY {}", words.fd().as_raw_fd());
    std::io::stdin().read_line(&mut String::new()).map_err(|error| error.to_string())?;
    let mut block = 0;
    loop {
        block = (block + 37) % args.blocks;
        if block.is_multiple_of(2) {
            if !args.silent {
                words.raise_generation(block);
            }
            memory.fill(block as usize * block_bytes, 0xEE, block_bytes).map_err(cuda)?;
        }
    }
}
