//! The asynchronous half of the cache: connects for ever, hands the pool over, forwards, and keeps the deadlines.
//!
//! ```text
//!  connect ──► Reachable ──► (engine: Open) ──► Opened ──► serve ──► Down ──► connect
//!                 ▲                 │ refused: stay listed as a worker, try again later
//!                 └─────────────────┘
//! ```
//!
//! Messages leave in the order in which the engine gave the commands. A command for a namespace that the session does
//! not know yet waits for its registration, and everything behind it waits too: a release must not overtake a commit.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvbm_hash::{BaseNamespace, Namespace};
use kvbm_shm::PoolLayout;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

use crate::client::Client;
use crate::desk::{Desk, Expired};
use crate::exchange::{Arrival, Attempt, Command, Inbox, Opening};
use crate::{ClientError, Config, DetachReason, Tenants, WorkerRegistration};

mod attach;
mod daemons;
mod forward;

/// Commands that wait for the link, at most. A full queue is a slow daemon.
const COMMANDS_MAX: usize = 1024;

/// Longest pause after a daemon that answers but does not take the pool.
const REFUSED_PAUSE_MAX: Duration = Duration::from_secs(5);

/// Longest pause after a daemon that answers and then falls silent.
const SILENT_PAUSE_MAX: Duration = Duration::from_secs(1);

/// A session that served this long did not fail.
const SERVED_WELL_AFTER: Duration = Duration::from_secs(1);

/// The engine's end of the link. Dropping it ends the session.
pub(crate) struct LinkHandle {
    commands: mpsc::Sender<(Attempt, Command)>,
    hangup: watch::Sender<Attempt>,
    worker: watch::Sender<Option<WorkerRegistration>>,
    pub desk: Arc<Desk>,
    pub inbox: Arc<Inbox>,
    task: AbortHandle,
    runtime: Option<Runtime>,
}

impl LinkHandle {
    /// Starts the link on `handle`, or on a thread of its own.
    pub fn start(
        parts: LinkParts,
        worker: Option<WorkerRegistration>,
        handle: Option<Handle>,
    ) -> std::io::Result<Self> {
        let (commands, orders) = mpsc::channel(COMMANDS_MAX);
        let (hangup, hangups) = watch::channel(0);
        let (worker, workers) = watch::channel(worker);
        let (desk, inbox) = (parts.desk.clone(), parts.inbox.clone());
        let runtime = match handle {
            Some(_) => None,
            None => Some(
                tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(1)
                    .thread_name("kvbm-link")
                    .enable_all()
                    .build()?,
            ),
        };
        let handle = handle
            .unwrap_or_else(|| runtime.as_ref().expect("built when no handle is given").handle().clone());
        let link = Link {
            parts,
            commands: orders,
            hangups,
            workers,
            attempt: 0,
            daemons: daemons::Daemons::new(inbox.clone()),
        };
        let task = handle.spawn(link.run()).abort_handle();
        Ok(Self { commands, hangup, worker, desk, inbox, task, runtime })
    }

    /// The engine's end of a link that nobody runs, and what the engine commands.
    #[cfg(test)]
    pub fn unserved(
        desk: Arc<Desk>,
        inbox: Arc<Inbox>,
        handle: &Handle,
    ) -> (Self, mpsc::Receiver<(Attempt, Command)>) {
        let (commands, orders) = mpsc::channel(COMMANDS_MAX);
        let task = handle.spawn(std::future::ready(())).abort_handle();
        let (hangup, worker) = (watch::Sender::new(0), watch::Sender::new(None));
        (Self { commands, hangup, worker, desk, inbox, task, runtime: None }, orders)
    }

    /// Hands a command over, unless the queue is full.
    pub fn send(&self, attempt: Attempt, command: Command) -> Result<(), DetachReason> {
        self.commands.try_send((attempt, command)).map_err(|_| DetachReason::QueueFull)
    }

    /// Ends this attempt and all before it.
    pub fn hang_up(&self, attempt: Attempt) {
        self.hangup.send_replace(attempt);
    }

    /// Changes how the engine is listed.
    pub fn set_worker(&self, worker: Option<WorkerRegistration>) {
        self.worker.send_replace(worker);
    }
}

impl Drop for LinkHandle {
    fn drop(&mut self) {
        self.task.abort();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// What the link is told at its start.
pub(crate) struct LinkParts {
    pub config: Config,
    pub tenants: Tenants,
    pub layout: PoolLayout,
    pub base: BaseNamespace,
    pub desk: Arc<Desk>,
    pub inbox: Arc<Inbox>,
}

impl LinkParts {
    /// Whose a namespace is.
    fn tenant(&self, namespace: &Namespace) -> Arc<str> {
        self.tenants.of(namespace).unwrap_or_else(|| self.config.tenant.as_str().into())
    }
}

struct Link {
    parts: LinkParts,
    commands: mpsc::Receiver<(Attempt, Command)>,
    hangups: watch::Receiver<Attempt>,
    workers: watch::Receiver<Option<WorkerRegistration>>,
    attempt: Attempt,
    daemons: daemons::Daemons,
}

/// A session and what it knows.
struct Connection {
    client: Client,
    namespaces: HashMap<Namespace, u32>,
}

/// Why an attempt ended, and whether the session can be used for another.
enum End {
    Session(DetachReason),
    Attempt(DetachReason),
    /// The engine dropped its end.
    Link,
}

impl From<ClientError> for End {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused { .. } => Self::Attempt(DetachReason::Refused(error)),
            ClientError::Deadline => Self::Session(DetachReason::Silent),
            ClientError::Unavailable { .. } => Self::Session(DetachReason::Gone(error)),
            ClientError::Malformed { .. } => Self::Session(DetachReason::Contradiction(error.to_string())),
        }
    }
}

impl Link {
    async fn run(mut self) {
        let mut failures = 0;
        loop {
            let client = self.connect().await;
            let daemon = self.daemons.identify(client.session().daemon());
            let mut connection = Connection { client, namespaces: HashMap::new() };
            loop {
                self.attempt += 1;
                self.push(Arrival::Reachable { daemon });
                let before = failures;
                let end = self.attempt_on(&mut connection, &mut failures).await;
                let daemon_dead = self.daemons.is_dead(daemon);
                let down = |reason| Arrival::Down { reason, daemon_dead };
                let first = self.parts.config.reconnect_pause.0;
                match end {
                    End::Link => return,
                    End::Session(reason) => {
                        tracing::debug!(%reason, "session with the daemon is over");
                        self.push(down(reason));
                        drop(connection);
                        tokio::time::sleep(doubled(first, SILENT_PAUSE_MAX, before)).await;
                        break;
                    }
                    End::Attempt(reason) => {
                        self.push(down(reason));
                        let pause = doubled(first, REFUSED_PAUSE_MAX, before);
                        if self.wait_listed(&mut connection, pause).await.is_err() {
                            break;
                        }
                    }
                }
            }
        }
    }

    /// Connects, however long it takes.
    async fn connect(&self) -> Client {
        let (first, longest) = self.parts.config.reconnect_pause;
        let mut failures = 0;
        loop {
            let config = &self.parts.config;
            match Client::connect_as(&config.socket, &config.client, config.attach_deadline).await {
                Ok(client) => return client.with_deadline(config.detach_after),
                Err(error) => {
                    tracing::debug!(%error, "no daemon");
                    tokio::time::sleep(doubled(first, longest, failures)).await;
                    failures += 1;
                }
            }
        }
    }

    /// Opens the pool and serves it until something ends it.
    async fn attempt_on(&mut self, connection: &mut Connection, failures: &mut u32) -> End {
        *failures += 1;
        let opening = match self.wait_for_opening(connection).await {
            Ok(opening) => opening,
            Err(end) => return end,
        };
        let opened = match self.open(connection, opening).await {
            Ok(opened) => opened,
            Err(end) => return end,
        };
        let pool_id = opened.pool_id;
        if let Err(end) = self.list_worker(connection, pool_id).await {
            return end;
        }
        self.push(Arrival::Opened(Box::new(opened)));
        let since = Instant::now();
        let Err(end) = self.serve(connection, pool_id).await;
        if since.elapsed() >= SERVED_WELL_AFTER {
            *failures = 0;
        }
        end
    }

    async fn wait_for_opening(&mut self, connection: &Connection) -> Result<Opening, End> {
        loop {
            let Self { parts, commands, hangups, attempt, .. } = self;
            match watched(parts, hangups, *attempt, connection, commands.recv()).await? {
                Some((of, Command::Open(opening))) if of == self.attempt => return Ok(opening),
                Some(_) => {}
                None => return Err(End::Link),
            }
        }
    }

    async fn serve(
        &mut self,
        connection: &mut Connection,
        pool_id: u32,
    ) -> Result<std::convert::Infallible, End> {
        loop {
            let Self { parts, commands, hangups, workers, attempt, .. } = self;
            let next = async {
                tokio::select! {
                    biased;
                    command = commands.recv() => Some(command.ok_or(End::Link)),
                    Ok(()) = workers.changed() => None,
                }
            };
            match watched(parts, hangups, *attempt, connection, next).await?.transpose()? {
                None => self.list_worker(connection, pool_id).await?,
                Some((of, command)) if of == self.attempt => {
                    self.forward(connection, pool_id, command).await?;
                }
                Some(_) => {}
            }
        }
    }

    /// Stays listed, without a pool, for a while.
    async fn wait_listed(&mut self, connection: &mut Connection, pause: Duration) -> Result<(), End> {
        self.list_worker(connection, 0).await?;
        let Self { parts, hangups, attempt, .. } = self;
        // The engine may have hung up on this attempt, which is over: only later ones count here.
        watched(parts, hangups, *attempt + 1, connection, tokio::time::sleep(pause)).await
    }

    async fn list_worker(&mut self, connection: &Connection, pool_id: u32) -> Result<(), End> {
        let worker = self.workers.borrow_and_update().clone();
        let Some(worker) = worker else { return Ok(()) };
        match connection.client.register_worker(worker.message(pool_id)).await {
            Err(ClientError::Refused { refusal, detail }) => {
                tracing::warn!(?refusal, detail, "the daemon does not list this worker");
                Ok(())
            }
            listed => Ok(listed?),
        }
    }

    fn push(&self, arrival: Arrival) {
        self.parts.inbox.push(self.attempt, arrival);
    }
}

/// Runs `work` while looking after the session, the engine and the deadlines.
async fn watched<T>(
    parts: &LinkParts,
    hangups: &mut watch::Receiver<Attempt>,
    attempt: Attempt,
    connection: &Connection,
    work: impl Future<Output = T>,
) -> Result<T, End> {
    let mut work = pin!(work);
    let mut ended = pin!(connection.client.ended());
    let mut hung_up = pin!(async { hangups.wait_for(|hung_up| *hung_up >= attempt).await.is_ok() });
    loop {
        let planned = parts.desk.next(attempt);
        let timer = async {
            match planned {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            reason = &mut ended => return Err(End::Session(DetachReason::Gone(ClientError::Unavailable { reason }))),
            hung_up = &mut hung_up => return Err(if hung_up {
                End::Session(DetachReason::HungUp)
            } else {
                End::Link
            }),
            done = &mut work => return Ok(done),
            () = parts.desk.changed() => {}
            () = timer => {
                // What has arrived is read before it counts as missing.
                tokio::task::yield_now().await;
                let now = Instant::now();
                match parts.desk.expire(attempt, planned.unwrap_or(now), now) {
                    Expired::Failed => return Err(End::Session(DetachReason::Silent)),
                    Expired::Missed(questions) => for question in questions {
                        parts.inbox.push(attempt, Arrival::Missed { question });
                    },
                }
            }
        }
    }
}

/// `first`, doubled `times` times, at most `longest`.
fn doubled(first: Duration, longest: Duration, times: u32) -> Duration {
    first.saturating_mul(1 << times.min(16)).min(longest)
}
