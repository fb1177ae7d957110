//! Opening a session, and looking after it until it ends.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvbm_proto::v1;
use kvbm_shm::{PoolWords, SharedMemory};
use parking_lot::RwLock;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::{Attachment, HostMemory, Inner};
use crate::ClientError;
use crate::client::{Client, answer};
use crate::session::Question;

/// Longest pause after a daemon that answers but does not take the pool.
const REFUSED_PAUSE_MAX: Duration = Duration::from_secs(5);

/// How often a daemon is asked for a sign of life, and how often after it missed a lookup.
const PROBE_EVERY: Duration = Duration::from_secs(1);
const PROBE_EVERY_OPEN: Duration = Duration::from_millis(100);

/// What a daemon must be able to do.
const FEATURE: &str = "engine_pools";

/// Attaches as `named`, for ever.
pub(super) async fn run(inner: Arc<Inner>, mut named: watch::Receiver<Option<[u8; 16]>>) {
    let Ok(engine) = named.wait_for(Option::is_some).await.map(|named| named.unwrap_or_default()) else {
        return;
    };
    let (first, longest) = inner.settings.reconnect_pause;
    let mut pause = first;
    let mut said = String::new();
    loop {
        match attach(&inner, engine).await {
            Ok(attachment) => {
                pause = first;
                said.clear();
                inner.counts.attaches.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                tracing::info!(rank = inner.settings.rank, "attached to the daemon");
                let reason = serve(&inner, attachment).await;
                tracing::info!(rank = inner.settings.rank, reason, "not attached to the daemon any more");
            }
            Err(error) => {
                let text = error.to_string();
                let refused = matches!(error, ClientError::Refused { .. } | ClientError::Malformed { .. });
                if refused && said != text {
                    tracing::warn!(%error, "the daemon does not take this engine's pool");
                    said = text;
                }
                pause = (pause * 2).min(if refused { REFUSED_PAUSE_MAX } else { longest });
            }
        }
        sleep(pause).await;
    }
}

async fn attach(inner: &Arc<Inner>, engine: [u8; 16]) -> Result<Arc<Attachment>, ClientError> {
    let (settings, registered) = (&inner.settings, &inner.registered);
    let client = Client::connect_as(&settings.socket, &settings.client, settings.attach_deadline).await?;
    if !client.hello().features.iter().any(|feature| feature == FEATURE) {
        let version = &client.hello().daemon_version;
        let detail =
            format!("the daemon (kvbm {version}) does not serve engines with pools of their own; update it");
        return Err(ClientError::Malformed { detail });
    }
    let block_bytes = registered.shape.block_bytes();
    let open = v1::OpenPool {
        mode: v1::PoolMode::Staged.into(),
        base: registered.base.0.to_vec(),
        block_bytes: block_bytes as u64,
        block_count: registered.shape.pages_max(),
        tokens_per_block: settings.tokens_per_block,
        device: registered.device.clone(),
        shard: settings.shard,
        shard_count: settings.shard_count,
        rank: settings.rank,
        rank_count: settings.rank_count,
        engine: engine.to_vec(),
        ..v1::OpenPool::default()
    };
    let question = client.session().question(Question::OpenPool(open), settings.attach_deadline, |_| ());
    let reply: v1::PoolReply = answer!(question.await?, Pool)?;
    let uuid = kvbm_proto::uuid("pool_uuid", &reply.pool_uuid)?;
    let words = timeout(settings.attach_deadline, client.session().side().take_memory(uuid)).await;
    let words =
        PoolWords::from_fd(words.map_err(|_| ClientError::Deadline)?).map_err(ClientError::malformed)?;
    if words.uuid() != uuid || words.block_count() != registered.shape.pages_max() {
        return Err(ClientError::malformed("the shared words are of another pool"));
    }
    let fits = |shard_offset: usize, slot_stride: usize| {
        shard_offset.checked_add(block_bytes).is_some_and(|end| end <= slot_stride)
    };
    let place = |bytes: u64| usize::try_from(bytes).map_err(ClientError::malformed);
    let (slot_stride, shard_offset) = (place(reply.slot_stride)?, place(reply.shard_offset)?);
    if !fits(shard_offset, slot_stride) {
        return Err(ClientError::malformed(format!(
            "slots of {slot_stride} bytes have no room for {block_bytes} at {shard_offset}"
        )));
    }
    let segments = RwLock::new(HashMap::new());
    let mover = registered.mover.clone();
    let host = Arc::new(HostMemory { words, segments, slot_stride, shard_offset, block_bytes, mover });
    let (given_up, _) = watch::channel(false);
    let namespaces = tokio::sync::Mutex::default();
    Ok(Arc::new(Attachment { client, pool_id: reply.pool_id, host, namespaces, given_up }))
}

/// Serves until the session ends; says why it did.
async fn serve(inner: &Arc<Inner>, attachment: Arc<Attachment>) -> String {
    inner.breaker.close(Instant::now());
    *inner.current.write() = Some(attachment.clone());
    let mut given_up = attachment.given_up.subscribe();
    let reason = tokio::select! {
        reason = attachment.client.ended() => reason,
        _ = given_up.wait_for(|given_up| *given_up) => "the daemon was silent".into(),
        reason = map_segments(inner, &attachment) => reason,
        () = probe(inner, &attachment) => "the daemon gave no sign of life".into(),
    };
    inner.give_up(&attachment);
    reason
}

/// Maps what the daemon sends, and tells it.
async fn map_segments(inner: &Arc<Inner>, attachment: &Arc<Attachment>) -> String {
    loop {
        let (segment, fd) = attachment.client.session().side().next_segment().await;
        let mover = inner.registered.mover.clone();
        // Registering memory with a device takes its time.
        let mapped = tokio::task::spawn_blocking(move || map(fd, mover.as_ref())).await;
        match mapped.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(memory) => {
                attachment.host.segments.write().insert(segment, memory);
                let mapped = v1::MappedSegments { pool_id: attachment.pool_id, segments: vec![segment] };
                attachment.tell(Question::MappedSegments(mapped)).await;
            }
            // It is not reported, so nothing in it is ever promised.
            Err(error) => tracing::warn!(segment, error, "a segment of host memory cannot be used"),
        }
    }
}

fn map(fd: OwnedFd, mover: &dyn crate::engine::pool::Mover) -> Result<Arc<SharedMemory>, String> {
    let memory = SharedMemory::from_fd(fd).map_err(|error| error.to_string())?;
    let memory = Arc::new(memory);
    mover.prepare(&memory)?;
    Ok(memory)
}

/// Ends when no answer comes any more. Closes the breaker when one comes promptly.
async fn probe(inner: &Arc<Inner>, attachment: &Arc<Attachment>) {
    loop {
        let pause = if inner.breaker.is_open() { PROBE_EVERY_OPEN } else { PROBE_EVERY };
        sleep(pause).await;
        inner.forget_former();
        let asked = Instant::now();
        let client = attachment.client.with_deadline(inner.patience());
        if client.ping().await.is_err() {
            return;
        }
        if asked.elapsed() <= inner.settings.lookup_deadline / 2 {
            inner.breaker.close(Instant::now());
        }
    }
}
