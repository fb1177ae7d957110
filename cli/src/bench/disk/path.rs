//! The whole path of a block: host memory, disk, host memory, with checksums, tables and accounts, through the block
//! manager as the daemon runs it.

use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kvbm::ledger::Millis;
use kvbm::{
    BlockRef, CommitBlock, DiskCapacity, DiskState, DiskTierConfig, Held, HostCapacity, Manager,
    ManagerConfig, NamespaceId, OpenPool, OpenedPool, PolicyKind, Route, SessionId, TrustDomain,
};
use kvbm_hash::SequenceHash;
use kvbm_shm::PoolLayout;

use super::engine::{fill_with_noise, process_cpu_seconds};
use super::{Direction, Figure};

/// Sets that the file has room for.
const SETS_ON_DISK: u64 = 9;
/// Sets that host memory has room for: a set is gone when so many others came after it.
const SETS_IN_HOST: u64 = 5;
/// Sets that are moved in a turn: more than what starting and ending take.
const SETS_PER_TURN: usize = 4;
/// Blocks of one sequence.
const CHAIN: usize = 128;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long a drive may not answer.
const DRIVE_PAUSE_MAX: Duration = Duration::from_secs(60);
/// What getting memory and a file may take besides, for each GB on disk: the kernel clears both.
const READY_PER_GB: Duration = Duration::from_secs(10);

/// One set of blocks: sequences.
type Set = Vec<Vec<SequenceHash>>;

/// See the header.
pub(super) struct WholePath {
    manager: Manager,
    session: SessionId,
    namespace: NamespaceId,
    pool: OpenedPool,
    block_bytes: usize,
    blocks: usize,
    sets: Vec<Set>,
    reads: usize,
    directory: tempfile::TempDir,
}

impl WholePath {
    /// A cache of `bytes` on disk that is full, so that every write replaces a block.
    pub fn start(dir: &Path, bytes: u64, block_bytes: usize) -> Result<Self, String> {
        let told = |error: &dyn std::fmt::Display| format!("measure the whole path: {error}");
        let directory = tempfile::tempdir_in(dir).map_err(|error| told(&error))?;
        let blocks =
            (bytes / (SETS_ON_DISK + 1) / block_bytes as u64) as usize / CHAIN.min(32) * CHAIN.min(32);
        let set_bytes = (blocks * block_bytes) as u64;
        let mut disk = DiskTierConfig::new(vec![directory.path().to_owned()], DiskCapacity::Bytes(bytes));
        // Blocks go to disk when this asks for them again, which is when the clock starts.
        disk.rules.admission.frequency_filter = true;
        disk.rules.idle = Millis(0);
        disk.scrub_bytes_per_second = 0;
        // A drive that pauses is slow here; it is not to be left alone for that.
        disk.io.deadline = DRIVE_PAUSE_MAX;
        let manager = Manager::start(ManagerConfig {
            host: HostCapacity::Bytes(set_bytes * SETS_IN_HOST * 21 / 20),
            disk: Some(disk),
            queue_depth: 1024,
            // What is in host memory must be foreseen.
            policy: PolicyKind::Lru,
            ..ManagerConfig::default()
        })
        .map_err(|error| told(&error))?;
        let session = manager.open_session(TrustDomain(0));
        let namespace = manager
            .register_namespace(session, [1; 32], [2; 32], "", "bench")
            .map_err(|error| told(&error))?;
        let open = OpenPool {
            base: [2; 32],
            layout: PoolLayout { block_bytes, block_count: blocks as u32 },
            tokens_per_block: 32,
            device: "cpu:0".into(),
            fresh: true,
            uuid: [3; 16],
        };
        let pool = manager.open_pool(session, open).map_err(|error| told(&error))?;
        // Behind the pool's header.
        fill_with_noise(pool.memory.memory(), pool.memory.layout().offset(0));
        let (sets, reads) = (Vec::new(), 0);
        let mut path =
            Self { manager, session, namespace, pool, block_bytes, blocks, sets, reads, directory };
        path.wait_for(
            PATIENCE + READY_PER_GB * (bytes / 1_000_000_000) as u32,
            "the tiers are ready",
            |path| {
                let (planned, there) = path.manager.host_bytes();
                let disk = path.manager.disk().map(|disk| disk.state);
                planned == there && disk == Some(DiskState::On)
            },
        )?;
        // Every byte of the file: parts that were never written are read as zeros, without the drive.
        for _ in 0..(bytes.div_ceil(set_bytes) as usize).div_ceil(SETS_PER_TURN) {
            path.write()?;
        }
        Ok(path)
    }

    /// Where the file is.
    pub fn dir(&self) -> &Path {
        self.directory.path()
    }

    /// One turn. After the first write the file may be written to by others: nothing is read from it any more.
    pub fn run(&mut self, direction: Direction) -> Result<Figure, String> {
        match direction {
            Direction::Write => self.write(),
            Direction::Read => self.read(),
        }
    }

    /// Puts new sets into host memory, then measures their way to disk.
    fn write(&mut self) -> Result<Figure, String> {
        let first = self.sets.len();
        for _ in 0..SETS_PER_TURN {
            let set = self.fill()?;
            self.sets.push(set);
        }
        // The filter takes a few for used before, and these went ahead. They are not counted.
        self.wait_until_written()?;
        let figure = self.measured(Route::HostToDisk, || {
            for chain in self.sets[first..].iter().flatten() {
                // Twice: the filter may just have forgotten that it was used before.
                for _ in 0..2 {
                    let asked = self.manager.prefetch(self.session, self.namespace, chain);
                    asked.map_err(|error| error.to_string())?;
                }
            }
            self.wait_until_written()
        })?;
        let whole = (SETS_PER_TURN * self.blocks * self.block_bytes) as u64;
        if figure.bytes < whole / 8 {
            let bytes = figure.bytes;
            return Err(format!("only {bytes} of {whole} bytes went to disk in a turn: {}", self.state()));
        }
        Ok(figure)
    }

    fn wait_until_written(&self) -> Result<(), String> {
        self.wait("nothing is left to be written", |path| {
            path.manager.inspect(|ledger| ledger.demote_backlog() + ledger.demoting()) == 0
        })
    }

    /// What says why blocks do not move.
    fn state(&self) -> String {
        let (turned_away, backlog) =
            self.manager.inspect(|ledger| (ledger.disk_turned_away(), ledger.demote_backlog()));
        let moved = [Route::DeviceToHost, Route::HostToDisk, Route::DiskToHost]
            .map(|route| self.manager.counters().blocks(route));
        let tier = self.manager.disk().map(|disk| (disk.state, disk.outages, disk.write_failures));
        format!("moved {moved:?}, turned away {turned_away:?}, waiting {backlog}, disk tier {tier:?}")
    }

    /// Measures the way of sets back that host memory has given up.
    fn read(&mut self) -> Result<Figure, String> {
        // From the oldest on disk, round and round: what was read or written before the last few is not in host memory.
        let oldest = self.sets.len() - SETS_ON_DISK as usize;
        let turn: Vec<usize> =
            (0..SETS_PER_TURN).map(|i| oldest + (self.reads + i) % SETS_ON_DISK as usize).collect();
        self.reads += SETS_PER_TURN;
        self.measured(Route::DiskToHost, || {
            let (send, receive) = mpsc::channel();
            let chains = || turn.iter().flat_map(|set| &self.sets[*set]);
            for chain in chains() {
                let send = send.clone();
                let done = Box::new(move |found| {
                    // Whoever waited may have given up.
                    let _ = send.send(found);
                });
                let asked = self.manager.prefetch_and_wait(self.session, self.namespace, chain, done);
                asked.map_err(|error| error.to_string())?;
            }
            for _ in chains() {
                receive
                    .recv_timeout(PATIENCE)
                    .map_err(|_| "blocks did not come back from disk".to_owned())?;
            }
            Ok(())
        })
    }

    fn measured(&self, route: Route, ask: impl FnOnce() -> Result<(), String>) -> Result<Figure, String> {
        let (blocks, cpu) = (self.manager.counters().blocks(route), process_cpu_seconds());
        let started = Instant::now();
        ask()?;
        let seconds = started.elapsed().as_secs_f64();
        let bytes = (self.manager.counters().blocks(route) - blocks) * self.block_bytes as u64;
        Ok(Figure { bytes, seconds, cpu_seconds: process_cpu_seconds() - cpu })
    }

    /// Computes, as it were, a new set, and waits until it is in host memory.
    fn fill(&self) -> Result<Set, String> {
        let failed = |error: kvbm::Refused| error.to_string();
        let number = self.sets.len() as u64;
        let mut set = Set::new();
        let mut left = self.blocks;
        while left > 0 {
            let chain: Vec<SequenceHash> =
                (0..left.min(CHAIN)).map(|i| key(number, set.len() as u64, i as u64)).collect();
            left -= chain.len();
            let mut targets: Vec<BlockRef> = Vec::new();
            self.wait("blocks of the pool are free", |path| {
                let wanted = chain.len() - targets.len();
                let granted = path.manager.request_grants(path.session, path.pool.pool_id, wanted);
                targets.extend(granted.unwrap_or_default());
                targets.len() == chain.len()
            })?;
            let commit = |(i, block): (usize, &BlockRef)| CommitBlock {
                block: *block,
                hash: chain[i],
                parent: i.checked_sub(1).map(|before| chain[before]),
                retention: None,
            };
            let commits: Vec<CommitBlock> = targets.iter().enumerate().map(commit).collect();
            let (session, namespace, pool) = (self.session, self.namespace, self.pool.pool_id);
            self.manager.commit(session, namespace, pool, &commits).map_err(failed)?;
            let (send, receive) = mpsc::channel();
            let done = Box::new(move |outcome| {
                let _ = send.send(outcome);
            });
            self.manager.offload(session, pool, &targets, done).map_err(failed)?;
            let outcome =
                receive.recv_timeout(PATIENCE).map_err(|_| "blocks did not reach host memory".to_owned())?;
            if outcome.blocks_failed > 0 {
                return Err(format!("blocks did not reach host memory: {:?}", outcome.error));
            }
            let held: Vec<Held> = targets.iter().map(|block| Held { block: *block, pins: 1 }).collect();
            self.manager.release(session, pool, &held).map_err(failed)?;
            set.push(chain);
        }
        Ok(set)
    }

    fn wait(&self, what: &str, until: impl FnMut(&Self) -> bool) -> Result<(), String> {
        self.wait_for(PATIENCE, what, until)
    }

    fn wait_for(
        &self,
        patience: Duration,
        what: &str,
        mut until: impl FnMut(&Self) -> bool,
    ) -> Result<(), String> {
        let started = Instant::now();
        while !until(self) {
            if started.elapsed() > patience {
                return Err(format!("waited in vain until {what}: {}", self.state()));
            }
            // Seldom enough to take nothing from what is measured.
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for WholePath {
    fn drop(&mut self) {
        self.manager.stop();
    }
}

fn key(set: u64, chain: u64, block: u64) -> SequenceHash {
    let mut hash = [0; 16];
    let spread = (set << 40 | chain << 20 | block).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    hash[..8].copy_from_slice(&spread.to_le_bytes());
    hash[8..].copy_from_slice(&(set << 40 | chain << 20 | block).to_le_bytes());
    SequenceHash(hash)
}
