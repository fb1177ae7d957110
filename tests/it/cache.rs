//! The cache is invisible in the answers: every token equals what a worker without a daemon says.

use std::collections::VecDeque;
use std::sync::Mutex;

use kvbm_tests::{
    Answer, Conversation, DaemonOptions, Node, Random, WorkerClient, WorkerOptions, conversations,
};

/// Blocks of 32 tokens in the pool: a few conversations, far less than all.
const POOL_TOKENS: usize = 1536;

/// All answers of all conversations, `concurrent` at a time. Conversations take turns, so that between two turns of one
/// others have used the pool.
pub fn talk(
    client: &WorkerClient,
    conversations: &[Conversation],
    concurrent: usize,
) -> Vec<Vec<(usize, Answer)>> {
    let queue: Mutex<VecDeque<(usize, usize, Vec<u32>)>> = Mutex::new(
        conversations
            .iter()
            .enumerate()
            .map(|(i, conversation)| (i, 0, conversation.system.clone()))
            .collect(),
    );
    let answers: Vec<Mutex<Vec<(usize, Answer)>>> = conversations.iter().map(|_| Mutex::default()).collect();
    std::thread::scope(|scope| {
        for _ in 0..concurrent {
            scope.spawn(|| {
                loop {
                    let Some((i, turn, mut text)) = queue.lock().unwrap().pop_front() else { return };
                    let conversation = &conversations[i];
                    text.extend(&conversation.turns[turn].user);
                    let answer = client.generate(&text, conversation.turns[turn].max_tokens);
                    assert_eq!(answer.tokens.len(), conversation.turns[turn].max_tokens as usize);
                    let prompt = text.len();
                    text.extend(&answer.tokens);
                    answers[i].lock().unwrap().push((prompt, answer));
                    if turn + 1 < conversation.turns.len() {
                        let mut queue = queue.lock().unwrap();
                        // Soon enough that the cache can help, late enough that the pool has moved on.
                        let at = queue.len().min(16);
                        queue.insert(at, (i, turn + 1, text));
                    }
                }
            });
        }
    });
    answers.into_iter().map(|answers| answers.into_inner().unwrap()).collect()
}

pub fn alone(conversations: &[Conversation]) -> Vec<Vec<(usize, Answer)>> {
    let node = Node::empty();
    let (_worker, client) =
        node.worker("alone", &WorkerOptions { alone: true, pool_blocks: 2048, ..WorkerOptions::default() });
    talk(&client, conversations, 2)
}

pub fn tokens(answers: &[Vec<(usize, Answer)>]) -> Vec<Vec<&[u32]>> {
    answers.iter().map(|turns| turns.iter().map(|(_, answer)| answer.tokens.as_slice()).collect()).collect()
}

pub fn small_pool(tokens_per_block: usize) -> WorkerOptions {
    WorkerOptions {
        tokens_per_block,
        pool_blocks: POOL_TOKENS / tokens_per_block,
        ..WorkerOptions::default()
    }
}

/// What part of the prompts came from where.
fn shares(answers: &[Vec<(usize, Answer)>]) -> (f64, f64) {
    let all = answers.iter().flatten();
    let (mut prompt, mut cached, mut host) = (0, 0, 0);
    for (length, answer) in all {
        prompt += length;
        cached += answer.device as usize + answer.host as usize;
        host += answer.host as usize;
    }
    (cached as f64 / prompt as f64, host as f64 / prompt as f64)
}

#[test]
fn conversations_are_the_same_with_and_without_daemon() {
    let all = conversations(1, 200);
    let expected = alone(&all);
    let mut evictions = 0.0;
    for (i, tokens_per_block) in [16, 32, 64].into_iter().enumerate() {
        let node = Node::start(DaemonOptions::default());
        let (_worker, client) = node.worker("worker", &small_pool(tokens_per_block));
        for (j, part) in all.chunks(50).enumerate() {
            let concurrent = 1 + (i + j) % 4;
            let expected = &expected[j * 50..j * 50 + part.len()];
            let answers = talk(&client, part, concurrent);
            assert_eq!(
                tokens(&answers),
                tokens(expected),
                "{tokens_per_block} per block, {concurrent} at once"
            );
            let (cached, host) = shares(&answers);
            println!(
                "{tokens_per_block} per block, {concurrent} at once: cached {cached:.2}, host {host:.2}"
            );
            assert!(cached >= 0.5, "cached {cached}");
            assert!(host >= 0.2, "from host {host}");
        }
        evictions += node.metric("kvbm_evictions_total", "device");
        // The daemon moved the bytes, and counted what the worker saw.
        assert!(node.metric("kvbm_transfer_bytes_total", "h2d") > 1e6);
        assert!(node.metric("kvbm_onboard_blocks_h2d", "") > 100.0);
        assert!(node.metric("kvbm_offload_blocks_d2h", "") > 100.0);
        node.assert_idle();
    }
    println!("evictions: {evictions}");
    assert!(evictions >= 1000.0, "{evictions} evictions");
}

#[test]
fn queues_of_length_one_change_no_token() {
    let all = conversations(2, 40);
    let arguments = ["--queue-depth", "1", "--batch-blocks", "1"].map(String::from).to_vec();
    let node = Node::start(DaemonOptions { arguments, ..DaemonOptions::default() });
    let (_worker, client) = node.worker("worker", &small_pool(32));
    let answers = talk(&client, &all, 4);
    assert_eq!(tokens(&answers), tokens(&alone(&all)));
    let (cached, host) = shares(&answers);
    println!("cached {cached:.2}, host {host:.2}");
    assert!(cached > 0.3 && host > 0.05);
    node.assert_idle();
}

/// The comparison above is worth something: one wrong byte in host memory changes an answer.
#[test]
fn one_flipped_byte_in_host_memory_is_noticed() {
    let mut random = Random::new(3);
    let prompt = random.tokens(400);
    let mut node = Node::start(DaemonOptions { host_mb: 16.0, ..DaemonOptions::default() });
    let (mut first, client) = node.worker("first", &WorkerOptions { witness: true, ..small_pool(32) });
    let expected = client.generate(&prompt, 24);
    node.assert_offloaded(12);
    first.kill();
    node.flip_host_byte();
    let arguments = vec!["--fresh-device-pool".into()];
    let (_second, client) =
        node.worker("second", &WorkerOptions { arguments, witness: true, ..small_pool(32) });
    let answer = client.generate(&prompt, 24);
    assert_eq!(answer.host, 384, "everything came from host");
    let compared = std::panic::catch_unwind(|| node.assert_kv_right());
    assert!(compared.is_err(), "a byte was flipped, and the drills' witness does not see it: {compared:?}");
    assert_ne!(answer.tokens, expected.tokens, "a byte was flipped, and the answer is the same");
}

#[test]
fn a_second_workers_first_request_is_a_host_hit() {
    let mut random = Random::new(4);
    let prompt = random.tokens(200);
    let node = Node::start(DaemonOptions::default());
    let (_a, first) = node.worker("a", &WorkerOptions::default());
    let cold = first.generate(&prompt, 16);
    assert_eq!((cold.device, cold.host), (0, 0));
    let again = first.generate(&prompt, 16);
    assert_eq!((again.device, again.host, &again.tokens), (192, 0, &cold.tokens));
    node.assert_offloaded(6);
    let (_b, second) = node.worker("b", &WorkerOptions::default());
    let warm = second.generate(&prompt, 16);
    assert_eq!((warm.device, warm.host, &warm.tokens), (0, 192, &cold.tokens));
}

/// Every figure follows from a workload of which each step is known.
#[test]
fn metrics_reconcile_with_a_known_workload() {
    let mut random = Random::new(5);
    let node = Node::start(DaemonOptions { host_mb: 64.0, ..DaemonOptions::default() });
    let prompt = random.tokens(320);
    let (_a, first) = node.worker("a", &WorkerOptions::default());
    first.generate(&prompt, 1);
    node.assert_offloaded(10);
    let (_b, second) = node.worker("b", &WorkerOptions::default());
    // 319 tokens may come from the cache: 9 whole blocks.
    assert_eq!(second.generate(&prompt, 1).host, 288);
    node.assert_idle();
    let block = 98_304.0;
    assert_eq!(node.metric("kvbm_onboard_blocks_h2d", ""), 9.0);
    assert_eq!(node.metric("kvbm_transfer_bytes_total", "h2d"), 9.0 * block);
    // The second worker's tenth block was in host already.
    assert_eq!(node.metric("kvbm_offload_blocks_d2h", ""), 10.0);
    assert_eq!(node.metric("kvbm_transfer_bytes_total", "d2h"), 10.0 * block);
    assert_eq!(node.metric("kvbm_matched_tokens", ""), 288.0);
    assert_eq!(node.metric("kvbm_transfer_seconds_count", "h2d"), 1.0);
    assert!((1.0..=10.0).contains(&node.metric("kvbm_transfer_seconds_count", "d2h")));
    assert_eq!(node.metric("kvbm_tier_resident_blocks", "host"), 10.0);
    assert_eq!(node.metric("kvbm_tier_resident_blocks", "device"), 20.0);
    // Two requests looked for 9 blocks each; the second found them.
    assert_eq!(node.metric("kvbm_host_cache_hit_rate", ""), 0.5);
    assert_eq!(node.metric("kvbm_sessions", ""), 2.0);
    assert_eq!(node.metric("kvbm_leases", "") + node.metric("kvbm_quarantined_blocks", ""), 0.0);
    let host = node.metric("kvbm_tier_capacity_bytes", "host");
    assert!((63e6..=64e6).contains(&host), "{host}");
    let status = node.status();
    assert_eq!(status.namespaces[0].resident_bytes["host"], 10 * 98_304);
    assert_eq!(status.workers.len(), 2);
}
