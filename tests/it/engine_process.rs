//! Engines that own their KV memory, as TensorRT-LLM does, over a real daemon: what one computed the other loads, byte
//! for byte, whatever becomes of the daemon in between.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvbm_connector::engine::{
    EngineProcess, EngineSettings, LayerGroup, LoadMode, MemoryFacts, MemoryMover, PoolShape, Prompt, Region,
    Report,
};
use kvbm_shm::{LentMemory, SharedMemory};
use kvbm_tests::{DaemonOptions, Node, Random, eventually};
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

/// All ranks of one engine, driven as its executor would.
struct Engine {
    ranks: Vec<Rank>,
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

impl Rank {
    fn start(node: &Node, rank: usize, count: usize, mode: LoadMode) -> Self {
        let settings = EngineSettings {
            model: "m".into(),
            tokens_per_block: TOKENS as u32,
            rank: rank as u32,
            rank_count: count as u32,
            shard: rank as u32,
            shard_count: count as u32,
            load_mode: mode,
            ..EngineSettings::new(node.socket())
        };
        let pool = SharedMemory::create("pool", PAGES * BYTES).unwrap();
        let lent = SharedMemory::from_fd(pool.fd().try_clone_to_owned().unwrap()).unwrap();
        let region =
            Region { base: lent.address().addr().get(), bytes: BYTES, stride: BYTES, pages: PAGES as u32 };
        let shape = PoolShape::new(vec![LayerGroup { regions: vec![region] }]).unwrap();
        let mover = Arc::new(MemoryMover::new(shape.clone(), vec![LentMemory::of_shared(lent)]));
        let process = EngineProcess::new(settings);
        let memory = MemoryFacts { layout: "test".into(), device: "cpu:0".into(), ..MemoryFacts::default() };
        process.register(shape, mover, &memory).unwrap();
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
    fn start(node: &Node, ranks: usize, mode: LoadMode) -> Self {
        let ranks = (0..ranks).map(|rank| Rank::start(node, rank, ranks, mode)).collect();
        let mut engine = Self { ranks, next_id: 1, next_page: 0 };
        // The other ranks attach when they hear which engine they are of.
        engine.step(vec![], vec![]);
        engine
    }

    fn wait_attached(self) -> Self {
        eventually("all ranks are attached", || {
            self.ranks.iter().all(|rank| rank.process.is_attached()).then_some(())
        });
        self
    }

    fn scheduler(&self) -> &EngineProcess {
        &self.ranks[0].process
    }

    fn step(&mut self, new: Vec<Report>, cached: Vec<Report>) {
        let metadata = self.scheduler().build(new, cached);
        for rank in &self.ranks {
            rank.process.bind(&metadata).unwrap();
            rank.process.start_loads(0).unwrap();
        }
    }

    fn query(&mut self, tokens: &[u32]) -> (u64, usize, bool) {
        let id = self.next_id;
        self.next_id += 1;
        let prompt = Prompt { id, tokens: tokens.to_vec(), cacheable: true, ..Prompt::default() };
        let (found, parked) = self.scheduler().query(prompt, 0);
        (id, found, parked)
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
        if self.scheduler().request_finished(id) {
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
    for mode in [LoadMode::Parked, LoadMode::InPass] {
        for ranks in [1, 2] {
            let node = small_node();
            let mut first = Engine::start(&node, ranks, mode).wait_attached();
            assert_eq!(first.serve(&prompt(1)), 0);
            first.serve_until_found(&prompt(1));
            drop(first);
            let mut second = Engine::start(&node, ranks, mode).wait_attached();
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
    let mut node = small_node();
    let mut engine = Engine::start(&node, 2, LoadMode::Parked).wait_attached();
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

#[test]
fn a_daemon_that_hangs_holds_up_one_lookup_and_caching_resumes() {
    let mut node = small_node();
    let mut engine = Engine::start(&node, 1, LoadMode::Parked).wait_attached();
    engine.serve(&prompt(1));
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
    node.daemon().signal(Signal::CONT);
    engine.serve_until_found(&prompt(1));
    assert_eq!(engine.broken_promises(), 0);
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
