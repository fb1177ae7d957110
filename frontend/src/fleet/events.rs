//! Follows the events of a daemon, for ever: first a snapshot, then what changes. What is missed is made good by a new
//! snapshot. While the daemon is away, what was known last holds.

use std::sync::Arc;
use std::time::Duration;

use kvbm_proto::v1::{SnapshotRequest, WatchEventsRequest};
use tokio::time::sleep;
use tonic::Code;
use tracing::{debug, info};

use super::keeper::{BACKOFF_MIN, next_pause};
use super::{Connection, Daemon, Drivers, Node};
use crate::router::{Change, Events, Knowledge, RouterMetrics};

/// Pause before a snapshot is asked for again on the same connection: events come faster than they are read.
const RESYNC_PAUSE: Duration = Duration::from_millis(100);

/// What a follower works with.
pub struct Follower {
    pub daemon: Daemon,
    pub node: Arc<Node>,
    pub knowledge: Arc<Knowledge>,
    pub metrics: Arc<RouterMetrics>,
    pub drivers: Drivers,
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
            let end = match self.snapshot(connection).await {
                Ok(sequence) => self.events(connection, sequence).await,
                Err(end) => end,
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

    /// Replaces what is known of the node; returns the number of the last event that is contained.
    async fn snapshot(&self, connection: &Connection) -> Result<u64, End> {
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
                return Ok(part.sequence);
            }
        }
    }

    async fn events(&self, connection: &Connection, mut after: u64) -> End {
        let watch = WatchEventsRequest { after_sequence: after };
        let batches = connection.registry().watch_events(self.daemon.request(watch)).await;
        let mut batches = match batches {
            Ok(batches) => batches.into_inner(),
            Err(status) => return end_of(&status),
        };
        let mut changes = Vec::new();
        loop {
            let batch = match batches.message().await {
                Ok(Some(batch)) => batch,
                Ok(None) => return End::Lost("the stream of events ended".to_owned()),
                Err(status) => return end_of(&status),
            };
            changes.clear();
            for event in &batch.events {
                if event.sequence != after + 1 {
                    return End::Gap(format!("event {} came behind {after}", event.sequence));
                }
                after = event.sequence;
                changes.extend(Change::of(self.node.id(), event));
            }
            self.metrics.events.inc_by(batch.events.len() as u64);
            self.knowledge.apply(&changes);
        }
    }
}

fn end_of(status: &tonic::Status) -> End {
    match status.code() {
        Code::OutOfRange => End::Gap(status.message().to_owned()),
        _ => End::Lost(status.message().to_owned()),
    }
}
