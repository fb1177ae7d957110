//! One session: an engine's stream of messages, its side channel, and what becomes of what it held.
//!
//! ```text
//!  Hello ──► attaching ── side channel bound ──► attached ── stream or side channel ends ──► silent ──► gone
//!               │ too late, or closed                            │ it holds no pool, or its process is dead ▲
//!               └────────────────────────────────────────────────┴──────────────────────────────────────────┘
//! ```
//!
//! One task does all of it, so that messages are handled in order and the end is handled once. A process counts as dead
//! when its side channel is at end of file *and* its pidfd is readable; silence never counts.

mod attached;
mod lookups;
mod outbound;
mod side;
mod table;

use std::sync::Arc;
use std::time::Duration;

use kvbm::{Refused, SessionId, TrustDomain};
use kvbm_proto::v1::{self, ClientMessage, client_message::Body as Ask, server_message::Body};
use kvbm_proto::{LOOKUP_CHANNEL, PROTOCOL_VERSION, SideMessage};
use tokio::time::timeout;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status, Streaming};

pub(crate) use outbound::Answers;
pub(crate) use side::accept;
pub(crate) use table::Sessions;

use crate::core::Core;
use crate::random;
use crate::wire::{self, invalid};
use attached::Attached;
use outbound::{Outbound, Unsendable};
use side::Side;
use table::Phase;

/// Feature: pools that the engine owns are served.
const ENGINE_POOLS: &str = "engine_pools";

/// How long a client may take to notice that the daemon stops.
const FAREWELL: Duration = Duration::from_millis(500);

/// `kvbm.v1.Cache`.
#[derive(Debug)]
pub(crate) struct CacheService(pub Arc<Core>);

#[tonic::async_trait]
impl v1::cache_server::Cache for CacheService {
    type AttachStream = Answers;

    async fn attach(&self, request: Request<Streaming<ClientMessage>>) -> Result<Response<Answers>, Status> {
        let core = &self.0;
        if core.stopping.is_cancelled() {
            return Err(Status::unavailable("the daemon is stopping"));
        }
        let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
        let uid = peer.map(|peer| peer.uid()).filter(|uid| core.may_attach(*uid));
        let uid = uid.ok_or_else(|| Status::permission_denied("this user may not attach"))?;
        let depth = usize::try_from(core.config.session_queue_depth).unwrap_or(1);
        let (outbound, answers) =
            outbound::channel(depth, Duration::from_millis(core.config.session_stall_ms));
        let task = run(Arc::clone(core), uid, request.into_inner(), outbound);
        core.tasks.spawn(task);
        Ok(Response::new(answers))
    }
}

/// Why a session is served no longer.
#[derive(Debug)]
enum End {
    /// The client closed the stream, or the connection broke.
    StreamClosed,
    /// The bytes are no messages.
    Malformed(Status),
    /// It takes no answers.
    Stalled,
    /// It did not attach in time.
    Late(&'static str),
    /// It does not keep the protocol; it has been told.
    Refused,
    /// The side channel is at end of file.
    SideClosed,
    /// Another session has taken over what it held.
    Superseded,
    /// The daemon stops.
    Stopping,
}

impl From<Unsendable> for End {
    fn from(unsendable: Unsendable) -> Self {
        match unsendable {
            Unsendable::Closed => Self::StreamClosed,
            Unsendable::Stalled => Self::Stalled,
        }
    }
}

impl End {
    /// What the client reads as the end of its stream, unless it closed it.
    fn status(&self) -> Option<Status> {
        match self {
            Self::StreamClosed => None,
            Self::Malformed(status) => Some(status.clone()),
            Self::Stalled => Some(Status::resource_exhausted("answers were not taken")),
            Self::Late(what) => Some(Status::deadline_exceeded(format!("no {what} in time"))),
            Self::Refused => Some(Status::failed_precondition("see the last message")),
            Self::SideClosed => Some(Status::aborted("the side channel is closed")),
            Self::Superseded => Some(Status::aborted("another session took over")),
            Self::Stopping => Some(Status::unavailable("the daemon is stopping")),
        }
    }
}

/// A session whose task fails by a bug must not keep its place for ever: its process is alive for all we know, so what
/// it holds is quarantined until the process hands it back or another daemon takes over.
struct Guard {
    core: Arc<Core>,
    id: SessionId,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.core.workers.remove(self.id);
            self.core.manager.session_silent(self.id);
            self.core.sessions.leave(self.id);
        }
    }
}

/// The life of a session.
async fn run(core: Arc<Core>, uid: u32, mut inbound: Streaming<ClientMessage>, outbound: Outbound) {
    let limit = Duration::from_millis(core.config.bind_timeout_ms);
    let hello = match first_message(&core, &mut inbound, limit).await {
        Ok((id, hello)) => match check_hello(&hello) {
            Ok(()) => (id, hello),
            Err(refused) => return turn_away(&outbound, id, &refused).await,
        },
        Err(end) => return end.status().into_iter().for_each(|status| outbound.end(status)),
    };
    let (hello_id, hello) = hello;
    let id = core.manager.open_session(TrustDomain(uid));
    let _guard = Guard { core: Arc::clone(&core), id };
    let token = random::<32>();
    let client = format!("{} (pid {})", hello.client, hello.pid);
    let Some(entered) = core.sessions.enter(id, uid, client, token, core.config.sessions_max) else {
        core.manager.session_dead(id);
        let busy = Refused::Busy { queue: "sessions" };
        core.refusals.note(&busy);
        return turn_away(&outbound, hello_id, &busy).await;
    };
    tracing::info!(session = id.0, uid, client = hello.client, pid = hello.pid, "a session opens");
    let table::Entered { side, over } = entered;
    let reply = v1::HelloReply {
        protocol_version: PROTOCOL_VERSION,
        features: vec![ENGINE_POOLS.to_owned(), LOOKUP_CHANNEL.to_owned()],
        session_id: id.0,
        token: token.to_vec(),
        daemon_version: env!("CARGO_PKG_VERSION").to_owned(),
        daemon_pid: std::process::id(),
    };
    let bound = async {
        outbound.reserve(hello_id).await?.send(Body::Hello(reply));
        bind(&core, &mut inbound, &outbound, side, limit).await
    };
    let (end, mut side) = match bound.await {
        Ok(side) => {
            core.sessions.set_phase(id, Phase::Attached);
            let mut session =
                Attached::new(Arc::clone(&core), (id, TrustDomain(uid)), outbound.clone(), side, limit);
            let end = tokio::select! {
                end = session.serve(&mut inbound) => end,
                () = over.cancelled() => End::Superseded,
                () = core.closing.cancelled() => End::Stopping,
            };
            (end, Some(session.into_side()))
        }
        Err(end) => (end, None),
    };
    tracing::info!(session = id.0, ?end, "a session ends");
    if matches!(end, End::Stalled) {
        core.refusals.note_queue("session_answers");
    }
    if let Some(status) = end.status() {
        outbound.end(status);
    }
    drop((outbound, inbound));
    // Before what it holds is given up: a lookup would hold more.
    core.sessions.end_lookups(id).await;
    core.workers.remove(id);
    if let (End::Stopping, Some(side)) = (&end, &mut side) {
        // Whoever is still writing would lose what it has not read yet if the connection were cut now.
        side.say_goodbye();
        let _ = timeout(FAREWELL, side.closed()).await;
    }
    tokio::select! {
        () = wait_for_death(&core, id, side) => core.manager.session_dead(id),
        () = over.cancelled() => {}
        () = core.closing.cancelled() => {}
    }
    core.sessions.leave(id);
}

/// Returns when nothing that the session held can be touched by its process any more.
async fn wait_for_death(core: &Core, id: SessionId, side: Option<Side>) {
    let Some(mut side) = side else { return };
    side.say_goodbye();
    if side.is_dead() || core.manager.end_session_without_pools(id) {
        return;
    }
    core.manager.session_silent(id);
    core.sessions.set_phase(id, Phase::Silent);
    side.dead().await;
    tracing::info!(session = id.0, pid = side.pid(), "the process of a session is dead");
}

async fn first_message(
    core: &Core,
    inbound: &mut Streaming<ClientMessage>,
    limit: Duration,
) -> Result<(u64, v1::Hello), End> {
    let message = tokio::select! {
        message = timeout(limit, next(inbound)) => message.map_err(|_| End::Late("Hello"))??,
        () = core.stopping.cancelled() => return Err(End::Stopping),
    };
    let hello = match message.body {
        Some(Ask::Hello(hello)) => hello,
        _ => v1::Hello::default(),
    };
    Ok((message.id, hello))
}

fn check_hello(hello: &v1::Hello) -> Result<(), Refused> {
    wire::label("hello.client", &hello.client)?;
    match hello.protocol_version {
        PROTOCOL_VERSION => Ok(()),
        0 => Err(invalid("hello", "is to be the first message")),
        other => {
            Err(invalid("hello.protocol_version", format!("{other} is not served, {PROTOCOL_VERSION} is")))
        }
    }
}

async fn turn_away(outbound: &Outbound, id: u64, refused: &Refused) {
    if let Ok(answer) = outbound.reserve(id).await {
        answer.refuse(refused);
        outbound.end(End::Refused.status().expect("the client is told"));
    }
}

async fn next(inbound: &mut Streaming<ClientMessage>) -> Result<ClientMessage, End> {
    match inbound.message().await {
        Ok(Some(message)) => Ok(message),
        Ok(None) => Err(End::StreamClosed),
        // A broken connection reads the same as malformed bytes; the status only matters if somebody still reads it.
        Err(status) => Err(End::Malformed(status)),
    }
}

/// Serves nothing but `Ping` until the side channel is there.
async fn bind(
    core: &Core,
    inbound: &mut Streaming<ClientMessage>,
    outbound: &Outbound,
    mut bound: tokio::sync::oneshot::Receiver<Side>,
    limit: Duration,
) -> Result<Side, End> {
    let late = tokio::time::sleep(limit);
    tokio::pin!(late);
    loop {
        let message = tokio::select! {
            biased;
            side = &mut bound => {
                let side = side.map_err(|_| End::SideClosed)?;
                side.send(SideMessage::Bound, None, limit).await.map_err(|_| End::SideClosed)?;
                return Ok(side);
            }
            () = core.closing.cancelled() => return Err(End::Stopping),
            () = &mut late => return Err(End::Late("side channel")),
            message = next(inbound) => message?,
        };
        let answer = outbound.reserve(message.id).await?;
        match message.body {
            Some(Ask::Ping(_)) => answer.send(Body::Pong(v1::Pong {})),
            _ => answer.refuse(&invalid("session", "is to be bound to a side channel first")),
        }
    }
}
