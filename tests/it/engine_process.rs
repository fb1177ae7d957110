//! Engines that own their KV memory, as TensorRT-LLM and vLLM do, over a real daemon: what one computed the other loads, byte
//! for byte, whatever becomes of the daemon in between.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use kvbm_connector::engine::{
    EngineProcess, EngineSettings, Export, Exported, ExportedMemory, ExportedRegion, Found, LayerGroup,
    LoadMode, MemoryFacts, MemoryMover, Pass, PoolChoice, PoolShape, Prompt, Region, Report, SharedFacts,
};
use kvbm_shm::{LentMemory, SharedMemory};
use kvbm_tests::{DaemonOptions, Node, Process, Random, eventually};
use rustix::process::Signal;

const TOKENS: usize = 16;
const PAGES: usize = 64;
const BYTES: usize = 8192;

/// One process of an engine, and its KV memory.
struct Rank {
    process: EngineProcess,
    pool: SharedMemory,
    rank: usize,
}

/// How an engine is set up.
#[derive(Clone, Copy)]
struct How {
    mode: LoadMode,
    choice: PoolChoice,
    /// The name of an engine whose scheduler half is a process of its own.
    apart: Option<[u8; 16]>,
}

/// All ranks of one engine, driven as its executor would.
struct Engine {
    ranks: Vec<Rank>,
    /// The scheduler half, where rank 0 does not have it.
    apart: Option<EngineProcess>,
    next_id: u64,
    next_page: i32,
}

/// What a block's page holds: of its tokens and all before them, and of the rank.
fn content(tokens: &[u32], block: usize, rank: usize) -> Vec<u8> {
    let prefix = &tokens[..(block + 1) * TOKENS];
    let seed = prefix.iter().fold(rank as u64 + 1, |seed, token| {
        (seed.rotate_left(7) ^ u64::from(*token)).wrapping_mul(0x9E37_79B9_7F4A_7C15)
    });
    (0..BYTES).map(|at| (seed.wrapping_mul(at as u64 + 1) >> 32) as u8).collect()
}

fn settings(node: &Node, rank: usize, count: usize, how: How) -> EngineSettings {
    EngineSettings {
        pool: how.choice,
        model: "m".into(),
        tokens_per_block: TOKENS as u32,
        rank: rank as u32,
        rank_count: count as u32,
        shard: rank as u32,
        shard_count: count as u32,
        load_mode: how.mode,
        apart: how.apart,
        ..EngineSettings::new(node.socket())
    }
}

impl How {
    /// An engine of each kind.
    fn together_and_apart(mode: LoadMode, choice: PoolChoice) -> [Self; 2] {
        [false, true].map(|apart| Self { mode, choice, apart: None }.named(apart))
    }

    /// Of another engine than any before.
    fn named(self, apart: bool) -> Self {
        static ENGINES: AtomicU8 = AtomicU8::new(1);
        Self { apart: apart.then(|| [ENGINES.fetch_add(1, Ordering::Relaxed); 16]), ..self }
    }
}

impl Rank {
    fn start(node: &Node, rank: usize, count: usize, how: How) -> Self {
        let settings = settings(node, rank, count, how);
        let pool = SharedMemory::create("pool", PAGES * BYTES).unwrap();
        let lent = SharedMemory::from_fd(pool.fd().try_clone_to_owned().unwrap()).unwrap();
        let region =
            Region { base: lent.address().addr().get(), bytes: BYTES, stride: BYTES, pages: PAGES as u32 };
        let shape = PoolShape::new(vec![LayerGroup { regions: vec![region] }]).unwrap();
        let mover = Arc::new(MemoryMover::new(shape.clone(), vec![LentMemory::of_shared(lent)]));
        let process = EngineProcess::new(settings);
        let memory = MemoryFacts { layout: "test".into(), device: "cpu:0".into(), ..MemoryFacts::default() };
        let exported = ExportedMemory::Shared(pool.fd().try_clone_to_owned().unwrap());
        let exported = Exported {
            exports: vec![Export { memory: exported, bytes: pool.bytes() as u64 }],
            regions: vec![ExportedRegion { export: 0, offset: 0 }],
        };
        process.register(shape, mover, Ok(exported), &memory).unwrap();
        Self { process, pool, rank }
    }

    fn write(&self, page: i32, bytes: &[u8]) {
        self.pool.write(page as usize * BYTES, bytes);
    }

    fn check(&self, page: i32, tokens: &[u32], block: usize) {
        let mut bytes = vec![0; BYTES];
        self.pool.read(page as usize * BYTES, &mut bytes);
        assert!(
            bytes == content(tokens, block, self.rank),
            "rank {}, block {block} in page {page}",
            self.rank
        );
    }

    fn figure(&self, name: &str) -> u64 {
        self.process.figures().0.into_iter().find(|(figure, _)| *figure == name).unwrap().1
    }
}

impl Engine {
    /// Its blocks are copied out by the daemon.
    fn start(node: &Node, ranks: usize, mode: LoadMode) -> Self {
        Self::start_with(node, ranks, How { mode, choice: PoolChoice::Auto, apart: None })
    }

    fn start_with(node: &Node, ranks: usize, how: How) -> Self {
        let apart = how.apart.map(|_| {
            let process = EngineProcess::new(settings(node, 0, ranks, how));
            let facts = SharedFacts { layout: "test".into(), replicated: false, block_bytes: BYTES };
            process.join(&facts).unwrap();
            process
        });
        let ranks = (0..ranks).map(|rank| Rank::start(node, rank, ranks, how)).collect();
        let mut engine = Self { ranks, apart, next_id: 1, next_page: 0 };
        // The other ranks attach when they hear which engine they are of.
        engine.step(vec![], vec![]);
        engine
    }

    fn wait_attached(self) -> Self {
        eventually("all ranks are attached", || {
            let ranks = self.ranks.iter().map(|rank| &rank.process);
            ranks.chain(&self.apart).all(EngineProcess::is_attached).then_some(())
        });
        self
    }

    fn scheduler(&self) -> &EngineProcess {
        self.apart.as_ref().unwrap_or(&self.ranks[0].process)
    }

    fn step(&mut self, new: Vec<Report>, cached: Vec<Report>) {
        let metadata = self.scheduler().build(new, cached);
        for rank in &self.ranks {
            rank.process.bind(&metadata).unwrap();
            rank.process.start_loads(0, Pass::Whole).unwrap();
        }
    }

    fn query(&mut self, tokens: &[u32]) -> (u64, usize, bool) {
        let id = self.next_id;
        self.next_id += 1;
        let prompt = Prompt { id, tokens: tokens.to_vec(), cacheable: true, ..Prompt::default() };
        let Some(apart) = &self.apart else {
            let (found, parked) = self.scheduler().query(prompt, 0, &mut || false);
            return (id, found, parked);
        };
        match apart.look_up(prompt, 0, 0) {
            Found::Tokens(found, parked) => (id, found, parked),
            Found::Later => panic!("there is no disk to wait for"),
        }
    }

    /// Pages for so many tokens, each time others, and poisoned.
    fn allocate(&mut self, tokens: usize) -> Vec<i32> {
        let pages: Vec<i32> = (0..tokens.div_ceil(TOKENS))
            .map(|index| (self.next_page + index as i32) % PAGES as i32)
            .collect();
        self.next_page = (self.next_page + pages.len() as i32) % PAGES as i32;
        for rank in &self.ranks {
            pages.iter().for_each(|page| rank.write(*page, &vec![0xEE; BYTES]));
        }
        pages
    }

    /// From the allocation to the end of the request.
    fn compute(&mut self, tokens: &[u32], (id, found, parked): (u64, usize, bool)) {
        let pages = self.allocate(tokens.len());
        self.scheduler().allocated(id, std::slice::from_ref(&pages)).unwrap();
        if parked {
            self.step(vec![], vec![]);
            self.wait_loaded(id);
        }
        let computed = if parked { found } else { 0 };
        let scheduled = Some(tokens.len() - found);
        let report = Report {
            id,
            known: 0,
            opaque: false,
            tokens: tokens.to_vec(),
            pages: vec![pages.clone()],
            computed,
            scheduled,
            priorities: None,
        };
        self.step(vec![report], vec![]);
        for rank in &self.ranks {
            for (block, page) in pages.iter().enumerate().take(tokens.len() / TOKENS) {
                if block < found / TOKENS {
                    rank.check(*page, tokens, block);
                } else {
                    rank.write(*page, &content(tokens, block, rank.rank));
                }
            }
            rank.process.pass_done(0).unwrap();
        }
        // Engines whose halves are apart reuse blocks at once.
        if self.scheduler().request_finished(id) && self.apart.is_none() {
            for rank in &self.ranks {
                wait_for(id, |asked| rank.process.get_finished(asked, &[]).unwrap().0);
            }
        }
    }

    fn wait_loaded(&self, id: u64) {
        for rank in &self.ranks {
            wait_for(id, |asked| rank.process.get_finished(&[], asked).unwrap().1);
        }
    }

    /// A whole request; returns how many tokens were found.
    fn serve(&mut self, tokens: &[u32]) -> usize {
        let asked = self.query(tokens);
        self.compute(tokens, asked);
        asked.1
    }

    /// Serves until all but the last block's tokens are found: saves arrive when they arrive.
    fn serve_until_found(&mut self, tokens: &[u32]) {
        let all = (tokens.len() - 1) / TOKENS * TOKENS;
        eventually("what was computed is found", || (self.serve(tokens) == all).then_some(()));
    }

    fn broken_promises(&self) -> u64 {
        self.ranks.iter().map(|rank| rank.figure("broken_promises")).sum()
    }
}

fn wait_for(id: u64, mut ask: impl FnMut(&[u64]) -> Vec<u64>) {
    let mut told = ask(&[id]);
    eventually("copies end", || {
        told.extend(ask(&[]));
        told.contains(&id).then_some(())
    });
    assert_eq!(told, [id]);
}

fn small_node() -> Node {
    Node::start(DaemonOptions { host_mb: 32.0, ..DaemonOptions::default() })
}

fn prompt(seed: u64) -> Vec<u32> {
    Random::new(seed).tokens(10 * TOKENS + 3)
}

#[test]
fn what_one_engine_computed_another_loads() {
    let ways = [(LoadMode::Parked, PoolChoice::Auto), (LoadMode::InPass, PoolChoice::Staged)];
    for how in ways.into_iter().flat_map(|(mode, choice)| How::together_and_apart(mode, choice)) {
        for ranks in [1, 2] {
            let node = small_node();
            let mut first = Engine::start_with(&node, ranks, how).wait_attached();
            let is_ipc = u64::from(how.choice == PoolChoice::Auto);
            assert!(first.ranks.iter().all(|rank| rank.figure("ipc") == is_ipc));
            assert_eq!(first.serve(&prompt(1)), 0);
            first.serve_until_found(&prompt(1));
            drop(first);
            let again = how.named(how.apart.is_some());
            let mut second = Engine::start_with(&node, ranks, again).wait_attached();
            second.serve_until_found(&prompt(1));
            assert_eq!(second.serve(&prompt(2)), 0);
            assert!(second.ranks.iter().all(|rank| rank.figure("loaded_blocks") >= 10));
            assert_eq!(second.broken_promises(), 0);
            drop(second);
            node.assert_idle();
        }
    }
}

#[test]
fn what_was_promised_is_loaded_though_the_daemon_died() {
    for how in How::together_and_apart(LoadMode::Parked, PoolChoice::Auto) {
        let mut node = small_node();
        let mut engine = Engine::start_with(&node, 2, how).wait_attached();
        engine.serve(&prompt(1));
        engine.serve_until_found(&prompt(1));
        let asked = engine.query(&prompt(1));
        assert_eq!(asked.1, 10 * TOKENS);
        node.kill_daemon();
        engine.compute(&prompt(1), asked);
        assert_eq!((engine.broken_promises(), engine.serve(&prompt(1))), (0, 0));
        // The next daemon is found, and filled again.
        node.start_daemon();
        let mut engine = engine.wait_attached();
        engine.serve_until_found(&prompt(1));
        assert_eq!(engine.broken_promises(), 0);
    }
}

#[test]
fn a_daemon_that_hangs_holds_up_one_lookup_and_caching_resumes() {
    let mut node = small_node();
    let mut engine = Engine::start(&node, 1, LoadMode::Parked).wait_attached();
    assert_eq!(engine.serve(&prompt(1)), 0);
    engine.serve_until_found(&prompt(1));
    node.daemon().signal(Signal::STOP);
    let took = |engine: &mut Engine| {
        let start = Instant::now();
        let asked = engine.query(&prompt(1));
        (asked.1, start.elapsed())
    };
    let (found, first) = took(&mut engine);
    assert_eq!(found, 0);
    // The deadline, and what a busy machine adds.
    assert!(first < Duration::from_millis(500), "{first:?}");
    let rest: Duration = (0..50).map(|_| took(&mut engine).1).sum();
    assert!(rest < Duration::from_millis(500), "50 lookups took {rest:?}");
    assert!(engine.ranks[0].figure("lookup_timeouts") <= 1, "one lookup waited");
    // What is to be saved is let go of when the session is.
    assert_eq!(engine.serve(&prompt(2)), 0);
    node.daemon().signal(Signal::CONT);
    // What the late answer held is given back, and the next lookup goes the same way as the first.
    let on_stream = engine.ranks[0].figure("lookups_on_stream");
    node.assert_idle();
    engine.serve_until_found(&prompt(1));
    // Host memory that the session before had mapped was not mapped once more.
    assert!(engine.ranks[0].figure("segments_kept") >= 1);
    assert_eq!(engine.ranks[0].figure("lookups_on_stream"), on_stream);
    assert_eq!(engine.broken_promises(), 0);
}

#[test]
fn memory_that_outlived_the_daemon_is_still_mapped_in_the_engine() {
    let mut node = Node::empty();
    let held = node.dir.path().join("hold.sock");
    let arguments = ["hold", "--socket", held.to_str().unwrap()].map(String::from);
    let mut holder = Process::start(node.dir.path(), "holder", &arguments, &[]);
    holder.wait_ready();
    let options = DaemonOptions { host_mb: 32.0, ..DaemonOptions::default() };
    node.configure(options.and(&["--holder", held.to_str().unwrap()]));
    node.start_daemon();
    let mut engine = Engine::start(&node, 1, LoadMode::Parked).wait_attached();
    engine.serve(&prompt(1));
    engine.serve_until_found(&prompt(1));
    assert_eq!(engine.ranks[0].figure("segments_kept"), 0);
    node.kill_daemon();
    eventually("the engine has seen it", || (!engine.ranks[0].process.is_attached()).then_some(()));
    node.start_daemon();
    let mut engine = engine.wait_attached();
    // Nothing is computed meanwhile: what is found was there before.
    let found = eventually("what was computed is found", || {
        let asked = engine.query(&prompt(1));
        if asked.1 > 0 {
            return Some(asked);
        }
        engine.scheduler().request_finished(asked.0);
        None
    });
    assert_eq!(found.1, 10 * TOKENS);
    engine.compute(&prompt(1), found);
    assert!(engine.ranks[0].figure("segments_kept") >= 1, "it was mapped once more");
    assert_eq!(engine.broken_promises(), 0);
}

#[test]
fn the_engines_thread_asks_by_itself_and_more_than_fits_a_packet_on_the_stream() {
    for how in How::together_and_apart(LoadMode::Parked, PoolChoice::Auto) {
        let node = small_node();
        let mut engine = Engine::start_with(&node, 1, how).wait_attached();
        let on_stream = |engine: &Engine| {
            let figures = engine.scheduler().figures().0;
            figures.iter().find(|(name, _)| *name == "lookups_on_stream").unwrap().1
        };
        engine.serve(&prompt(1));
        let before = on_stream(&engine);
        engine.scheduler().expect_query();
        engine.serve_until_found(&prompt(1));
        assert_eq!(on_stream(&engine), before);
        let long = Random::new(9).tokens(5_000 * TOKENS);
        let (id, found, _) = engine.query(&long);
        engine.scheduler().request_finished(id);
        assert_eq!((found, on_stream(&engine)), (0, before + 1));
        assert_eq!(engine.broken_promises(), 0);
        drop(engine);
        node.assert_idle();
    }
}

#[test]
fn a_rank_that_is_missing_is_promised_nothing() {
    let node = small_node();
    let mut engine = Engine::start(&node, 2, LoadMode::Parked).wait_attached();
    engine.serve(&prompt(1));
    engine.serve_until_found(&prompt(1));
    engine.ranks[1].process.close();
    eventually("nothing is found while a rank is away", || (engine.query(&prompt(1)).1 == 0).then_some(()));
}

#[test]
fn blocks_on_disk_are_a_miss_and_in_host_memory_the_next_time() {
    let mut node = Node::start(DaemonOptions::with_disk(32.0, 32.0));
    let mut engine = Engine::start(&node, 1, LoadMode::Parked).wait_attached();
    engine.serve(&prompt(1));
    eventually("all blocks are on disk", || {
        (node.metric("kvbm_offload_blocks_h2d", "") >= 10.0).then_some(())
    });
    // A daemon whose host memory has nothing; the engine's own does not count, for it is not asked.
    node.kill_daemon();
    node.start_daemon();
    let mut engine = engine.wait_attached();
    let mut asked = || {
        let (id, found, _) = engine.query(&prompt(1));
        // It is not taken up.
        engine.scheduler().request_finished(id);
        found
    };
    let first = asked();
    eventually("what is on disk has come to host memory", || (asked() == 10 * TOKENS).then_some(()));
    assert_eq!(first, 0, "the engine was not made to wait for a drive");
    assert!(node.metric("kvbm_onboard_blocks_d2d", "") >= 10.0);
    assert_eq!(engine.serve(&prompt(1)), 10 * TOKENS);
    assert_eq!(engine.broken_promises(), 0);
}
