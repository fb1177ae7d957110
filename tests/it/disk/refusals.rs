//! Files that a daemon does not touch, and blocks of a model that is not there.

use std::path::Path;
use std::process::Command;

use kvbm_tests::{
    DaemonOptions, Node, Random, WorkerClient, WorkerOptions, disk_file, eventually, flip_header, program,
    set_version,
};

const HOST_MB: f64 = 16.0;
const DISK_MB: f64 = 12.0;

/// Starts a daemon that must not start, beside whatever runs at `node`, and returns the one line that it says.
fn refused(node: &Node) -> String {
    let own = tempfile::tempdir().unwrap();
    let output = Command::new(program())
        .args(node.daemon_arguments(&own.path().join("kvbm.sock")))
        .env("DYN_LOG", "warn")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    said
}

/// The refusal names the file and all of `advice`; the file is what it was.
fn assert_refused(node: &Node, advice: &[&str]) {
    let file = disk_file(&node.disk_dir());
    let before = std::fs::read(&file).unwrap();
    let said = refused(node);
    assert!(said.contains(file.to_str().unwrap()), "{said}");
    advice.iter().for_each(|words| assert!(said.contains(words), "{words}: {said}"));
    assert!(std::fs::read(&file).unwrap() == before, "the file was changed: {said}");
}

fn options() -> DaemonOptions {
    DaemonOptions::with_disk(HOST_MB, DISK_MB)
}

fn stop(node: &mut Node) {
    assert!(node.daemon.take().unwrap().terminate().success());
}

#[test]
fn a_file_in_use_is_refused_and_its_daemon_goes_on() {
    let node = Node::start(options());
    let said = refused(&node);
    assert!(said.contains(disk_file(&node.disk_dir()).to_str().unwrap()), "{said}");
    assert!(said.contains("in use by another daemon: stop it, or give this one a directory"), "{said}");
    let (_worker, client) = node.worker("worker", &WorkerOptions::default());
    client.generate(&Random::new(1).tokens(200), 4);
    on_disk(&node, 6.0);
}

#[test]
fn a_file_that_is_not_understood_is_refused_left_alone_and_replaced_when_told() {
    let spoil: [(&dyn Fn(&Path), &[&str]); 3] = [
        (
            &|directory| std::fs::write(disk_file(directory), [b'x'; 9000]).unwrap(),
            &["is not a disk cache of kvbm", "move it away, choose another directory, or reset"],
        ),
        (&|directory| set_version(directory, 2), &["version 2", "up to 1", "start the newer release"]),
        (&|directory| flip_header(directory), &["damaged header", "check the drive, then reset"]),
    ];
    for (spoil, advice) in spoil {
        let mut node = Node::start(options());
        stop(&mut node);
        spoil(&node.disk_dir());
        assert_refused(&node, advice);
        node.configure(options().and(&["--reset-disk"]));
        node.start_daemon();
        assert_eq!(node.metric("kvbm_disk_in_service", ""), 1.0);
        let (_worker, client) = node.worker("worker", &WorkerOptions::default());
        client.generate(&Random::new(1).tokens(200), 4);
        on_disk(&node, 6.0);
    }
}

fn on_disk(node: &Node, blocks: f64) {
    eventually("blocks are on disk", || {
        (node.metric("kvbm_tier_resident_blocks", "disk") == blocks).then_some(())
    });
}

/// Bytes on disk of the namespaces of the model `label`, and of those nobody has named since the start.
fn bytes_on_disk(node: &Node, label: &str) -> u64 {
    let namespaces = node.status().namespaces;
    let of_model = namespaces.iter().filter(|namespace| namespace.model == label);
    of_model.map(|namespace| namespace.resident_bytes["disk"]).sum()
}

#[test]
fn two_models_share_a_file_and_the_one_that_is_away_keeps_its_blocks() {
    const BLOCK_BYTES: u64 = 98_304;
    let prompt = Random::new(31).tokens(200);
    let one = WorkerOptions::default();
    let other = WorkerOptions {
        tokens_per_block: 16,
        arguments: ["--served-model-name", "other"].map(String::from).to_vec(),
        ..WorkerOptions::default()
    };
    let mut node = Node::start(options());
    let ask = |node: &Node, options: &WorkerOptions| {
        let name = format!("worker-{}", options.tokens_per_block);
        let (worker, client): (_, WorkerClient) = node.worker(&name, options);
        let answer = client.generate(&prompt, 8);
        (worker, answer)
    };
    let (first, cold_one) = ask(&node, &one);
    on_disk(&node, 6.0);
    let (second, cold_other) = ask(&node, &other);
    on_disk(&node, 18.0);
    assert_eq!(bytes_on_disk(&node, "tiny"), 6 * BLOCK_BYTES);
    assert_eq!(bytes_on_disk(&node, "other"), 12 * BLOCK_BYTES / 2);
    drop((first, second));
    node.kill_daemon();
    node.start_daemon();
    assert_eq!(node.metric("kvbm_disk_recovered_blocks", ""), 18.0);
    let (_second, warm_other) = ask(&node, &other);
    assert_eq!((warm_other.disk, &warm_other.tokens), (192, &cold_other.tokens));
    // Of the first nobody has heard yet, so its namespace has no name.
    assert_eq!(bytes_on_disk(&node, ""), 6 * BLOCK_BYTES);
    assert_eq!(bytes_on_disk(&node, "other"), 12 * BLOCK_BYTES / 2);
    let (_first, warm_one) = ask(&node, &one);
    assert_eq!((warm_one.disk, &warm_one.tokens), (192, &cold_one.tokens));
    assert_eq!(bytes_on_disk(&node, "tiny"), 6 * BLOCK_BYTES);
    node.assert_idle();
}
