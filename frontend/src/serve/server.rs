//! The listening socket, and the order in which everything starts and stops.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router as Routes;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::routes::{App, routes};
use crate::args::Config;
use crate::discovery::{Appointed, keep_daemon};
use crate::error::FrontendError;
use crate::fleet::{self, Drivers, Fleet, Means};
use crate::metrics::Metrics;
use crate::model::Library;
use crate::request_id::RequestIds;
use crate::router::{Events, Knowledge, Router, RouterMetrics, RouterMode};
use crate::upstream::{self, Upstreams};

/// Clients at a time; further ones wait to be accepted.
const CONNECTIONS_MAX: usize = 16_384;

/// How long a client may take for the head of a request, the pause between two of them included.
const HEADER_DEADLINE: Duration = Duration::from_secs(120);

/// Pause after the kernel refused a connection, which it does when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until `stop`, then lets running requests end for `config.drain`. `bound` is told the address once it is
/// listened on, which is before any worker is known.
pub async fn run(
    config: Config,
    stop: CancellationToken,
    bound: impl FnOnce(SocketAddr),
) -> Result<(), FrontendError> {
    let failed = |source| FrontendError::Bind { address: config.address, source };
    let listener = TcpListener::bind(config.address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let metrics = Arc::new(Metrics::new().expect("the names of all series are valid and distinct"));
    let fleet = Arc::new(Fleet::new(metrics.clone()));
    let drivers = Drivers { tasks: TaskTracker::new(), abort: CancellationToken::new() };
    let library = Arc::new(Library::new(config.model_path.clone()));
    let means = Means { fleet: fleet.clone(), library, drivers: drivers.clone() };
    let routing = RouterMetrics::new(metrics.registry());
    let routing = Arc::new(routing.expect("the names of all series are valid and distinct"));
    let looks_at_blocks = config.router.mode == RouterMode::Kv || config.router.disagg.is_some();
    let follows = looks_at_blocks && config.router.events == Events::Followed;
    let events = if follows { Events::Followed } else { Events::Ignored };
    let mut knowledge = Knowledge::new(events, config.router.guess_lifetime);
    if let Some(nats) = config.router.nats.as_ref().filter(|_| follows) {
        let opened = kvbm_nats::Bus::open(nats).await;
        knowledge = knowledge.over(opened.map_err(|error| FrontendError::Events(error.to_string()))?);
    }
    let knowledge = Arc::new(knowledge);

    let mut keepers = JoinSet::new();
    for endpoint in config.workers.iter().cloned() {
        keepers.spawn(fleet::keep_static(endpoint, means.clone()));
    }
    for daemon in config.daemons.iter().cloned() {
        let (means, drivers) = (means.clone(), drivers.clone());
        keepers.spawn(keep_daemon(daemon, means, knowledge.clone(), routing.clone(), drivers));
    }
    let upstreams = Arc::new(Upstreams::new(config.upstream_ca.as_deref())?);
    for url in &config.upstreams {
        keepers.spawn(upstream::watch(upstreams.clone(), upstreams.add(url)));
    }
    if let Some(place) = config.discovery.clone() {
        let files = config.daemon_files.clone();
        let appointed = Appointed::new(means, upstreams.clone(), knowledge.clone(), routing.clone(), files);
        keepers.spawn(place.follow(appointed));
    }
    let router =
        Router::new(fleet.clone(), config.worker_wait, config.router, knowledge.clone(), routing.clone());
    let app = Arc::new(App {
        router: Arc::new(router),
        knowledge,
        routing,
        upstreams,
        fleet,
        metrics,
        ids: RequestIds::new(),
        body_limit_bytes: config.body_limit_bytes,
        timing: config.timing,
        tool_calls: config.tool_calls,
        started: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        stop: stop.clone(),
    });
    info!(%address, "frontend listens");
    bound(address);

    let clients = Clients { tasks: TaskTracker::new(), stop, abort: CancellationToken::new() };
    clients.accept(listener, routes(app)).await;
    clients.drain(config.drain).await;
    keepers.shutdown().await;
    drivers.abort.cancel();
    drivers.tasks.close();
    drivers.tasks.wait().await;
    Ok(())
}

/// The connections of clients, one task each.
struct Clients {
    tasks: TaskTracker,
    stop: CancellationToken,
    abort: CancellationToken,
}

impl Clients {
    async fn accept(&self, listener: TcpListener, routes: Routes) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let accepted = async {
                let place = places.clone().acquire_owned().await;
                (place, listener.accept().await)
            };
            let (place, accepted) = tokio::select! {
                () = self.stop.cancelled() => return,
                accepted = accepted => accepted,
            };
            let socket = match accepted {
                Ok((socket, _)) => socket,
                Err(error) => {
                    warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (routes, stop, abort) = (routes.clone(), self.stop.clone(), self.abort.clone());
            self.tasks.spawn(async move {
                let _place = place;
                serve_client(socket, routes, stop, abort).await;
            });
        }
    }

    async fn drain(self, deadline: Duration) {
        self.tasks.close();
        if tokio::time::timeout(deadline, self.tasks.wait()).await.is_err() {
            warn!(connections = self.tasks.len(), "requests are still running, ending them");
            self.abort.cancel();
            self.tasks.wait().await;
        }
    }
}

async fn serve_client(socket: TcpStream, routes: Routes, stop: CancellationToken, abort: CancellationToken) {
    if let Err(error) = socket.set_nodelay(true) {
        debug!(%error, "client left before it was served");
        return;
    }
    let service = service_fn(move |request: http::Request<Incoming>| {
        let mut routes = routes.clone();
        async move { tower::Service::call(&mut routes, request).await }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_DEADLINE);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(socket), service));
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                served = connection.as_mut() => served,
                () = abort.cancelled() => return,
            }
        }
    };
    if let Err(error) = served {
        debug!(%error, "connection ended");
    }
}
