//! The `kvbm` binary: one program, one subcommand per part.
#![forbid(unsafe_code)]

mod bench;
mod hold;
mod models;
mod parent;
mod pin;
mod ready;
mod replay;
mod run;
mod signals;
mod status;
mod up;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use kvbm_telemetry::{Lines, Telemetry};
use ready::Ready;

/// KV cache for LLM inference that outlives the engine: one daemon per node owns every KV block on it
#[derive(Debug, Parser)]
#[command(name = "kvbm", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(up::UpArgs),
    /// Run the daemon of this node: it owns the KV blocks, engines attach to it
    Daemon(Part<kvbm_server::DaemonArgs>),
    #[command(about = hold::ABOUT, long_about = hold::HELP)]
    Hold(Part<hold::HoldArgs>),
    /// Run the reference engine: tokens in, tokens out, KV in a pool that the daemon owns
    Worker(Part<kvbm_worker::WorkerArgs>),
    /// Run the OpenAI HTTP frontend before the workers
    Frontend(Part<kvbm_frontend::FrontendArgs>),
    Run(run::RunArgs),
    Status(status::StatusArgs),
    Pin(pin::PinArgs),
    Unpin(pin::UnpinArgs),
    Models(models::ModelsArgs),
    Bench(bench::BenchArgs),
    Replay(replay::ReplayArgs),
}

/// A part that `kvbm up` may start.
#[derive(Debug, Args)]
struct Part<A: Args> {
    #[command(flatten)]
    args: A,
    /// File that appears when the part serves
    #[arg(long, hide = true, value_name = "PATH")]
    ready_file: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if matches!(error.kind(), ErrorKind::ValueValidation | ErrorKind::InvalidValue) => {
            // One line that names setting and value, as for every other wrong value.
            let text = error.to_string();
            let line =
                text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect::<Vec<_>>().join(" ");
            return complain(&line.trim_start_matches("error: "), 2);
        }
        Err(error) => error.exit(),
    };
    if let Err(error) = parent::follow() {
        return complain(&error, 1);
    }
    match cli.command {
        Command::Up(args) => {
            let _telemetry = start_log("kvbm-up", "info");
            outcome(block_on(up::run(args)))
        }
        Command::Daemon(Part { args, ready_file }) => kvbm_server::run(&args, |addresses| {
            let metrics = addresses.admin_url("/metrics");
            let address = addresses.socket.display().to_string();
            announce(&Ready { address, metrics }, ready_file);
        }),
        Command::Hold(Part { args, ready_file }) => {
            let _telemetry = start_log("kvbm-hold", "info");
            hold(&args, ready_file)
        }
        Command::Worker(Part { args, ready_file }) => {
            let _telemetry = start_log("kvbm-worker", "info");
            worker(args, ready_file)
        }
        Command::Frontend(Part { args, ready_file }) => {
            let _telemetry = start_log("kvbm-frontend", "info");
            frontend(args, ready_file)
        }
        Command::Run(args) => {
            let _telemetry = start_log("kvbm-run", "warn");
            run::run(args)
        }
        Command::Status(args) => outcome(block_on(status::run(args))),
        Command::Pin(args) => outcome(block_on(pin::run(args))),
        Command::Unpin(args) => outcome(block_on(pin::unpin(args))),
        Command::Models(args) => outcome(block_on(models::run(args))),
        Command::Bench(args) => outcome(bench::run(&args).map(|()| 0)),
        Command::Replay(args) => outcome(replay::run(&args)),
    }
}

fn hold(args: &hold::HoldArgs, ready_file: Option<PathBuf>) -> ExitCode {
    let ready = |socket: &std::path::Path| {
        announce(&Ready { address: socket.display().to_string(), metrics: String::new() }, ready_file);
    };
    match hold::run(args, ready) {
        Ok(()) => ExitCode::SUCCESS,
        Err((error, code)) => complain(&format!("kvbm hold: {error}"), code),
    }
}

fn worker(args: kvbm_worker::WorkerArgs, ready_file: Option<PathBuf>) -> ExitCode {
    let serve = async {
        let stop = signals::stop_token().map_err(|error| (error, 1))?;
        let ready = |info: kvbm_worker::ReadyInfo| {
            let metrics = info.system_url.map_or_else(String::new, |url| format!("{url}/metrics"));
            announce(&Ready { address: info.endpoint, metrics }, ready_file);
        };
        let run = kvbm_worker::run(args, stop, ready).await;
        run.map_err(|error| (error.to_string(), error.exit_code()))
    };
    match block_on(serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err((error, code)) => complain(&format!("kvbm worker: {error}"), code),
    }
}

fn frontend(args: kvbm_frontend::FrontendArgs, ready_file: Option<PathBuf>) -> ExitCode {
    let serve = async {
        let args = match args {
            // The daemon of `kvbm up`, unless something else is named.
            args if args.socket.is_none()
                && args.daemons.is_empty()
                && args.workers.is_empty()
                && args.upstreams.is_empty()
                && args.discovery.is_none() =>
            {
                kvbm_frontend::FrontendArgs { socket: Some(up::default_socket()), ..args }
            }
            args => args,
        };
        let config = kvbm_frontend::Config::try_from(args).map_err(|error| (error.to_string(), 2))?;
        let stop = signals::stop_token().map_err(|error| (error, 1))?;
        let bound = |mut address: std::net::SocketAddr| {
            tracing::info!(%address, "serving");
            if address.ip().is_unspecified() {
                address.set_ip([127, 0, 0, 1].into());
            }
            let address = format!("http://{address}");
            announce(&Ready { metrics: format!("{address}/metrics"), address }, ready_file);
        };
        kvbm_frontend::run(config, stop, bound).await.map_err(|error| (error.to_string(), 1))
    };
    match block_on(serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err((error, code)) => complain(&format!("kvbm frontend: {error}"), code),
    }
}

/// Logs to standard error, filtered by KVBM_LOG, DYN_LOG or RUST_LOG; as JSON with KVBM_LOG_JSON or DYN_LOGGING_JSONL.
fn start_log(service: &str, default: &str) -> Telemetry {
    let filter = ["KVBM_LOG", "DYN_LOG", "RUST_LOG"].into_iter().find_map(|name| std::env::var(name).ok());
    let json = ["KVBM_LOG_JSON", "DYN_LOGGING_JSONL"]
        .into_iter()
        .any(|name| std::env::var(name).is_ok_and(|value| matches!(value.as_str(), "1" | "true")));
    let lines = if json { Lines::Json } else { Lines::Text };
    kvbm_telemetry::start(service, filter.as_deref().unwrap_or(default), lines)
}

fn announce(ready: &Ready, file: Option<PathBuf>) {
    if let Err(error) = ready.announce(file.as_deref()) {
        tracing::error!(%error, "cannot tell that this part serves");
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.expect("the kernel gives threads and an epoll descriptor").block_on(work)
}

fn outcome(result: Result<u8, String>) -> ExitCode {
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => complain(&format!("kvbm: {error}"), 2),
    }
}

/// One line on standard error.
fn complain(what: &dyn std::fmt::Display, code: u8) -> ExitCode {
    eprintln!("{what}");
    ExitCode::from(code)
}
