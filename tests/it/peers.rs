//! Two workers without host memory between them: what one computed the other copies out of its pool. On GPUs only: on that of
//! `KVBM_TEST_DEVICE`, or on that and the one of `KVBM_TEST_SECOND_DEVICE`; elsewhere skipped.

use kvbm_tests::{DaemonOptions, Node, Random, Reference, WorkerOptions, on_gpu};

const PROMPTS: u64 = 12;
const TOKENS: u32 = 16;

fn prompts() -> Vec<Vec<u32>> {
    (0..PROMPTS).map(|i| Random::new(500 + i).tokens(290)).collect()
}

fn reference() -> (Reference, impl Sized) {
    let node = Node::empty();
    let alone = WorkerOptions { alone: true, ..WorkerOptions::default() };
    let (worker, client) = node.worker("alone", &alone);
    (Reference::ask(client, prompts(), TOKENS, !on_gpu()), (worker, node))
}

#[test]
fn peer_copies_bring_what_the_other_worker_computed() {
    if !on_gpu() {
        return println!("skipped: no GPU");
    }
    let (expected, _alone) = reference();
    let node = Node::start(DaemonOptions { host_mb: 0.0, arguments: vec![] });
    let options = WorkerOptions { pool_blocks: 256, ..WorkerOptions::default() };
    let (_a, first) = node.worker("a", &options);
    let (_b, second) = node.worker("b", &WorkerOptions { second_device: true, ..options });
    let workers = [first, second];
    for (i, prompt) in prompts().iter().enumerate() {
        // In turn: one computes, the other copies.
        let (computes, copies) = (&workers[i % 2], &workers[1 - i % 2]);
        let cold = computes.generate(prompt, TOKENS);
        assert_eq!((cold.device, cold.host), (0, 0));
        expected.check(i, &cold.tokens, "computed: ");
        let warm = copies.generate(prompt, TOKENS);
        assert_eq!((warm.device, warm.host), (0, 288), "nine blocks come from the other worker");
        expected.check(i, &warm.tokens, "copied: ");
    }
    node.assert_idle();
    let bytes = |route| node.metric("kvbm_transfer_bytes_total", route);
    assert!(bytes("device_to_device") > 0.0);
    assert_eq!(bytes("h2d") + bytes("d2h"), 0.0, "there is no host memory");
}

/// The worker that computed is killed: its pool, on whichever device, is still a source.
#[test]
fn peer_copies_outlive_the_worker_that_computed() {
    if !on_gpu() {
        return println!("skipped: no GPU");
    }
    let (expected, _alone) = reference();
    let node = Node::start(DaemonOptions { host_mb: 0.0, arguments: vec![] });
    let options = WorkerOptions { pool_blocks: 256, ..WorkerOptions::default() };
    let (mut a, first) = node.worker("a", &options);
    prompts().iter().for_each(|prompt| _ = first.generate(prompt, TOKENS));
    a.kill();
    let fresh = vec!["--fresh-device-pool".into()];
    let options = WorkerOptions { arguments: fresh, second_device: true, ..options };
    let (_b, second) = node.worker("b", &options);
    for (i, prompt) in prompts().iter().enumerate() {
        let warm = second.generate(prompt, TOKENS);
        assert_eq!((warm.device, warm.host), (0, 288));
        expected.check(i, &warm.tokens, "after its death: ");
    }
    node.assert_idle();
}
