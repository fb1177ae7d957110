//! A frontend on a free port.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use kvbm_frontend::{Config, Daemon, DaemonFiles, Endpoint, FrontendError, RouterConfig, RouterMode, Times};
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::client;
use crate::mock::MockWorker;

pub struct Frontend {
    pub address: SocketAddr,
    pub stop: CancellationToken,
    task: JoinHandle<Result<(), FrontendError>>,
}

pub fn config() -> Config {
    Config {
        daemons: Vec::new(),
        upstreams: Vec::new(),
        upstream_ca: None,
        discovery: None,
        daemon_files: DaemonFiles::default(),
        workers: Vec::new(),
        model_path: None,
        address: "127.0.0.1:0".parse().unwrap(),
        worker_wait: Duration::from_secs(60),
        body_limit_bytes: 32_000_000,
        timing: Times::default(),
        tool_calls: None,
        drain: Duration::from_secs(60),
        router: RouterConfig::default(),
    }
}

impl Frontend {
    pub async fn start(config: Config) -> Self {
        let stop = CancellationToken::new();
        let (sender, receiver) = oneshot::channel();
        let task =
            tokio::spawn(kvbm_frontend::run(config, stop.clone(), |address| sender.send(address).unwrap()));
        Self { address: receiver.await.unwrap(), stop, task }
    }

    pub async fn of(workers: &[&MockWorker]) -> Self {
        Self::routed(workers, RouterConfig::default()).await
    }

    pub async fn routed(workers: &[&MockWorker], router: RouterConfig) -> Self {
        let workers: Vec<Endpoint> = workers.iter().map(|worker| worker.endpoint.clone()).collect();
        let frontend = Self::start(Config { workers: workers.clone(), router, ..config() }).await;
        frontend.until_ready(workers.len()).await;
        frontend
    }

    pub async fn of_daemon(socket: PathBuf) -> Self {
        Self::start(Config { daemons: vec![Daemon::at_socket(socket)], ..config() }).await
    }

    /// Of a daemon, with routing by blocks, which answers tell of.
    pub async fn kv(socket: PathBuf, workers: usize) -> Self {
        let router = RouterConfig { mode: RouterMode::Kv, debug_headers: true, ..RouterConfig::default() };
        let daemons = vec![Daemon::at_socket(socket)];
        let frontend = Self::start(Config { daemons, router, ..config() }).await;
        frontend.until_ready(workers).await;
        frontend
    }

    /// Returns when so many workers are ready.
    pub async fn until_ready(&self, count: usize) {
        self.until_workers(|workers| {
            workers.iter().filter(|worker| worker["state"] == "ready").count() == count
        })
        .await;
    }

    /// Returns when `/health` lists such workers.
    pub async fn until_workers(&self, wanted: impl Fn(&[Value]) -> bool) {
        loop {
            let health = client::get(self.address, "/health").await.json();
            if wanted(health["workers"].as_array().unwrap()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Returns when `/metrics` has this line.
    pub async fn until_metric(&self, line: &str) {
        loop {
            let text = client::get(self.address, "/metrics").await.text();
            if text.lines().any(|l| l == line) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub async fn stopped(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }
}
