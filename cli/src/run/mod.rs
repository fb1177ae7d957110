//! `kvbm run`: a model, and a prompt in the terminal to talk to it.
//!
//! A worker without a daemon and a frontend, both in this process, and a client that talks to the frontend as any other
//! would: what is seen here is what a client gets.

mod client;
mod talk;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use kvbm_frontend::{Config, Endpoint, FrontendArgs, RouterConfig};
use kvbm_worker::WorkerArgs;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use talk::Talk;

/// Talk to a model in the terminal
///
/// Loads the model into this process and serves it to this terminal only. An empty line does nothing, /clear forgets the
/// conversation, /exit or the end of input leaves, and an interrupt ends the answer. With a PROMPT, answers that and ends.
#[derive(Debug, clap::Args)]
pub(crate) struct RunArgs {
    /// What is asked, instead of a conversation
    #[arg(value_name = "PROMPT")]
    prompt: Option<String>,
    /// Folder of the model: config.json, tokenizer.json, safetensors
    #[arg(long, env = "KVBM_MODEL_PATH", value_name = "DIR")]
    model: PathBuf,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of an answer [default: what the context has room for]
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<u32>,
    /// 0 takes the likeliest tokens [default: as the model's generation_config.json says]
    #[arg(long)]
    temperature: Option<f64>,
    /// The same seed gives the same answers
    #[arg(long)]
    seed: Option<i64>,
    /// KV pool, GB (10^9 bytes)
    #[arg(long, default_value_t = 0.25)]
    device_cache_gb: f64,
    /// Threads that compute; 0: one per processor
    #[arg(long, default_value_t = 0)]
    threads: u32,
}

/// Flags of a part, as if they had been given on the command line.
#[derive(Parser)]
struct Flags<A: clap::Args> {
    #[command(flatten)]
    args: A,
}

/// Runs until the conversation ends.
pub(crate) fn run(args: RunArgs) -> ExitCode {
    match crate::block_on(serve_and_talk(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err((error, code)) => crate::complain(&format!("kvbm run: {error}"), code),
    }
}

async fn serve_and_talk(args: RunArgs) -> Result<(), (String, u8)> {
    let folder = tempfile::tempdir().map_err(|error| (format!("make a temporary folder: {error}"), 1))?;
    let endpoint = format!("unix:{}", folder.path().join("worker.sock").display());
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();

    let (ready, mut readiness) = oneshot::channel();
    let worker_args = worker_args(&args, &endpoint).map_err(|error| (error, 2))?;
    let worker = kvbm_worker::run(worker_args, stop.clone(), |info| drop(ready.send(info)));
    let mut worker = tokio::spawn(worker);
    tokio::select! {
        _ = &mut readiness => {}
        ended = &mut worker => return Err(worker_error(ended)),
    }

    let (bound, address) = oneshot::channel();
    let config = frontend_config(&endpoint).map_err(|error| (error, 2))?;
    let mut frontend = tokio::spawn(kvbm_frontend::run(config, stop.clone(), |address| {
        // Nobody waits any more only if this has ended.
        let _ = bound.send(address);
    }));
    let address: SocketAddr = tokio::select! {
        address = address => address.map_err(|_| ("the frontend ended".to_owned(), 1))?,
        ended = &mut frontend => return Err((format!("the frontend ended: {ended:?}"), 1)),
    };
    // Reading from the terminal blocks, and nothing but the end of the process ends it.
    let (done, talking) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    std::thread::spawn(move || {
        let talk = Talk::new(address, &args, &runtime);
        drop(done.send(talk.go_on(args.prompt)));
    });
    tokio::select! {
        talked = talking => match talked {
            Ok(talked) => talked.map_err(|error| (error, 1)),
            Err(_) => Err(("the conversation broke off".to_owned(), 1)),
        },
        ended = &mut worker => Err(worker_error(ended)),
    }
}

fn worker_args(args: &RunArgs, endpoint: &str) -> Result<WorkerArgs, String> {
    let gigabytes = args.device_cache_gb.to_string();
    let threads = args.threads.to_string();
    let flags = [
        "worker",
        "--no-daemon",
        "--served-model-name",
        "model",
        "--drain-seconds",
        "0",
        "--listen",
        endpoint,
        "--device-cache-gb",
        &gigabytes,
        "--threads",
        &threads,
        "--system-port",
        "-1",
    ];
    let mut flags: Vec<std::ffi::OsString> = flags.into_iter().map(Into::into).collect();
    flags.extend(["--model".into(), args.model.clone().into_os_string()]);
    let flags = Flags::<WorkerArgs>::try_parse_from(flags).map_err(|error| error.to_string())?;
    Ok(flags.args)
}

fn frontend_config(endpoint: &str) -> Result<Config, String> {
    let flags = ["frontend", "--worker", endpoint, "--http-host", "127.0.0.1", "--http-port", "0"];
    let flags = Flags::<FrontendArgs>::try_parse_from(flags).map_err(|error| error.to_string())?;
    let config = Config::try_from(flags.args).map_err(|error| error.to_string())?;
    let worker = Endpoint::parse(endpoint).into_iter().collect();
    // Whatever the environment names for other frontends.
    Ok(Config {
        daemons: Vec::new(),
        workers: worker,
        upstreams: Vec::new(),
        discovery: None,
        model_path: None,
        router: RouterConfig::default(),
        ..config
    })
}

fn worker_error(ended: Result<Result<(), kvbm_worker::WorkerError>, tokio::task::JoinError>) -> (String, u8) {
    match ended {
        Ok(Ok(())) => ("the engine ended".into(), 1),
        Ok(Err(error)) => (error.to_string(), error.exit_code()),
        Err(error) => (error.to_string(), 1),
    }
}
