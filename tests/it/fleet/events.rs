//! Two nodes that tell two frontends of their blocks through NATS, which is killed and started again while requests go on.

use kvbm_tests::{DaemonOptions, Frontend, Node, Process, Random, eventually};
use serde_json::json;

use super::nats_accounts::Accounts;
use super::servers::{Server, free_ports, nats_is_there};
use super::worker;

const BLOCK: usize = 16;
const TOKENS: usize = 20 * BLOCK;

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
    if !nats_is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let port = free_ports();
    let place = format!("nats://127.0.0.1:{port}");
    let server = Server::nats(folder.path(), port);
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
    let _server = Server::nats(folder.path(), port);
    until_told_by_nats();
    for number in 2..6 {
        let (home, found) = ask(&frontends[0], number);
        assert_eq!((ask(&frontends[1], number), found), ((home, TOKENS), TOKENS));
    }
}

#[test]
fn a_nats_that_demands_credentials_is_shown_them() {
    if !nats_is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let accounts = Accounts::make(folder.path());
    let port = free_ports();
    let _server =
        Server::nats_with(folder.path(), port, &["--config", accounts.server_config.to_str().unwrap()]);
    let place = format!("nats://127.0.0.1:{port}");
    let with = ["--events", &place, "--events-credentials", accounts.credentials.to_str().unwrap()];
    let node = Node::start(DaemonOptions { host_mb: 64.0, arguments: vec![] }.and(&with));
    let _worker = worker(&node, 0, 128, BLOCK, &[]);
    let start = |name: &str, events: &[&str]| {
        let folder = folder.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        let arguments = [&["--router-mode", "kv", "--debug-headers"], events].concat();
        let frontend = Frontend::start(&folder, &[&node], &arguments);
        frontend.until_ready(1);
        frontend
    };
    let shown = start("shown", &with);
    let mut number = 0;
    eventually("it hears of blocks through NATS", || {
        number += 1;
        ask(&shown, number);
        (shown.metric("dynamo_frontend_router_events_total", "from=\"nats\"") > 0.0).then_some(())
    });
    // Without them NATS says nothing, and the daemon is asked itself.
    let refused = start("refused", &with[..2]);
    eventually("it hears of blocks from the daemon", || {
        number += 1;
        ask(&refused, number);
        (refused.metric("dynamo_frontend_router_events_total", "from=\"daemon\"") > 0.0).then_some(())
    });
    assert_eq!(refused.metric("dynamo_frontend_router_events_total", "from=\"nats\""), 0.0);
}
