//! How fast does the engine prefill and decode on this machine?
//!
//! `cargo run --profile ci -p kvbm-worker --example engine_speed -- models/tiny [threads] [portable|avx2|avx512]`
//!
//! Prints tokens per second: the median of several passes after one that is not counted.

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use kvbm_worker::{BlockId, Chunk, Engine, EngineOptions, Isa, KvMemory, Logits, Want};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().unwrap_or_else(|| "models/tiny".into());
    let threads = args.next().map_or(Ok(0), |threads| threads.parse())?;
    let isa = match args.next().as_deref() {
        None => None,
        Some("portable") => Some(Isa::Portable),
        Some("avx2") => Some(Isa::Avx2),
        Some("avx512") => Some(Isa::Avx512),
        Some(other) => return Err(format!("unknown instruction set {other}").into()),
    };
    let options = EngineOptions { threads, isa, ..EngineOptions::default() };
    let begin = Instant::now();
    let mut engine = Engine::load(Path::new(&folder), &options)?;
    println!("load {:.3} s, {} threads, {:?}", begin.elapsed().as_secs_f64(), engine.threads(), engine.isa());
    let layout = engine.kv_layout(32);
    let context = engine.config().context_length;
    let blocks_each = layout.blocks_for(context.min(4096));
    let kv = KvMemory::private(layout, blocks_each * 16);
    let blocks: Vec<BlockId> = (0..kv.block_count() as u32).map(BlockId).collect();
    let vocab_size = engine.config().vocab_size as u32;
    let tokens: Vec<u32> = (0..4096u32).map(|i| (i * 7919 + 17) % vocab_size).collect();
    let mut logits = Logits::default();
    for (name, first, count) in [("prefill.512", 0, 512), ("prefill.512 behind 3,000", 3000, 512)] {
        let rate = median(11, || {
            let chunk = Chunk {
                tokens: &tokens[..count],
                first_position: first,
                blocks: &blocks[..blocks_each],
                want: Want::Logits(1),
            };
            engine.forward(&kv, &[chunk], &mut logits);
            count
        });
        println!("{name}: {rate:.0} tok/s");
    }
    for (sequences, position) in [(1, 100), (1, 1000), (1, 3900), (4, 100), (16, 100), (16, 1000)] {
        let rate = median(101, || {
            let batch: Vec<Chunk<'_>> = (0..sequences)
                .map(|i| Chunk {
                    tokens: &tokens[i..=i],
                    first_position: position,
                    blocks: &blocks[i * blocks_each..][..blocks_each],
                    want: Want::Logits(1),
                })
                .collect();
            engine.forward(&kv, &batch, &mut logits);
            sequences
        });
        println!("decode, batch {sequences}, position {position}: {rate:.0} tok/s");
    }
    Ok(())
}

fn median(passes: usize, mut pass: impl FnMut() -> usize) -> f64 {
    pass();
    let mut rates: Vec<f64> = (0..passes)
        .map(|_| {
            let begin = Instant::now();
            let tokens = pass();
            tokens as f64 / begin.elapsed().as_secs_f64()
        })
        .collect();
    rates.sort_by(f64::total_cmp);
    rates[passes / 2]
}
