//! A daemon and a worker for a measurement: child processes, with nobody else's traffic.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvbm_connector::Client;
use kvbm_proto::v1::generate_event::Body;
use kvbm_proto::v1::worker_client::WorkerClient;
use kvbm_proto::v1::{GenerateRequest, Sampling};
use kvbm_server::status::Status;
use rustix::process::{Pid, Signal};
use tonic::transport::{Channel, Endpoint};

use crate::parent::PARENT_PID;
use crate::ready::Ready;

/// Loading weights, populating host memory, filling a disk: longer than any of them takes.
const PATIENCE: Duration = Duration::from_secs(300);
/// A prompt that warms up what is used for the first time, tokens, and how often.
const WARM_UP: (u32, usize) = (3000, 3);

/// What is started.
#[derive(Debug, Clone)]
pub(super) struct NodeOptions {
    /// Where the worker computes.
    pub device: String,
    /// Its folder.
    pub model: PathBuf,
    /// A shape, or `none`.
    pub random_weights: String,
    pub pool_blocks: usize,
    pub host_gb: f64,
    /// The disk tier, as large as the host's, to which each block goes as soon as it can.
    pub disk: bool,
    /// In which folder everything is.
    pub dir: Option<PathBuf>,
    /// More for the daemon.
    pub daemon_flags: Vec<String>,
}

/// The first token of an answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct First {
    /// From the request to the token.
    pub seconds: f64,
    /// Prompt tokens that were found on the device.
    pub device_tokens: usize,
    /// In host memory.
    pub host_tokens: usize,
    /// On disk.
    pub disk_tokens: usize,
}

/// See the module.
pub(super) struct Node {
    /// Ends before its folder goes.
    worker: Option<Worker>,
    daemon: Option<Running>,
    daemon_flags: Vec<String>,
    worker_flags: Vec<String>,
    dir: tempfile::TempDir,
}

struct Worker {
    _process: Running,
    client: WorkerClient<Channel>,
}

/// A child that ends with its owner: asked first, so that a drive is left in order.
struct Running(Child);

impl Node {
    /// Starts the daemon.
    pub fn start(options: NodeOptions) -> Result<Self, String> {
        let dir = match &options.dir {
            Some(folder) => tempfile::tempdir_in(folder),
            None => tempfile::tempdir(),
        };
        let dir = dir.map_err(|error| format!("make a temporary folder: {error}"))?;
        let gb = options.host_gb.to_string();
        let mut daemon_flags: Vec<String> =
            ["daemon", "--metrics-port", "0", "--cpu-cache-gb", &gb].map(String::from).to_vec();
        if options.disk {
            let eager = [
                "--disable-disk-offload-filter",
                "--disk-idle-ms",
                "0",
                // A drive that is filled at once may stand still for a while.
                "--disk-deadline-ms",
                "120000",
                "--disk-cache-gb",
                &gb,
            ];
            daemon_flags.extend(eager.map(String::from));
        }
        daemon_flags.extend(options.daemon_flags);
        let mut worker_flags: Vec<String> =
            ["worker", "--device", &options.device, "--fresh-device-pool", "--block-size", "32", "--model"]
                .map(String::from)
                .to_vec();
        worker_flags.push(options.model.display().to_string());
        worker_flags.extend(["--device-cache-blocks".into(), options.pool_blocks.to_string()]);
        if options.random_weights != "none" {
            worker_flags.extend(["--random-weights".into(), options.random_weights]);
        }
        let mut node = Self { worker: None, daemon: None, daemon_flags, worker_flags, dir };
        node.restart_daemon()?;
        Ok(node)
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.path("kvbm.sock")
    }

    /// To talk to the worker.
    pub fn client(&self) -> Result<WorkerClient<Channel>, String> {
        Ok(self.worker.as_ref().ok_or("no worker was started")?.client.clone())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A new daemon, with empty host memory and whatever is on disk.
    pub fn restart_daemon(&mut self) -> Result<(), String> {
        self.worker = None;
        self.daemon = None;
        let mut flags = self.daemon_flags.clone();
        flags.extend(["--socket".into(), self.socket().display().to_string()]);
        flags.extend(["--state-dir".into(), self.dir.path().display().to_string()]);
        self.daemon = Some(Running::start(&flags, &self.path("daemon.json"))?);
        Ok(())
    }

    /// A new worker, with an empty pool.
    pub fn start_worker(&mut self) -> Result<(), String> {
        self.worker = None;
        let endpoint = self.path("worker.sock");
        let mut flags = self.worker_flags.clone();
        flags.extend(["--listen".into(), format!("unix:{}", endpoint.display())]);
        flags.extend(["--socket".into(), self.socket().display().to_string()]);
        let process = Running::start(&flags, &self.path("worker.json"))?;
        let endpoint =
            Endpoint::try_from(format!("unix:{}", endpoint.display())).map_err(|error| error.to_string())?;
        self.worker = Some(Worker { _process: process, client: WorkerClient::new(endpoint.connect_lazy()) });
        let (length, times) = WARM_UP;
        tokio::runtime::Handle::current().block_on(async {
            for _ in 0..times {
                self.ask((0..length).map(|token| token % 997 + 3).collect()).await?;
            }
            Ok(())
        })
    }

    /// Asks for one token.
    pub async fn ask(&mut self, prompt: Vec<u32>) -> Result<First, String> {
        let worker = self.worker.as_mut().ok_or("no worker was started")?;
        let request = GenerateRequest {
            prompt,
            max_tokens: 1,
            ignore_eos: true,
            sampling: Some(Sampling::default()),
            ..GenerateRequest::default()
        };
        let text = |status: tonic::Status| status.to_string();
        let started = Instant::now();
        let mut stream = worker.client.generate(request).await.map_err(text)?.into_inner();
        let mut first = First { seconds: 0.0, device_tokens: 0, host_tokens: 0, disk_tokens: 0 };
        while let Some(event) = stream.message().await.map_err(text)? {
            match event.body {
                Some(Body::Started(found)) => {
                    first.device_tokens = found.device_tokens as usize;
                    first.host_tokens = found.host_tokens as usize;
                    first.disk_tokens = found.disk_tokens as usize;
                }
                Some(Body::Tokens(_)) if first.seconds == 0.0 => {
                    first.seconds = started.elapsed().as_secs_f64();
                }
                Some(Body::Tokens(_) | Body::Finished(_)) | None => {}
            }
        }
        if first.seconds == 0.0 { Err("an answer had no token".into()) } else { Ok(first) }
    }

    /// Waits until that many blocks are resident in a tier.
    pub async fn resident(&self, tier: &str, blocks: usize) -> Result<(), String> {
        let client = Client::connect_as(&self.socket(), "kvbm-bench", PATIENCE).await;
        let client = client.map_err(|error| error.to_string())?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = client.status().await.map_err(|error| error.to_string())?;
            let status: Status = serde_json::from_str(&status).map_err(|error| error.to_string())?;
            let there = status.tiers.iter().find(|known| known.tier == tier);
            if there.is_some_and(|there| there.slots.resident >= blocks as u64) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("{blocks} blocks did not come to {tier}: {:?}", status.tiers));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Running {
    fn start(flags: &[String], ready: &Path) -> Result<Self, String> {
        let what = flags.first().cloned().unwrap_or_default();
        let _ = std::fs::remove_file(ready);
        let program = std::env::current_exe().map_err(|error| format!("find own program: {error}"))?;
        let child = Command::new(program)
            .args(flags)
            .arg("--ready-file")
            .arg(ready)
            .env(PARENT_PID, std::process::id().to_string())
            .env("DYN_LOG", std::env::var("DYN_LOG").unwrap_or_else(|_| "warn".into()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| format!("start a {what}: {error}"))?;
        let mut running = Self(child);
        let deadline = Instant::now() + PATIENCE;
        while Ready::read(ready).is_none() {
            if let Ok(Some(status)) = running.0.try_wait() {
                return Err(format!("the {what} ended: {status}"));
            }
            if Instant::now() > deadline {
                return Err(format!("the {what} did not become ready"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(running)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + Duration::from_secs(30);
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
