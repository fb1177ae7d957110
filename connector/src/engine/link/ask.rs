//! Questions to the daemon.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvbm_hash::{Namespace, Retention, SequenceHash};
use kvbm_proto::{pack_keys, retention_runs, v1};

use super::{Attachment, Inner, writes_of};
use crate::ClientError;
use crate::client::answer;
use crate::engine::host::{Copied, StoreRequest, Stored, Writes};
use crate::engine::metadata::Lease;
use crate::engine::scheduler::{Promised, Slot};
use crate::session::{Answer, Question};

/// Stands for a block of which nothing is said.
const NO_PRIORITY: u8 = u8::MAX;

/// How long the daemon may take to copy blocks out. Whether it lives is seen elsewhere.
const COPY_PATIENCE: Duration = Duration::from_secs(60);

/// How long a daemon may take for a sign of life while a request waits for its drives, in deadlines of lookups.
const SIGN_OF_LIFE_PATIENCE: u32 = 3;

/// What is in host memory, held, and how many blocks behind it are on disk.
pub(super) type Found = (Option<Promised>, usize);

impl Attachment {
    /// Says something that needs no answer. What cannot be said goes with the session.
    pub async fn tell(&self, message: Question) {
        let _ = self.client.session().tell(message).await;
    }

    async fn ask(&self, question: Question, deadline: Duration) -> Result<Answer, ClientError> {
        let returns = self.client.session().returns();
        let late = move |answer| {
            // A lease that nobody waits for any more.
            if let Answer::Match(v1::MatchReply { lease_id: lease_id @ 1.., .. }) = answer {
                returns.send(Question::ReleaseLease(v1::ReleaseLease { lease_id, whole: true }));
            }
        };
        self.client.session().question(question, deadline, late).await
    }
}

impl Inner {
    /// The number of a namespace in this session.
    async fn namespace_id(&self, attachment: &Attachment, namespace: Namespace) -> Result<u32, ClientError> {
        let mut known = attachment.namespaces.lock().await;
        if let Some(id) = known.get(&namespace) {
            return Ok(*id);
        }
        let client = attachment.client.with_deadline(self.patience());
        let (base, tenant) = (self.registered.base, &self.settings.tenant);
        let id = client.register_namespace(namespace, base, tenant, &self.settings.model).await?;
        known.insert(namespace, id);
        self.note_namespace(namespace);
        Ok(id)
    }

    /// Makes known in a new session what was asked for in those before, so that the first lookups need one answer only.
    pub(super) async fn register_known(&self, attachment: &Attachment) -> Result<(), ClientError> {
        let known: Vec<Namespace> = self.namespaces.lock().iter().copied().collect();
        for namespace in known {
            self.namespace_id(attachment, namespace).await?;
        }
        Ok(())
    }

    /// Blocks behind the first `skip`, held. A daemon that says nothing for too long loses the session.
    pub(super) async fn look_up(
        &self,
        attachment: &Arc<Attachment>,
        namespace: Namespace,
        keys: &[SequenceHash],
        skip: usize,
    ) -> Option<Found> {
        let found = async {
            let namespace_id = self.namespace_id(attachment, namespace).await?;
            let question = match_message(attachment, namespace_id, keys, skip);
            let reply = attachment.ask(Question::Match(question), self.patience()).await?;
            found_in(answer!(reply, Match)?, keys.len() - skip)
        };
        self.judge(attachment, found.await)
    }

    /// Returns when these blocks have come from disk or failed to, or after `patience`. How long a drive takes says
    /// nothing about the daemon.
    pub(super) async fn bring(
        &self,
        attachment: &Arc<Attachment>,
        namespace: Namespace,
        keys: &[SequenceHash],
        patience: Duration,
    ) {
        let Ok(namespace_id) = self.namespace_id(attachment, namespace).await else { return };
        let client = attachment.client.with_deadline(patience);
        if let Err(error) = client.prefetch_and_wait(namespace_id, keys).await {
            tracing::debug!(%error, "blocks on disk are not waited for");
        }
    }

    /// Returns when the daemon gives no sign of life for some lookups' time: whoever waits for its drives is not kept
    /// waiting then.
    pub(super) async fn silence(&self, attachment: &Attachment) {
        let every = self.settings.lookup_deadline;
        let client = attachment.client.with_deadline(every * SIGN_OF_LIFE_PATIENCE);
        loop {
            tokio::time::sleep(every).await;
            if let Err(error) = client.ping().await {
                return tracing::debug!(%error, "blocks on disk are not waited for any longer");
            }
        }
    }

    pub(super) async fn store(
        &self,
        attachment: &Arc<Attachment>,
        request: &StoreRequest,
    ) -> Result<Stored, ClientError> {
        let stored = async {
            let pool = attachment.pool.as_ref().ok_or_else(|| ClientError::malformed("there is no pool"))?;
            let namespace_id = self.namespace_id(attachment, request.namespace).await?;
            let question = store_message(namespace_id, pool.id, request);
            let is_ipc = pool.mode == v1::PoolMode::Ipc;
            let patience = if is_ipc { COPY_PATIENCE } else { self.patience() };
            // Copies take their time; a session that is given up meanwhile is not waited for.
            let mut given_up = attachment.given_up.subscribe();
            let answer = tokio::select! {
                answer = attachment.ask(Question::Store(question), patience) => answer?,
                _ = given_up.wait_for(|given_up| *given_up) => {
                    return Err(ClientError::unavailable("the session is over"));
                }
            };
            let reply: v1::StoreReply = answer!(answer, Store)?;
            if reply.verdicts.len() != request.keys.len() {
                return Err(ClientError::malformed("a Store was answered for another number of blocks"));
            }
            let count = |verdict: v1::StoreVerdict| {
                reply.verdicts.iter().filter(|of| i32::from(**of) == verdict as i32).count() as u64
            };
            let orphans = count(v1::StoreVerdict::Orphan) > 0;
            let busy = count(v1::StoreVerdict::Busy) > 0;
            if is_ipc {
                let stored = count(v1::StoreVerdict::Stored);
                let stale = count(v1::StoreVerdict::Stale) + count(v1::StoreVerdict::Failed);
                return Ok(Stored::Copied(Copied { stored, stale, orphans, busy }));
            }
            let writes = writes_of(&reply.verdicts, &reply.slots.unwrap_or_default());
            let writes = writes.ok_or_else(|| {
                ClientError::malformed("a Store was answered with other slots than blocks to write")
            })?;
            let host = pool.host.clone();
            if !host.writes.begin(writes.iter().map(|write| write.pin)) {
                return Err(ClientError::unavailable("the session is over"));
            }
            Ok(Stored::ToWrite(Writes { store_id: reply.store_id, host, writes, orphans, busy }))
        };
        let stored = stored.await;
        let kept = stored.as_ref().map(|_| ()).map_err(Clone::clone);
        self.judge(attachment, kept);
        stored
    }

    /// An offer that no rank has heard of.
    pub(super) fn take_back(&self, attachment: &Arc<Attachment>, lease: Lease) {
        let attachment = attachment.clone();
        let question = v1::ReleaseLease { lease_id: lease.lease_id, whole: true };
        self.handle.spawn(async move { attachment.tell(Question::ReleaseLease(question)).await });
    }

    /// What an answer, or its absence, says about the daemon.
    pub(super) fn judge<T>(&self, attachment: &Arc<Attachment>, result: Result<T, ClientError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            // Full, or not of a mind to: an answer like others. Only one that does not know this session's pool, because
            // another has been opened in its place, will never know it again.
            Err(ClientError::Refused { refusal, detail }) if refusal != v1::Refusal::Unknown => {
                tracing::debug!(?refusal, detail, "the daemon refused");
                None
            }
            Err(error) => {
                if self.give_up(attachment) {
                    tracing::warn!(%error, "going on without the daemon");
                }
                None
            }
        }
    }

    /// Goes on without this session. False: it had done so before.
    pub(super) fn give_up(&self, attachment: &Arc<Attachment>) -> bool {
        let mut current = self.current.write();
        let given_up = current.as_ref().is_some_and(|now| Arc::ptr_eq(now, attachment));
        if given_up {
            // First: at no time is a promise found in neither.
            if let Some((registered, pool)) = self.registered.pool.as_ref().zip(attachment.pool.as_ref()) {
                self.keep(pool.host.clone());
                self.former_writes.lock().push((Instant::now(), pool.host.writes.clone()));
                pool.host.writes.end_session();
                registered.generations.unshare(&pool.host.words);
            }
            *current = None;
        }
        drop(current);
        attachment.given_up.send_replace(true);
        given_up
    }
}

/// Asks for the blocks behind the first `skip`, of which there are some, to be held.
pub(super) fn match_message(
    attachment: &Attachment,
    namespace_id: u32,
    keys: &[SequenceHash],
    skip: usize,
) -> v1::Match {
    v1::Match {
        namespace_id,
        keys: pack_keys(keys.iter().map(|key| &key.0)),
        pool_id: attachment.pool.as_ref().map_or(0, |pool| pool.id),
        skip_blocks: u32::try_from(skip).expect("there is a key for each"),
        hold: true,
        ..v1::Match::default()
    }
}

pub(super) fn found_in(reply: v1::MatchReply, asked: usize) -> Result<Found, ClientError> {
    let on_disk = reply.disk_blocks as usize;
    Ok((promised(reply, asked)?, on_disk))
}

fn promised(reply: v1::MatchReply, asked: usize) -> Result<Option<Promised>, ClientError> {
    let blocks = reply.host_blocks as usize;
    if reply.lease_id == 0 || blocks == 0 {
        return Ok(None);
    }
    let slots = reply.slots.unwrap_or_default();
    if blocks > asked || slots.segments.len() != blocks || slots.indices.len() != blocks {
        return Err(ClientError::malformed("a Match was answered with other slots than blocks"));
    }
    let slots = slots.segments.into_iter().zip(slots.indices);
    Ok(Some(Promised {
        lease: Lease { lease_id: reply.lease_id, pin: reply.pin },
        slots: slots.map(|(segment, index)| Slot { segment, index }).collect(),
    }))
}

fn store_message(namespace_id: u32, pool_id: u32, request: &StoreRequest) -> v1::Store {
    let priority = |priority: &u8| {
        (*priority != NO_PRIORITY).then_some(Retention { priority: *priority, duration: None })
    };
    let retention: Vec<Option<Retention>> = request.priorities.iter().map(priority).collect();
    let parents = request.parent.map_or([0; 16], |parent| parent.0);
    let parents = std::iter::once(&parents).chain(request.keys.iter().map(|key| &key.0));
    v1::Store {
        namespace_id,
        pool_id,
        blocks: request
            .blocks
            .iter()
            .map(|(block, generation)| v1::BlockRef { block: *block, generation: *generation })
            .collect(),
        keys: pack_keys(request.keys.iter().map(|key| &key.0)),
        parents: pack_keys(parents.take(request.keys.len())),
        retention: retention_runs(&retention),
        ..v1::Store::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_that_do_not_fit_the_answer_are_refused() {
        let slots = v1::Slots { segments: vec![1, 1], indices: vec![4, 5], ..v1::Slots::default() };
        let reply =
            v1::MatchReply { host_blocks: 2, lease_id: 9, pin: 3, slots: Some(slots), ..Default::default() };
        let found = promised(reply.clone(), 2).unwrap().unwrap();
        assert_eq!(found.slots, [Slot { segment: 1, index: 4 }, Slot { segment: 1, index: 5 }]);
        assert!(promised(reply.clone(), 1).is_err());
        assert!(promised(v1::MatchReply { host_blocks: 1, ..reply.clone() }, 2).is_err());
        assert_eq!(promised(v1::MatchReply { lease_id: 0, ..reply }, 2), Ok(None));
    }

    #[test]
    fn parents_are_the_keys_before() {
        let key = |byte| SequenceHash([byte; 16]);
        let request = StoreRequest {
            namespace: Namespace([0; 32]),
            blocks: vec![(4, 0), (9, 2)],
            keys: vec![key(1), key(2)],
            parent: None,
            priorities: vec![80, NO_PRIORITY],
        };
        let message = store_message(3, 4, &request);
        assert_eq!(message.parents, [[0; 16], [1; 16]].concat());
        assert_eq!(message.retention.len(), 2);
        let behind = store_message(3, 4, &StoreRequest { parent: Some(key(7)), ..request });
        assert_eq!(behind.parents, [[7; 16], [1; 16]].concat());
    }
}
