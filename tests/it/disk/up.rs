//! `kvbm up` with a disk: a long prompt is not computed again, whatever was killed meanwhile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvbm_tests::{Random, Up, eventually, eventually_within};
use serde_json::{Value, json};

/// Of 4,096 that the bundled model takes.
const PROMPT_TOKENS: usize = 3_990;
/// Whole blocks of 32 of them.
const CACHED_TOKENS: u64 = 3_968;
const BLOCKS: f64 = 124.0;

fn with_disk(dir: Option<Arc<tempfile::TempDir>>) -> Up {
    let arguments = ["--disk-cache-gb", "0.2"];
    let dir = dir.unwrap_or_else(|| Arc::new(tempfile::tempdir().unwrap()));
    Up::start_in(dir, &arguments, &[])
}

fn prompt() -> Value {
    let tokens = Random::new(21).tokens(PROMPT_TOKENS);
    json!({"model": "tiny", "prompt": tokens, "max_tokens": 16, "temperature": 0, "ignore_eos": true})
}

/// An answer, as far as it matters here.
struct Answered {
    text: String,
    cached: [u64; 3],
    took: Duration,
}

/// Asks until there is an answer: parts may be on their way.
fn ask(up: &Up) -> Answered {
    eventually_within(Duration::from_secs(60), "it answers", || {
        let started = Instant::now();
        let (status, cached, answer) = up.try_post("/v1/completions", &prompt()).ok()?;
        let took = started.elapsed();
        (status == 200).then(|| Answered {
            text: answer["choices"][0]["text"].as_str().unwrap().to_owned(),
            cached: parse(&cached),
            took,
        })
    })
}

/// Tokens from device, host and disk.
fn parse(header: &str) -> [u64; 3] {
    let mut parts = header.split(',').map(|part| part.split('=').nth(1).unwrap().parse().unwrap());
    [(); 3].map(|()| parts.next().unwrap())
}

/// Asks twice, the second time being what makes blocks worth writing, and waits until all of them are on disk.
fn ask_until_on_disk(up: &Up) -> Answered {
    let cold = ask(up);
    assert_eq!(cold.cached, [0; 3]);
    let again = ask(up);
    assert_eq!((again.cached, &again.text), ([CACHED_TOKENS, 0, 0], &cold.text));
    eventually("the prompt is on disk", || {
        (up.metric("kvbm_offload_blocks_h2d", "") >= BLOCKS).then_some(())
    });
    cold
}

/// Waits until a worker is attached to a daemon whose disk is in service.
fn attached(up: &Up) {
    eventually_within(Duration::from_secs(60), "worker and disk are back", || {
        // Ready: there is host memory into which blocks can be read.
        let back = ["kvbm_ready", "kvbm_disk_in_service", "kvbm_workers"];
        let back: Option<f64> = back.iter().map(|name| up.try_metric(name, "")).sum();
        (back? == 3.0).then_some(())
    });
}

/// Has a prompt computed, stored and found again after parts were killed, with so many tokens from each tier. A lookup may
/// always miss, if all that runs here at once is in its way; then all of it is done again, twice at most.
fn found_after(kill: impl Fn(&Up), expected: [u64; 3]) -> Up {
    for attempt in 1.. {
        let up = with_disk(None);
        let cold = ask_until_on_disk(&up);
        kill(&up);
        attached(&up);
        let warm = ask(&up);
        println!("computed in {:?}, found {:?} in {:?}", cold.took, warm.cached, warm.took);
        assert_eq!(warm.text, cold.text);
        if warm.cached == expected {
            assert!(warm.took < cold.took, "found in {:?}, computed in {:?}", warm.took, cold.took);
            return up;
        }
        assert_eq!(warm.cached, [0; 3], "all of it or nothing");
        assert!(attempt < 3, "not found in attempt {attempt}");
    }
    unreachable!("the last attempt returns or panics")
}

#[test]
fn a_prompt_survives_the_death_of_everything_that_knew_it() {
    let everything_but_the_frontend = |up: &Up| {
        up.kill(&["workers", "daemon", "holder"]);
        let killed = up.pids();
        eventually("they are gone", || {
            let alive = |pid: &&u64| std::path::Path::new(&format!("/proc/{pid}/root")).exists();
            (killed.iter().filter(alive).count() <= 1).then_some(())
        });
    };
    let up = found_after(everything_but_the_frontend, [0, 0, CACHED_TOKENS]);
    assert_eq!(up.metric("kvbm_onboard_blocks_d2d", ""), BLOCKS);
}

#[test]
fn with_the_holder_alive_the_prompt_is_still_in_host_memory() {
    let workers_and_daemon = |up: &Up| {
        let daemon = up.try_metric("kvbm_uptime_seconds", "").unwrap();
        up.kill(&["workers", "daemon"]);
        eventually_within(Duration::from_secs(60), "another daemon serves", || {
            up.try_metric("kvbm_uptime_seconds", "").filter(|age| *age < daemon)
        });
    };
    found_after(workers_and_daemon, [0, CACHED_TOKENS, 0]);
}

#[test]
fn a_prompt_is_found_on_disk_after_an_orderly_end() {
    let mut first = with_disk(None);
    let cold = ask_until_on_disk(&first);
    assert!(first.terminate().success());
    assert!(first.log().contains("disk cache closed"), "it was closed cleanly");
    // A lookup may always miss, if all that runs here at once is in its way. Then the blocks are there in the next life.
    for life in 1.. {
        let mut next = with_disk(Some(Arc::clone(&first.dir)));
        attached(&next);
        assert_eq!(next.metric("kvbm_disk_recovered_blocks", ""), BLOCKS);
        assert_eq!(next.metric("kvbm_disk_recovery_damaged_entries", ""), 0.0);
        let warm = ask(&next);
        assert_eq!(warm.text, cold.text);
        if warm.cached == [0, 0, CACHED_TOKENS] {
            return;
        }
        assert!(life < 3, "{:?} in life {life}: {}", warm.cached, next.log());
        assert!(next.terminate().success());
    }
}
