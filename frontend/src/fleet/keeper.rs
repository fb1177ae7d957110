//! Keeps one worker connected, for as long as somebody says that it exists.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use super::{
    Connection, Description, Drivers, Endpoint, Fleet, Node, Place, Role, WorkerState, base_namespace,
};
use crate::model::Library;

/// First and last pause between attempts to connect.
pub const BACKOFF_MIN: Duration = Duration::from_millis(20);
pub const BACKOFF_MAX: Duration = Duration::from_millis(500);

/// How long a worker that the registry no longer lists, but that is still connected, is used: a daemon that was
/// started again lists its workers only when they have attached again.
const ABSENT_MAX: Duration = Duration::from_secs(10);

/// Pause between attempts to read a model's folder.
const LOAD_RETRY: Duration = Duration::from_secs(5);

/// What a worker is kept with.
#[derive(Clone)]
pub struct Means {
    pub fleet: Arc<Fleet>,
    pub library: Arc<Library>,
    pub drivers: Drivers,
}

/// What the registry last said of a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listing {
    /// It is there, and takes requests unless it is draining.
    Listed {
        /// What it says of itself.
        description: Description,
        /// It takes nothing new.
        draining: bool,
    },
    /// It is no longer listed, since this time.
    Absent(Instant),
}

/// When a connected worker that cannot be used is looked at again.
fn retry_pause(state: &WorkerState) -> Option<Duration> {
    match state {
        WorkerState::Ready(..) => None,
        WorkerState::Draining => Some(BACKOFF_MAX),
        WorkerState::Down(_) => Some(LOAD_RETRY),
    }
}

/// The next pause: twice the last one.
pub fn next_pause(pause: Duration) -> Duration {
    (pause * 2).min(BACKOFF_MAX)
}

/// Takes a worker off the table when nobody keeps it any more.
struct Kept {
    fleet: Arc<Fleet>,
    endpoint: Endpoint,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.fleet.remove(&self.endpoint);
    }
}

/// Keeps a worker that a flag or a list named; it is asked what it serves. Ends only by being dropped.
pub async fn keep_static(endpoint: Endpoint, means: Means) {
    let _kept = Kept { fleet: means.fleet.clone(), endpoint: endpoint.clone() };
    let mut pause = BACKOFF_MIN;
    let mut last_reason = String::new();
    let place = Place { node: Node::alone(), pool: 0 };
    means.fleet.set(&endpoint, None, WorkerState::Down("not connected yet".to_owned()));
    loop {
        match describe(&endpoint, &place, &means).await {
            Ok((connection, description, draining)) => {
                pause = BACKOFF_MIN;
                last_reason.clear();
                let state = usable_state(&connection, &description, draining, &means).await;
                let retry = retry_pause(&state);
                means.fleet.set(&endpoint, Some(&description), state);
                if let Some(pause) = retry {
                    sleep(pause).await;
                    continue;
                }
                info!(%endpoint, worker = description.worker_id, model = description.model, "worker is connected");
                connection.closed().await;
                warn!(%endpoint, worker = description.worker_id, "worker is gone");
                means.fleet.set(
                    &endpoint,
                    Some(&description),
                    WorkerState::Down("connection lost".to_owned()),
                );
            }
            Err(reason) => {
                if reason != last_reason {
                    warn!(%endpoint, reason, "cannot reach worker, trying on");
                    means.fleet.set(&endpoint, None, WorkerState::Down(reason.clone()));
                    last_reason = reason;
                }
                sleep(pause).await;
                pause = next_pause(pause);
            }
        }
    }
}

async fn describe(
    endpoint: &Endpoint,
    place: &Place,
    means: &Means,
) -> Result<(Arc<Connection>, Description, bool), String> {
    let opened = Connection::open(endpoint, &means.drivers).await;
    let (connection, reply) = opened.map_err(|error| error.to_string())?;
    let description = Description {
        worker_id: reply.worker_id,
        model: reply.model,
        model_path: reply.model_path.into(),
        context_length: if reply.context_length == 0 { u32::MAX } else { reply.context_length },
        role: Role::parse(&reply.role),
        base: base_namespace(&reply.base_namespace),
        tokens_per_block: reply.tokens_per_block as usize,
        place: place.clone(),
    };
    Ok((Arc::new(connection), description, reply.state == "draining"))
}

async fn usable_state(
    connection: &Arc<Connection>,
    description: &Description,
    draining: bool,
    means: &Means,
) -> WorkerState {
    if draining {
        return WorkerState::Draining;
    }
    match means.library.get(&description.model_path).await {
        Ok(model) => WorkerState::Ready(connection.clone(), model),
        Err(error) => {
            warn!(worker = description.worker_id, %error, "worker cannot be used");
            WorkerState::Down(error.to_string())
        }
    }
}

/// Keeps a worker of the registry. Returns, and takes it off the table, when it is no longer listed and either its
/// connection ends or it has been so for a while.
pub async fn keep_listed(endpoint: Endpoint, mut listing: watch::Receiver<Listing>, means: Means) {
    let mut pause = BACKOFF_MIN;
    let mut last_reason = String::new();
    loop {
        let Listing::Listed { description, .. } = listing.borrow_and_update().clone() else { break };
        match Connection::open(&endpoint, &means.drivers).await {
            Ok((connection, _)) => {
                pause = BACKOFF_MIN;
                last_reason.clear();
                info!(%endpoint, worker = description.worker_id, model = description.model, "worker is connected");
                let connection = Arc::new(connection);
                let outcome = keep_connected(&endpoint, &connection, &mut listing, &means).await;
                info!(%endpoint, worker = description.worker_id, "worker is no longer used");
                if outcome.is_break() {
                    break;
                }
                means.fleet.set(
                    &endpoint,
                    Some(&description),
                    WorkerState::Down("connection lost".to_owned()),
                );
            }
            Err(error) => {
                let reason = error.to_string();
                if reason != last_reason {
                    warn!(%endpoint, reason, "cannot reach worker, trying on");
                    means.fleet.set(&endpoint, Some(&description), WorkerState::Down(reason.clone()));
                    last_reason = reason;
                }
                tokio::select! {
                    () = sleep(pause) => pause = next_pause(pause),
                    changed = listing.changed() => if changed.is_err() { break },
                }
            }
        }
    }
    means.fleet.remove(&endpoint);
}

/// Follows the listing while the connection is up. `Break`: the worker is not to be kept any longer.
async fn keep_connected(
    endpoint: &Endpoint,
    connection: &Arc<Connection>,
    listing: &mut watch::Receiver<Listing>,
    means: &Means,
) -> ControlFlow<()> {
    let mut described: Option<Description> = None;
    loop {
        let listed = listing.borrow_and_update().clone();
        let deadline = match &listed {
            Listing::Listed { description, draining } => {
                // Another process behind the same address: its connection is not this one.
                if described.as_ref().is_some_and(|before| !before.is_same_process(description)) {
                    return ControlFlow::Continue(());
                }
                let state = usable_state(connection, description, *draining, means).await;
                let retry = if *draining { None } else { retry_pause(&state) };
                means.fleet.set(endpoint, Some(description), state);
                described = Some(description.clone());
                retry.map(|pause| (Instant::now() + pause, ControlFlow::Continue(())))
            }
            Listing::Absent(since) => Some((*since + ABSENT_MAX, ControlFlow::Break(()))),
        };
        tokio::select! {
            () = connection.closed() => return ControlFlow::Continue(()),
            then = reached(deadline) => if then.is_break() { return then },
            changed = listing.changed() => if changed.is_err() { return ControlFlow::Break(()) },
        }
    }
}

async fn reached(deadline: Option<(Instant, ControlFlow<()>)>) -> ControlFlow<()> {
    match deadline {
        Some((at, then)) => {
            sleep_until(at).await;
            then
        }
        None => std::future::pending().await,
    }
}
