//! Where a prompt is computed when there are workers for prompts and others for answers.

use std::time::Duration;

use kvbm_frontend::{Config, Daemon, DisaggConfig, RouterConfig, RouterMode, Strategy};
use kvbm_proto::v1::{RegisterWorker, WorkerEntry};
use serde_json::{Value, json};

use crate::client::post;
use crate::frontend::{Frontend, config};
use crate::mock::{MockDaemon, MockWorker, Script, say};

const PROMPT_TOKENS: u64 = 100;

fn of_role(entry: WorkerEntry, role: &str) -> WorkerEntry {
    let worker = entry.worker.map(|worker| RegisterWorker { role: role.to_owned(), ..worker });
    WorkerEntry { worker, ..entry }
}

/// Different ones with each number.
fn request(number: u32) -> Value {
    let prompt: Vec<u32> = (0..PROMPT_TOKENS as u32).map(|at| 100 + 200 * number + at).collect();
    json!({ "model": "tiny", "prompt": prompt, "max_tokens": 5 })
}

#[tokio::test]
async fn a_prompt_is_computed_where_it_is_answered_while_workers_for_prompts_have_too_much_to_do() {
    for (mode, strategy) in
        [(RouterMode::Kv, Strategy::PrefillFirst), (RouterMode::RoundRobin, Strategy::DecodeFirst)]
    {
        let folder = tempfile::tempdir().unwrap();
        let prefill = MockWorker::start(folder.path(), "p", "tiny", Script::Hang(Vec::new()));
        let decode = MockWorker::start(folder.path(), "d", "tiny", say(" x"));
        let entries = vec![
            of_role(prefill.entry_with_pool(1), "prefill"),
            of_role(decode.entry_with_pool(2), "decode"),
        ];
        let socket = folder.path().join("kvbm.sock");
        let _daemon = MockDaemon::start(&socket, entries);
        let disagg = DisaggConfig {
            strategy,
            threshold_tokens: 64,
            queue_tokens: 2 * PROMPT_TOKENS,
            wait: Duration::ZERO,
            lease: Duration::from_secs(1),
        };
        let router = RouterConfig { mode, disagg: Some(disagg), ..RouterConfig::default() };
        let daemons = vec![Daemon::at_socket(socket)];
        let frontend = Frontend::start(Config { daemons, router, ..config() }).await;
        frontend.until_ready(2).await;
        // None of these comes to its first token.
        let mut waiting = Vec::new();
        for number in 0..2 {
            let address = frontend.address;
            waiting
                .push(tokio::spawn(async move { post(address, "/v1/completions", request(number)).await }));
            while prefill.requests().len() <= number as usize {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        assert_eq!(decode.requests().len(), 0, "{mode:?}");
        assert_eq!(post(frontend.address, "/v1/completions", request(2)).await.status, 200);
        assert_eq!((prefill.requests().len(), decode.requests().len()), (2, 1), "{mode:?}");
        frontend.until_metric("dynamo_frontend_disaggregated_requests_total{prefill=\"local\"} 1").await;
        waiting.iter().for_each(tokio::task::JoinHandle::abort);
    }
}
