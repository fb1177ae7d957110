//! What an attached engine may ask.

mod engine;
mod pools;
mod waits;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use kvbm::{LeaseId, NamespaceId, PoolId, Prefetched, Refused, SessionId, TrustDomain};
use kvbm_proto::digest;
use kvbm_proto::v1::{self, ClientMessage, client_message::Body as Ask, server_message::Body};
use tokio::sync::watch;
use tonic::Streaming;
use tracing::field::Empty;
use tracing::{Span, info_span};

use super::End;
use super::lookups::find_for_engine;
use super::outbound::{Answer, Outbound};
use super::side::{Ahead, Side, ahead};
use crate::core::Core;
use crate::wire::{self, invalid, malformed};
use waits::Waits;

/// Descriptors that came ahead of their adoption, per session.
const DESCRIPTORS_MAX: usize = 16;

/// A session that is served.
#[derive(Debug)]
pub(super) struct Attached {
    core: Arc<Core>,
    id: SessionId,
    /// Of its user.
    domain: TrustDomain,
    outbound: Outbound,
    /// Questions that wait for a drive.
    waits: Waits,
    side: Side,
    /// Memory of pools that the client will ask to have adopted.
    descriptors: HashMap<[u8; 16], OwnedFd>,
    /// Memory of GPUs that has the blocks of such pools.
    device_descriptors: HashMap<[u8; 16], OwnedFd>,
    /// How long the client may take for each step.
    limit: Duration,
    /// Changes when host memory was given to a class: an engine may have to map it.
    segments: watch::Receiver<()>,
}

impl Attached {
    pub fn new(
        core: Arc<Core>,
        (id, domain): (SessionId, TrustDomain),
        outbound: Outbound,
        side: Side,
        limit: Duration,
    ) -> Self {
        let waits = Waits::new(usize::try_from(core.config.session_queue_depth).unwrap_or(1));
        let segments = core.segments_changed.subscribe();
        let (descriptors, device_descriptors) = Default::default();
        Self { core, id, domain, outbound, waits, side, descriptors, device_descriptors, limit, segments }
    }

    pub fn into_side(self) -> Side {
        self.side
    }

    /// Handles messages in order until something ends.
    pub async fn serve(&mut self, inbound: &mut Streaming<ClientMessage>) -> End {
        loop {
            let message = tokio::select! {
                biased;
                packet = self.side.receive() => match packet {
                    Some(packet) => {
                        self.keep(ahead(packet));
                        continue;
                    }
                    None => return End::SideClosed,
                },
                Ok(()) = self.segments.changed() => {
                    if let Err(end) = self.give_segments().await {
                        return end;
                    }
                    continue;
                }
                () = self.outbound.closed() => return End::StreamClosed,
                unsendable = self.waits.unsendable() => return unsendable.into(),
                message = super::next(inbound) => message,
            };
            let handled = match message {
                Ok(message) => self.handle(message).await,
                Err(end) => Err(end),
            };
            if let Err(end) = handled {
                return end;
            }
        }
    }

    fn keep(&mut self, memory: Option<Ahead>) {
        match memory {
            Some(Ahead::Pool(uuid, fd)) if self.descriptors.len() < DESCRIPTORS_MAX => {
                self.descriptors.insert(uuid, fd);
            }
            Some(Ahead::Device(uuid, fd)) if self.device_descriptors.len() < DESCRIPTORS_MAX => {
                self.device_descriptors.insert(uuid, fd);
            }
            Some(_) => tracing::warn!(session = self.id.0, "a descriptor too many is dropped"),
            None => tracing::warn!(session = self.id.0, "a side channel packet without meaning is dropped"),
        }
    }

    async fn handle(&mut self, message: ClientMessage) -> Result<(), End> {
        let ClientMessage { id, body, trace } = message;
        let span = trace.map_or_else(Span::none, |trace| span_of(body.as_ref(), &trace));
        // Those that are answered only when refused.
        let done = match &body {
            None => Err(invalid("body", "is missing or not known")),
            Some(_) if self.core.stopping.is_cancelled() => Err(Refused::Closed),
            Some(Ask::Commit(message)) => self.commit(message),
            Some(Ask::Release(message)) => self.release(message),
            Some(Ask::ReleaseLease(message)) => {
                self.core.manager.release_lease_of(self.id, LeaseId(message.lease_id), message.whole)
            }
            Some(Ask::MappedSegments(message)) => self.mapped_segments(message),
            Some(Ask::StoreDone(message)) => self.store_done(message),
            Some(_) => Ok(()),
        };
        match (done, body) {
            (Err(refused), _) => self.outbound.reserve(id).await?.refuse(&refused),
            (
                Ok(()),
                None
                | Some(
                    Ask::Commit(_)
                    | Ask::Release(_)
                    | Ask::ReleaseLease(_)
                    | Ask::MappedSegments(_)
                    | Ask::StoreDone(_),
                ),
            ) => {}
            (Ok(()), Some(Ask::Onboard(message))) if self.is_engine_pool(message.pool_id) => {
                if let Err(refused) = self.load(id, &message) {
                    self.outbound.reserve(id).await?.refuse(&refused);
                }
            }
            (Ok(()), Some(Ask::Store(message))) => match self.store(id, &message) {
                Ok(None) => {}
                Ok(Some(body)) => self.outbound.reserve(id).await?.send(body),
                Err(refused) => self.outbound.reserve(id).await?.refuse(&refused),
            },
            (Ok(()), Some(Ask::Prefetch(message))) if message.wait => {
                if let Err(refused) = self.prefetch_and_wait(id, &message, span) {
                    self.outbound.reserve(id).await?.refuse(&refused);
                }
            }
            (Ok(()), Some(body)) => self.answer(self.outbound.reserve(id).await?, body, span).await?,
        }
        Ok(())
    }

    async fn answer(&mut self, answer: Answer, body: Ask, span: Span) -> Result<(), End> {
        match body {
            Ask::Ping(_) => answer.send(Body::Pong(v1::Pong {})),
            Ask::Hello(_) => answer.refuse(&invalid("hello", "was said already")),
            Ask::RegisterNamespace(message) => answer.send_or_refuse(self.register_namespace(&message)),
            Ask::OpenPool(message) => self.open_pool(answer, &message).await?,
            Ask::Match(message) => answer.send_or_refuse(self.find(&message, &span)),
            Ask::Onboard(message) => self.onboard(answer, &message, span),
            Ask::RequestGrants(message) => answer.send_or_refuse(self.grant(&message)),
            Ask::Offload(message) => self.offload(answer, &message),
            Ask::Prefetch(message) => answer.send_or_refuse(self.prefetch(&message)),
            Ask::RegisterWorker(message) => answer.send_or_refuse(self.register_worker(message)),
            Ask::JoinEngine(message) => answer.send_or_refuse(self.join_engine(&message)),
            Ask::CancelOnboard(message) => self.cancel_onboard(answer, &message),
            Ask::Commit(_)
            | Ask::Release(_)
            | Ask::ReleaseLease(_)
            | Ask::MappedSegments(_)
            | Ask::StoreDone(_)
            | Ask::Store(_) => {
                unreachable!("handled above: they have no answer, or not at once")
            }
        }
        Ok(())
    }

    // ---- without an answer ----------------------------------------------------------------------------------------

    fn commit(&self, message: &v1::Commit) -> Result<(), Refused> {
        let (namespace, pool) = (NamespaceId(message.namespace_id), PoolId(message.pool_id));
        let blocks = wire::commits(message)?;
        self.core.manager.commit(self.id, namespace, pool, &blocks)?;
        if let Some(recorder) = &self.core.recorder {
            recorder.committed(&self.core.manager, namespace, &blocks);
        }
        Ok(())
    }

    fn release(&self, message: &v1::Release) -> Result<(), Refused> {
        self.core.manager.release(self.id, PoolId(message.pool_id), &wire::held(message)?)
    }

    // ---- answered at once -----------------------------------------------------------------------------------------

    fn register_namespace(&self, message: &v1::RegisterNamespace) -> Result<Body, Refused> {
        let digest_in = digest("digest", &message.digest).map_err(malformed)?;
        let base = digest("base", &message.base).map_err(malformed)?;
        let (tenant, model) =
            (wire::label("tenant", &message.tenant)?, wire::label("model", &message.model)?);
        let id = self.core.manager.register_namespace(self.id, digest_in, base, tenant, model)?;
        Ok(Body::Namespace(v1::NamespaceReply { namespace_id: id.0 }))
    }

    fn find(&self, message: &v1::Match, span: &Span) -> Result<Body, Refused> {
        let keys = wire::hashes("keys", &message.keys)?;
        let retention = wire::match_retention(message, keys.len())?;
        let pool = (message.pool_id > 0).then_some(PoolId(message.pool_id));
        let namespace = NamespaceId(message.namespace_id);
        if self.core.manager.is_of_engine(self.id, namespace) {
            return find_for_engine(&self.core, self.id, message, &keys, &retention);
        }
        if message.hold || message.skip_blocks > 0 {
            return Err(invalid(
                "hold",
                "only engines with a pool of their own may ask for that, or skip blocks",
            ));
        }
        let matched = self.core.manager.match_prefix(self.id, namespace, &keys, pool, &retention)?;
        if let Some(recorder) = &self.core.recorder {
            recorder.matched(&self.core.manager, namespace, keys, &matched);
        }
        span.record("keys", message.keys.len() / 16);
        span.record("device_blocks", matched.device.len());
        let behind = matched.host_blocks + matched.peer_blocks;
        let mut lease_ms = self.core.config.lease_ms;
        if matched.peer_blocks > 0 {
            lease_ms = lease_ms.min(kvbm::PEER_LEASE_MAX.as_millis() as u64);
        }
        span.record("host_blocks", behind);
        span.record("disk_blocks", matched.disk_blocks);
        Ok(Body::Match(v1::MatchReply {
            device: matched.device.into_iter().map(wire::block_out).collect(),
            host_blocks: wire::count(behind),
            peer_blocks: wire::count(matched.peer_blocks),
            disk_blocks: wire::count(matched.disk_blocks),
            lease_id: matched.lease.map_or(0, |lease| lease.0),
            lease_ms: u32::try_from(lease_ms).unwrap_or(u32::MAX),
            ..Default::default()
        }))
    }

    fn grant(&self, message: &v1::RequestGrants) -> Result<Body, Refused> {
        let count = usize::try_from(message.count).unwrap_or(usize::MAX);
        let blocks = self.core.manager.request_grants(self.id, PoolId(message.pool_id), count)?;
        let blocks = blocks.into_iter().map(wire::block_out).collect();
        Ok(Body::Grants(v1::Grants { pool_id: message.pool_id, blocks }))
    }

    fn prefetch(&self, message: &v1::Prefetch) -> Result<Body, Refused> {
        let keys = wire::hashes("keys", &message.keys)?;
        let found = self.core.manager.prefetch(self.id, NamespaceId(message.namespace_id), &keys)?;
        Ok(wire::prefetched(&found))
    }

    fn register_worker(&self, message: v1::RegisterWorker) -> Result<Body, Refused> {
        if message.pool_id > 0 && !self.core.owns_pool(self.id, PoolId(message.pool_id)) {
            return Err(Refused::Unknown { what: "pool" });
        }
        let pool = PoolId(message.pool_id);
        let of_pool = self.core.manager.inspect(|ledger| ledger.pool(pool).map(|pool| pool.identity.base));
        let base = match of_pool {
            None if !message.base_namespace.is_empty() => {
                Some(digest("base_namespace", &message.base_namespace).map_err(malformed)?)
            }
            of_pool => of_pool,
        };
        self.core.workers.register(self.id, self.side.pid(), message, base)?;
        Ok(Body::Worker(v1::WorkerReply {}))
    }

    // ---- answered when copies have ended ----------------------------------------------------------------------------

    fn onboard(&self, answer: Answer, message: &v1::Onboard, span: Span) {
        let (lease, pool) = (LeaseId(message.lease_id), PoolId(message.pool_id));
        let targets = wire::blocks(&message.targets);
        span.record("host_blocks", targets.len());
        later(answer, |done| {
            let done = Box::new(move |outcome: kvbm::Outcome| {
                // The span ends with the copy.
                drop(span);
                done(wire::transfer_done(&outcome));
            });
            self.core.manager.onboard(self.id, lease, pool, &targets, done)
        });
    }

    fn offload(&self, answer: Answer, message: &v1::Offload) {
        let blocks = wire::blocks(&message.blocks);
        later(answer, |done| {
            let done = Box::new(move |outcome: kvbm::Outcome| done(wire::transfer_done(&outcome)));
            self.core.manager.offload(self.id, PoolId(message.pool_id), &blocks, done)
        });
    }

    // ---- answered when a drive has done its part ----------------------------------------------------------------------

    fn prefetch_and_wait(&mut self, id: u64, message: &v1::Prefetch, span: Span) -> Result<(), Refused> {
        let keys = wire::hashes("keys", &message.keys)?;
        let Some(answering) = self.waits.begin(&self.outbound, id) else {
            let busy = Refused::Busy { queue: "session_answers" };
            self.core.refusals.note(&busy);
            return Err(busy);
        };
        let done = Box::new(move |found: Prefetched| {
            drop(span);
            answering(wire::prefetched(&found));
        });
        let namespace = NamespaceId(message.namespace_id);
        self.core.manager.prefetch_and_wait(self.id, namespace, &keys, done)
    }
}

/// Starts something that answers from another thread; a refusal is answered here.
fn later(answer: Answer, start: impl FnOnce(Box<dyn FnOnce(Body) + Send>) -> Result<(), Refused>) {
    // Shared, because only the outcome of `start` tells who answers.
    let answer = Arc::new(parking_lot::Mutex::new(Some(answer)));
    let taken = Arc::clone(&answer);
    let done = Box::new(move |body| {
        if let Some(answer) = taken.lock().take() {
            answer.send(body);
        }
    });
    if let Err(refused) = start(done)
        && let Some(answer) = answer.lock().take()
    {
        answer.refuse(&refused);
    }
}

/// Starts something that says from another thread that it is over; or was over before.
fn later_or(
    answer: Answer,
    start: impl FnOnce(Box<dyn FnOnce() + Send>) -> bool,
    over: Body,
    was_over: Body,
) {
    let answer = Arc::new(parking_lot::Mutex::new(Some(answer)));
    let taken = Arc::clone(&answer);
    let done = Box::new(move || {
        if let Some(answer) = taken.lock().take() {
            answer.send(over);
        }
    });
    if !start(done)
        && let Some(answer) = answer.lock().take()
    {
        answer.send(was_over);
    }
}

/// The span of a question that belongs to a trace, until it is answered.
fn span_of(body: Option<&Ask>, trace: &v1::TraceContext) -> Span {
    let span = match body {
        Some(Ask::Match(_)) => {
            info_span!("match", keys = Empty, device_blocks = Empty, host_blocks = Empty, disk_blocks = Empty)
        }
        Some(Ask::Onboard(_)) => info_span!("onboard", host_blocks = Empty),
        Some(Ask::Prefetch(_)) => info_span!("promote"),
        _ => return Span::none(),
    };
    kvbm_telemetry::follow(&span, trace);
    span
}
