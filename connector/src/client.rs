//! A client of the daemon, one method per message, for benches, tools and engines with a pool of their own making.
//!
//! Every question has a deadline and may be asked from many tasks at once. What a late answer brings (pins, leases) is
//! given back by itself.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kvbm_hash::{BaseNamespace, Namespace, Retention, SequenceHash};
use kvbm_proto::v1;
use kvbm_proto::v1::registry_client::RegistryClient;
use kvbm_proto::{MESSAGE_BYTES_MAX, pack_keys, retention_runs};
use kvbm_shm::{PoolMemory, PoolWords, ProcessWatch};
use tokio::time::timeout;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::session::{Answer, Question, Returns, Session};
use crate::{ClientError, Release};

/// How long a question waits unless [`Client::with_deadline`] says otherwise.
const DEADLINE: Duration = Duration::from_secs(5);

/// A session with the daemon. Clones share it; it ends with the last of them.
#[derive(Clone)]
pub struct Client {
    session: Arc<Session>,
    deadline: Duration,
}

/// Blocks to commit, all of one namespace.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Committed {
    /// The blocks.
    pub blocks: Vec<v1::BlockRef>,
    /// One key for each.
    pub keys: Vec<SequenceHash>,
    /// One parent for each; none for the first block of a sequence.
    pub parents: Vec<Option<SequenceHash>>,
    /// What each is to be kept like; empty: all by default.
    pub retention: Vec<Retention>,
}

macro_rules! answer {
    ($answer:expr, $variant:ident) => {
        match $answer {
            $crate::session::Answer::$variant(reply) => Ok(reply),
            other => Err(ClientError::malformed(format!(
                concat!("expected ", stringify!($variant), ", got {:?}"),
                other
            ))),
        }
    };
}
pub(crate) use answer;

impl Client {
    /// Connects to the daemon at `socket`, greets it and binds the side channel.
    pub async fn connect(socket: impl AsRef<Path>) -> Result<Self, ClientError> {
        let name = concat!("kvbm-connector/", env!("CARGO_PKG_VERSION"));
        Self::connect_as(socket, name, DEADLINE).await
    }

    /// Connects within `deadline`, which is also the default of all questions, under a name of its own.
    pub async fn connect_as(
        socket: impl AsRef<Path>,
        name: &str,
        deadline: Duration,
    ) -> Result<Self, ClientError> {
        let session = Session::connect(socket.as_ref(), name, deadline).await?;
        Ok(Self { session: Arc::new(session), deadline })
    }

    pub(crate) fn deadline(&self) -> Duration {
        self.deadline
    }

    pub(crate) fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// The same session with another deadline.
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self { session: self.session.clone(), deadline }
    }

    /// What the daemon said about itself.
    pub fn hello(&self) -> &v1::HelloReply {
        self.session.hello()
    }

    /// The daemon's process, if the kernel names it.
    pub fn daemon(&self) -> Option<&ProcessWatch> {
        self.session.daemon().map(Arc::as_ref)
    }

    /// Waits until the session has ended and says why.
    pub async fn ended(&self) -> String {
        self.session.ended().await
    }

    /// True once no answer can come any more.
    pub fn has_ended(&self) -> bool {
        self.session.has_ended()
    }

    /// Makes a namespace known; its id is good for this session.
    pub async fn register_namespace(
        &self,
        digest: Namespace,
        base: BaseNamespace,
        tenant: &str,
        model: &str,
    ) -> Result<u32, ClientError> {
        let body = v1::RegisterNamespace {
            digest: digest.0.to_vec(),
            base: base.0.to_vec(),
            tenant: tenant.into(),
            model: model.into(),
        };
        let reply = answer!(self.ask(Question::RegisterNamespace(body)).await?, Namespace)?;
        match reply.namespace_id {
            0 => Err(ClientError::malformed("namespace_id is 0")),
            id => Ok(id),
        }
    }

    /// Opens a pool of the daemon's making and maps its memory. Without adoption.
    pub async fn open_pool(&self, open: v1::OpenPool) -> Result<(PoolMemory, v1::PoolReply), ClientError> {
        let reply = answer!(self.ask(Question::OpenPool(open)).await?, Pool)?;
        let uuid = kvbm_proto::uuid("pool_uuid", &reply.pool_uuid)?;
        let memory = timeout(self.deadline, self.session.side().take_pool(uuid));
        let (memory, device) = memory.await.map_err(|_| ClientError::Deadline)?;
        Ok((PoolMemory::from_fds(memory, device).map_err(ClientError::malformed)?, reply))
    }

    /// Hands over a pool that the engine kept: its memory, then the table in `open.adoption`.
    pub async fn hand_over_pool(
        &self,
        memory: &PoolMemory,
        open: v1::OpenPool,
    ) -> Result<v1::PoolReply, ClientError> {
        let sent = timeout(self.deadline, self.session.side().send_pool(memory));
        sent.await.unwrap_or(Err(ClientError::Deadline))?;
        answer!(self.ask(Question::OpenPool(open)).await?, Pool)
    }

    /// Hands over memory of the engine's own, under the name that an export gives it. To be followed by
    /// [`Client::open_engine_pool`].
    pub async fn send_memory(&self, name: [u8; 16], memory: BorrowedFd<'_>) -> Result<(), ClientError> {
        let sent = timeout(self.deadline, self.session.side().send_memory(name, memory));
        sent.await.unwrap_or(Err(ClientError::Deadline))
    }

    /// Opens a pool of the engine's own. Returns the words that are shared about it.
    pub async fn open_engine_pool(
        &self,
        open: v1::OpenPool,
    ) -> Result<(PoolWords, v1::PoolReply), ClientError> {
        let reply = answer!(self.ask(Question::OpenPool(open)).await?, Pool)?;
        let uuid = kvbm_proto::uuid("pool_uuid", &reply.pool_uuid)?;
        let words = timeout(self.deadline, self.session.side().take_memory(uuid)).await;
        let words = PoolWords::from_fd(words.map_err(|_| ClientError::Deadline)?);
        Ok((words.map_err(ClientError::malformed)?, reply))
    }

    /// Says that blocks of such a pool are complete.
    pub async fn store(&self, store: v1::Store) -> Result<v1::StoreReply, ClientError> {
        answer!(self.ask(Question::Store(store)).await?, Store)
    }

    /// The longest prefix of `keys` that is held, pinned. `pool_id` 0 asks no device pool. What the blocks are to be kept
    /// like stays as it is.
    pub async fn match_prefix(
        &self,
        namespace_id: u32,
        keys: &[SequenceHash],
        pool_id: u32,
    ) -> Result<v1::MatchReply, ClientError> {
        let keys = pack_keys(keys.iter().map(|key| &key.0));
        let returns = self.session.returns();
        let late = move |answer| give_back(&returns, pool_id, answer);
        let question = Question::Match(v1::Match { namespace_id, keys, pool_id, ..Default::default() });
        answer!(self.session.question(question, self.deadline, late).await?, Match)
    }

    /// Copies the first blocks of a lease into granted ones. After a [`ClientError::Deadline`] the daemon may still be
    /// writing into `targets`.
    pub async fn onboard(
        &self,
        lease_id: u64,
        pool_id: u32,
        targets: Vec<v1::BlockRef>,
    ) -> Result<v1::TransferDone, ClientError> {
        let body = v1::Onboard { lease_id, pool_id, targets, ..Default::default() };
        answer!(self.ask(Question::Onboard(body)).await?, TransferDone)
    }

    /// Says that blocks are complete. There is no answer.
    pub async fn commit(
        &self,
        namespace_id: u32,
        pool_id: u32,
        committed: Committed,
    ) -> Result<(), ClientError> {
        self.tell(Question::Commit(commit_message(namespace_id, pool_id, committed))).await
    }

    /// Gives back pins. There is no answer.
    pub async fn release(&self, pool_id: u32, releases: &[Release]) -> Result<(), ClientError> {
        self.tell(Question::Release(release_message(pool_id, releases))).await
    }

    /// Gives back a lease. There is no answer.
    pub async fn release_lease(&self, lease_id: u64) -> Result<(), ClientError> {
        self.tell(Question::ReleaseLease(v1::ReleaseLease { lease_id, ..Default::default() })).await
    }

    /// Asks for up to `count` blocks to fill.
    pub async fn request_grants(&self, pool_id: u32, count: u32) -> Result<Vec<v1::BlockRef>, ClientError> {
        let returns = self.session.returns();
        let late = move |answer| give_back(&returns, pool_id, answer);
        let question = Question::RequestGrants(v1::RequestGrants { pool_id, count });
        Ok(answer!(self.session.question(question, self.deadline, late).await?, Grants)?.blocks)
    }

    /// Waits until committed blocks are in host memory.
    pub async fn offload(
        &self,
        pool_id: u32,
        blocks: Vec<v1::BlockRef>,
    ) -> Result<v1::TransferDone, ClientError> {
        answer!(self.ask(Question::Offload(v1::Offload { pool_id, blocks })).await?, TransferDone)
    }

    /// Has blocks on disk brought to host memory. Answered at once, with what is there and what is on its way.
    pub async fn prefetch(
        &self,
        namespace_id: u32,
        keys: &[SequenceHash],
    ) -> Result<v1::PrefetchReply, ClientError> {
        let question = prefetch_message(namespace_id, keys, PrefetchAnswer::AtOnce);
        answer!(self.ask(Question::Prefetch(question)).await?, Prefetch)
    }

    /// As [`Client::prefetch`], answered when what is on its way has arrived or failed. That takes as long as a drive
    /// does: give it a deadline of its own, [`Client::with_deadline`]. After it the blocks are still brought.
    pub async fn prefetch_and_wait(
        &self,
        namespace_id: u32,
        keys: &[SequenceHash],
    ) -> Result<v1::PrefetchReply, ClientError> {
        let question = prefetch_message(namespace_id, keys, PrefetchAnswer::Arrived);
        answer!(self.ask(Question::Prefetch(question)).await?, Prefetch)
    }

    /// Lists this session in the registry, or changes how it is listed.
    pub async fn register_worker(&self, worker: v1::RegisterWorker) -> Result<(), ClientError> {
        answer!(self.ask(Question::RegisterWorker(worker)).await?, Worker).map(|_| ())
    }

    /// Waits for any sign of life.
    pub async fn ping(&self) -> Result<(), ClientError> {
        answer!(self.ask(Question::Ping(v1::Ping {})).await?, Pong).map(|_| ())
    }

    /// The document of `kvbm status --json`.
    pub async fn status(&self) -> Result<String, ClientError> {
        let mut registry = self.registry();
        let reply = timeout(self.deadline, registry.status(v1::StatusRequest {}));
        Ok(reply.await.map_err(|_| ClientError::Deadline)??.into_inner().json)
    }

    /// The workers now, and again after each change.
    pub async fn watch_workers(&self) -> Result<Streaming<v1::WorkerList>, ClientError> {
        let mut registry = self.registry();
        let stream = timeout(self.deadline, registry.watch_workers(v1::WatchWorkersRequest {}));
        Ok(stream.await.map_err(|_| ClientError::Deadline)??.into_inner())
    }

    /// Numbered events after `after_sequence`; `Refused` as stale when they are no longer kept.
    pub async fn watch_events(&self, after_sequence: u64) -> Result<Streaming<v1::EventBatch>, ClientError> {
        let mut registry = self.registry();
        let stream = timeout(self.deadline, registry.watch_events(v1::WatchEventsRequest { after_sequence }));
        Ok(stream.await.map_err(|_| ClientError::Deadline)??.into_inner())
    }

    /// Everything that is resident, and the number of the last event it contains.
    pub async fn snapshot(&self) -> Result<(u64, Vec<v1::Event>), ClientError> {
        let mut registry = self.registry();
        let read = async {
            let mut stream = registry.snapshot(v1::SnapshotRequest {}).await?.into_inner();
            let mut stored = Vec::new();
            while let Some(part) = stream.message().await? {
                stored.extend(part.stored);
                if part.last {
                    return Ok((part.sequence, stored));
                }
            }
            Err(ClientError::malformed("the snapshot has no last part"))
        };
        timeout(self.deadline, read).await.unwrap_or(Err(ClientError::Deadline))
    }

    fn registry(&self) -> RegistryClient<Channel> {
        RegistryClient::new(self.session.channel()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    async fn ask(&self, question: Question) -> Result<Answer, ClientError> {
        self.session.question(question, self.deadline, |_| ()).await
    }

    async fn tell(&self, message: Question) -> Result<(), ClientError> {
        timeout(self.deadline, self.session.tell(message)).await.unwrap_or(Err(ClientError::Deadline))
    }
}

/// Sends back what an unwanted answer brought.
fn give_back(returns: &Returns, pool_id: u32, answer: Answer) {
    let (blocks, lease_id) = match answer {
        Answer::Match(reply) => (reply.device, reply.lease_id),
        Answer::Grants(grants) => (grants.blocks, 0),
        _ => return,
    };
    if !blocks.is_empty() {
        let pins = vec![1; blocks.len()];
        returns.send(Question::Release(v1::Release { pool_id, blocks, pins }));
    }
    if lease_id != 0 {
        returns.send(Question::ReleaseLease(v1::ReleaseLease { lease_id, ..Default::default() }));
    }
}

/// When a prefetch is to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PrefetchAnswer {
    AtOnce,
    /// When what is being promoted has arrived or failed.
    Arrived,
}

pub(crate) fn prefetch_message(
    namespace_id: u32,
    keys: &[SequenceHash],
    answer: PrefetchAnswer,
) -> v1::Prefetch {
    let keys = pack_keys(keys.iter().map(|key| &key.0));
    v1::Prefetch { namespace_id, keys, wait: answer == PrefetchAnswer::Arrived }
}

pub(crate) fn commit_message(namespace_id: u32, pool_id: u32, committed: Committed) -> v1::Commit {
    // What nothing is said of is kept by default.
    let said = |retention: Retention| (retention != Retention::default()).then_some(retention);
    let retention: Vec<_> = committed.retention.into_iter().map(said).collect();
    let parents = committed.parents.iter().map(|parent| parent.map_or([0; 16], |parent| parent.0));
    v1::Commit {
        namespace_id,
        pool_id,
        blocks: committed.blocks,
        keys: pack_keys(committed.keys.iter().map(|key| &key.0)),
        parents: parents.flatten().collect(),
        retention: retention_runs(&retention),
    }
}

pub(crate) fn release_message(pool_id: u32, releases: &[Release]) -> v1::Release {
    v1::Release {
        pool_id,
        blocks: releases.iter().map(|release| release.block.into()).collect(),
        pins: releases.iter().map(|release| release.pins).collect(),
    }
}
