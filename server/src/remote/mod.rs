//! The registry over TCP, for frontends and routers on other machines.
//!
//! Engines must be on the node, so sessions are not served here: only workers, KV events, snapshots and status; and
//! pins, for whoever shows a token.
//!
//! ```text
//!  connection ──► a place ──► TLS ──► token ──► Registry
//!                  (bounded)    └───────┴── one deadline for all of it; who misses it is hung up on
//! ```
//!
//! **Invariant.** Nothing is answered but `UNAUTHENTICATED` before a request has shown what the settings demand; and
//! whoever has not shown it holds a place for a bounded time only.

mod credentials;
mod door;
mod guest;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kvbm_proto::MESSAGE_BYTES_MAX;
use kvbm_proto::v1::admin_server::AdminServer;
use kvbm_proto::v1::registry_server::RegistryServer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::InterceptorLayer;
use tonic::transport::Server;

use crate::core::Core;
use crate::error::StartError;
use crate::registry::RegistryService;
use crate::rights::AdminService;
pub use credentials::Misfit;
pub(crate) use credentials::{Credentials, Token};
pub(crate) use door::Door;
use door::{Doorkeeper, Reason};
use guest::{Bytes, Guest};

/// Streams served at once to other machines, which are not to take those of this node.
const WATCHERS_MAX: usize = 512;
/// Requests under way on one connection.
const STREAMS_MAX: u32 = 32;
/// Bytes of a request's headers; a token has at most 4 KiB.
const HEADERS_BYTES_MAX: u32 = 16 << 10;
/// Peers that answer no ping for `PING_DEADLINE` are gone.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_DEADLINE: Duration = Duration::from_secs(20);
/// Pause after the kernel refused a connection, which it does when descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A bound port that is not served yet.
pub(crate) struct Remote {
    listener: TcpListener,
    address: SocketAddr,
    credentials: Credentials,
}

impl Remote {
    /// Binds exactly the port that was asked for: clients elsewhere are configured for it.
    pub async fn bind(listen: SocketAddr, credentials: Credentials) -> Result<Self, StartError> {
        let failed = |source| StartError::Remote { address: listen, source };
        let listener = TcpListener::bind(listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address, credentials })
    }

    /// Where it is reached.
    pub fn url(&self) -> String {
        let scheme = if self.credentials.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Serves until connections are closed.
    pub async fn serve(self, core: Arc<Core>) {
        let Self { listener, credentials: Credentials { tls, token }, .. } = self;
        let (sender, guests) = mpsc::channel(1);
        core.tasks.spawn(accept(Arc::clone(&core), listener, tls, sender));
        let registry = RegistryServer::new(RegistryService::new(Arc::clone(&core), WATCHERS_MAX))
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        // A certificate alone lets look, not change.
        let admin = token.is_some().then(|| AdminServer::new(AdminService::behind_token(Arc::clone(&core))));
        let hanging_up = core.hanging_up.clone();
        let server = Server::builder()
            .max_concurrent_streams(STREAMS_MAX)
            .http2_max_header_list_size(HEADERS_BYTES_MAX)
            .http2_keepalive_interval(Some(PING_INTERVAL))
            .http2_keepalive_timeout(Some(PING_DEADLINE))
            .layer(InterceptorLayer::new(Doorkeeper::new(core, token)))
            .add_service(registry)
            .add_optional_service(admin);
        let served =
            server.serve_with_incoming_shutdown(ReceiverStream::new(guests), hanging_up.cancelled_owned());
        if let Err(error) = served.await {
            tracing::error!(%error, "the gRPC server over TCP ended");
        }
    }
}

type Guests = mpsc::Sender<io::Result<Guest>>;

/// Each connection needs a place. While the last one waits for it, further ones wait in the kernel's queue.
async fn accept(core: Arc<Core>, listener: TcpListener, tls: Option<TlsAcceptor>, guests: Guests) {
    loop {
        let accepted = async {
            let stream = listener.accept().await;
            (core.door.place().await, stream)
        };
        let (place, accepted) = tokio::select! {
            () = core.closing.cancelled() => return,
            accepted = accepted => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let welcome = welcome(Arc::clone(&core), stream, place, tls.clone(), guests.clone());
                let closing = core.closing.clone();
                core.tasks.spawn(async move {
                    tokio::select! {
                        () = closing.cancelled() => {}
                        () = welcome => {}
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection over TCP");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Shakes hands and passes the connection on.
async fn welcome(
    core: Arc<Core>,
    stream: TcpStream,
    place: OwnedSemaphorePermit,
    tls: Option<TlsAcceptor>,
    guests: Guests,
) {
    let deadline = Instant::now() + Duration::from_millis(core.config.bind_timeout_ms);
    // Messages are small and written at once: only latency is at stake.
    let _ = stream.set_nodelay(true);
    let bytes: Box<dyn Bytes> = match tls {
        None => Box::new(stream),
        Some(tls) => match timeout_at(deadline, tls.accept(stream)).await {
            Ok(Ok(stream)) => Box::new(stream),
            Ok(Err(error)) => {
                core.door.reject(Reason::Tls);
                tracing::debug!(%error, "no TLS with a client");
                return;
            }
            Err(_) => {
                core.door.reject(Reason::Silent);
                return;
            }
        },
    };
    // If nobody takes it, the server has ended.
    let _ = guests.send(Ok(Guest::new(bytes, core, deadline, place))).await;
}
