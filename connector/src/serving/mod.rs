//! `kvbm.v1.Worker` for an engine that is written in another language: requests are fetched, answers given back, and the
//! worker is listed in the daemon's registry for as long as it serves.
//!
//! ```text
//!  frontend ── Generate ──► Requests ──► Serving::next ──► engine
//!                              ▲                              │
//!                              └────────── Serving::answer ◄──┘     bounded, by request
//! ```
//!
//! A frontend that goes away cancels its request. A daemon that is away is no reason to stop: the worker registers again
//! by itself.

mod listed;
mod requests;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kvbm_proto::MESSAGE_BYTES_MAX;
use kvbm_proto::v1;
use kvbm_proto::v1::worker_server::WorkerServer;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;

use crate::WorkerRegistration;
use requests::Service;
pub use requests::{Answer, Event, Requests};

/// What is served, and where.
#[derive(Debug, Clone)]
pub struct ServingOptions {
    /// Its endpoint is set to that of `socket`.
    pub worker: WorkerRegistration,
    /// Tokens of the vocabulary.
    pub vocab_size: u32,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
    /// Where requests are taken.
    pub socket: PathBuf,
    /// The daemon's socket.
    pub daemon: PathBuf,
    /// Requests at a time; more are refused as RESOURCE_EXHAUSTED.
    pub requests_max: usize,
}

/// Stops when it is dropped.
pub struct Serving {
    runtime: Option<Runtime>,
    requests: Arc<Requests>,
    state: watch::Sender<&'static str>,
    socket: PathBuf,
}

impl Serving {
    /// Takes requests from now on, and lists the worker as soon as the daemon is there.
    pub fn start(options: ServingOptions) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("kvbm-serving")
            .enable_all()
            .build()?;
        let ServingOptions { mut worker, socket, daemon, .. } = options.clone();
        worker.endpoint = format!("unix:{}", socket.display());
        // What a worker that was killed has left.
        if socket.exists() {
            std::fs::remove_file(&socket)?;
        }
        let listener = {
            let _entered = runtime.enter();
            UnixListener::bind(&socket)?
        };
        let requests = Arc::new(Requests::new(options.requests_max));
        let (state, watched) = watch::channel("ready");
        let service = Service::new(&options, requests.clone(), watched.clone());
        let service = WorkerServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX);
        runtime.spawn(async move {
            let incoming = UnixListenerStream::new(listener);
            let served =
                tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await;
            if let Err(error) = served {
                tracing::error!(%error, "requests are not taken any more");
            }
        });
        runtime.spawn(listed::run(daemon, worker, watched));
        Ok(Self { runtime: Some(runtime), requests, state, socket })
    }

    /// The next thing that the engine is to know, if one comes within `patience`.
    pub fn next(&self, patience: Duration) -> Option<Event> {
        self.requests.next(patience)
    }

    /// Says something of a request. False: nobody listens any more.
    pub fn answer(&self, request: u64, answer: Answer) -> bool {
        self.requests.answer(request, answer)
    }

    /// Takes no new requests, and says so; those under way go on.
    pub fn drain(&self) {
        self.state.send_replace("draining");
    }

    /// Requests under way.
    pub fn running(&self) -> usize {
        self.requests.running()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serving").field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// The description that frontends ask for.
fn description(options: &ServingOptions, state: &str) -> v1::DescribeReply {
    let WorkerRegistration {
        worker_id,
        model,
        model_path,
        role,
        tokens_per_block,
        context_length,
        base_namespace,
        ..
    } = options.worker.clone();
    v1::DescribeReply {
        worker_id,
        model,
        model_path,
        context_length,
        tokens_per_block,
        vocab_size: options.vocab_size,
        eos_token_ids: options.eos_token_ids.clone(),
        role,
        state: state.into(),
        pid: std::process::id(),
        base_namespace: base_namespace.map_or_else(Vec::new, Vec::from),
    }
}
