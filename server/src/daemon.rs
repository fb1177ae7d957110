//! The daemon: owns its parts, starts them in order and stops them in reverse.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kvbm::{Manager, MapGpus};
use kvbm_proto::MESSAGE_BYTES_MAX;
use kvbm_proto::v1::admin_server::AdminServer;
use kvbm_proto::v1::cache_server::CacheServer;
use kvbm_proto::v1::registry_server::RegistryServer;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::core::Core;
use crate::error::StartError;
use crate::gpus::NodeGpus;
use crate::record::Recorder;
use crate::registry::RegistryService;
use crate::remote::{Credentials, Remote, Token};
use crate::rights::AdminService;
use crate::session::{self, CacheService};
use crate::socket::Sockets;
use crate::status::Status;
use crate::{Config, admin, holder, inventory, random, warm};

/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(100);
/// Bytes a client may send ahead: the table of a large pool comes in one message.
const WINDOW_BYTES: u32 = 1 << 20;
/// Streams of the registry served at once to processes of this node.
const WATCHERS_MAX: usize = 1024;
/// How long connections may take to end after everything else has.
const GOODBYE: Duration = Duration::from_secs(2);

/// Where a daemon is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses {
    /// gRPC.
    pub socket: PathBuf,
    /// Side channel.
    pub side_socket: PathBuf,
    /// Admin HTTP.
    pub admin: SocketAddr,
    /// gRPC over TCP, as a URL.
    pub grpc: Option<String>,
}

impl Addresses {
    /// URL of an admin page, for example `/metrics`.
    pub fn admin_url(&self, path: &str) -> String {
        format!("http://{}{path}", self.admin)
    }
}

/// A running daemon. To be stopped with [`Daemon::stop`]; dropping it only ends its tasks with the runtime.
#[derive(Debug)]
pub struct Daemon {
    core: Arc<Core>,
    addresses: Addresses,
    grpc: JoinHandle<()>,
    admin: JoinHandle<()>,
    remote: Option<JoinHandle<()>>,
    /// Last: the claim on the path goes when nothing of us uses it.
    _sockets: Sockets,
}

impl Daemon {
    /// Binds everything and starts serving. Host memory is populated in the background.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let credentials = Credentials::read(&config)?;
        let admin_token = Token::for_admin(&config)?;
        let mut sockets = Sockets::bind(&config)?;
        let listener = admin::bind(&config).await?;
        let address = listener
            .local_addr()
            .map_err(|source| StartError::Admin { address: config.metrics_address(), source })?;
        let remote = match credentials {
            Some((listen, credentials)) => Some(Remote::bind(listen, credentials).await?),
            None => None,
        };
        let record = config.record.as_ref();
        let recorder = record.map(|path| Recorder::start(path, config.record_max_bytes())).transpose()?;
        let gpus = find_gpus(&config).await;
        let (manager, holder) = start_manager(&config, gpus.as_ref()).await?;
        let addresses = Addresses {
            socket: config.socket.clone(),
            side_socket: config.side_socket(),
            admin: address,
            grpc: remote.as_ref().map(Remote::url),
        };
        let core = Arc::new(Core::new(config, manager, recorder, admin_token));
        // Both are set once, here.
        let _ = core.admin.set(addresses.admin_url(""));
        if let Some(url) = addresses.grpc.clone() {
            let _ = core.grpc.set(url);
        }
        if let Some(gpus) = gpus {
            let _ = core.gpus.set(gpus);
        }
        let admin = tokio::spawn(admin::serve(Arc::clone(&core), listener));
        if let Some(side) = sockets.side.take() {
            core.tasks.spawn(session::accept(Arc::clone(&core), side));
        }
        core.tasks.spawn(keep_time(Arc::clone(&core)));
        if let Some(holder) = holder {
            let stopping = core.stopping.clone();
            core.tasks.spawn(async move { stopping.run_until_cancelled(holder.watch()).await });
        }
        let grpc = sockets.grpc.take().map(UnixListenerStream::new).expect("it was bound above");
        let grpc = tokio::spawn(serve(Arc::clone(&core), grpc));
        let remote = remote.map(|remote| tokio::spawn(remote.serve(Arc::clone(&core))));
        announce(&core, &addresses);
        enter(&core, &addresses);
        publish(&core);
        Ok(Self { core, addresses, grpc, admin, remote, _sockets: sockets })
    }

    /// Where it is reached.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// What it holds and for whom.
    pub fn status(&self) -> Status {
        inventory::take(&self.core)
    }

    /// The text of `/metrics`.
    pub fn metrics(&self) -> String {
        crate::metrics::render(&self.core)
    }

    /// Answers everything with `CLOSED`, lets copies in flight end, then closes all connections and removes the
    /// sockets.
    pub async fn stop(self) {
        tracing::info!("stopping");
        self.core.stopping.cancel();
        let manager = self.core.manager.clone();
        if tokio::task::spawn_blocking(move || manager.stop()).await.is_err() {
            tracing::error!("the block manager did not stop");
        }
        if self.core.recorder.is_some() {
            let core = Arc::clone(&self.core);
            let stopped = tokio::task::spawn_blocking(move || core.recorder.as_ref().map(Recorder::stop));
            // A panic of that thread was reported by it.
            let _ = timeout(GOODBYE, stopped).await;
        }
        self.core.closing.cancel();
        self.core.tasks.close();
        if timeout(GOODBYE, self.core.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = self.core.tasks.len(), "some tasks did not end in time");
        }
        self.core.hanging_up.cancel();
        let remote = self.remote.map(|server| ("gRPC over TCP", server));
        for (name, mut server) in [("gRPC", self.grpc), ("admin HTTP", self.admin)].into_iter().chain(remote)
        {
            if timeout(GOODBYE, &mut server).await.is_err() {
                tracing::warn!(name, "connections of a server are cut off");
                server.abort();
            }
        }
        tracing::info!("stopped");
    }
}

/// Tells other machines where it is, if that is wanted.
fn enter(core: &Arc<Core>, addresses: &Addresses) {
    let Some(etcd) = core.config.announce.as_deref().and_then(kvbm_etcd::Etcd::parse) else { return };
    let Some(url) = core.config.announce_url.clone().or_else(|| addresses.grpc.clone()) else { return };
    let key = kvbm_etcd::key(kvbm_etcd::DAEMONS, &url);
    let stopping = core.stopping.clone().cancelled_owned();
    core.tasks.spawn(kvbm_etcd::announce(etcd, key, url, stopping));
}

/// Tells of its blocks over NATS, if that is wanted.
fn publish(core: &Arc<Core>) {
    let Some(nats) = core.config.events.as_deref().and_then(kvbm_nats::Nats::parse) else { return };
    let nats = nats.with_credentials(core.config.events_credentials.as_deref());
    core.tasks.spawn(crate::publisher::run(Arc::clone(core), nats));
}

/// With what an earlier daemon left in host memory, if somebody kept it. Opening files and mapping memory blocks.
async fn start_manager(
    config: &Config,
    gpus: Option<&NodeGpus>,
) -> Result<(Manager, Option<Arc<holder::Client>>), StartError> {
    let mut settings = config.manager(u64::from_le_bytes(random()));
    if let Some(found) = gpus {
        settings.gpu_nodes = found.nodes();
        settings.exports = Arc::new(MapGpus::new(Arc::clone(&found.gpus)));
    }
    let holder = config.holder.clone();
    let started = tokio::task::spawn_blocking(move || {
        let (client, warm) = holder.and_then(|path| warm::connect(&path)).unzip();
        Manager::start_warm(settings, warm).map(|manager| (manager, client))
    });
    Ok(started.await.expect("starting the block manager does not panic")?)
}

/// Starting the driver blocks.
async fn find_gpus(config: &Config) -> Option<NodeGpus> {
    let config = config.clone();
    tokio::task::spawn_blocking(move || NodeGpus::find(&config))
        .await
        .expect("looking for GPUs does not panic")
}

async fn serve(core: Arc<Core>, listener: UnixListenerStream) {
    let cache = CacheServer::new(CacheService(Arc::clone(&core)))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let registry = RegistryServer::new(RegistryService::new(Arc::clone(&core), WATCHERS_MAX))
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let server = Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .add_service(cache)
        .add_service(registry)
        .add_service(AdminServer::new(AdminService::on_socket(Arc::clone(&core))));
    let hanging_up = core.hanging_up.clone();
    if let Err(error) = server.serve_with_incoming_shutdown(listener, hanging_up.cancelled_owned()).await {
        tracing::error!(%error, "the gRPC server ended");
    }
}

/// Time passes for leases and orphan pools.
async fn keep_time(core: Arc<Core>) {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = core.stopping.cancelled() => return,
            _ = ticks.tick() => core.manager.tick(),
        }
    }
}

/// One line that says what serves where.
fn announce(core: &Core, addresses: &Addresses) {
    let config = &core.config;
    let host = match config.cpu_cache_blocks {
        Some(blocks) => format!("{blocks} blocks"),
        None => format!("{} GB", config.cpu_cache_gb),
    };
    let disk = match (config.disk_cache_blocks, config.disk_cache_gb) {
        (Some(blocks), _) => format!("{blocks} blocks"),
        (None, 0.0) => "off".to_owned(),
        (None, gigabytes) => format!("{gigabytes} GB"),
    };
    let metrics = addresses.admin_url(if config.metrics { "/metrics" } else { "/status" });
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        socket = %addresses.socket.display(),
        grpc = addresses.grpc.as_deref().unwrap_or("off"),
        host,
        disk,
        metrics,
        "kvbm daemon serves"
    );
}
