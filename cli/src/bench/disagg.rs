//! What a flood of long prompts does to answers that are being given: two workers that do both, against one that computes
//! prompts and one that answers.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::Row;
use super::row::{histogram, percentile_us};

const WARM_UP: Duration = Duration::from_secs(2);
const MEASURE: Duration = Duration::from_secs(10);
/// Each shape is measured so often, in turn.
const ROUNDS: usize = 2;
/// Clients that listen to answers, and clients that send long prompts.
const LISTENERS: usize = 4;
const FLOODERS: u64 = 2;
const ANSWER_TOKENS: u32 = 128;
const PROMPT_TOKENS: u64 = 1500;

/// How the two workers share the work.
#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    workers: &'static [&'static str],
}

const SHAPES: [Shape; 2] = [
    Shape { name: "both", workers: &["--workers", "2"] },
    Shape { name: "apart", workers: &["--workers", "1", "--prefill-workers", "1"] },
];

/// Gaps between tokens, and prompts that were computed meanwhile.
struct Figures {
    gaps: Histogram<u64>,
    prompts: u64,
}

pub(super) fn measure() -> Result<Vec<Row>, String> {
    let mut all = SHAPES.map(|_| Figures { gaps: histogram(), prompts: 0 });
    for _ in 0..ROUNDS {
        for (shape, figures) in SHAPES.iter().zip(&mut all) {
            let up = Up::start(*shape)?;
            let round = load(&up.address)?;
            figures.gaps.add(round.gaps).map_err(|error| error.to_string())?;
            figures.prompts += round.prompts;
        }
    }
    let seconds = ROUNDS as f64 * MEASURE.as_secs_f64();
    let p99 = |figures: &Figures| percentile_us(&figures.gaps, 99.0);
    let together = p99(&all[0]);
    let mut rows = Vec::new();
    for (shape, figures) in SHAPES.iter().zip(&all) {
        let detail = format!(
            "two workers, {LISTENERS} answers, {:.1} prompts of {PROMPT_TOKENS} tokens per second",
            figures.prompts as f64 / seconds
        );
        let row = |name: &str, value: f64| {
            Row::new(format!("disagg.{}.itl.{name}", shape.name), value, "us").detail(&detail)
        };
        rows.push(row("p50", percentile_us(&figures.gaps, 50.0)));
        let last = row("p99", p99(figures));
        rows.push(if shape.name == "apart" { last.at_most(together) } else { last });
    }
    Ok(rows)
}

fn load(address: &str) -> Result<Figures, String> {
    let (counting, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let prompts = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let listen = || {
            let mut gaps = histogram();
            while !stop.load(Ordering::Relaxed) {
                let mut last = None;
                ask(address, &body(1 + LISTENERS as u64, 20, ANSWER_TOKENS), || {
                    let now = Instant::now();
                    if let Some(last) = last.replace(now)
                        && counting.load(Ordering::Relaxed)
                    {
                        gaps.saturating_record((now - last).as_nanos() as u64);
                    }
                })?;
            }
            Ok::<_, String>(gaps)
        };
        let flood = |flooder: u64| {
            let mut number = flooder << 32;
            while !stop.load(Ordering::Relaxed) {
                number += 1;
                ask(address, &body(number, PROMPT_TOKENS, 1), || {})?;
                prompts.fetch_add(u64::from(counting.load(Ordering::Relaxed)), Ordering::Relaxed);
            }
            Ok::<_, String>(())
        };
        let listeners: Vec<_> = (0..LISTENERS).map(|_| scope.spawn(listen)).collect();
        let flooders: Vec<_> = (1..=FLOODERS).map(|flooder| scope.spawn(move || flood(flooder))).collect();
        std::thread::sleep(WARM_UP);
        counting.store(true, Ordering::Relaxed);
        std::thread::sleep(MEASURE);
        counting.store(false, Ordering::Relaxed);
        stop.store(true, Ordering::Relaxed);
        let mut gaps = histogram();
        for listener in listeners {
            let of_one = listener.join().map_err(|_| "a client panicked".to_owned())??;
            gaps.add(of_one).map_err(|error| error.to_string())?;
        }
        for flooder in flooders {
            flooder.join().map_err(|_| "a client panicked".to_owned())??;
        }
        Ok(Figures { gaps, prompts: prompts.load(Ordering::Relaxed) })
    })
}

/// A prompt that no other number has, from its first token on.
fn body(number: u64, prompt_tokens: u64, max_tokens: u32) -> String {
    let token = |at: u64| {
        let digest = blake3::hash(&[number.to_le_bytes(), at.to_le_bytes()].concat());
        5 + u64::from(digest.as_bytes()[0]) * 15 + u64::from(digest.as_bytes()[1] % 15)
    };
    let prompt: Vec<u64> = (0..prompt_tokens).map(token).collect();
    let body = serde_json::json!({
        "model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true, "stream": true, "temperature": 0,
    });
    body.to_string()
}

/// Sends a request and tells of each event of its answer as it comes.
fn ask(address: &str, body: &str, mut event: impl FnMut()) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("ask {address}: {error}");
    let mut stream = TcpStream::connect(address).map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let mut whole = false;
    for line in BufReader::new(stream).lines() {
        let line = line.map_err(failed)?;
        if line.starts_with("data: [DONE]") {
            whole = true;
        } else if line.starts_with("data: ") {
            event();
        }
    }
    if whole { Ok(()) } else { Err("an answer broke off".into()) }
}

/// `kvbm up` in one shape; each worker has one thread.
struct Up {
    child: Child,
    address: String,
    _dir: tempfile::TempDir,
}

impl Up {
    fn start(shape: Shape) -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|error| format!("make a temporary folder: {error}"))?;
        let program = std::env::current_exe().map_err(|error| format!("find own program: {error}"))?;
        let mut child = Command::new(program)
            .args(["up", "--json", "--http-port", "0", "--metrics-port", "0", "--cpu-cache-gb", "0.5"])
            .args(shape.workers)
            .arg("--state-dir")
            .arg(dir.path())
            .envs([("DYN_LOG", "warn"), ("KVBM_WORKER_THREADS", "1")])
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("start kvbm up: {error}"))?;
        let stdout = child.stdout.take().ok_or("kvbm up has no standard output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).map_err(|error| error.to_string())?;
        let mut up = Self { child, address: String::new(), _dir: dir };
        let ready: serde_json::Value =
            serde_json::from_str(&line).map_err(|error| format!("kvbm up did not become ready: {error}"))?;
        let address = ready["http"].as_str().unwrap_or_default().trim_start_matches("http://");
        address.replace("0.0.0.0", "127.0.0.1").clone_into(&mut up.address);
        Ok(up)
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
