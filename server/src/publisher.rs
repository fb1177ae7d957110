//! Tells of events over NATS, once for all frontends. What cannot be told is missing from the numbers, so that whoever
//! listens takes a snapshot; the same holds for what a server lost that was restarted.

use std::sync::Arc;
use std::time::Duration;

use kvbm_nats::{Bus, Nats, NatsError};
use kvbm_proto::v1::EventBatch;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::core::Core;
use crate::registry::Encoder;

/// Events in one message: well below the megabyte that servers permit.
const BATCH_EVENTS: usize = 2048;
/// With nothing to tell, the number of the last event is told so often: who missed it notices.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Pause before it is tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// Until the daemon stops.
pub(crate) async fn run(core: Arc<Core>, nats: Nats) {
    let stopping = core.stopping.clone();
    stopping.run_until_cancelled(publish_on(core, nats)).await;
}

async fn publish_on(core: Arc<Core>, nats: Nats) {
    let mut changed = core.events_changed.subscribe();
    let mut told = core.manager.events().last();
    let mut encoder = Encoder::new(Arc::clone(&core));
    let mut last_error = String::new();
    let say = |error: NatsError, last_error: &mut String| {
        let error = error.to_string();
        if error != *last_error {
            tracing::warn!(%nats, error, "events cannot be told, trying on");
            *last_error = error;
        }
    };
    let bus = loop {
        match Bus::open(&nats).await {
            Ok(bus) => break bus,
            Err(error) => say(error, &mut last_error),
        }
        sleep(PAUSE).await;
    };
    loop {
        let Err(error) = publish(&core, &bus, &mut encoder, &mut changed, &mut told, &mut last_error).await;
        say(error, &mut last_error);
        sleep(PAUSE).await;
    }
}

/// Goes on behind event `told` until something fails.
async fn publish(
    core: &Core,
    bus: &Bus,
    encoder: &mut Encoder,
    changed: &mut watch::Receiver<()>,
    told: &mut u64,
    last_error: &mut String,
) -> Result<std::convert::Infallible, NatsError> {
    bus.prepare().await?;
    loop {
        changed.mark_unchanged();
        let log = core.manager.events();
        let (first, events) = log.after(*told, BATCH_EVENTS).unwrap_or_else(|_| {
            // They are not kept any more.
            *told = log.last();
            (*told + 1, Vec::new())
        });
        let count = events.len() as u64;
        let batch = EventBatch { events: encoder.encode(&events, Some(first)), last_sequence: *told + count };
        bus.publish(&core.instance, &batch).await?;
        *told += count;
        if !std::mem::take(last_error).is_empty() || first == 1 {
            tracing::info!(nats = %bus.place(), instance = core.instance, "events are told");
        }
        if count < BATCH_EVENTS as u64 {
            // Nobody changes it any more: the daemon has stopped, and so does this.
            let _ = timeout(HEARTBEAT, changed.changed()).await;
        }
    }
}
