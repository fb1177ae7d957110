//! etcd and NATS gone together and back again, while requests go on without a pause and nodes come and go.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use kvbm_tests::{
    DaemonOptions, Frontend, Node, Process, Random, WorkerOptions, eventually, eventually_within, get_any,
};
use serde_json::{Value, json};

use super::servers::{Server, etcd_is_there, free_ports, nats_is_there};

const CLIENTS: usize = 3;
/// Different requests; clients ask them again and again.
const REQUESTS: usize = 8;

fn request(number: usize) -> Value {
    json!({
        "model": "tiny", "prompt": Random::new(number as u64).tokens(70), "max_tokens": 12, "seed": number,
        "temperature": if number.is_multiple_of(2) { 0.0 } else { 0.8 }, "ignore_eos": true,
    })
}

fn text(frontend: &Frontend, number: usize) -> String {
    let (status, answer) = frontend.complete(&request(number));
    assert_eq!(status, 200, "{answer}");
    answer["choices"][0]["text"].as_str().unwrap().to_owned()
}

/// Nodes that are found through etcd and tell of their blocks through NATS.
struct Places {
    etcd: String,
    nats: String,
    token: String,
}

impl Places {
    fn new(folder: &Path, etcd: u16, nats: u16) -> Self {
        let token = folder.join("token");
        std::fs::write(&token, "secret-of-the-test\n").unwrap();
        std::fs::set_permissions(&token, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        Self {
            etcd: format!("etcd://127.0.0.1:{etcd}"),
            nats: format!("nats://127.0.0.1:{nats}"),
            token: token.display().to_string(),
        }
    }

    fn node(&self) -> (Process, Node) {
        let node = Node::start(DaemonOptions { host_mb: 64.0, arguments: vec![] }.and(&[
            "--grpc-listen",
            "127.0.0.1:0",
            "--grpc-token-file",
            &self.token,
            "--announce",
            &self.etcd,
            "--events",
            &self.nats,
        ]));
        let arguments = ["--listen", "http://127.0.0.1:0", "--threads", "1"].map(String::from).to_vec();
        let options = WorkerOptions { arguments, tokens_per_block: 16, ..WorkerOptions::default() };
        (node.worker_at_own_address("worker", &options), node)
    }

    fn frontend(&self, folder: &Path) -> Frontend {
        let arguments = [
            ["--discovery", &self.etcd, "--daemon-token-file", &self.token],
            ["--router-mode", "kv", "--events", &self.nats],
        ];
        Frontend::start(folder, &[], arguments.as_flattened())
    }
}

#[test]
fn requests_go_on_while_etcd_and_nats_are_gone_and_all_is_known_again_afterwards() {
    if !etcd_is_there() || !nats_is_there() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (etcd_port, nats_port) = (free_ports(), free_ports());
    let places = Places::new(folder.path(), etcd_port, nats_port);
    let (etcd, nats) = (Server::etcd(folder.path(), etcd_port), Server::nats(folder.path(), nats_port));
    let (first, second) = (places.node(), places.node());
    let frontend = places.frontend(folder.path());
    frontend.until_ready(2);
    let expected: Vec<String> = (0..REQUESTS).map(|number| text(&frontend, number)).collect();

    let (asked, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let client = || {
        while !over.load(Ordering::Relaxed) {
            let number = asked.fetch_add(1, Ordering::Relaxed) % REQUESTS;
            assert_eq!(text(&frontend, number), expected[number]);
        }
    };
    let workers = || {
        let health: Value = serde_json::from_str(&get_any(&frontend.url("/health")).1).unwrap();
        health["workers"].as_array().unwrap().len()
    };
    let told = || frontend.metric("dynamo_frontend_router_events_total", "from=\"nats\"");
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        let some_more = || {
            let before = asked.load(Ordering::Relaxed);
            eventually("requests go on", || {
                assert!(clients.iter().all(|client| !client.is_finished()), "a request failed");
                (asked.load(Ordering::Relaxed) >= before + 10 * CLIENTS).then_some(())
            });
        };
        // Whatever ends this, clients end with it.
        let _end = End(&over);
        let news = |salt: u64| {
            let before = told();
            let mut number = salt;
            eventually("blocks are heard of through NATS", || {
                number += 1;
                let prompt = Random::new(number).tokens(70);
                let body = json!({ "model": "tiny", "prompt": prompt, "max_tokens": 1 });
                assert_eq!(frontend.complete(&body).0, 200);
                (told() > before).then_some(())
            });
        };
        news(1 << 20);
        some_more();
        drop(nats);
        some_more();
        drop(etcd);
        some_more();
        // A node is lost that nobody can take off the list, in the middle of requests.
        drop(second);
        some_more();
        let _nats = Server::nats(folder.path(), nats_port);
        some_more();
        let _etcd = Server::etcd(folder.path(), etcd_port);
        some_more();
        // Longer than a key outlives its daemon.
        eventually_within(Duration::from_secs(60), "the lost node is forgotten", || {
            (workers() == 1).then_some(())
        });
        let _third = places.node();
        frontend.until_ready(2);
        news(1 << 21);
        drop(first);
        some_more();
        over.store(true, Ordering::Relaxed);
        clients.into_iter().for_each(|client| client.join().unwrap());
    });
}

/// Says that it is over.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
