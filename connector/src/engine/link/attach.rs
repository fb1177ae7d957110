//! Opening a session, and looking after it until it ends.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvbm_proto::v1;
use kvbm_shm::{PoolWords, SharedMemory};
use parking_lot::RwLock;
use tokio::sync::watch;
use tokio::time::{sleep, timeout, timeout_at};

use super::{Attachment, HostMemory, Inner, OpenPool, RegisteredPool, WritePins, direct};
use crate::ClientError;
use crate::client::{Client, answer};
use crate::engine::PoolChoice;
use crate::engine::export::ExportedMemory;
use crate::engine::host::MappedSegment;
use crate::engine::settings::EngineSettings;
use crate::session::Question;

/// Longest pause after a daemon that answers but does not take the pool.
const REFUSED_PAUSE_MAX: Duration = Duration::from_secs(5);

/// How often a daemon is asked for a sign of life, and how often after it missed a lookup.
const PROBE_EVERY: Duration = Duration::from_secs(1);
const PROBE_EVERY_OPEN: Duration = Duration::from_millis(100);

/// How long what an earlier session had mapped is kept after the last of it that came again.
const KNOWN_KEPT: Duration = Duration::from_millis(200);

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
    let mut staged_because = None;
    loop {
        match attach(&inner, engine, &mut staged_because).await {
            Ok(attachment) => {
                pause = first;
                said.clear();
                inner.counts.attaches.fetch_add(1, Ordering::Relaxed);
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

async fn attach(
    inner: &Arc<Inner>,
    engine: [u8; 16],
    staged_because: &mut Option<String>,
) -> Result<Arc<Attachment>, ClientError> {
    let (settings, registered) = (&inner.settings, &inner.registered);
    let client = Client::connect_as(&settings.socket, &settings.client, settings.attach_deadline).await?;
    if !client.hello().features.iter().any(|feature| feature == FEATURE) {
        let version = &client.hello().daemon_version;
        let detail =
            format!("the daemon (kvbm {version}) does not serve engines with pools of their own; update it");
        return Err(ClientError::Malformed { detail });
    }
    let pool = match &registered.pool {
        Some(pool) => Some(open_pool(inner, pool, &client, engine, staged_because).await?),
        None => {
            let join = v1::JoinEngine { engine: engine.to_vec(), base: registered.base.0.to_vec() };
            let asked =
                client.session().question(Question::JoinEngine(join), settings.attach_deadline, |_| ());
            let _: v1::EngineReply = answer!(asked.await?, Engine)?;
            None
        }
    };
    let (given_up, _) = watch::channel(false);
    let namespaces = tokio::sync::Mutex::default();
    // Only the process of the scheduler half looks up.
    let looks_up = pool.is_none() || (settings.rank == 0 && settings.apart.is_none());
    let lookups = if looks_up { direct::open(&client, settings).await } else { None };
    let attachment = Attachment { client, pool, namespaces, lookups: lookups.into(), given_up };
    inner.register_known(&attachment).await?;
    Ok(Arc::new(attachment))
}

async fn open_pool(
    inner: &Inner,
    pool: &RegisteredPool,
    client: &Client,
    engine: [u8; 16],
    staged_because: &mut Option<String>,
) -> Result<OpenPool, ClientError> {
    let settings = &inner.settings;
    let shape = &pool.shape;
    let block_bytes = shape.block_bytes();
    let staged = v1::OpenPool {
        mode: v1::PoolMode::Staged.into(),
        base: inner.registered.base.0.to_vec(),
        block_bytes: block_bytes as u64,
        block_count: shape.pages_max(),
        tokens_per_block: settings.tokens_per_block,
        device: pool.device.clone(),
        shard: settings.shard,
        shard_count: settings.shard_count,
        rank: settings.rank,
        rank_count: settings.rank_count,
        engine: engine.to_vec(),
        ..v1::OpenPool::default()
    };
    let (mode, reply) = open(settings, pool, client, staged, staged_because).await?;
    let uuid = kvbm_proto::uuid("pool_uuid", &reply.pool_uuid)?;
    let words = timeout(settings.attach_deadline, client.session().side().take_memory(uuid)).await;
    let words =
        PoolWords::from_fd(words.map_err(|_| ClientError::Deadline)?).map_err(ClientError::malformed)?;
    if words.uuid() != uuid || words.block_count() != shape.pages_max() {
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
    let words = Arc::new(words);
    let writes = Arc::new(WritePins::new(words.clone()));
    let host = Arc::new(HostMemory { words, writes, segments, slot_stride, shard_offset, block_bytes });
    Ok(OpenPool { id: reply.pool_id, mode, host })
}

/// Opens the pool: for the daemon to copy out of if it can be exported, else for this process alone. What stands against
/// it is said once.
async fn open(
    settings: &EngineSettings,
    pool: &RegisteredPool,
    client: &Client,
    staged: v1::OpenPool,
    staged_because: &mut Option<String>,
) -> Result<(v1::PoolMode, v1::PoolReply), ClientError> {
    let ask = async |open: v1::OpenPool| {
        let question = client.session().question(Question::OpenPool(open), settings.attach_deadline, |_| ());
        answer!(question.await?, Pool)
    };
    let reason = match &pool.exported {
        Ok(exported) => {
            for (export, uuid) in exported.exports.iter().zip(exported.names()) {
                if let ExportedMemory::Shared(fd) = &export.memory {
                    client.session().side().send_memory(uuid, fd.as_fd()).await?;
                }
            }
            let (exports, fragments) = exported.messages(&pool.shape);
            let ipc = v1::OpenPool { mode: v1::PoolMode::Ipc.into(), exports, fragments, ..staged.clone() };
            match ask(ipc).await {
                // It could not map the memory, or finds blocks in it in no way that it can copy.
                Err(ClientError::Refused { refusal: v1::Refusal::Invalid, detail })
                    if settings.pool == PoolChoice::Auto
                        && ["exports", "fragments"].iter().any(|field| detail.contains(field)) =>
                {
                    detail
                }
                opened => return Ok((v1::PoolMode::Ipc, opened?)),
            }
        }
        Err(reason) => reason.clone(),
    };
    if staged_because.as_ref() != Some(&reason) {
        if settings.pool == PoolChoice::Auto {
            tracing::warn!(reason, "the daemon does not copy out of the engine's memory, this process does");
        }
        *staged_because = Some(reason);
    }
    Ok((v1::PoolMode::Staged, ask(staged).await?))
}

/// Serves until the session ends; says why it did.
async fn serve(inner: &Arc<Inner>, attachment: Arc<Attachment>) -> String {
    // A daemon that has just been started may be slow for a while: it is trusted when it answers promptly.
    if answers(inner, &attachment).await != Some(Prompt::Yes) {
        inner.breaker.open(Instant::now());
    }
    if let Some((registered, pool)) = inner.registered.pool.as_ref().zip(attachment.pool.as_ref())
        && pool.mode == v1::PoolMode::Ipc
    {
        registered.generations.share(&pool.host.words);
    }
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

/// Maps what the daemon sends, and tells it. What sessions before had mapped may come again. Until it is clear that no more
/// of it does, that comes first, and new memory waits.
async fn map_segments(inner: &Arc<Inner>, attachment: &Arc<Attachment>) -> String {
    let Some((registered, pool)) = inner.registered.pool.as_ref().zip(attachment.pool.as_ref()) else {
        // A process that only asks is sent none.
        return std::future::pending().await;
    };
    let (mut known, mut new) = (inner.mapped(), VecDeque::new());
    let mut until = Instant::now() + KNOWN_KEPT;
    loop {
        let next = attachment.client.session().side().next_segment();
        let (segment, fd) = if known.is_empty() {
            match new.pop_front() {
                Some(waiting) => waiting,
                None => next.await,
            }
        } else if let Ok(next) = timeout_at(until.into(), next).await {
            next
        } else {
            inner.let_go(std::mem::take(&mut known));
            continue;
        };
        let again = SharedMemory::id_of(fd.as_fd()).ok().and_then(|id| known.remove(&id));
        if again.is_none() && !known.is_empty() {
            new.push_back((segment, fd));
            continue;
        }
        let mapped = match again {
            Some(mapped) => {
                until = Instant::now() + KNOWN_KEPT;
                inner.counts.segments_kept.fetch_add(1, Ordering::Relaxed);
                Ok(mapped)
            }
            None => {
                let mover = registered.mover.clone();
                // Registering memory with a device takes its time.
                let mapped = tokio::task::spawn_blocking(move || MappedSegment::new(fd, mover)).await;
                mapped.unwrap_or_else(|error| Err(error.to_string())).map(Arc::new)
            }
        };
        match mapped {
            Ok(mapped) => {
                if pool.host.segments.read().contains_key(&segment) {
                    return format!("the daemon sent segment {segment} a second time");
                }
                pool.host.segments.write().insert(segment, mapped);
                let mapped = v1::MappedSegments { pool_id: pool.id, segments: vec![segment] };
                attachment.tell(Question::MappedSegments(mapped)).await;
            }
            // It is not reported, so nothing in it is ever promised.
            Err(error) => tracing::warn!(segment, error, "a segment of host memory cannot be used"),
        }
    }
}

/// Ends when no answer comes any more. Closes the breaker when one comes promptly.
async fn probe(inner: &Arc<Inner>, attachment: &Arc<Attachment>) {
    loop {
        let pause = if inner.breaker.is_open() { PROBE_EVERY_OPEN } else { PROBE_EVERY };
        sleep(pause).await;
        inner.forget_former();
        if answers(inner, attachment).await.is_none() {
            return;
        }
    }
}

/// Whether the daemon answers, and promptly: that closes the breaker.
async fn answers(inner: &Inner, attachment: &Attachment) -> Option<Prompt> {
    let asked = Instant::now();
    attachment.client.with_deadline(inner.patience()).ping().await.ok()?;
    if asked.elapsed() > inner.settings.lookup_deadline / 2 {
        return Some(Prompt::No);
    }
    inner.breaker.close(Instant::now());
    Some(Prompt::Yes)
}

#[derive(Debug, PartialEq, Eq)]
enum Prompt {
    Yes,
    No,
}
