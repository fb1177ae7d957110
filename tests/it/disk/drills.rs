//! Drills between host memory and disk: the daemon is killed in the middle of writes and reads, the drive goes away and
//! comes back. No request fails, no token is wrong, nothing stays held.

use std::path::Path;
use std::time::Duration;

use kvbm_server::status::TierStatus;
use kvbm_tests::{
    DaemonOptions, Node, Random, WorkerClient, WorkerOptions, drill_seeds, eventually, eventually_within,
};

use crate::drills::{Expected, all_right, expected, moment, under_traffic};

const SHORT: u64 = 4;
/// Room for about half of all blocks of the prompts in each tier, so that they keep moving.
const HOST_MB: f64 = 2.4;
const DISK_MB: f64 = 4.0;
const POOL_BLOCKS: usize = 30;

fn slow_copies() -> DaemonOptions {
    DaemonOptions::with_disk(HOST_MB, DISK_MB).and(&["--copy-delay-us", "2000"])
}

fn small_pool() -> WorkerOptions {
    WorkerOptions { pool_blocks: POOL_BLOCKS, hasty: true, ..WorkerOptions::default() }
}

fn disk(node: &Node) -> TierStatus {
    node.status().tiers.into_iter().find(|tier| tier.tier == "disk").unwrap()
}

/// Blocks have gone to disk and come back.
fn used_in_both_directions(node: &Node) {
    eventually("blocks move between host and disk", || {
        let moved = |name| node.metric(name, "") > 0.0;
        (moved("kvbm_offload_blocks_h2d") && moved("kvbm_onboard_blocks_d2d")).then_some(())
    });
}

fn attached(node: &Node) {
    eventually_within(Duration::from_secs(10), "the worker is attached", || {
        (node.status().workers.len() == 1).then_some(())
    });
}

#[test]
fn drill_disk_daemon_killed() {
    let expected = expected();
    for seed in drill_seeds(SHORT) {
        let mut random = Random::new(seed);
        let mut node = Node::start(slow_copies());
        let (_worker, client) = node.worker("worker", &small_pool());
        let (answered, failed) = under_traffic(&client, seed, &expected, || {
            used_in_both_directions(&node);
            moment(&mut random);
            // In turn: in the middle of a write, in the middle of a read.
            eventually("a block is on its way", || {
                let slots = disk(&node).slots;
                (if seed % 2 == 0 { slots.filling > 0 } else { slots.pinned > 0 }).then_some(())
            });
            node.kill_daemon();
            moment(&mut random);
            node.start_daemon();
            assert!(node.metric("kvbm_disk_recovered_blocks", "") > 0.0, "seed {seed}: the disk is cold");
            attached(&node);
            used_in_both_directions(&node);
        });
        println!("seed {seed}: {answered} answered, {failed} failed");
        assert_eq!(failed, 0, "seed {seed}: a request failed because of the cache");
        all_right(&client, &expected);
        assert_eq!(node.metric("kvbm_disk_checksum_failures_total", ""), 0.0, "seed {seed}");
        node.assert_idle();
    }
}

/// How a drive comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Repair {
    /// With everything that was on it.
    SameDrive,
    /// Empty.
    NewDrive,
}

fn out_of_service(node: &Node) {
    eventually("the tier is out of service", || (disk(node).state == "out").then_some(()));
    assert!(disk(node).reason.contains("kvbm-disk-cache"), "{}", disk(node).reason);
    let (status, body) = node.admin("/ready");
    assert!(status == 503 && body.contains("the disk tier is out of service"), "{status} {body}");
    assert_eq!(node.metric("kvbm_disk_in_service", ""), 0.0);
}

fn serves_without(client: &WorkerClient, node: &Node, expected: &Expected) {
    // What was being read when the drive went has arrived or failed.
    eventually("reads and writes end", || {
        let slots = disk(node).slots;
        (slots.pinned + slots.filling == 0).then_some(())
    });
    let before = node.metric("kvbm_onboard_blocks_d2d", "");
    all_right(client, expected);
    assert_eq!(disk(node).state, "out");
    assert_eq!(node.metric("kvbm_onboard_blocks_d2d", ""), before, "nothing comes from a drive that is out");
}

fn back_in_service(node: &Node, repair: Repair) {
    eventually_within(Duration::from_secs(60), "the tier is in service again", || {
        (node.admin("/ready").0 == 200 && node.metric("kvbm_disk_in_service", "") == 1.0).then_some(())
    });
    let (written, read) =
        (node.metric("kvbm_offload_blocks_h2d", ""), node.metric("kvbm_onboard_blocks_d2d", ""));
    eventually("blocks are written and read again", || {
        let (writes, reads) =
            (node.metric("kvbm_offload_blocks_h2d", ""), node.metric("kvbm_onboard_blocks_d2d", ""));
        (writes > written && reads > read).then_some(())
    });
    // A new one begins empty, so all that it has was written now.
    if repair == Repair::NewDrive {
        assert_eq!(node.metric("kvbm_disk_recovered_blocks", ""), 0.0);
    }
}

fn replace_by_a_file(directory: &Path, aside: &Path) {
    std::fs::rename(directory, aside).unwrap();
    std::fs::write(directory, b"not a directory").unwrap();
}

#[test]
fn drill_disk_lost_and_repaired() {
    let expected = expected();
    for seed in drill_seeds(2) {
        let mut random = Random::new(seed);
        let repair = if seed % 2 == 0 { Repair::SameDrive } else { Repair::NewDrive };
        let node = Node::start(slow_copies());
        let (_worker, client) = node.worker("worker", &small_pool());
        let (directory, aside) = (node.disk_dir(), node.dir.path().join("aside"));
        let (answered, failed) = under_traffic(&client, seed, &expected, || {
            used_in_both_directions(&node);
            moment(&mut random);
            replace_by_a_file(&directory, &aside);
            out_of_service(&node);
            serves_without(&client, &node, &expected);
            std::fs::remove_file(&directory).unwrap();
            if repair == Repair::SameDrive {
                std::fs::rename(&aside, &directory).unwrap();
            }
            back_in_service(&node, repair);
        });
        println!("seed {seed}: {repair:?}, {answered} answered, {failed} failed");
        assert_eq!(failed, 0, "seed {seed}: a request failed because of the drive");
        all_right(&client, &expected);
        assert!(node.metric("kvbm_disk_outages_total", "") >= 1.0);
        node.assert_idle();
    }
}
