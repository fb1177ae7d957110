//! The golden vectors of `docs/wire.md`, which a second implementation made.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use kvbm_hash::{BaseNamespace, BaseParts, Chain, MultimodalItem, sequence_hashes};
use serde_json::Value;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

#[test]
fn golden_vectors_hold() {
    let golden: Vec<Value> = serde_json::from_str(include_str!("../../docs/golden.json")).unwrap();
    assert!(golden.len() >= 8);
    for vector in golden {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let base = &vector["base"];
        let size = base["tokens_per_block"].as_u64().unwrap() as u32;
        let base = BaseNamespace::new(&BaseParts {
            model: &text(&base["model"]),
            revision: &text(&base["revision"]),
            kv_dtype: &text(&base["kv_dtype"]),
            layout: &text(&base["layout"]),
            tokens_per_block: size,
            parallel: &text(&base["parallel"]),
        });
        assert_eq!(hex(&base.0), text(&vector["base_digest"]));
        let namespace = base.namespace(Some(&text(&vector["lora"])), Some(&text(&vector["salt"])));
        let namespace = namespace.of_tenant(&text(&vector["tenant"]));
        assert_eq!(hex(&namespace.0), text(&vector["namespace_digest"]));
        let tokens: Vec<u32> =
            vector["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect();
        let keys = |name: &str| vector[name].as_array().unwrap().iter().map(text).collect::<Vec<_>>();
        let ours = sequence_hashes(namespace, size as usize, &tokens);
        assert_eq!(ours.iter().map(|key| hex(&key.0)).collect::<Vec<_>>(), keys("keys"));
        let mut chain = Chain::new(namespace);
        let with_items = tokens.chunks_exact(size as usize).enumerate().map(|(block, tokens)| {
            let items = vector["items"].as_array().unwrap().iter().filter(|item| item["block"] == block);
            let items: Vec<MultimodalItem> = items
                .map(|item| MultimodalItem {
                    digest: unhex(&text(&item["digest"])).try_into().unwrap(),
                    offset: item["offset"].as_i64().unwrap() as i32,
                })
                .collect();
            hex(&chain.push_with_items(tokens, &items).0)
        });
        assert_eq!(with_items.collect::<Vec<_>>(), keys("keys_with_items"));
    }
}
