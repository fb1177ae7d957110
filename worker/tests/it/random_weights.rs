//! Models of random weights, and the engine on a GPU where there is none.

use kvbm_worker::model::Shape;
use kvbm_worker::{
    BatchLimits, Chunk, CudaEngine, DevicePool, Engine, EngineOptions, KvMemory, Logits, Sampling, Want,
};

use crate::support::{blocks, model, run};

fn options() -> EngineOptions {
    EngineOptions { random_weights: Some(Shape::Small), threads: 2, ..EngineOptions::default() }
}

#[test]
fn random_weights_compute_and_answer_with_tokens_of_the_folder_only() {
    let mut engine = Engine::load(&model(), &options()).unwrap();
    assert_eq!((engine.config().vocab_size, engine.config().token_count), (8192, 4096));
    assert_eq!(engine.revision(), "random-v1/small-128");
    let kv = KvMemory::private(engine.kv_layout(32), 4);
    let tokens: Vec<u32> = (0..70).map(|i| i * 53 % 4096).collect();
    let logits = run(&mut engine, &kv, &tokens, 0);
    assert_eq!(logits.len(), 4096);
    // Random weights keep the spread of what they are multiplied with.
    let square = logits.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 4096.0;
    assert!((0.5..2.0).contains(&square), "{square}");
    let mut again = Engine::load(&model(), &options()).unwrap();
    let kv = KvMemory::private(again.kv_layout(16), 5);
    assert!(run(&mut again, &kv, &tokens, 0) == logits, "the same weights each time");
}

#[test]
fn who_wants_the_largest_gets_what_greedy_sampling_takes() {
    let mut engine = Engine::load(&model(), &options()).unwrap();
    let kv = KvMemory::private(engine.kv_layout(32), 4);
    let table = blocks(4);
    let mut logits = Logits::default();
    let mut chunk = Chunk { tokens: &[5, 6, 7], first_position: 0, blocks: &table, want: Want::Largest };
    engine.forward(&kv, &[chunk], &mut logits);
    let token = logits.largest(0);
    chunk.want = Want::Logits(1);
    engine.forward(&kv, &[chunk], &mut logits);
    assert_eq!(Sampling::greedy().choose(logits.row(0), 3), token);
}

#[test]
fn a_gpu_computes_or_the_error_says_what_is_missing() {
    let limits = BatchLimits { tokens: 64, sequences: 2, answers: 2, tokens_per_block: 16 };
    match CudaEngine::load(&"cuda:0".parse().unwrap(), &model(), &options(), limits) {
        Err(error) => {
            let error = error.to_string();
            assert!(
                error.starts_with("find the NVIDIA driver") || error.starts_with("find a usable GPU"),
                "{error}"
            );
        }
        Ok(mut gpu) => {
            let pool = DevicePool::private(&gpu, 4).unwrap();
            let table = blocks(4);
            let chunk =
                Chunk { tokens: &[5, 6, 7], first_position: 0, blocks: &table, want: Want::Logits(1) };
            let mut logits = Logits::default();
            gpu.forward(&pool, &[chunk], &mut logits).unwrap();
            let mut cpu = Engine::load(&model(), &options()).unwrap();
            let kv = KvMemory::private(cpu.kv_layout(16), 4);
            let wanted = run(&mut cpu, &kv, &[5, 6, 7], 0);
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let got = logits.row(0);
            let cosine = dot(got, &wanted) / (dot(got, got) * dot(&wanted, &wanted)).sqrt();
            assert!(cosine > 0.9999, "{cosine}");
        }
    }
}
