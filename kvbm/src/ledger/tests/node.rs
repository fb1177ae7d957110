//! A small node in virtual time: one pool, one host segment, one disk segment, and requests that go through them.

use std::collections::HashMap;

use super::*;

pub(super) const BLOCK: u64 = 4096;

/// In blocks.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sizes {
    pub device: u32,
    pub host: usize,
    pub disk: usize,
}

/// One request: a chain of so many blocks, told apart by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Chain(pub u8, pub u8);

impl Chain {
    pub fn keys(self) -> Vec<SequenceHash> {
        (0..self.1).map(|i| self.key(i)).collect()
    }

    pub fn key(self, i: u8) -> SequenceHash {
        let mut hash = [0xC0; 16];
        (hash[0], hash[8]) = (self.0, i);
        SequenceHash(hash)
    }
}

pub(super) fn keep(priority: u8, ms: Option<u64>) -> Retention {
    Retention { priority, duration: ms.map(Duration::from_millis) }
}

pub(super) struct Node {
    pub ledger: Ledger,
    pub session: SessionId,
    pub pool: PoolId,
    pub now: Millis,
    namespaces: HashMap<&'static str, NamespaceId>,
}

impl Node {
    pub fn new(sizes: Sizes, quotas: Quotas) -> Self {
        let admission = AdmissionRules { frequency_filter: false, priority_min: 0, bytes_per_day: None };
        let mut ledger = Ledger::new(LedgerConfig {
            lease: Duration::from_secs(30),
            orphan_pools_max: 0,
            orphan_pool_ttl: Duration::ZERO,
            secret: 5,
            disk: DiskRules { admission, idle: Millis(0), high_water: 0.0 },
            policy: PolicyKind::Lru,
            quotas,
            offload_priority_min: 0,
            pin_budget_bytes: 8 * BLOCK,
            rescue: Duration::from_secs(3),
            shard_wait: Duration::from_secs(10),
            one_domain: false,
        });
        let cut = |blocks: usize| SlotsIn::bytes(blocks * BLOCK as usize);
        if sizes.host > 0 {
            ledger.set_segments(Some(cut(sizes.host)));
            ledger.add_segment(SegmentId(0));
        } else {
            ledger.set_segments(None);
        }
        if sizes.disk > 0 {
            ledger.add_disk(cut(sizes.disk));
            ledger.add_disk_segment(SegmentId(0));
            ledger.set_disk_service(true);
        }
        let session = ledger.open_session(TrustDomain(1));
        let identity = PoolIdentity {
            layout: PoolLayout { block_bytes: BLOCK as usize, block_count: sizes.device },
            ..World::identity(0, 1, 1)
        };
        let pool = ledger.add_pool(session, identity, 1).expect("the session is there");
        Self { ledger, session, pool, now: Millis(0), namespaces: HashMap::new() }
    }

    pub fn namespace(&mut self, tenant: &'static str) -> NamespaceId {
        let Self { ledger, session, now, .. } = self;
        *self.namespaces.entry(tenant).or_insert_with(|| {
            let mut digest = [7; 32];
            digest[..tenant.len()].copy_from_slice(tenant.as_bytes());
            ledger.register_namespace(*session, digest, base(0), tenant, "m", *now).expect("there is room")
        })
    }

    pub fn wait(&mut self, ms: u64) {
        self.now = Millis(self.now.0 + ms);
        self.ledger.tick(self.now);
        self.ledger.check_integrity();
    }

    /// Serves a request of a tenant as an engine would; returns how many blocks its pool had. `retention` of each block, if
    /// the request gives any.
    pub fn serve_for(&mut self, tenant: &'static str, chain: Chain, retention: &[Retention]) -> usize {
        let (namespace, keys, now) = (self.namespace(tenant), chain.keys(), self.now);
        let said: Vec<_> = retention.iter().copied().map(Some).collect();
        let matched = self.ledger.match_prefix(self.session, namespace, &keys, Some(self.pool), &said, now);
        let Matched { device: mut blocks, lease, .. } = matched.expect("all is registered");
        lease.map(|lease| self.ledger.release_lease(self.session, lease, now));
        let found = blocks.len();
        let wanted = keys.len() - found;
        let granted =
            self.ledger.request_grants(self.session, self.pool, wanted, now).expect("it is its pool");
        assert_eq!(granted.len(), wanted, "the pool holds a request");
        let commits: Vec<_> = granted
            .iter()
            .enumerate()
            .map(|(i, block)| CommitBlock {
                block: *block,
                hash: keys[found + i],
                parent: (found + i).checked_sub(1).map(|before| keys[before]),
                retention: retention.get(found + i).copied(),
            })
            .collect();
        self.ledger.commit(self.session, namespace, self.pool, &commits, now).expect("they were granted");
        blocks.extend(granted);
        // The last block first: leaves age first.
        let held: Vec<_> = blocks.iter().rev().map(|block| Held { block: *block, pins: 1 }).collect();
        self.ledger.release(self.session, self.pool, &held, now).expect("they were held");
        self.ledger.check_integrity();
        found
    }

    pub fn serve(&mut self, chain: Chain, retention: &[Retention]) -> usize {
        self.serve_for("", chain, retention)
    }

    /// All that is to go to host, and from there to disk, is there.
    pub fn settle(&mut self) {
        while let Some(batch) = self.ledger.next_offload(16, self.now) {
            self.ledger.finish_offload(batch, true, self.now);
            self.ledger.check_integrity();
        }
        let limit = BatchLimit { blocks: 16, bytes: usize::MAX };
        while let Some(batch) = self.ledger.next_demote(limit, self.now) {
            let written = vec![true; batch.copies().len()];
            self.ledger.finish_demote(batch, &written, self.now);
            self.ledger.check_integrity();
        }
    }

    /// Blocks of a chain in a tier, without using them.
    pub fn held_for(&mut self, tenant: &'static str, tier: Tier, chain: Chain) -> usize {
        let namespace = self.namespace(tenant);
        let held = |hash: &SequenceHash| {
            let key = Key { namespace, hash: *hash };
            self.ledger.tables_of(tier).iter().any(|(_, slots)| slots.resident(key).is_some())
        };
        chain.keys().iter().filter(|hash| held(hash)).count()
    }

    pub fn held(&mut self, tier: Tier, chain: Chain) -> usize {
        self.held_for("", tier, chain)
    }

    /// Takes what disk has of a chain to host; returns how many blocks.
    pub fn promote(&mut self, tenant: &'static str, chain: Chain) -> usize {
        let (namespace, keys) = (self.namespace(tenant), chain.keys());
        let limit = BatchLimit { blocks: 16, bytes: usize::MAX };
        let batches = self.ledger.begin_promote(self.session, namespace, &keys, limit, self.now);
        let mut arrived = 0;
        for batch in batches.expect("all is registered") {
            let outcomes = vec![Promoted::Arrived; batch.copies().len()];
            arrived += self.ledger.finish_promote(batch, &outcomes, self.now);
        }
        self.ledger.check_integrity();
        arrived
    }

    pub fn usage(&self, tenant: &str, tier: Tier) -> TenantUsage {
        let of = |usage: &TenantUsage| usage.tenant == tenant && usage.tier == tier;
        self.ledger.tenants().into_iter().find(of).expect("it has a quota")
    }
}
