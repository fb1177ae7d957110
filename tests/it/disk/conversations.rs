//! Conversations whose cache is mostly on disk are the same as those without a cache.

use kvbm_tests::{Answer, DaemonOptions, Node, conversations};

use crate::cache::{alone, small_pool, talk, tokens};

/// 80 blocks of 32 tokens: about one part in eight of all that is said.
const HOST_MB: f64 = 8.0;
const DISK_MB: f64 = 200.0;

/// What part of the prompts came from disk.
fn disk_share(answers: &[Vec<(usize, Answer)>]) -> f64 {
    let all = || answers.iter().flatten();
    let prompt: usize = all().map(|(length, _)| length).sum();
    let disk: usize = all().map(|(_, answer)| answer.disk as usize).sum();
    disk as f64 / prompt as f64
}

#[test]
fn conversations_from_disk_are_the_same_as_without_a_daemon() {
    let all = conversations(11, 40);
    let expected = alone(&all);
    let variants: [&[&str]; 2] = [&[], &["--queue-depth", "1", "--batch-blocks", "1", "--disk-io", "pread"]];
    for arguments in variants {
        let node = Node::start(DaemonOptions::with_disk(HOST_MB, DISK_MB).and(arguments));
        let (_worker, client) = node.worker("worker", &small_pool(32));
        let answers = talk(&client, &all, 4);
        assert_eq!(tokens(&answers), tokens(&expected), "{arguments:?}");
        let share = disk_share(&answers);
        println!("{arguments:?}: from disk {share:.2}");
        // A quarter on a quiet machine; lookups of a busy one do not wait for the disk for ever.
        assert!(share > 0.0, "{arguments:?}: nothing came from disk");
        // The daemon counted what the worker saw, and the tier was as small as it was meant to be.
        assert!(node.metric("kvbm_onboard_blocks_d2d", "") > 0.0);
        assert!(node.metric("kvbm_evictions_total", "host") > 100.0);
        assert_eq!(node.metric("kvbm_disk_checksum_failures_total", ""), 0.0);
        assert_eq!(node.metric("kvbm_disk_read_failures_total", ""), 0.0);
        node.assert_idle();
    }
}
