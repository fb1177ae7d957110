//! Prefill and decode at different workers, the KV handed over by the daemon.

use kvbm_tests::{DaemonOptions, Frontend, Node, Process, Random};
use serde_json::{Value, json};

use super::worker;

const BLOCK: usize = 16;
const POOL: usize = 512;
const ARGUMENTS: [&str; 4] = ["--disagg", "--disagg-threshold-tokens", "64", "--router-mode"];

fn role(node: &Node, number: usize, role: &str) -> Process {
    worker(node, number, POOL, BLOCK, &["--role", role])
}

fn request(number: u64, prompt_tokens: usize) -> Value {
    json!({
        "model": "tiny", "prompt": Random::new(number).tokens(prompt_tokens), "max_tokens": 24, "ignore_eos": true,
        "temperature": if number.is_multiple_of(2) { 0.0 } else { 0.9 }, "seed": number,
    })
}

fn text(frontend: &Frontend, body: &Value) -> String {
    let (status, answer) = frontend.complete(body);
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["usage"]["completion_tokens"], body["max_tokens"], "{answer}");
    answer["choices"][0]["text"].as_str().unwrap().to_owned()
}

fn prefilled(frontend: &Frontend, how: &str) -> f64 {
    frontend.metric("dynamo_frontend_disaggregated_requests_total", &format!("\"{how}\""))
}

#[test]
fn answers_are_the_same_and_prompts_are_computed_once() {
    let plain = Node::start(DaemonOptions::default());
    let _alone = role(&plain, 0, "both");
    let whole = Frontend::start(plain.dir.path(), &[&plain], &[]);
    whole.until_ready(1);
    let requests: Vec<Value> =
        (0..6).map(|number| request(number, 300)).chain([request(50, 33), request(51, 1)]).collect();
    let expected: Vec<String> = requests.iter().map(|body| text(&whole, body)).collect();

    for mode in ["kv", "round-robin"] {
        let node = Node::start(DaemonOptions::default());
        let _prefill = role(&node, 0, "prefill");
        let _decode = role(&node, 1, "decode");
        let frontend = Frontend::start(node.dir.path(), &[&node], &[&ARGUMENTS[..], &[mode]].concat());
        frontend.until_ready(2);
        for (body, expected) in requests.iter().zip(&expected) {
            assert_eq!(&text(&frontend, body), expected, "{mode}");
        }
        assert_eq!((prefilled(&frontend, "remote"), prefilled(&frontend, "local")), (6.0, 2.0), "{mode}");
        // The complete blocks of each prompt came out of host memory: 18 of 16 tokens.
        let onboarded = node.metric("kvbm_onboard_blocks_h2d", "");
        assert_eq!(onboarded, 6.0 * 18.0, "{mode}");
        node.assert_idle();
    }
}

#[test]
fn a_missing_role_is_made_up_for() {
    let node = Node::start(DaemonOptions::default());
    let mut prefill = role(&node, 0, "prefill");
    let decode = role(&node, 1, "decode");
    let frontend = Frontend::start(node.dir.path(), &[&node], &[&ARGUMENTS[..], &["kv"]].concat());
    frontend.until_ready(2);
    let expected = text(&frontend, &request(2, 300));
    prefill.kill();
    frontend.until_ready(1);
    assert_eq!(text(&frontend, &request(2, 300)), expected);
    assert_eq!(prefilled(&frontend, "role_missing"), 1.0);
    let _prefill = role(&node, 0, "prefill");
    frontend.until_ready(2);
    drop(decode);
    frontend.until_ready(1);
    assert_eq!(text(&frontend, &request(2, 300)), expected);
    assert_eq!(prefilled(&frontend, "role_missing"), 2.0);
}

/// Whether KV is just being copied out of a pool, or into one.
fn is_copying(node: &Node, victim: usize) -> bool {
    let status = node.status();
    let filling = status.tiers.iter().filter(|tier| tier.tier == "host").any(|tier| tier.slots.filling > 0);
    let [out, into] = [filling, status.leases > 0];
    status.transfers_in_flight > 0 && [out, into][victim]
}

#[test]
fn drill_disagg_roles_killed_while_kv_is_handed_over() {
    // Slow copies, so that the blow falls into one.
    let options = DaemonOptions { host_mb: 128.0, arguments: vec!["--copy-delay-us".into(), "5000".into()] };
    let node = Node::start(options);
    let mut processes = [role(&node, 0, "prefill"), role(&node, 1, "decode"), role(&node, 2, "decode")];
    let frontend = Frontend::start(node.dir.path(), &[&node], &[&ARGUMENTS[..], &["kv"]].concat());
    frontend.until_ready(3);
    let expected: Vec<String> = (0..8).map(|number| text(&frontend, &request(number, 300))).collect();
    let mut struck = [0; 2];
    for round in kvbm_tests::drill_seeds(4) {
        let victim = (round % 2) as usize;
        std::thread::scope(|scope| {
            let asked: Vec<_> = (0..8)
                .map(|number| {
                    let frontend = &frontend;
                    // A salt of its own: nothing of it is there before.
                    let mut body = request(number, 300);
                    body["cache_salt"] = json!(format!("round {round}"));
                    scope.spawn(move || text(frontend, &body))
                })
                .collect();
            // Soon after the first copy, or later.
            std::thread::sleep(std::time::Duration::from_millis(40 * (round / 2 % 5)));
            let in_time = || asked.iter().any(|answer| !answer.is_finished());
            let mut copying = is_copying(&node, victim);
            while !copying && in_time() {
                copying = is_copying(&node, victim);
            }
            processes[victim].kill();
            struck[victim] += usize::from(copying);
            for (number, answer) in asked.into_iter().enumerate() {
                assert_eq!(answer.join().unwrap(), expected[number], "round {round}");
            }
        });
        processes[victim] = role(&node, victim, ["prefill", "decode"][victim]);
        frontend.until_ready(3);
    }
    println!("killed in the middle of a copy: prefill {} times, decode {} times", struck[0], struck[1]);
    assert!(kvbm_tests::drill_seeds(4).count() < 4 || (struck[0] > 0 && struck[1] > 0), "{struck:?}");
    node.assert_idle();
}
