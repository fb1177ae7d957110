//! Follows the events of a daemon, for ever: first a snapshot, then what changes. What is missed is made good by a new
//! snapshot. While the daemon is away, what was known last holds.

use std::sync::Arc;
use std::time::Duration;

use kvbm_nats::{Bus, NatsError};
use kvbm_proto::v1::{Event, SnapshotRequest, WatchEventsRequest};
use tokio::time::sleep;
use tonic::Code;
use tracing::{debug, info, warn};

use super::keeper::{BACKOFF_MIN, next_pause};
use super::told::{Batch, Told};
use super::{Connection, Daemon, Drivers, Node};
use crate::router::{Change, Events, Knowledge, RouterMetrics};

/// Pause before a snapshot is asked for again on the same connection: events come faster than they are read.
const RESYNC_PAUSE: Duration = Duration::from_millis(100);

/// How long the daemon itself is asked before NATS is tried again.
const CUT_OFF_PAUSE: Duration = Duration::from_secs(3);

/// What a follower works with.
pub struct Follower {
    pub daemon: Daemon,
    pub node: Arc<Node>,
    pub knowledge: Arc<Knowledge>,
    pub metrics: Arc<RouterMetrics>,
    pub drivers: Drivers,
}

/// Up to where a snapshot goes.
struct Snapshot {
    /// The last event that is contained.
    sequence: u64,
    /// Which life of the daemon it is of.
    instance: String,
}

/// Why the stream of events ended.
enum End {
    /// Some events were missed.
    Gap(String),
    /// The daemon is gone.
    Lost(String),
}

impl Follower {
    /// Ends only by being dropped.
    pub async fn follow(self) {
        let mut pause = BACKOFF_MIN;
        let mut last_reason = String::new();
        loop {
            let reason = match Connection::open_daemon(&self.daemon, &self.drivers).await {
                Ok(connection) => {
                    pause = BACKOFF_MIN;
                    let connection = Arc::new(connection);
                    self.node.set_link(&connection);
                    match self.knowledge.events() {
                        Events::Followed => self.follow_on(&connection).await,
                        Events::Ignored => {
                            connection.closed().await;
                            "the connection ended".to_owned()
                        }
                    }
                }
                Err(error) => error.to_string(),
            };
            // The follower of the daemon's list of workers says that it is away; here only what is new is said.
            if reason != last_reason {
                debug!(daemon = %self.daemon, reason, "cannot follow the daemon's events, trying on");
                last_reason = reason;
            }
            sleep(pause).await;
            pause = next_pause(pause);
        }
    }

    /// Says why the connection is of no more use.
    async fn follow_on(&self, connection: &Connection) -> String {
        loop {
            let end = match (self.snapshot(connection).await, self.knowledge.bus()) {
                (Ok(mut snapshot), None) => self.events(connection, &mut snapshot.sequence).await,
                (Ok(snapshot), Some(bus)) => self.told(connection, bus, snapshot).await,
                (Err(end), _) => end,
            };
            match end {
                End::Lost(reason) => return reason,
                End::Gap(reason) => {
                    self.metrics.event_gaps.inc();
                    info!(daemon = %self.daemon, reason, "events were missed, asking for a snapshot");
                    sleep(RESYNC_PAUSE).await;
                }
            }
        }
    }

    /// Replaces what is known of the node.
    async fn snapshot(&self, connection: &Connection) -> Result<Snapshot, End> {
        let lost = |status: tonic::Status| End::Lost(status.message().to_owned());
        let parts = connection.registry().snapshot(self.daemon.request(SnapshotRequest {})).await;
        let mut parts = parts.map_err(lost)?.into_inner();
        let mut stored = Vec::new();
        loop {
            let part = parts.message().await.map_err(lost)?;
            let part = part.ok_or_else(|| End::Lost("a snapshot broke off".to_owned()))?;
            stored.extend(part.stored.iter().filter_map(|event| Change::of(self.node.id(), event)));
            if part.last {
                self.knowledge.replace(self.node.id(), &stored);
                self.metrics.snapshots.inc();
                return Ok(Snapshot { sequence: part.sequence, instance: part.instance });
            }
        }
    }

    /// What changes behind event `known`, which moves on. May be dropped at any time.
    async fn events(&self, connection: &Connection, known: &mut u64) -> End {
        let watch = WatchEventsRequest { after_sequence: *known };
        let batches = connection.registry().watch_events(self.daemon.request(watch)).await;
        let mut batches = match batches {
            Ok(batches) => batches.into_inner(),
            Err(status) => return end_of(&status),
        };
        loop {
            let batch = match batches.message().await {
                Ok(Some(batch)) => batch,
                Ok(None) => return End::Lost("the stream of events ended".to_owned()),
                Err(status) => return end_of(&status),
            };
            for event in &batch.events {
                if event.sequence != *known + 1 {
                    return End::Gap(format!("event {} came behind {known}", event.sequence));
                }
                *known = event.sequence;
            }
            self.apply(&batch.events, "daemon");
        }
    }

    fn apply(&self, events: &[Event], from: &str) {
        let changes: Vec<Change> =
            events.iter().filter_map(|event| Change::of(self.node.id(), event)).collect();
        self.metrics.events.with_label_values(&[from]).inc_by(events.len() as u64);
        self.knowledge.apply(&changes);
    }

    /// As NATS tells them, and from the daemon itself while NATS does not. The connection's end means that the daemon, and
    /// so perhaps the instance, is another one.
    async fn told(&self, connection: &Connection, bus: &Bus, snapshot: Snapshot) -> End {
        let Snapshot { sequence: mut known, instance } = snapshot;
        let mut is_cut_off = false;
        loop {
            let reason = match Told::of(bus, &instance).await {
                Ok(told) => {
                    if std::mem::take(&mut is_cut_off) {
                        info!(daemon = %self.daemon, nats = %bus.place(), "events come over NATS again");
                    }
                    match self.listen(connection, told, &instance, &mut known).await {
                        Ok(end) => return end,
                        Err(error) => error.to_string(),
                    }
                }
                Err(error) => error.to_string(),
            };
            if !std::mem::replace(&mut is_cut_off, true) {
                warn!(daemon = %self.daemon, reason, "NATS tells no events, asking the daemon itself");
            }
            tokio::select! {
                end = self.events(connection, &mut known) => return end,
                () = sleep(CUT_OFF_PAUSE) => {}
            }
        }
    }

    /// An error is about NATS, an end about the daemon.
    async fn listen(
        &self,
        connection: &Connection,
        mut told: Told,
        instance: &str,
        known: &mut u64,
    ) -> Result<End, NatsError> {
        loop {
            let batch = tokio::select! {
                batch = told.next(*known) => batch?,
                () = connection.closed() => return Ok(End::Lost("the connection ended".to_owned())),
            };
            match batch {
                Batch::News { events, last } => {
                    *known = last;
                    self.apply(&events, "nats");
                }
                Batch::Gap(reason) => {
                    self.metrics.event_gaps.inc();
                    info!(daemon = %self.daemon, reason, "events were missed, asking for a snapshot");
                    match self.snapshot(connection).await {
                        Ok(snapshot) if snapshot.instance == instance => *known = snapshot.sequence,
                        Ok(_) => return Ok(End::Lost("the daemon is another one".to_owned())),
                        Err(end) => return Ok(end),
                    }
                }
            }
        }
    }
}

fn end_of(status: &tonic::Status) -> End {
    match status.code() {
        Code::OutOfRange => End::Gap(status.message().to_owned()),
        _ => End::Lost(status.message().to_owned()),
    }
}
