//! What the cache costs when it never hits: a worker with a daemon against one without, turn by turn, on prompts that
//! nobody has seen.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvbm_proto::v1::worker_client::WorkerClient;
use kvbm_proto::v1::{GenerateRequest, Sampling};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

use super::Row;
use super::daemon::BenchDaemon;
use crate::parent::PARENT_PID;
use crate::ready::Ready;

/// Turns of each worker.
const TURNS: u32 = 20;
/// Requests of one turn, one after the other.
const REQUESTS: u32 = 10;
const PROMPT_TOKENS: usize = 512;
const OUTPUT_TOKENS: u32 = 32;
/// Blocks of 32 tokens: the pool turns over several times in each measurement.
const POOL_BLOCKS: u32 = 512;
const HOST_BYTES: u64 = 256 << 20;
/// More time than this is too much, unless two equal workers differ by more.
const LIMIT_PERCENT: f64 = 1.0;

pub(super) fn measure() -> Result<Vec<Row>, String> {
    let daemon = BenchDaemon::start(HOST_BYTES)?;
    let dir = tempfile::tempdir().map_err(|error| format!("make a temporary folder: {error}"))?;
    let runtime = Runtime::new().map_err(|error| error.to_string())?;
    let guard = runtime.enter();
    let socket = daemon.socket();
    let mut with = BenchWorker::start(dir.path(), "with", Some(&socket), vec![daemon.pid()])?;
    let mut alone = BenchWorker::start(dir.path(), "alone", None, vec![])?;
    let mut twin = BenchWorker::start(dir.path(), "twin", None, vec![])?;
    drop(guard);
    for turn in 0..=TURNS {
        // Everybody is first, second and third equally often; the first round warms up.
        let mut order = [&mut with, &mut alone, &mut twin];
        order.rotate_left((turn % 3) as usize);
        for worker in order {
            worker.turn(&runtime, turn)?;
        }
    }
    let rows = [("time", BenchWorker::seconds as fn(&BenchWorker) -> f64), ("cpu", BenchWorker::cpu_seconds)];
    let tokens = f64::from(TURNS * REQUESTS) * (PROMPT_TOKENS as f64 + f64::from(OUTPUT_TOKENS));
    Ok(rows
        .into_iter()
        .map(|(name, figure)| {
            let (a, b, c) = (figure(&with), figure(&alone), figure(&twin));
            let percent = |x: f64| (x / b - 1.0) * 100.0;
            let twins = percent(c).abs();
            let detail = format!(
                "{TURNS} interleaved turns of {REQUESTS} unseen prompts of {PROMPT_TOKENS} + {OUTPUT_TOKENS} tokens; \
                 {:.1} us per token with the daemon (its CPU included), {:.1} without; two workers without differ by {twins:.2} %",
                a / tokens * 1e6,
                b / tokens * 1e6,
            );
            Row::new(format!("overhead.{name}"), percent(a), "%").at_most(twins.max(LIMIT_PERCENT)).detail(detail)
        })
        .collect())
}

struct BenchWorker {
    child: Child,
    client: WorkerClient<Channel>,
    /// Processes whose CPU time counts.
    pids: Vec<u32>,
    seed: u64,
    turns: Vec<(f64, f64)>,
}

impl BenchWorker {
    fn start(dir: &Path, name: &str, daemon: Option<&Path>, mut pids: Vec<u32>) -> Result<Self, String> {
        let program = std::env::current_exe().map_err(|error| format!("find own program: {error}"))?;
        let model = crate::up::bundled_model().ok_or("the bundled model was not found")?;
        let endpoint = dir.join(format!("{name}.sock"));
        let ready = dir.join(format!("{name}.json"));
        let mut command = Command::new(program);
        command.arg("worker").arg("--model").arg(model).arg("--listen");
        command.arg(format!("unix:{}", endpoint.display()));
        command.args(["--device-cache-blocks", &POOL_BLOCKS.to_string(), "--ready-file"]).arg(&ready);
        match daemon {
            Some(socket) => command.arg("--socket").arg(socket),
            None => command.arg("--no-daemon"),
        };
        let command = command.env(PARENT_PID, std::process::id().to_string()).env("DYN_LOG", "warn");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        let child = child.map_err(|error| format!("start a worker: {error}"))?;
        pids.push(child.id());
        let client = WorkerClient::new(connect(&endpoint)?);
        let worker = Self { child, client, pids, seed: 1, turns: vec![] };
        let deadline = Instant::now() + Duration::from_secs(30);
        while Ready::read(&ready).is_none() {
            if Instant::now() > deadline {
                return Err(format!("the worker {name:?} did not become ready"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(worker)
    }

    /// One turn; those of number 0 do not count.
    fn turn(&mut self, runtime: &Runtime, number: u32) -> Result<(), String> {
        let (started, cpu) = (Instant::now(), self.cpu_now());
        for _ in 0..REQUESTS {
            let prompt = self.unseen_prompt();
            runtime.block_on(generate(self.client.clone(), prompt))?;
        }
        if number > 0 {
            self.turns.push((started.elapsed().as_secs_f64(), self.cpu_now() - cpu));
        }
        Ok(())
    }

    fn unseen_prompt(&mut self) -> Vec<u32> {
        let mut token = || {
            self.seed =
                self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            5 + (self.seed >> 33) as u32 % 4000
        };
        (0..PROMPT_TOKENS).map(|_| token()).collect()
    }

    /// User and system time of its processes, seconds.
    fn cpu_now(&self) -> f64 {
        let ticks = |pid: &u32| -> Option<u64> {
            let stat =
                std::fs::read_to_string(PathBuf::from("/proc").join(pid.to_string()).join("stat")).ok()?;
            let fields: Vec<&str> = stat.rsplit(") ").next()?.split(' ').collect();
            Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
        };
        let ticks: u64 = self.pids.iter().filter_map(ticks).sum();
        ticks as f64 / rustix::param::clock_ticks_per_second() as f64
    }

    /// Of all turns.
    fn cpu_seconds(&self) -> f64 {
        self.turns.iter().map(|(_, cpu)| cpu).sum()
    }

    /// Twenty times the median turn: one disturbed turn does not count.
    fn seconds(&self) -> f64 {
        let mut seconds: Vec<f64> = self.turns.iter().map(|(seconds, _)| *seconds).collect();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2] * f64::from(TURNS)
    }
}

impl Drop for BenchWorker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn connect(socket: &Path) -> Result<Channel, String> {
    let endpoint =
        Endpoint::try_from(format!("unix:{}", socket.display())).map_err(|error| error.to_string())?;
    Ok(endpoint.connect_lazy())
}

async fn generate(mut client: WorkerClient<Channel>, prompt: Vec<u32>) -> Result<(), String> {
    let request = GenerateRequest {
        prompt,
        max_tokens: OUTPUT_TOKENS,
        ignore_eos: true,
        sampling: Some(Sampling::default()),
        ..GenerateRequest::default()
    };
    let answer = client.generate(request).await.map_err(|status| status.to_string())?;
    let mut stream = answer.into_inner();
    while stream.message().await.map_err(|status| status.to_string())?.is_some() {}
    Ok(())
}
