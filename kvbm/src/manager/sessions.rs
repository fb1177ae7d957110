//! Who is there: sessions and their namespaces.

use super::Manager;
use crate::error::Refused;
use crate::ledger::{NamespaceId, SessionId, TrustDomain};

impl Manager {
    /// An engine attached.
    pub fn open_session(&self, domain: TrustDomain) -> SessionId {
        self.shared.with_ledger(|ledger, _| ledger.open_session(domain))
    }

    /// Its process is dead: what it held is released after copies in flight ended. A pool whose epoch moved is not kept:
    /// the engine had gone its own way in it, and what the ledger knows of it is of the past.
    pub fn session_dead(&self, session: SessionId) {
        self.shared.register_last(session);
        self.shared.with_ledger(|ledger, now| {
            for id in ledger.pools_of(session) {
                let known = ledger.pool(id).map(|pool| pool.epoch);
                if self.shared.pools.get(id).map(|pool| pool.memory.epoch()) != known {
                    ledger.retire_pool(id);
                }
            }
            ledger.session_dead(session, now);
        });
    }

    /// Its connection is gone while its process lives. If it holds no pool and no memory, it ends now; false if it does.
    pub fn end_session_without_pools(&self, session: SessionId) -> bool {
        self.shared.with_ledger(|ledger, now| {
            let idle = ledger.pools_of(session).is_empty() && !ledger.is_engine_session(session);
            if idle {
                ledger.session_dead(session, now);
            }
            idle
        })
    }

    /// Its connection is gone while its process lives: what it holds is quarantined.
    pub fn session_silent(&self, session: SessionId) {
        self.shared.with_ledger(|ledger, _| ledger.session_silent(session));
    }

    /// Gives a session the right to a namespace.
    pub fn register_namespace(
        &self,
        session: SessionId,
        digest: [u8; 32],
        base: [u8; 32],
        tenant: &str,
        model: &str,
    ) -> Result<NamespaceId, Refused> {
        self.shared
            .with_ledger(|ledger, now| ledger.register_namespace(session, digest, base, tenant, model, now))
    }
}
