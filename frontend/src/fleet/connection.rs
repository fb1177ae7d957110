//! One HTTP/2 connection to a worker or to the daemon.
//!
//! The generated clients run directly on hyper's connection: one queue between a request and the socket, and it
//! is known at once when the peer is gone, which a channel that reconnects by itself hides.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use kvbm_proto::v1::registry_client::RegistryClient;
use kvbm_proto::v1::worker_client::WorkerClient;
use kvbm_proto::v1::{DescribeReply, DescribeRequest};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::body::Body;

use super::daemon::Tls;
use super::{Daemon, Endpoint};

const CONNECT_DEADLINE: Duration = Duration::from_secs(2);

/// How soon a peer that answers no pings counts as gone.
#[derive(Clone, Copy)]
struct Pings {
    interval: Duration,
    deadline: Duration,
}

/// Of workers: answers wait for them, so one that is stopped or cut off is given up soon.
const WORKER_PINGS: Pings = Pings { interval: Duration::from_secs(1), deadline: Duration::from_secs(3) };
/// Of a daemon on another machine. The kernel tells when one on this machine is gone.
const DAEMON_PINGS: Pings = Pings { interval: Duration::from_secs(10), deadline: Duration::from_secs(20) };

/// Tokens of many streams share a connection; a client that reads slowly must not stop the others.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// An open connection; its driver ends by itself when the last request on it has ended and this is dropped.
pub struct Connection {
    id: u64,
    transport: Transport,
    origin: Uri,
    closed: CancellationToken,
}

/// What drives connections, and stops them.
#[derive(Clone)]
pub struct Drivers {
    /// Counts the tasks.
    pub tasks: TaskTracker,
    /// Ends them.
    pub abort: CancellationToken,
}

impl Connection {
    /// Connects to a worker, which says what it is. The kernel takes connections for a process that is stopped, too: only
    /// an answer tells that it runs.
    pub async fn open(endpoint: &Endpoint, drivers: &Drivers) -> io::Result<(Self, DescribeReply)> {
        in_time(async {
            let connection = Self::connect(endpoint, drivers).await?;
            let reply = connection.worker().describe(DescribeRequest {}).await;
            let reply = reply.map_err(|status| io::Error::other(status.message().to_owned()))?;
            Ok((connection, reply.into_inner()))
        })
        .await
    }

    async fn connect(endpoint: &Endpoint, drivers: &Drivers) -> io::Result<Self> {
        Self::dial(endpoint, None, endpoint.origin(), Some(WORKER_PINGS), drivers).await
    }

    /// Connects to the daemon and shakes hands.
    pub async fn open_daemon(daemon: &Daemon, drivers: &Drivers) -> io::Result<Self> {
        let pings = matches!(daemon.endpoint(), Endpoint::Tcp(_)).then_some(DAEMON_PINGS);
        in_time(Self::dial(daemon.endpoint(), daemon.tls(), daemon.origin(), pings, drivers)).await
    }

    async fn dial(
        endpoint: &Endpoint,
        tls: Option<&Tls>,
        origin: Uri,
        pings: Option<Pings>,
        drivers: &Drivers,
    ) -> io::Result<Self> {
        let authority = match endpoint {
            Endpoint::Unix(path) => {
                return Self::drive(UnixStream::connect(path).await?, origin, pings, drivers).await;
            }
            Endpoint::Tcp(authority) => authority,
        };
        let stream = TcpStream::connect(authority.as_str()).await?;
        stream.set_nodelay(true)?;
        match tls {
            None => Self::drive(stream, origin, pings, drivers).await,
            Some(Tls { connector, name }) => {
                let stream = connector.connect(name.clone(), stream).await?;
                Self::drive(stream, origin, pings, drivers).await
            }
        }
    }

    async fn drive<S>(stream: S, origin: Uri, pings: Option<Pings>, drivers: &Drivers) -> io::Result<Self>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
        if let Some(Pings { interval, deadline }) = pings {
            builder.keep_alive_interval(interval).keep_alive_timeout(deadline).keep_alive_while_idle(true);
        }
        let (sender, driver) = builder.handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        let closed = CancellationToken::new();
        let (ended, abort) = (closed.clone().drop_guard(), drivers.abort.clone());
        drivers.tasks.spawn(async move {
            let _ended = ended;
            // How it ended is seen by each request on it.
            tokio::select! {
                _ = driver => {}
                () = abort.cancelled() => {}
            }
        });
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Ok(Self { id, transport: Transport { sender }, origin, closed })
    }

    /// Not used by any other connection of this process.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whether requests can no longer be sent.
    pub fn is_closed(&self) -> bool {
        self.closed.is_cancelled() || self.transport.sender.is_closed()
    }

    /// Returns when the peer is gone.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }

    /// To talk to a worker.
    pub fn worker(&self) -> WorkerClient<Transport> {
        WorkerClient::with_origin(self.transport.clone(), self.origin.clone())
    }

    /// To talk to the daemon.
    pub fn registry(&self) -> RegistryClient<Transport> {
        RegistryClient::with_origin(self.transport.clone(), self.origin.clone())
            .max_decoding_message_size(kvbm_proto::MESSAGE_BYTES_MAX)
    }
}

async fn in_time<T>(opening: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(CONNECT_DEADLINE, opening).await.unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {CONNECT_DEADLINE:?}")))
    })
}

/// hyper's handle as the service that generated clients want.
#[derive(Clone)]
pub struct Transport {
    sender: http2::SendRequest<Body>,
}

impl tower::Service<Request<Body>> for Transport {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.sender.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.sender.send_request(request))
    }
}
