//! What several tests need.

use std::path::PathBuf;

use kvbm_worker::{BlockId, Chunk, Engine, EngineOptions, Isa, KvMemory, Logits, Want};

/// The bundled model.
pub fn model() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/tiny")
}

/// The bundled model on so many threads.
pub fn engine(threads: usize, isa: Option<Isa>) -> Engine {
    let options =
        EngineOptions { threads, isa, revision: Some("not wanted".into()), ..EngineOptions::default() };
    Engine::load(&model(), &options).unwrap()
}

/// Blocks 0, 1, 2 and so on.
pub fn blocks(count: usize) -> Vec<BlockId> {
    (0..count as u32).map(BlockId).collect()
}

/// The token with the largest logit.
pub fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32
}

/// One sequence, alone, with the blocks 0, 1, ..: computes `tokens` in one chunk and returns the last one's logits.
pub fn run(engine: &mut Engine, kv: &KvMemory, tokens: &[u32], first_position: usize) -> Vec<f32> {
    let table = blocks(kv.block_count());
    let mut logits = Logits::default();
    engine.forward(
        kv,
        &[Chunk { tokens, first_position, blocks: &table, want: Want::Logits(1) }],
        &mut logits,
    );
    logits.row(0).to_vec()
}

/// A small generator, so that a failure can be repeated from its seed.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}
