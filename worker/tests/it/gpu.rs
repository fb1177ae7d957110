//! The engine on a GPU behind the scheduler, against the CPU engine alone. Without a GPU there is nothing to compare, and
//! the test says so.

use std::collections::BTreeMap;

use kvbm_worker::{
    BatchLimits, Chunk, CudaEngine, CudaLlama, DevicePool, EngineOptions, Event, KvMemory, Logits, Request,
    RequestId, Want,
};

use crate::scheduling::{EASY, request, scheduler, turn};
use crate::support::{Random, argmax, blocks, engine, model, run};
use crate::test_cache::{Behaviour, TestCache};

/// Where the CPU's two largest logits are closer than this, another choice is as good.
const TIE: f32 = 0.05;

const LIMITS: BatchLimits = BatchLimits { tokens: 512, sequences: 64, answers: 128, tokens_per_block: 16 };

/// `None`: there is no GPU, which is said.
fn gpu() -> Option<CudaEngine> {
    let options = EngineOptions { revision: Some("not wanted".into()), ..EngineOptions::default() };
    CudaEngine::load(&"cuda:0".parse().unwrap(), &model(), &options, LIMITS)
        .inspect_err(|error| eprintln!("skipped: {error}"))
        .ok()
}

#[test]
fn answers_come_in_the_order_of_the_batch_whatever_is_wanted() {
    let Some(mut gpu) = gpu() else { return };
    let pool = DevicePool::private(&gpu, 40).unwrap();
    let table = blocks(40);
    let texts: Vec<Vec<u32>> = (0..40).map(|i| vec![i * 7 + 3; 1 + i as usize % 3]).collect();
    let batch = |want: fn(usize) -> Want| -> Vec<Chunk<'_>> {
        let chunk = |(i, tokens)| Chunk { tokens, first_position: 0, blocks: &table[i..=i], want: want(i) };
        texts.iter().map(Vec::as_slice).enumerate().map(chunk).collect()
    };
    let (mut all, mut mixed) = (Logits::default(), Logits::default());
    gpu.forward(&pool, &batch(|_| Want::Logits(1)), &mut all).unwrap();
    let want = |i| [Want::Logits(1), Want::Largest, Want::Nothing, Want::Logits(1)][i % 4];
    gpu.forward(&pool, &batch(want), &mut mixed).unwrap();
    assert_eq!((all.answers(), mixed.answers()), (40, 30));
    for (answer, i) in (0..40).filter(|i| want(*i) != Want::Nothing).enumerate() {
        // A product of fewer rows may differ in its last bits, so of equally good tokens either will do.
        let (chosen, best) = (mixed.largest(answer), argmax(all.row(i)));
        assert!(all.row(i)[best as usize] - all.row(i)[chosen as usize] < TIE, "chunk {i}");
        if want(i) == Want::Logits(1) {
            let worst = mixed.row(answer).iter().zip(all.row(i)).map(|(a, b)| (a - b).abs());
            assert!(worst.fold(0.0, f32::max) < 0.05, "chunk {i}");
        }
    }
}

#[test]
fn texts_in_company_on_a_gpu_are_those_of_the_processor() {
    let behaviour = Behaviour { blocks: 34, delay: 1, pending_in: 5, ..EASY };
    let Some(gpu) = gpu() else { return };
    let mut random = Random(11);
    let texts: Vec<Vec<u32>> =
        (0..3).map(|_| (0..300).map(|_| 3 + random.below(90) as u32).collect()).collect();
    let requests: Vec<Request> = (0..40)
        .map(|id| {
            let text = &texts[random.below(texts.len())];
            request(id, text[..1 + random.below(text.len())].to_vec(), 24)
        })
        .collect();
    let pool = DevicePool::private(&gpu, behaviour.blocks).unwrap();
    let mut gpu = CudaLlama { engine: gpu, pool };
    let (mut cache, _) = TestCache::new(behaviour, 5);
    // Small steps, so that prompts are divided and computed beside decodes.
    let mut scheduler = scheduler(behaviour, |options| options.max_batch_tokens = 100);
    requests.iter().for_each(|request| scheduler.submit(request.clone()));
    let mut texts: BTreeMap<RequestId, Vec<u32>> = BTreeMap::new();
    while !scheduler.is_idle() {
        turn(&mut scheduler, &mut cache, &mut gpu);
        for (id, event) in scheduler.take_events() {
            if let Event::Tokens(tokens) = event {
                texts.entry(id).or_default().extend(tokens);
            }
        }
    }
    let counters = scheduler.counters();
    assert!(
        counters.max_decode_batch > 1 && counters.device_tokens > 0 && counters.preemptions > 0,
        "{counters:?}"
    );
    let mut cpu = engine(0, None);
    let excused =
        requests.iter().filter(|request| parts_at_a_tie(&mut cpu, request, &texts[&request.id])).count();
    println!("{} texts, {excused} excused", requests.len());
    assert!(excused <= 1, "at most one of {} texts may part from the processor's at a tie", requests.len());
}

/// Whether a text differs from the processor's, where two tokens were as good. Panics if it differs elsewhere.
fn parts_at_a_tie(cpu: &mut kvbm_worker::Engine, request: &Request, text: &[u32]) -> bool {
    assert_eq!(text.len(), 24);
    let kv = KvMemory::private(cpu.kv_layout(32), 20);
    let mut logits = run(cpu, &kv, &request.prompt, 0);
    for (i, token) in text.iter().enumerate() {
        let best = argmax(&logits);
        if best != *token {
            let gap = logits[best as usize] - logits[*token as usize];
            assert!(gap < TIE, "{:?}: token {i} is {token}, not {best}, {gap} below it", request.id);
            return true;
        }
        logits = run(cpu, &kv, &[*token], request.prompt.len() + i);
    }
    false
}
