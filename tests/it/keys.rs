//! What must never be a hit.

use kvbm_proto::v1::GenerateRequest;
use kvbm_tests::{Answer, DaemonOptions, Node, Random, WorkerClient, WorkerOptions};

fn options(arguments: &[&str]) -> WorkerOptions {
    WorkerOptions { arguments: arguments.iter().map(|a| (*a).into()).collect(), ..WorkerOptions::default() }
}

#[test]
fn another_salt_or_adapter_finds_nothing() {
    let prompt = Random::new(1).tokens(200);
    let node = Node::start(DaemonOptions::default());
    let (_a, first) = node.worker("a", &options(&["--ignore-lora"]));
    let (_b, second) = node.worker("b", &options(&["--ignore-lora"]));
    let ask = |client: &WorkerClient, salt: &str, lora: &str| -> Answer {
        let request = GenerateRequest {
            cache_salt: salt.into(),
            lora: lora.into(),
            ..WorkerClient::request(&prompt, 8)
        };
        client.send(request).unwrap()
    };
    let cold = ask(&first, "", "");
    node.assert_offloaded(6);
    let mut stored = 6;
    for (salt, lora) in [("tenant-a", ""), ("tenant-b", ""), ("", "adapter"), ("tenant-a", "adapter")] {
        let unseen = ask(&first, salt, lora);
        assert_eq!((unseen.device, unseen.host), (0, 0), "{salt:?} {lora:?}");
        assert_eq!(unseen.tokens, cold.tokens);
        stored += 6;
        node.assert_offloaded(stored);
        // What the first stored under this name, the second finds; nothing else.
        let known = ask(&second, salt, lora);
        assert_eq!((known.device, known.host), (0, 192), "{salt:?} {lora:?}");
        assert_eq!(known.tokens, cold.tokens);
    }
    assert_eq!(ask(&first, "", "").device, 192);
}

#[test]
fn another_block_size_revision_or_model_name_finds_nothing() {
    let prompt = Random::new(2).tokens(200);
    let node = Node::start(DaemonOptions::default());
    let (_a, first) = node.worker("a", &options(&[]));
    let cold = first.generate(&prompt, 8);
    node.assert_offloaded(6);
    let others = [
        WorkerOptions { tokens_per_block: 16, ..options(&[]) },
        options(&["--model-revision", "another"]),
        options(&["--served-model-name", "another"]),
    ];
    for (i, other) in others.iter().enumerate() {
        let (_worker, client) = node.worker(&format!("other-{i}"), other);
        let answer = client.generate(&prompt, 8);
        assert_eq!((answer.device, answer.host), (0, 0), "{other:?}");
        assert_eq!(answer.tokens, cold.tokens);
    }
    let (_same, client) = node.worker("same", &options(&[]));
    assert_eq!(client.generate(&prompt, 8).host, 192);
}

/// Two models with blocks of different size share one host tier; both hit, neither is mixed with the other.
#[test]
fn two_models_on_one_daemon_are_served_and_never_mixed() {
    let node = Node::start(DaemonOptions { host_mb: 48.0, ..DaemonOptions::default() });
    let names = ["one", "two"];
    let sizes = [32, 16];
    let workers: Vec<_> = names
        .iter()
        .zip(sizes)
        .map(|(name, tokens_per_block)| {
            let small = WorkerOptions {
                tokens_per_block,
                pool_blocks: 1024 / tokens_per_block,
                ..options(&["--served-model-name", name])
            };
            node.worker(name, &small)
        })
        .collect();
    let prompts: Vec<Vec<u32>> = (0..12).map(|i| Random::new(100 + i).tokens(250)).collect();
    let mut cold: Vec<Vec<Answer>> = vec![];
    for round in 0..3 {
        for (i, prompt) in prompts.iter().enumerate() {
            for (w, (_, client)) in workers.iter().enumerate() {
                let answer = client.generate(prompt, 8);
                if round == 0 {
                    cold.resize_with(2, Vec::new);
                    cold[w].push(answer);
                } else {
                    assert_eq!(answer.tokens, cold[w][i].tokens, "model {} prompt {i}", names[w]);
                }
            }
        }
    }
    assert_eq!(
        cold[0].iter().map(|a| &a.tokens).collect::<Vec<_>>(),
        cold[1].iter().map(|a| &a.tokens).collect::<Vec<_>>()
    );
    let status = node.status();
    assert_eq!(status.layouts.len(), 2, "{:?}", status.layouts);
    for name in names {
        let namespace = status.namespaces.iter().find(|n| n.model == name).expect("both models have blocks");
        assert!(namespace.resident_bytes.get("host").copied().unwrap_or(0) > 0);
    }
    node.assert_idle();
}
