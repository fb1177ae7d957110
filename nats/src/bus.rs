//! A connection to NATS, for ever: while the servers are away it is tried again, and calls fail in time.

use std::time::Duration;

use async_nats::connection::State;
use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use async_nats::jetstream::stream::{Config, DiscardPolicy, StorageType};
use async_nats::jetstream::{self, Context};
use async_nats::{Client, ConnectOptions};
use futures_util::StreamExt;
use prost::Message;
use thiserror::Error;
use tokio::time::{Instant, sleep, timeout};

use crate::Nats;

const STREAM: &str = "KVBM_EVENTS";
const SUBJECTS: &str = "kvbm.v1.events";
/// How long messages are kept: longer than a frontend takes to come back, or to read what it missed.
const KEPT_FOR: Duration = Duration::from_secs(120);
/// How much is kept, bytes; the oldest goes first.
const KEPT_BYTES: i64 = 256 << 20;
/// Of a call that is answered once.
const CALL_DEADLINE: Duration = Duration::from_secs(5);
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// A server that answers no pings is given up for another.
const PING_INTERVAL: Duration = Duration::from_secs(3);
const RECONNECT_PAUSE: Duration = Duration::from_millis(500);

/// How often the connection is looked at while somebody waits.
const LOOK_PAUSE: Duration = Duration::from_millis(200);

/// Why NATS did not do what it was asked.
#[derive(Debug, Error)]
pub enum NatsError {
    /// Nobody can be asked.
    #[error("reach NATS at {0}")]
    Unreachable(String),
    /// A call failed.
    #[error("{doing}: {reason}")]
    Failed {
        /// What was tried.
        doing: &'static str,
        /// What came of it.
        reason: String,
    },
    /// A message is not what it should be.
    #[error("read a message: {0}")]
    Nonsense(String),
    /// No message came, though one was due.
    #[error("no message came for {0:?}")]
    Silent(Duration),
}

fn failed(doing: &'static str, reason: impl std::fmt::Display) -> NatsError {
    NatsError::Failed { doing, reason: reason.to_string() }
}

/// See the module. Copies share the connection.
#[derive(Debug, Clone)]
pub struct Bus {
    nats: Nats,
    client: Client,
    context: Context,
}

impl Bus {
    /// Returns at once, whether anybody answers there or not.
    pub async fn open(nats: &Nats) -> Result<Self, NatsError> {
        let mut options = ConnectOptions::new()
            .name("kvbm")
            .retry_on_initial_connect()
            .connection_timeout(CONNECT_DEADLINE)
            .request_timeout(Some(CALL_DEADLINE))
            .ping_interval(PING_INTERVAL)
            .reconnect_delay_callback(|_| RECONNECT_PAUSE)
            // Whoever calls says what failed; the library would say it at each attempt.
            .event_callback(|_| async {});
        if let Some(file) = nats.credentials() {
            let read = options.credentials_file(file).await;
            options =
                read.map_err(|error| failed("read credentials", format!("{}: {error}", file.display())))?;
        }
        let client =
            options.connect(nats.servers()).await.map_err(|error| failed("open a connection", error))?;
        let mut context = jetstream::new(client.clone());
        context.set_timeout(CALL_DEADLINE);
        Ok(Self { nats: nats.clone(), client, context })
    }

    /// Where it leads.
    pub fn place(&self) -> &Nats {
        &self.nats
    }

    fn is_connected(&self) -> bool {
        matches!(self.client.connection_state(), State::Connected)
    }

    fn unreachable(&self) -> NatsError {
        NatsError::Unreachable(self.nats.to_string())
    }

    /// Otherwise calls would wait for the servers to come back. A connection that was only just opened is waited for.
    async fn check(&self) -> Result<(), NatsError> {
        let connected = async {
            while !self.is_connected() {
                sleep(LOOK_PAUSE).await;
            }
        };
        timeout(CONNECT_DEADLINE, connected).await.map_err(|_| self.unreachable())
    }

    /// Makes the stream, if there is none.
    pub async fn prepare(&self) -> Result<(), NatsError> {
        self.check().await?;
        let config = Config {
            name: STREAM.to_owned(),
            subjects: vec![format!("{SUBJECTS}.*")],
            storage: StorageType::Memory,
            discard: DiscardPolicy::Old,
            max_age: KEPT_FOR,
            max_bytes: KEPT_BYTES,
            ..Config::default()
        };
        let made = self.context.get_or_create_stream(config).await;
        made.map(drop).map_err(|error| failed("make the stream of events", error))
    }

    /// Says a message; returns when the stream has it.
    pub async fn publish(&self, instance: &str, message: &impl Message) -> Result<(), NatsError> {
        self.check().await?;
        let doing = "publish events";
        let subject = format!("{SUBJECTS}.{instance}");
        let sent = self.context.publish(subject, message.encode_to_vec().into()).await;
        let stored = sent.map_err(|error| failed(doing, error))?.await;
        stored.map(drop).map_err(|error| failed(doing, error))
    }

    /// Messages of an instance: the last one that there is, and all that come.
    pub async fn follow(&self, instance: &str) -> Result<Messages, NatsError> {
        let doing = "follow events";
        self.check().await?;
        let stream = self.context.get_stream(STREAM).await.map_err(|error| failed(doing, error))?;
        let config = pull::OrderedConfig {
            filter_subject: format!("{SUBJECTS}.{instance}"),
            deliver_policy: DeliverPolicy::LastPerSubject,
            ..Default::default()
        };
        let consumer = stream.create_consumer(config).await.map_err(|error| failed(doing, error))?;
        let messages = consumer.messages().await.map_err(|error| failed(doing, error))?;
        Ok(Messages { messages, bus: self.clone() })
    }
}

/// What an instance says, in its order.
pub struct Messages {
    messages: pull::Ordered,
    bus: Bus,
}

impl Messages {
    /// The next one; an error if there is none for so long, or it cannot be had. Then there may be a gap.
    pub async fn next<M: Message + Default>(&mut self, silence: Duration) -> Result<M, NatsError> {
        let started = Instant::now();
        let next = loop {
            if let Ok(next) = timeout(LOOK_PAUSE, self.messages.next()).await {
                break next;
            }
            if !self.bus.is_connected() {
                return Err(self.bus.unreachable());
            }
            if started.elapsed() >= silence {
                return Err(NatsError::Silent(silence));
            }
        };
        let message = next
            .ok_or_else(|| failed("follow events", "the stream has ended"))?
            .map_err(|error| failed("follow events", error))?;
        M::decode(message.payload.clone()).map_err(|error| NatsError::Nonsense(error.to_string()))
    }
}
