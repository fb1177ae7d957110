//! Logits and greedy continuations against those of another implementation, stored beside the model.

use kvbm_worker::KvMemory;
use serde_json::Value;

use crate::support::{argmax, engine, model, run};

/// Where the two largest logits of the reference are closer than this, another choice is as good.
const TIE: f64 = 0.05;
/// Largest difference of a logit.
const TOLERANCE: f64 = 0.06;

fn prompts() -> Vec<Value> {
    let file = std::fs::read(model().join("reference.json")).unwrap();
    let json: Value = serde_json::from_slice(&file).unwrap();
    json["prompts"].as_array().unwrap().clone()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn logits_equal_the_reference() {
    let mut engine = engine(2, None);
    let kv = KvMemory::private(engine.kv_layout(32), 4096 / 32);
    let mut worst: f64 = 0.0;
    for prompt in prompts() {
        let tokens = ids(&prompt["ids"]);
        let mut positions: Vec<usize> =
            prompt["logits"].as_object().unwrap().keys().map(|p| p.parse().unwrap()).collect();
        positions.sort_unstable();
        let mut done = 0;
        for position in positions {
            let logits = run(&mut engine, &kv, &tokens[done..=position], done);
            done = position + 1;
            let listed: Vec<(usize, f64)> = prompt["logits"][position.to_string()]
                .as_array()
                .unwrap()
                .iter()
                .map(|pair| (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap()))
                .collect();
            for (token, want) in &listed {
                let difference = (f64::from(logits[*token]) - want).abs();
                worst = worst.max(difference);
                assert!(
                    difference <= TOLERANCE,
                    "position {position} token {token}: {} not {want}",
                    logits[*token]
                );
            }
            if listed[0].1 - listed[1].1 >= TIE {
                assert_eq!(argmax(&logits) as usize, listed[0].0, "position {position}");
            }
        }
    }
    println!("largest difference of a logit: {worst:.4}");
}

#[test]
fn greedy_continuations_equal_the_reference() {
    let mut engine = engine(2, None);
    let kv = KvMemory::private(engine.kv_layout(32), 4096 / 32);
    for prompt in prompts() {
        let mut tokens = ids(&prompt["ids"]);
        let mut done = 0;
        for (want, gap) in ids(&prompt["greedy"]).into_iter().zip(prompt["gap"].as_array().unwrap()) {
            let next = argmax(&run(&mut engine, &kv, &tokens[done..], done));
            done = tokens.len();
            if next != want {
                assert!(gap.as_f64().unwrap() < TIE, "token {next} not {want} with gap {gap}");
                break;
            }
            tokens.push(next);
        }
    }
}
