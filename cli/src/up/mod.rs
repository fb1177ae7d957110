//! `kvbm up`: holder, daemon, workers and frontend with one command.
//!
//! Start order is holder, daemon, workers, frontend; stop order is the reverse. Whatever dies is started again after a
//! pause.

mod args;
mod fleet;
mod part;
mod state_dir;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};

pub(crate) use args::UpArgs;
use part::Part;
use state_dir::StateDir;

use crate::hold;

/// Long enough to fill a block of tokens, so that the second time it is found in the cache.
const TRY: &str = "In the beginning God created the heaven and the earth. And the earth was without form, and void; and \
                   darkness was upon the face of the deep. And the Spirit of God moved upon the face of the waters.";
/// The name of the part that keeps the daemon's host memory.
const HOLDER: &str = "holder";
/// How often children are looked at.
const LOOK: Duration = Duration::from_millis(20);
/// How long a part may take to stop: longer than running requests are given.
const PATIENCE: Duration = Duration::from_secs(15);
/// Ports that are tried for the frontend.
const PORTS_TRIED: usize = 100;
/// How long the parts may take until they serve: a large model is read and hashed first.
const START_MAX: Duration = Duration::from_secs(1800);
/// How long the frontend may then take to connect to the workers before that is no reason to wait any more.
const CONNECT_MAX: Duration = Duration::from_secs(30);
/// How long the daemon's start waits for the holder's. It looks for the holder for a while itself.
const HOLDER_START_MAX: Duration = Duration::from_secs(5);
/// A part that ends this often before everything was ready once is not started again.
const EARLY_ENDS_MAX: u32 = 3;

/// Where `kvbm status` looks when it is told nothing.
pub(crate) fn default_socket() -> PathBuf {
    state_dir::default().join("kvbm.sock")
}

/// The model that comes with kvbm: beside the sources, or installed beside the program.
pub(crate) fn bundled_model() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let installed = program.parent()?.join("../share/kvbm/models/tiny");
    let sources =
        program.ancestors().map(|dir| dir.join("models/tiny")).find(|dir| dir.join("config.json").is_file());
    std::iter::once(installed).find(|dir| dir.join("config.json").is_file()).or(sources)
}

/// Runs until told to stop. Returns the exit code.
pub(crate) async fn run(args: UpArgs) -> Result<u8, String> {
    let model = match args.model.clone() {
        // A path that has a name, which `.` has not.
        Some(model) => model.canonicalize().unwrap_or(model),
        None => bundled_model().ok_or("--model: the bundled model was not found, name a folder")?,
    };
    if !model.join("config.json").is_file() {
        return Err(format!("--model {}: there is no config.json in it", model.display()));
    }
    let state = StateDir::open(args.state_dir.clone())?;
    let mut signals = Signals::new()?;
    let mut fleet = Fleet::new(&args, &model, &state)?;
    // Before anything runs: a wrong setting is one line, not a line among logs.
    fleet.part("daemon").check_settings().await?;
    let retention = args.retention.over(args.worker_config.as_deref());
    retention.map_err(|error| error.to_string().replace("--config", "--worker-config"))?;
    let outcome = fleet.serve(&args, &model, &state, &mut signals).await;
    if outcome.is_ok() {
        eprintln!("kvbm: stopping; once more to stop at once");
    }
    tokio::select! {
        () = fleet.stop() => {}
        () = signals.stop() => fleet.kill().await,
    }
    outcome.map(|()| 0)
}

/// Ctrl-C, or whoever started us, wants us to stop.
struct Signals(Signal, Signal, Signal);

impl Signals {
    fn new() -> Result<Self, String> {
        let listen = |kind| signal(kind).map_err(|error| format!("listen to signals: {error}"));
        Ok(Self(
            listen(SignalKind::interrupt())?,
            listen(SignalKind::terminate())?,
            listen(SignalKind::hangup())?,
        ))
    }

    async fn stop(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
            _ = self.2.recv() => {}
        }
    }
}

struct Fleet {
    /// In order of starting.
    parts: Vec<Part>,
}

impl Fleet {
    fn new(args: &UpArgs, model: &Path, state: &StateDir) -> Result<Self, String> {
        let socket = state.socket().display().to_string();
        let run_dir = state.run_dir();
        let mut daemon = Part::new("daemon".into(), "daemon", &run_dir);
        daemon.argument("--socket", &socket);
        daemon.argument("--state-dir", state.path().display());
        daemon.optional("--cpu-cache-gb", args.cpu_cache_gb.as_ref());
        daemon.optional("--disk-cache-gb", args.disk_cache_gb.as_ref());
        daemon.optional("--metrics-port", args.metrics_port.as_ref());
        let mut parts = Vec::new();
        if args.no_warm_host {
            // Nor the one that a variable or kvbm.toml may name.
            daemon.argument("--holder", "");
        } else {
            let place = hold::beside(&state.socket());
            let mut holder = Part::new(HOLDER.into(), "hold", &run_dir);
            holder.argument("--socket", place.display());
            daemon.argument("--holder", place.display());
            parts.push(holder);
        }
        parts.push(daemon);
        let apart = args.prefill_workers > 0;
        for i in 1..=args.workers + args.prefill_workers {
            let mut worker = Part::new(format!("worker {i}"), "worker", &run_dir);
            worker.argument("--socket", &socket);
            worker.argument("--model", model.display());
            worker.argument("--engine", &args.engine);
            if apart {
                worker.argument("--role", if i > args.workers { "prefill" } else { "decode" });
            }
            worker.optional("--device-cache-gb", args.device_cache_gb.as_ref());
            let path = args.worker_config.as_ref().map(|path| path.display().to_string());
            worker.optional("--config", path.as_ref());
            let whole = |given: Option<i64>| given.map(|given| given.to_string());
            let retention = &args.retention;
            let priority = whole(retention.local_kv_retention_priority);
            worker.optional("--local-kv-retention-priority", priority.as_ref());
            let duration = whole(retention.local_kv_retention_duration);
            worker.optional("--local-kv-retention-duration", duration.as_ref());
            worker
                .argument("--listen", format!("unix:{}", run_dir.join(format!("worker-{i}.sock")).display()));
            if let Some(port) = system_port(i)? {
                worker.argument("--system-port", port);
            }
            parts.push(worker);
        }
        let mut frontend = Part::new("frontend".into(), "frontend", &run_dir);
        frontend.argument("--socket", &socket);
        frontend.argument("--http-port", http_port(args)?);
        frontend.optional("--router-mode", args.router_mode.as_ref());
        if apart {
            frontend.flag("--disagg");
        }
        parts.push(frontend);
        Ok(Self { parts })
    }

    fn part(&self, name: &str) -> &Part {
        self.parts.iter().find(|part| part.name == name).expect("it is one of those that are always there")
    }

    async fn serve(
        &mut self,
        args: &UpArgs,
        model: &Path,
        state: &StateDir,
        signals: &mut Signals,
    ) -> Result<(), String> {
        for part in &mut self.parts {
            part.start()?;
            if part.name == HOLDER {
                part.wait_ready(HOLDER_START_MAX).await;
            }
        }
        let deadline = Instant::now() + START_MAX;
        let (mut served, mut ready) = (None, false);
        let mut early_ends = 0;
        loop {
            if !ready && self.parts.iter().all(|part| part.ready().is_some()) {
                let since = *served.get_or_insert_with(Instant::now);
                if self.is_one_fleet().await || since.elapsed() > CONNECT_MAX {
                    ready = true;
                    self.announce(args, model, state);
                }
            }
            for part in &mut self.parts {
                if let Some((how, code)) = part.ended() {
                    // A holder to which no daemon comes ends as it should: the daemon lost an earlier one, or cannot start.
                    let is_alone = part.name == HOLDER && code == Some(0);
                    early_ends += u32::from(!ready && !is_alone);
                    // Code 2 says that a setting is wrong: trying again does not help.
                    if !ready && (code == Some(2) || early_ends > EARLY_ENDS_MAX) {
                        return Err(format!("{} could not start ({how})", part.name));
                    }
                    let pause = part.schedule_restart();
                    if is_alone {
                        tracing::info!(part = part.name, ?pause, "no daemon needs it; will be started again");
                    } else {
                        tracing::warn!(part = part.name, %how, ?pause, "ended and will be started again");
                    }
                }
                if part.due.is_some_and(|due| due <= Instant::now()) {
                    part.start()?;
                }
            }
            if !ready && Instant::now() > deadline {
                let late = self.parts.iter().find(|part| part.ready().is_none());
                return Err(format!("{} did not become ready", late.map_or("nothing", |part| &part.name)));
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = signals.stop() => return Ok(()),
            }
        }
    }

    /// Whether the frontend uses every worker: a first request that comes before has fewer to choose from.
    async fn is_one_fleet(&self) -> bool {
        let workers = self.parts.iter().filter(|part| part.name.starts_with("worker")).count();
        let Some(frontend) = self.part("frontend").ready() else { return false };
        fleet::usable_workers(&frontend.address).await.is_some_and(|usable| usable >= workers)
    }

    /// Tells people or scripts where everything is, and keeps the ports for later starts.
    fn announce(&mut self, args: &UpArgs, model: &Path, state: &StateDir) {
        let of = |name: &str| self.parts.iter().find(|part| part.name == name).and_then(Part::ready);
        let http = of("frontend").unwrap_or_default().address;
        let metrics = of("daemon").unwrap_or_default().metrics;
        let pid = |prefix: &str| -> Vec<u32> {
            self.parts.iter().filter(|part| part.name.starts_with(prefix)).map(Part::pid).collect()
        };
        let (holder, daemon) = (pid(HOLDER).first().copied(), pid("daemon"));
        let (frontend, workers) = (pid("frontend"), pid("worker"));
        let folder = model.file_name().map(|name| name.to_string_lossy().into_owned());
        let named = std::env::var("KVBM_WORKER_SERVED_MODEL_NAME").ok();
        let model = named.or(folder).unwrap_or_default();
        if args.json {
            let pids =
                json!({"holder": holder, "daemon": daemon[0], "frontend": frontend[0], "workers": workers});
            let socket = state.socket();
            say(&json!({"ready": true, "http": http, "metrics": metrics, "socket": socket, "pids": pids}));
        } else {
            say(&format!(
                "kvbm is up.\n\n  OpenAI API  {http}/v1\n  metrics     {metrics}\n  status      kvbm status --socket {}\n",
                state.socket().display()
            ));
            say(&format!(
                "Try:\n\n  curl {http}/v1/completions -H 'content-type: application/json' \\\n    -d '{{\"model\":\"{model}\",\"prompt\":\"{TRY}\",\"max_tokens\":32,\"temperature\":0}}'\n\nCtrl-C stops everything."
            ));
        }
        let port = |url: &str| url.trim_end_matches("/metrics").rsplit(':').next().map(str::to_owned);
        for (name, flag, url) in [("daemon", "--metrics-port", &metrics), ("frontend", "--http-port", &http)]
        {
            if let (Some(part), Some(port)) =
                (self.parts.iter_mut().find(|part| part.name == name), port(url))
            {
                part.set_argument(flag, &port);
            }
        }
    }

    async fn stop(&mut self) {
        for part in self.parts.iter_mut().rev() {
            part.stop(PATIENCE).await;
        }
    }

    async fn kill(&mut self) {
        for part in self.parts.iter_mut().rev() {
            part.stop(Duration::ZERO).await;
        }
    }
}

/// A line on standard output. Whoever closed it does not want to know.
fn say(line: &dyn std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// The port of the frontend: the one that is wanted or, as for metrics, the next that is free.
fn http_port(args: &UpArgs) -> Result<u16, String> {
    let (name, text) = match &args.http_port {
        Some(text) => ("--http-port", text.clone()),
        None => ("DYN_HTTP_PORT", std::env::var("DYN_HTTP_PORT").unwrap_or_else(|_| "8000".into())),
    };
    let wanted: u16 =
        text.parse().map_err(|_| format!("{name} = {text} is not valid, it must be within 0 to 65535"))?;
    if wanted == 0 {
        return Ok(0);
    }
    let free = |port: &u16| std::net::TcpListener::bind((std::net::Ipv4Addr::UNSPECIFIED, *port)).is_ok();
    let found = (wanted..=u16::MAX).take(PORTS_TRIED).find(free);
    found.ok_or_else(|| format!("{name} = {text}: neither it nor the next {PORTS_TRIED} ports are free"))
}

/// One port for each worker, counting up from the one that was asked for.
fn system_port(worker: u16) -> Result<Option<u16>, String> {
    let Ok(text) = std::env::var("DYN_SYSTEM_PORT") else { return Ok(None) };
    let first: Option<u16> = text.parse().ok();
    let port = first.and_then(|port| if port == 0 { Some(0) } else { port.checked_add(worker - 1) });
    let port = port.ok_or_else(|| {
        format!("DYN_SYSTEM_PORT = {text} is not valid, it must be within 0 to 65535 and leave one port per worker")
    })?;
    Ok(Some(port))
}
