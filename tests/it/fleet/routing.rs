//! What routing by blocks does with a prefix that is in no pool any more.

use std::time::Duration;

use kvbm_tests::{DaemonOptions, Frontend, Node, Random, eventually};
use serde_json::json;

use super::worker;

const BLOCK: usize = 16;

#[test]
fn a_prefix_that_is_only_in_host_or_on_disk_still_draws_its_requests() {
    let with_disk = DaemonOptions::with_disk(64.0, 64.0);
    let nodes = [Node::start(with_disk.clone()), Node::start(with_disk)];
    let _processes = nodes.each_ref().map(|node| worker(node, 0, 24, BLOCK, &[]));
    let frontend = Frontend::start(
        nodes[0].dir.path(),
        &[&nodes[0], &nodes[1]],
        &["--router-mode", "kv", "--debug-headers"],
    );
    frontend.until_ready(2);
    let ask = |seed: u64| {
        let tokens = Random::new(seed).tokens(20 * BLOCK + 1);
        let body =
            json!({ "model": "tiny", "prompt": tokens, "max_tokens": 1, "stream": true, "temperature": 0 });
        frontend.stream(&body).route
    };
    let field = |route: &str, name: &str| {
        let value = route.split("; ").find_map(|field| field.strip_prefix(&format!("{name}=")));
        value.map(str::to_owned).unwrap_or_else(|| panic!("{name} is not in {route:?}"))
    };
    let first = ask(1);
    let home = field(&first, "worker");
    // Events travel apart from answers.
    std::thread::sleep(Duration::from_secs(1));
    // Enough of others to push it out of the small pool; some of them go to the same worker.
    let mut seed = 100;
    eventually("the prefix is in host memory only", || {
        let route = ask(1);
        assert_eq!(field(&route, "worker"), home, "{route}");
        let tokens = |name| field(&route, name).parse::<usize>().unwrap();
        let (device, further) = (tokens("device"), tokens("host") + tokens("disk"));
        if device == 0 && further == 20 * BLOCK {
            return Some(());
        }
        for _ in 0..4 {
            seed += 1;
            ask(seed);
        }
        None
    });
}

#[test]
fn a_prefix_on_disk_is_announced_to_its_daemon_and_found() {
    // Room for four such prompts.
    let node = Node::start(DaemonOptions::with_disk(4.0, 64.0));
    let _worker = worker(&node, 0, 24, BLOCK, &[]);
    let frontend = Frontend::start(node.dir.path(), &[&node], &["--router-mode", "kv"]);
    frontend.until_ready(1);
    let found = |seed: u64| {
        let tokens = Random::new(seed).tokens(20 * BLOCK + 1);
        frontend.found(&json!({ "model": "tiny", "prompt": tokens, "max_tokens": 1, "temperature": 0 }))
    };
    let announced = || frontend.metric("dynamo_frontend_router_prefetches_total", "taken");
    found(1);
    let mut seed = 100;
    eventually("the prefix is on disk only", || {
        for _ in 0..8 {
            seed += 1;
            found(seed);
        }
        let before = announced();
        let (device, all) = found(1);
        (announced() > before).then(|| assert!(all > device, "{all} {device}"))
    });
    assert!(node.metric("kvbm_onboard_blocks_d2d", "") > 0.0);
}
