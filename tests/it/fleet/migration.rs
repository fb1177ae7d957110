//! Answers that outlive their workers: killed, stopped and drained at random, no stream may lose, repeat or change a
//! token. `KVBM_DRILL_STREAMS` sets how many streams there are.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use kvbm_tests::{DaemonOptions, Frontend, Node, Process, Random, Streamed};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::whole::{Request, Whole, hear};
use super::worker;

const WORKERS: usize = 3;
const BLOCK: usize = 16;
/// A pool promises no more than half of its blocks to what comes from host memory at once: that must be enough for all
/// streams (of 28 blocks at most) when they move to one worker, or tokens are computed again for want of promises.
const POOL: usize = 1024;
const CLIENTS: usize = 16;
/// Different requests; streams ask them again and again.
const REQUESTS: usize = 20;
const STREAMS: usize = 100;
const TOKENS: usize = 300;

/// Half of them greedy, half by chance with a fixed seed; prompts share beginnings. Some want several choices, some the
/// scores of tokens, some a form.
fn request(number: usize) -> Request {
    let mut prompt = Random::new(number as u64 / 4).tokens(100);
    prompt.extend(Random::new(1000 + number as u64).tokens(40));
    let temperature = if number.is_multiple_of(2) { 0.0 } else { 0.8 };
    let mut body = json!({
        "max_tokens": TOKENS, "ignore_eos": true, "temperature": temperature, "seed": number,
        "stop": if number % 5 == 4 { json!(["zq"]) } else { Value::Null },
    });
    match number % 10 {
        3 => body["n"] = json!(3),
        5 => body["logprobs"] = json!(2),
        7 => {
            body["presence_penalty"] = json!(0.5);
            body["logprobs"] = json!(1);
        }
        8 => body["guided_regex"] = json!("([a-f]{3}[0-9]{3} ){100}"),
        9 => {
            let numbers =
                json!({ "type": "array", "items": { "type": "integer", "maximum": 999 }, "minItems": 99 });
            body["guided_json"] = numbers;
        }
        _ => {}
    }
    Request::completion(&prompt, body)
}

/// How a worker is taken away.
#[derive(Debug, Clone, Copy)]
enum Blow {
    Kill,
    Stop,
    Drain,
}

fn strike(node: &Node, place: &mut Process, number: usize, blow: Blow) {
    match blow {
        Blow::Kill => place.kill(),
        Blow::Stop => {
            place.signal(Signal::STOP);
            // Longer than the frontend is patient with one that answers no pings.
            std::thread::sleep(Duration::from_secs(5));
            place.kill();
        }
        Blow::Drain => {
            place.terminate();
        }
    }
    *place = start(node, number);
}

/// Draining ends before its answers do.
fn start(node: &Node, number: usize) -> Process {
    worker(node, number, POOL, BLOCK, &["--drain-seconds", "0.2"])
}

fn expect_whole(streamed: &Streamed, expected: &str) {
    assert!(streamed.error.is_none(), "{streamed:?}");
    assert!(streamed.finish.is_some(), "it broke off: {streamed:?}");
    assert_eq!(streamed.text, expected);
}

/// Bounds of the histogram of gaps, in seconds.
const BOUNDS: [&str; 8] = ["0.003", "0.01", "0.02", "0.03", "0.05", "0.1", "0.3", "0.5"];

/// Gaps between tokens over a move: what of them was spent copying KV into the next worker's pool, or the rest.
struct Gaps {
    part: &'static str,
    moves: f64,
    mean_ms: f64,
    /// Moves that took no longer than each bound.
    within: [f64; 8],
}

impl Gaps {
    fn of(frontend: &Frontend, part: &'static str) -> Self {
        let metric = |what: &str, more: &str| {
            let label = format!("part=\"{part}\"{more}");
            frontend.metric(&format!("dynamo_frontend_model_migration_gap_seconds_{what}"), &label)
        };
        let moves = metric("count", "");
        let within = BOUNDS.map(|bound| metric("bucket", &format!(",le=\"{bound}\"")));
        Self { part, moves, mean_ms: 1000.0 * metric("sum", "") / moves.max(1.0), within }
    }

    /// The first bound that half of them keep to, as seconds.
    fn median_below(&self) -> f64 {
        let at = self.within.iter().position(|count| 2.0 * count >= self.moves);
        at.map_or(f64::INFINITY, |at| BOUNDS[at].parse().unwrap())
    }

    fn print(&self) {
        let shares: Vec<String> =
            BOUNDS.iter().zip(self.within).map(|(bound, count)| format!("{count} in {bound} s")).collect();
        println!(
            "gap, {}: mean {:.1} ms, half of {} within {} s; {}",
            self.part,
            self.mean_ms,
            self.moves,
            self.median_below(),
            shares.join(", ")
        );
    }
}

#[test]
fn drill_migration() {
    let at_length = std::env::var("KVBM_DRILL_STREAMS").ok().map(|count| count.parse::<usize>().unwrap());
    let streams = at_length.unwrap_or(STREAMS);
    let node = Node::start(DaemonOptions::default());
    let mut processes: Vec<Process> = (0..WORKERS).map(|number| start(&node, number)).collect();
    let arguments = ["--router-mode", "kv", "--migration-limit", "1000"];
    let frontend = Frontend::start(node.dir.path(), &[&node], &arguments);
    frontend.until_ready(WORKERS);
    let expected: Vec<Whole> =
        (0..REQUESTS).map(|number| hear(&frontend, &request(number), |_, _| ()).whole).collect();
    let (next, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let disturbed = || frontend.metric("dynamo_frontend_model_migration_total", "ongoing_request");
    let gaps = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        // On until somebody was disturbed.
                        if at >= streams && (disturbed() > 0.0 || at >= 20 * streams) {
                            return;
                        }
                        let number = at % REQUESTS;
                        let heard = hear(&frontend, &request(number), |_, _| ());
                        assert_eq!(heard.whole, expected[number], "request {number}");
                        gaps.lock().unwrap().push(heard.longest_gap);
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            let mut random = Random::new(11);
            while !over.load(Ordering::Relaxed) {
                let number = random.within(0..WORKERS);
                let blow = *random.pick(&[Blow::Kill, Blow::Kill, Blow::Drain, Blow::Drain, Blow::Stop]);
                strike(&node, &mut processes[number], number, blow);
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        let ended: Vec<_> = clients.into_iter().map(|client| client.join()).collect();
        over.store(true, Ordering::Relaxed);
        for client in ended {
            client.unwrap();
        }
    });
    let moved = |outcome| frontend.metric("dynamo_frontend_model_migration_total", outcome);
    let (ongoing, retried) = (moved("ongoing_request"), moved("new_request"));
    let recomputed = frontend.metric("dynamo_frontend_model_migration_recomputed_tokens_total", "");
    let resumed = frontend.metric("dynamo_frontend_model_migration_duration_seconds_count", "");
    let seconds = frontend.metric("dynamo_frontend_model_migration_duration_seconds_sum", "");
    let within = |limit| frontend.metric("dynamo_frontend_model_migration_duration_seconds_bucket", limit);
    let soon = within("le=\"0.05\"");
    let of = |reason: &str| {
        let label = format!("reason=\"{reason}\"");
        frontend.metric("dynamo_frontend_model_migration_recomputed_tokens_total", &label)
    };
    let [open_block, not_offloaded, missed] = ["open_block", "not_offloaded", "missed"].map(of);
    let mut gaps = gaps.into_inner().unwrap();
    gaps.sort();
    println!(
        "{streams} streams: {ongoing} moves, {retried} retries, {:.1} tokens recomputed per move (block being filled \
         {open_block}, not offloaded {not_offloaded}, missed {missed}), {:.1} ms per move, {soon} of {resumed} within 50 ms, \
         longest gap of a stream p50 {:?}",
        recomputed / resumed.max(1.0),
        1000.0 * seconds / resumed.max(1.0),
        gaps[gaps.len() / 2],
    );
    let [onboard, rest] = ["onboard", "rest"].map(|part| Gaps::of(&frontend, part));
    onboard.print();
    rest.print();
    // No more than the block that was being filled, and what had not been offloaded.
    assert_eq!(recomputed, open_block + not_offloaded);
    assert!(open_block <= BLOCK as f64 * resumed, "{open_block} tokens of {resumed} blocks");
    // In a few moves, or beside other tests, time says nothing.
    let is_soon = at_length.is_none() || rest.median_below() <= 0.05;
    assert!(is_soon, "half of the moves took longer than 50 ms beyond the copy");
    assert!(ongoing > 0.0, "nothing was disturbed");
}

#[test]
fn an_answer_goes_on_with_what_the_dead_worker_computed() {
    let node = Node::start(DaemonOptions::default());
    let mut first = start(&node, 0);
    let frontend = Frontend::start(node.dir.path(), &[&node], &["--router-mode", "kv"]);
    frontend.until_ready(1);
    let body = json!({
        "model": "tiny", "prompt": Random::new(3).tokens(400), "max_tokens": 3000, "stream": true, "ignore_eos": true,
        "temperature": 0.7, "seed": 5,
    });
    let expected = frontend.stream(&body).text;
    let tokens = || frontend.metric("dynamo_frontend_output_tokens_total", "");
    let before = tokens();
    std::thread::scope(|scope| {
        let stream = scope.spawn(|| frontend.stream(&body));
        kvbm_tests::eventually("some of it has come", || (tokens() > before + 200.0).then_some(()));
        let _second = start(&node, 1);
        frontend.until_ready(2);
        first.kill();
        expect_whole(&stream.join().unwrap(), &expected);
    });
    assert_eq!(frontend.metric("dynamo_frontend_model_migration_total", "ongoing_request"), 1.0);
    let recomputed = frontend.metric("dynamo_frontend_model_migration_recomputed_tokens_total", "");
    // The block that was being filled, and what was on its way to host memory when the worker died.
    assert!(recomputed <= 3.0 * BLOCK as f64, "{recomputed} tokens were computed again");
    node.assert_idle();
}
