//! A worker from its flags to its end: the parts, started in order and stopped in reverse.
//!
//! ```text
//! settings -> ports -> engine thread { model, pool, daemon } -> service -> ready
//! stop: listed as draining, requests refused -> running ones end, or their time is over -> engine -> server
//! ```

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kvbm_connector::{Tenants, WorkerRegistration};
use kvbm_proto::MESSAGE_BYTES_MAX;
use kvbm_proto::v1::worker_server::WorkerServer;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::engine_thread::{EnginePlan, EngineThread, Loaded};
use crate::listener::{Accepts, Listener, SocketFile};
use crate::pool_cache::Listing;
use crate::service::{Description, Service};
use crate::settings::Settings;
use crate::system::{self, Condition};
use crate::{EngineKind, Guides, Handle, Limits, Processors, WorkerArgs, WorkerError, inbox};

/// How long connections may take to close once nothing is answered any more.
const CLOSING: Duration = Duration::from_secs(1);

/// Where a worker is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadyInfo {
    /// `unix:/path` or `http://host:port`, serving `kvbm.v1.Worker`.
    pub endpoint: String,
    /// Root of /health, /live and /metrics, if they are served.
    pub system_url: Option<String>,
}

/// Runs a worker until `cancel`, then lets running requests end. `on_ready` is called when it serves.
pub async fn run(
    args: WorkerArgs,
    cancel: CancellationToken,
    on_ready: impl FnOnce(ReadyInfo),
) -> Result<(), WorkerError> {
    run_with(args, Processors::default(), cancel, on_ready).await
}

/// As [`run`], with code of one's own that changes logits.
pub async fn run_with(
    args: WorkerArgs,
    mut processors: Processors,
    cancel: CancellationToken,
    on_ready: impl FnOnce(ReadyInfo),
) -> Result<(), WorkerError> {
    let mut settings = Settings::check(args, |name| std::env::var(name).ok())?;
    processors.0.append(&mut settings.processors.0);
    settings.processors = processors;
    let drain = settings.drain;
    let mut parts = Parts::start(settings).await?;
    tokio::select! {
        loaded = &mut parts.loading => {
            // The thread says something unless it panicked.
            parts.serve(loaded.unwrap_or(Err(WorkerError::EngineEnded))?);
        }
        () = cancel.cancelled() => return Ok(()),
    }
    let system = parts.info.system_url.as_deref().unwrap_or("off");
    tracing::info!(endpoint = parts.info.endpoint, model = parts.worker.model, system, "serving");
    on_ready(parts.info.clone());
    let outcome = tokio::select! {
        () = cancel.cancelled() => Ok(()),
        () = parts.engine.ended() => Err(WorkerError::EngineEnded),
        error = ended(&mut parts.server) => Err(error),
    };
    parts.stop(if outcome.is_ok() { drain } else { Duration::ZERO }).await;
    outcome
}

/// Everything that runs.
struct Parts {
    settings: Settings,
    info: ReadyInfo,
    worker: WorkerRegistration,
    limits: Limits,
    eos_token_ids: Vec<u32>,
    listing: Listing,
    tenants: Tenants,
    handle: Handle,
    engine: EngineThread,
    loading: tokio::sync::oneshot::Receiver<Result<Loaded, WorkerError>>,
    condition: Condition,
    accepts: Option<Accepts>,
    /// Cancelled when the gRPC server is to close.
    closing: CancellationToken,
    server: JoinSet<Result<(), tonic::transport::Error>>,
    _system: JoinSet<()>,
    _file: Option<SocketFile>,
}

impl Parts {
    async fn start(settings: Settings) -> Result<Self, WorkerError> {
        let model = settings.model_config()?;
        let kv = settings.kv_layout(&model);
        let pool = settings.pool_layout(kv)?;
        let pool_blocks = match settings.engine {
            EngineKind::Llama => pool.block_count as usize,
            EngineKind::Echo => usize::MAX,
        };
        let limits = Limits {
            context_length: model.context_length,
            vocab_size: model.token_count,
            pool_blocks,
            tokens_per_block: settings.tokens_per_block,
        };
        let condition = Condition {
            model: settings.served_name.clone(),
            loaded: Arc::new(OnceLock::new()),
            draining: CancellationToken::new(),
            running: TaskTracker::new(),
        };
        let mut system = JoinSet::new();
        let mut system_url = None;
        if let Some(address) = settings.system {
            let (listener, url) = system::bind(address).await?;
            system.spawn(system::serve(listener, condition.clone()));
            system_url = Some(url);
        }
        let Listener { accepts, endpoint, file } = settings.listen.bind().await?;
        let worker = WorkerRegistration {
            worker_id: worker_id(),
            endpoint: endpoint.clone(),
            model: settings.served_name.clone(),
            model_path: settings.model.display().to_string(),
            role: settings.role.clone(),
            tokens_per_block: settings.tokens_per_block as u32,
            context_length: u32::try_from(limits.context_length).unwrap_or(u32::MAX),
            state: "ready".into(),
            base_namespace: None,
        };
        let (listing, tenants) = (Listing::default(), Tenants::default());
        let (handle, inbox) = inbox(limits.context_length);
        let (engine, loading) = EngineThread::start(EnginePlan {
            settings: settings.clone(),
            limits: limits.clone(),
            eos_token_ids: model.eos_token_ids.clone(),
            kv,
            pool,
            worker: worker.clone(),
            listing: listing.clone(),
            tenants: tenants.clone(),
            inbox,
        })?;
        Ok(Self {
            settings,
            info: ReadyInfo { endpoint, system_url },
            worker,
            limits,
            eos_token_ids: model.eos_token_ids,
            listing,
            tenants,
            handle,
            engine,
            loading,
            condition,
            accepts: Some(accepts),
            closing: CancellationToken::new(),
            server: JoinSet::new(),
            _system: system,
            _file: file,
        })
    }

    fn serve(&mut self, loaded: Loaded) {
        let Some(accepts) = self.accepts.take() else { return };
        let service = Service {
            handle: self.handle.clone(),
            limits: self.limits.clone(),
            guides: Arc::new(Guides::new(&self.settings.model, self.eos_token_ids.clone())),
            base: loaded.base,
            description: Description {
                worker_id: self.worker.worker_id.clone(),
                model: self.worker.model.clone(),
                model_path: self.settings.model.clone(),
                eos_token_ids: self.eos_token_ids.clone(),
                role: self.worker.role.clone(),
            },
            lora: self.settings.lora,
            tenants: self.tenants.clone(),
            retention: self.settings.retention.clone(),
            draining: self.condition.draining.clone(),
            running: self.condition.running.clone(),
        };
        let service = WorkerServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let router = Server::builder().add_service(service);
        let closing = self.closing.clone().cancelled_owned();
        self.server.spawn(async move {
            match accepts {
                Accepts::Unix(listener) => {
                    router.serve_with_incoming_shutdown(UnixListenerStream::new(listener), closing).await
                }
                Accepts::Tcp(listener) => {
                    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
                    router.serve_with_incoming_shutdown(incoming, closing).await
                }
            }
        });
        // It is served once.
        let _ = self.condition.loaded.set(loaded);
    }

    /// Stops in order; running requests get `drain`.
    async fn stop(mut self, drain: Duration) {
        self.condition.draining.cancel();
        self.listing.change(WorkerRegistration { state: "draining".into(), ..self.worker.clone() });
        self.engine.bell().ring();
        self.condition.running.close();
        tracing::info!(running = self.condition.running.len(), "draining");
        if timeout(drain, self.condition.running.wait()).await.is_err() {
            tracing::warn!(running = self.condition.running.len(), "requests are given up");
        }
        self.engine.stop();
        self.engine.ended().await;
        self.closing.cancel();
        // Connections that stay open are cut by dropping the server.
        let _ = timeout(CLOSING, self.server.join_next()).await;
    }
}

async fn ended(server: &mut JoinSet<Result<(), tonic::transport::Error>>) -> WorkerError {
    let detail = match server.join_next().await {
        Some(Ok(Ok(()))) | None => "without a reason".into(),
        Some(Ok(Err(error))) => error.to_string(),
        Some(Err(error)) => error.to_string(),
    };
    WorkerError::Server(detail)
}

/// Unique among the workers of a daemon, whatever process namespaces they are in.
fn worker_id() -> String {
    let mut bytes = [0; 4];
    // Without randomness the process's id has to do.
    let _ = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty());
    format!("worker-{}-{:08x}", std::process::id(), u32::from_le_bytes(bytes))
}
