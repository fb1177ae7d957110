//! Two nodes that tell two frontends of their blocks through NATS, which is killed and started again while requests go on. Skipped
//! where there is no `nats-server`, unless `KVBM_TEST_NATS` demands it.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use kvbm_tests::{DaemonOptions, Frontend, Node, Process, Random, eventually};
use serde_json::json;

use super::worker;

const BLOCK: usize = 16;
const TOKENS: usize = 20 * BLOCK;

/// One server with JetStream.
struct NatsServer {
    child: Child,
}

impl NatsServer {
    fn start(folder: &Path, port: u16) -> Self {
        let child = Command::new("nats-server")
            .args(["--addr", "127.0.0.1", "--port", &port.to_string(), "--jetstream"])
            .args(["--store_dir", folder.join("nats").to_str().unwrap()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { child }
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_there() -> bool {
    let there = Command::new("nats-server").arg("--version").stdout(Stdio::null()).status().is_ok();
    assert!(there || std::env::var_os("KVBM_TEST_NATS").is_none(), "there is no nats-server");
    there
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Says where the prompt with this number went, and how many of its tokens were thought to be there.
fn ask(frontend: &Frontend, number: u64) -> (String, usize) {
    let prompt = Random::new(number).tokens(TOKENS + 1);
    let body =
        json!({ "model": "tiny", "prompt": prompt, "max_tokens": 1, "stream": true, "temperature": 0 });
    let streamed = frontend.stream(&body);
    assert!(streamed.finish.is_some(), "{streamed:?}");
    let field = |name: &str| {
        let field = streamed.route.split("; ").find_map(|field| field.strip_prefix(&format!("{name}=")));
        field.unwrap_or_else(|| panic!("{name} is not in {:?}", streamed.route)).to_owned()
    };
    let tokens = |name| field(name).parse::<usize>().unwrap();
    (field("worker"), tokens("device") + tokens("host"))
}

/// Both come to know where all of the prompt is, whoever asked for it.
fn both_know(frontends: &[Frontend; 2], number: u64) {
    let (home, _) = ask(&frontends[0], number);
    for frontend in frontends {
        eventually("the prompt is known everywhere", || {
            (ask(frontend, number) == (home.clone(), TOKENS)).then_some(())
        });
    }
}

fn told(frontends: &[Frontend; 2], from: &str) -> Vec<f64> {
    frontends.iter().map(|f| f.metric("dynamo_frontend_router_events_total", from)).collect()
}

#[test]
fn frontends_hear_of_blocks_through_nats_and_its_loss_disturbs_nobody() {
    if !is_there() {
        eprintln!("skipped: there is no nats-server");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let port = free_port();
    let place = format!("nats://127.0.0.1:{port}");
    let server = NatsServer::start(folder.path(), port);
    let options = DaemonOptions { host_mb: 64.0, arguments: vec![] }.and(&["--events", &place]);
    let nodes = [Node::start(options.clone()), Node::start(options)];
    let _workers: [Process; 2] = nodes.each_ref().map(|node| worker(node, 0, 128, BLOCK, &[]));
    let arguments = ["--router-mode", "kv", "--debug-headers", "--events", &place];
    let of = [&nodes[0], &nodes[1]];
    let frontends = nodes.each_ref().map(|node| Frontend::start(node.dir.path(), &of, &arguments));
    for frontend in &frontends {
        frontend.until_ready(2);
    }
    both_know(&frontends, 1);
    let mut number = 100;
    let mut until_told_by_nats = || {
        let before = told(&frontends, "from=\"nats\"");
        eventually("all hear of it through NATS", || {
            number += 1;
            both_know(&frontends, number);
            let now = told(&frontends, "from=\"nats\"");
            before.iter().zip(&now).all(|(before, now)| now > before).then_some(())
        });
    };
    until_told_by_nats();
    // While it is away, the daemons are asked themselves; nothing of what comes to be known is lost afterwards.
    drop(server);
    for number in 2..6 {
        both_know(&frontends, number);
    }
    let _server = NatsServer::start(folder.path(), port);
    until_told_by_nats();
    for number in 2..6 {
        let (home, found) = ask(&frontends[0], number);
        assert_eq!((ask(&frontends[1], number), found), ((home, TOKENS), TOKENS));
    }
}
