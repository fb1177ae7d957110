//! A daemon and workers in a folder of their own.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvbm_server::status::Status;
use tempfile::TempDir;

use crate::process::Process;
use crate::tiny_model;
use crate::wait::eventually;
use crate::worker_client::WorkerClient;

/// How a daemon is started.
#[derive(Debug, Clone)]
pub struct DaemonOptions {
    /// Host memory, MB.
    pub host_mb: f64,
    /// Further arguments.
    pub arguments: Vec<String>,
}

impl Default for DaemonOptions {
    fn default() -> Self {
        Self { host_mb: 256.0, arguments: vec![] }
    }
}

impl DaemonOptions {
    /// With a disk tier of so many MB to which each block goes as soon as it can.
    pub fn with_disk(host_mb: f64, disk_mb: f64) -> Self {
        let gb = (disk_mb / 1000.0).to_string();
        let eager = ["--disable-disk-offload-filter", "--disk-idle-ms", "0", "--disk-cache-gb", &gb];
        Self { host_mb, arguments: eager.map(String::from).to_vec() }
    }

    /// With further arguments.
    #[must_use]
    pub fn and(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }
}

/// What makes a worker wait for the daemon as long as it takes on a machine where all tests run at once. By itself it gives
/// up after milliseconds and computes, so that what it would have found is not seen.
pub(crate) const PATIENCE: [(&str, &str); 3] = [
    ("KVBM_MATCH_DEADLINE_MS", "5000"),
    ("KVBM_DETACH_AFTER_MS", "20000"),
    ("KVBM_CONNECTOR_DISK_WAIT_BASE_MS", "10000"),
];

/// How a worker is started.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Model folder.
    pub model: PathBuf,
    /// Blocks in its pool.
    pub pool_blocks: usize,
    /// Tokens in one block.
    pub tokens_per_block: usize,
    /// Without a daemon.
    pub alone: bool,
    /// On the device that `KVBM_TEST_SECOND_DEVICE` names, where the tests have two.
    pub second_device: bool,
    /// It waits for the daemon no longer than workers usually do.
    pub hasty: bool,
    /// It notes what bytes its blocks have, and compares what the cache gives back: see [`Node::assert_kv_right`].
    pub witness: bool,
    /// Further arguments.
    pub arguments: Vec<String>,
}

impl WorkerOptions {
    fn environment(&self, notes: &Path) -> Vec<(String, String)> {
        let patience = PATIENCE.iter().filter(|_| !self.hasty);
        let patience = patience.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let witness = self.witness.then(|| ("KVBM_TEST_KV_WITNESS".to_owned(), notes.display().to_string()));
        patience.chain(witness).collect()
    }
}

impl Default for WorkerOptions {
    fn default() -> Self {
        let (pool_blocks, tokens_per_block) = (128, 32);
        Self {
            model: tiny_model(),
            pool_blocks,
            tokens_per_block,
            alone: false,
            second_device: false,
            hasty: false,
            witness: false,
            arguments: vec![],
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Node {
    /// The daemon, while there is one. It ends before its folder does.
    pub daemon: Option<Process>,
    /// Its folder.
    pub dir: TempDir,
    daemon_options: DaemonOptions,
    metrics: String,
}

impl Node {
    /// A folder without processes.
    pub fn empty() -> Self {
        let dir = tempfile::Builder::new().prefix("kvbm").tempdir().unwrap();
        Self { dir, daemon: None, daemon_options: DaemonOptions::default(), metrics: String::new() }
    }

    /// How the daemon is started from now on.
    pub fn configure(&mut self, options: DaemonOptions) {
        self.daemon_options = options;
    }

    /// A running daemon whose host memory is populated.
    pub fn start(options: DaemonOptions) -> Self {
        let mut node = Self { daemon_options: options, ..Self::empty() };
        node.start_daemon();
        node
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("kvbm.sock")
    }

    /// Directory of the disk tier, unless the daemon is told another.
    pub fn disk_dir(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    /// What a daemon that serves at `socket` is started with.
    pub fn daemon_arguments(&self, socket: &Path) -> Vec<String> {
        let mut arguments: Vec<String> = vec!["daemon".into(), "--socket".into()];
        arguments.push(socket.display().to_string());
        arguments.extend(["--state-dir".into(), self.dir.path().display().to_string()]);
        let gb = self.daemon_options.host_mb / 1000.0;
        arguments.extend(["--metrics-port".into(), "0".into(), "--cpu-cache-gb".into(), gb.to_string()]);
        arguments.extend(self.daemon_options.arguments.clone());
        arguments
    }

    /// Starts the daemon (again).
    pub fn start_daemon(&mut self) {
        let mut daemon =
            Process::start(self.dir.path(), "daemon", &self.daemon_arguments(&self.socket()), &[]);
        let ready = daemon.wait_ready();
        self.metrics = ready["metrics"].as_str().unwrap().to_owned();
        self.daemon = Some(daemon);
        eventually("host memory is populated and the disk is open", || {
            let status = self.status();
            let coming = |state: &str| matches!(state, "populating" | "opening");
            (!status.tiers.iter().any(|tier| coming(&tier.state))).then_some(())
        });
    }

    /// The daemon.
    pub fn daemon(&mut self) -> &mut Process {
        self.daemon.as_mut().unwrap()
    }

    /// Kills the daemon with -9.
    pub fn kill_daemon(&mut self) {
        self.daemon.take().unwrap().kill();
    }

    /// Starts a worker and waits until it serves.
    pub fn worker(&self, name: &str, options: &WorkerOptions) -> (Process, WorkerClient) {
        let endpoint = self.dir.path().join(format!("{name}.sock"));
        let mut arguments: Vec<String> = vec!["worker".into(), "--model".into()];
        arguments.push(options.model.display().to_string());
        arguments.extend(["--listen".into(), format!("unix:{}", endpoint.display())]);
        arguments.extend(["--block-size".into(), options.tokens_per_block.to_string()]);
        arguments.extend(["--device-cache-blocks".into(), options.pool_blocks.to_string()]);
        if options.alone {
            arguments.push("--no-daemon".into());
        } else {
            arguments.extend(["--socket".into(), self.socket().display().to_string()]);
        }
        // The same tests on a GPU.
        let second = std::env::var("KVBM_TEST_SECOND_DEVICE").ok().filter(|_| options.second_device);
        if let Some(device) = second.or_else(|| std::env::var("KVBM_TEST_DEVICE").ok()) {
            arguments.extend(["--device".into(), device]);
        }
        arguments.extend(options.arguments.clone());
        let mut process =
            Process::start(self.dir.path(), name, &arguments, &options.environment(&self.notes()));
        process.wait_ready();
        (process, WorkerClient::connect(&endpoint))
    }

    /// Starts a worker that listens where its arguments say.
    pub fn worker_at_own_address(&self, name: &str, options: &WorkerOptions) -> Process {
        let mut arguments: Vec<String> = vec!["worker".into(), "--model".into()];
        arguments.push(options.model.display().to_string());
        arguments.extend(["--block-size".into(), options.tokens_per_block.to_string()]);
        arguments.extend(["--device-cache-blocks".into(), options.pool_blocks.to_string()]);
        arguments.extend(["--socket".into(), self.socket().display().to_string()]);
        arguments.extend(options.arguments.clone());
        let mut process =
            Process::start(self.dir.path(), name, &arguments, &options.environment(&self.notes()));
        process.wait_ready();
        process
    }

    /// What `kvbm status --json` says.
    pub fn status(&self) -> Status {
        let address = self.metrics.trim_end_matches("/metrics");
        serde_json::from_str(&get(&format!("{address}/status"))).unwrap()
    }

    /// Status code and body of a page of the admin server, `/ready` for example.
    pub fn admin(&self, path: &str) -> (u16, String) {
        get_any(&format!("{}{path}", self.metrics.trim_end_matches("/metrics")))
    }

    /// Sum of a metric over its labels, or over those lines that contain `label`.
    pub fn metric(&self, name: &str, label: &str) -> f64 {
        metric_in(&get(&self.metrics), name, label)
    }

    /// Waits until so many blocks have been offloaded.
    pub fn assert_offloaded(&self, blocks: u64) {
        eventually("blocks are in host memory", || {
            (self.metric("kvbm_offload_blocks_d2h", "") >= blocks as f64).then_some(())
        });
    }

    /// Flips the sign and exponent of one stored number in host memory, behind the daemon's back.
    pub fn flip_host_byte(&mut self) {
        let pid = self.daemon().pid();
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
            let is_host =
                std::fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().contains("kvbm-host"));
            if !is_host {
                continue;
            }
            let file = File::options().read(true).write(true).open(entry.path()).unwrap();
            let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            // Numbers are bf16: the second byte of each has sign and exponent.
            if let Some(at) = (1..bytes.len()).step_by(2).find(|at| bytes[*at] != 0) {
                file.write_all_at(&[bytes[at] ^ 0xC0], at as u64).unwrap();
                return;
            }
        }
        panic!("no host segment of the daemon holds a block");
    }

    fn notes(&self) -> PathBuf {
        self.dir.path().join("kv-witness")
    }

    /// Fails if any block that the cache gave to a worker had bytes that no worker computed under its key. Returns how
    /// many blocks were compared: those found in a pool, and those that were loaded.
    pub fn assert_kv_right(&self) -> (u64, u64) {
        let notes = std::fs::read_to_string(self.notes()).unwrap_or_default();
        let wrong: Vec<&str> = notes.lines().filter(|line| line.starts_with("WRONG")).collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
        let sum = |start: &str| {
            notes.lines().filter_map(|line| line.strip_prefix(start)?.parse::<u64>().ok()).sum()
        };
        (sum("right device "), sum("right loaded "))
    }

    /// What the daemon holds: open files, mappings of shared memory and of GPUs, and bytes of GPUs that are in use.
    pub fn daemon_holds(&mut self) -> (usize, usize, u64) {
        let proc = PathBuf::from(format!("/proc/{}", self.daemon().pid()));
        let files = std::fs::read_dir(proc.join("fd")).unwrap().count();
        let maps = std::fs::read_to_string(proc.join("maps")).unwrap();
        let shared =
            maps.lines().filter(|line| line.contains("/memfd:") || line.contains("/dev/nvidia")).count();
        let used =
            self.status().gpus.iter().filter_map(|gpu| Some(gpu.memory_bytes - gpu.memory_free_bytes?)).sum();
        (files, shared, used)
    }

    /// Fails unless nothing is held: no lease, pin, quarantine, slot of host or disk being filled, transfer.
    pub fn assert_idle(&self) {
        let given_back = || {
            let status = self.status();
            let held = |slots: kvbm_server::status::SlotStatus| slots.pinned + slots.quarantined;
            let pools: u64 = status.pools.iter().map(|pool| held(pool.slots)).sum();
            let tiers: u64 = status.tiers.iter().map(|tier| held(tier.slots)).sum();
            // Those of a device are granted in advance.
            let shared = status.tiers.iter().filter(|tier| tier.tier != "device");
            let filling: u64 = shared.map(|tier| tier.slots.filling).sum();
            status.leases + status.transfers_in_flight + pools + tiers + filling == 0
        };
        // Sooner than a lease that nobody gave back ends by itself.
        let deadline = Instant::now() + Duration::from_secs(15);
        while !given_back() {
            assert!(Instant::now() < deadline, "something is held: {:#?}", self.status());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The text at a URL.
pub fn get(url: &str) -> String {
    ureq::get(url).call().unwrap().body_mut().read_to_string().unwrap()
}

/// Status code and text at a URL.
pub fn get_any(url: &str) -> (u16, String) {
    let config = ureq::Agent::config_builder().http_status_as_error(false).build();
    let mut response = ureq::Agent::new_with_config(config).get(url).call().unwrap();
    (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
}

/// Sum of the samples of a metric whose line contains `label`.
pub fn metric_in(text: &str, name: &str, label: &str) -> f64 {
    let samples = text.lines().filter(|line| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])) && line.contains(label)
    });
    samples.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}
