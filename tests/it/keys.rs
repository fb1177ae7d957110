//! What must never be a hit.

use std::path::{Path, PathBuf};

use kvbm_proto::v1::GenerateRequest;
use kvbm_tests::{Answer, DaemonOptions, Node, Random, WorkerClient, WorkerOptions, tiny_model};

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

/// Two models whose blocks have the same size share pools' geometry and host segments; both hit, neither is mixed with
/// the other.
#[test]
fn two_models_on_one_daemon_are_served_and_never_mixed() {
    let node = Node::start(DaemonOptions { host_mb: 48.0, ..DaemonOptions::default() });
    let other = other_weights(node.dir.path());
    let small = |name, model: &Path| WorkerOptions {
        pool_blocks: 32,
        model: model.to_owned(),
        ..options(&["--served-model-name", name])
    };
    let models = [("one", tiny_model()), ("two", other)];
    let prompts: Vec<Vec<u32>> = (0..12).map(|i| Random::new(100 + i).tokens(250)).collect();
    let expected: Vec<Vec<Answer>> = models
        .iter()
        .map(|(name, model)| {
            let alone = WorkerOptions { alone: true, pool_blocks: 512, ..small(name, model) };
            let (_worker, client) = node.worker(&format!("{name}-alone"), &alone);
            prompts.iter().map(|prompt| client.generate(prompt, 8)).collect()
        })
        .collect();
    let workers: Vec<_> = models.iter().map(|(name, model)| node.worker(name, &small(name, model))).collect();
    let mut host = [0, 0];
    for _ in 0..3 {
        for (i, prompt) in prompts.iter().enumerate() {
            for (w, (_, client)) in workers.iter().enumerate() {
                let answer = client.generate(prompt, 8);
                assert_eq!(answer.tokens, expected[w][i].tokens, "model {} prompt {i}", models[w].0);
                host[w] += answer.host;
            }
        }
    }
    assert!(host.iter().all(|tokens| *tokens > 0), "{host:?}");
    let differing = expected[0].iter().zip(&expected[1]).filter(|(a, b)| a.tokens != b.tokens).count();
    assert!(differing > 6, "the models must be told apart by what they say");
    node.assert_idle();
}

/// The bundled model with some weights changed.
fn other_weights(dir: &Path) -> PathBuf {
    let copy = dir.join("other");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(tiny_model()).unwrap().flatten() {
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    let path = copy.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    // The sign of every 64th number.
    for number in bytes[header..].chunks_exact_mut(2).step_by(64) {
        number[1] ^= 0x80;
    }
    std::fs::write(&path, bytes).unwrap();
    copy
}
