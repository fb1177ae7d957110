//! A daemon of its own for a measurement: a child process, with nobody else's traffic.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvbm_connector::Client;
use kvbm_hash::{BaseNamespace, BaseParts, Namespace};
use kvbm_proto::v1::{OpenPool, PoolMode, PoolReply};
use kvbm_server::status::Status;
use kvbm_shm::PoolMemory;

use crate::parent::PARENT_PID;
use crate::ready::Ready;

/// How long host memory may take to be populated.
const POPULATE_MAX: Duration = Duration::from_secs(60);

/// Ends with its owner.
pub(super) struct BenchDaemon {
    child: Child,
    dir: tempfile::TempDir,
    /// URL of its metrics.
    metrics: String,
}

impl BenchDaemon {
    /// Starts it, with `host_bytes` of host memory.
    pub fn start(host_bytes: u64) -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|error| format!("make a temporary folder: {error}"))?;
        let program = std::env::current_exe().map_err(|error| format!("find own program: {error}"))?;
        let ready = dir.path().join("ready.json");
        let child = Command::new(program)
            .args(["daemon", "--metrics-port", "0", "--cpu-cache-gb", &(host_bytes as f64 / 1e9).to_string()])
            .arg("--socket")
            .arg(dir.path().join("kvbm.sock"))
            .arg("--ready-file")
            .arg(&ready)
            .env(PARENT_PID, std::process::id().to_string())
            .env("DYN_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| format!("start a daemon: {error}"))?;
        let mut daemon = Self { child, dir, metrics: String::new() };
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(ready) = Ready::read(&ready) {
                daemon.metrics = ready.metrics;
                return Ok(daemon);
            }
            if let Ok(Some(status)) = daemon.child.try_wait() {
                return Err(format!("the daemon ended: {status}"));
            }
            if Instant::now() > deadline {
                return Err("the daemon did not become ready".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sum of a metric's samples, or of those whose line contains `label`.
    pub fn metric(&self, name: &str, label: &str) -> Result<f64, String> {
        let failed = |error: std::io::Error| format!("read {}: {error}", self.metrics);
        let address = self.metrics.trim_start_matches("http://");
        let (address, path) = address.split_once('/').unwrap_or((address, "metrics"));
        let mut stream = TcpStream::connect(address).map_err(failed)?;
        write!(stream, "GET /{path} HTTP/1.0\r\n\r\n").map_err(failed)?;
        let mut page = String::new();
        stream.read_to_string(&mut page).map_err(failed)?;
        let samples = page.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])) && line.contains(label)
        });
        let value = |line: &str| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok());
        Ok(samples.filter_map(value).sum())
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("kvbm.sock")
    }

    /// Waits until all host memory is populated.
    pub async fn populated(&self, client: &Client) -> Result<(), String> {
        until(client, |status| status.tiers.iter().any(|tier| tier.tier == "host" && tier.state == "on"))
            .await
    }

    /// Waits until all host memory is registered with the GPU that an engine has opened.
    pub async fn registered(&self, client: &Client) -> Result<(), String> {
        until(client, |status| {
            let host = status.tiers.iter().find(|tier| tier.tier == "host");
            // Segments leave a little of the capacity over.
            let wanted = host.map_or(0, |host| host.capacity_bytes / 100 * 99);
            status.gpus.iter().any(|gpu| gpu.state == "on" && gpu.host_registered_bytes >= wanted)
        })
        .await
    }
}

async fn until(client: &Client, holds: impl Fn(&Status) -> bool) -> Result<(), String> {
    let deadline = Instant::now() + POPULATE_MAX;
    loop {
        let status = client.status().await.map_err(|error| error.to_string())?;
        let status: Status = serde_json::from_str(&status).map_err(|error| error.to_string())?;
        if holds(&status) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!("host memory does not get ready: {:?} {:?}", status.tiers, status.gpus));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl Drop for BenchDaemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What blocks of that size have in common.
pub(super) fn bench_base(block_bytes: usize) -> BaseNamespace {
    BaseNamespace::new(&BaseParts {
        model: "bench",
        revision: "1",
        kv_dtype: "bytes",
        layout: &block_bytes.to_string(),
        tokens_per_block: 32,
        parallel: "tp1",
    })
}

/// An attached engine that does not compute.
pub(super) struct BenchEngine {
    pub client: Client,
    pub namespace: Namespace,
    pub namespace_id: u32,
    pub memory: PoolMemory,
    pub pool: PoolReply,
}

impl BenchEngine {
    /// Attaches, and opens a pool of `block_count` blocks of `block_bytes`.
    pub async fn attach(client: Client, block_bytes: usize, block_count: u32) -> Result<Self, String> {
        Self::attach_on(client, "cpu:0", block_bytes, block_count).await
    }

    /// As [`BenchEngine::attach`], on another device.
    pub async fn attach_on(
        client: Client,
        device: &str,
        block_bytes: usize,
        block_count: u32,
    ) -> Result<Self, String> {
        let base = bench_base(block_bytes);
        let namespace = base.namespace(None, None);
        let client = client.with_deadline(Duration::from_secs(60));
        let registered = client.register_namespace(namespace, base, "", "bench").await;
        let namespace_id = registered.map_err(|error| error.to_string())?;
        let open = OpenPool {
            mode: PoolMode::Owned.into(),
            base: base.0.to_vec(),
            block_bytes: block_bytes as u64,
            block_count,
            tokens_per_block: 32,
            device: device.into(),
            shard_count: 1,
            fresh: true,
            ..OpenPool::default()
        };
        let (memory, pool) = client.open_pool(open).await.map_err(|error| error.to_string())?;
        Ok(Self { client, namespace, namespace_id, memory, pool })
    }
}
