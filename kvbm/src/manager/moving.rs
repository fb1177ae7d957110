//! Finding blocks and bringing them where they are wanted.

use std::sync::atomic::Ordering;

use kvbm_hash::SequenceHash;

use super::copy::OnboardJob;
use super::{Done, Manager, Outcome, Prefetched, Shared};
use crate::error::Refused;
use crate::ledger::{BlockRef, LeaseId, Ledger, Matched, Millis, NamespaceId, PoolId, Retention, SessionId};
use crate::what_if::Asked;

impl Manager {
    /// The longest prefix of `keys` that is held, pinned. `retention` says how the first of them are kept from now on; none
    /// is given: priorities stay, durations end.
    pub fn match_prefix(
        &self,
        session: SessionId,
        namespace: NamespaceId,
        keys: &[SequenceHash],
        pool: Option<PoolId>,
        retention: &[Option<Retention>],
    ) -> Result<Matched, Refused> {
        let (matched, block_bytes) = self.shared.with_ledger(|ledger, now| {
            let matched = ledger.match_prefix(session, namespace, keys, pool, retention, now)?;
            if matched.disk_blocks > 0 {
                self.shared.queue_promotes(ledger, session, namespace, keys, now)?;
            }
            Ok((matched, ledger.block_bytes(namespace)))
        })?;
        let wanted = keys.len() - matched.device.len();
        self.shared.counters.looked_up(
            matched.host_blocks,
            matched.disk_blocks,
            wanted - matched.peer_blocks,
        );
        if let Some(block_bytes) = block_bytes {
            let in_host = matched.device.len() + matched.peer_blocks + matched.host_blocks;
            let on_disk = in_host + matched.disk_blocks;
            let asked = Asked { session, namespace, keys, block_bytes, in_host, on_disk };
            self.shared.what_if.asked(&asked, self.shared.now());
        }
        Ok(matched)
    }

    /// The lease is not wanted any more.
    pub fn release_lease(&self, session: SessionId, lease: LeaseId) -> Result<(), Refused> {
        self.release_lease_of(session, lease, true)
    }

    /// Copies the first blocks of a lease into granted blocks. Unless refused, `done` is called exactly once, on
    /// another thread.
    pub fn onboard(
        &self,
        session: SessionId,
        lease: LeaseId,
        pool: PoolId,
        targets: &[BlockRef],
        done: Done,
    ) -> Result<(), Refused> {
        let mapped = self.shared.pools.get(pool).ok_or(Refused::Unknown { what: "pool" })?;
        self.shared.with_ledger(|ledger, now| {
            // Only pushed to under this lock: room that is there now is there below.
            if !self.shared.onboards.has_room() {
                self.shared.counters.was_busy("onboard");
                return Err(self.shared.full("onboard"));
            }
            let batch = ledger.begin_onboard(session, lease, pool, targets, now)?;
            let tokens_per_block = ledger.pool(pool).map_or(0, |pool| pool.identity.tokens_per_block);
            let peer = batch.peer.map(|peer| {
                self.shared.pools.get(peer.pool).expect("pools are connected when they are mapped")
            });
            self.shared.gate.enter();
            let job = OnboardJob { batch, pool: mapped, peer, tokens_per_block, done };
            if let Err(job) = self.shared.onboards.push(job) {
                self.shared.gate.leave();
                ledger.cancel_onboard(job.batch, now);
                return Err(self.shared.full("onboard"));
            }
            Ok(())
        })
    }

    /// Reports when these committed blocks are in host memory. Unless refused, `done` is called exactly once.
    pub fn offload(
        &self,
        session: SessionId,
        pool: PoolId,
        blocks: &[BlockRef],
        done: Done,
    ) -> Result<(), Refused> {
        self.shared.with_ledger(|ledger, _| {
            let waiter = ledger.watch_offload(session, pool, blocks)?;
            self.shared.waiters.lock().insert(waiter, done);
            Ok(())
        })
    }

    /// Makes sure that what is known of a prefix will be in host memory when it is asked for.
    pub fn prefetch(
        &self,
        session: SessionId,
        namespace: NamespaceId,
        keys: &[SequenceHash],
    ) -> Result<Prefetched, Refused> {
        self.shared.with_ledger(|ledger, now| self.shared.prefetch(ledger, session, namespace, keys, now))
    }

    /// Begins to promote what disk has of a prefix that some session is about to ask for: any that registered the
    /// namespace. Nothing happens while there is none.
    pub fn prefetch_ahead(
        &self,
        namespace: NamespaceId,
        keys: &[SequenceHash],
    ) -> Result<Prefetched, Refused> {
        self.shared.with_ledger(|ledger, now| {
            let found = ledger.look_at_prefix(namespace, keys);
            if let Some(session) = ledger.user_of(namespace).filter(|_| found.disk_blocks > 0) {
                self.shared.queue_promotes(ledger, session, namespace, keys, now)?;
            }
            Ok(Prefetched { host_blocks: found.host_blocks, promoting_blocks: found.disk_blocks })
        })
    }

    /// As [`Manager::prefetch`]; `done` is called once, when all of it has arrived or no more of it will.
    pub fn prefetch_and_wait(
        &self,
        session: SessionId,
        namespace: NamespaceId,
        keys: &[SequenceHash],
        done: Box<dyn FnOnce(Prefetched) + Send>,
    ) -> Result<(), Refused> {
        self.await_promotion(session, namespace, keys.to_vec(), None, done)
    }

    /// `before`: what there was when it was last asked; then this cannot be refused.
    fn await_promotion(
        &self,
        session: SessionId,
        namespace: NamespaceId,
        keys: Vec<SequenceHash>,
        before: Option<Prefetched>,
        done: Box<dyn FnOnce(Prefetched) + Send>,
    ) -> Result<(), Refused> {
        let mut done = Some(done);
        let found = self.shared.with_ledger(|ledger, now| {
            let found = self.shared.prefetch(ledger, session, namespace, &keys, now)?;
            // The queue may have had no room for all of it: there is more to wait for as long as some of it arrives.
            if !self.shared.stopping.load(Ordering::SeqCst)
                && before.is_none_or(|before| found.host_blocks > before.host_blocks)
                && let Some(waiter) = ledger.watch_promote(session, namespace, &keys)?
            {
                let (manager, done) = (self.clone(), done.take().expect("it waits once"));
                let arrived = move |_: Outcome| {
                    let asked = manager.await_promotion(session, namespace, keys, Some(found), done);
                    asked.expect("what was granted before is answered with what there was");
                };
                self.shared.waiters.lock().insert(waiter, Box::new(arrived));
            }
            Ok(found)
        });
        let found = match (found, before) {
            (Ok(found), _) | (Err(_), Some(found)) => found,
            (Err(refused), None) => return Err(refused),
        };
        if let Some(done) = done {
            done(found);
        }
        Ok(())
    }
}

impl Shared {
    fn prefetch(
        &self,
        ledger: &mut Ledger,
        session: SessionId,
        namespace: NamespaceId,
        keys: &[SequenceHash],
        now: Millis,
    ) -> Result<Prefetched, Refused> {
        let found = ledger.find_prefix(session, namespace, keys, now)?;
        if found.disk_blocks > 0 {
            self.queue_promotes(ledger, session, namespace, keys, now)?;
        }
        Ok(Prefetched { host_blocks: found.host_blocks, promoting_blocks: found.disk_blocks })
    }
}
