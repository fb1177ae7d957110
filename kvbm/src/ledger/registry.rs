//! Sessions and namespaces: who is there, and what they may read and write.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::TrustDomain;
use super::key::NamespaceId;
use super::segments::Class;
use super::slots::GroupId;
use crate::error::Refused;
use crate::tier::Tier;

/// Number of a session within one life of the daemon. Never reused, never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// Namespaces one session may register: salts come from users, so there must be an end.
const NAMESPACES_PER_SESSION_MAX: usize = 1 << 16;

/// One attached engine.
#[derive(Debug)]
pub struct Session {
    /// Its user.
    pub domain: TrustDomain,
    /// What it registered.
    pub namespaces: HashSet<NamespaceId>,
    /// Not connected while its process lives.
    pub silent: bool,
}

/// One namespace of one trust domain: users do not share blocks, so they do not share numbers either.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// Digest, see `kvbm-hash`.
    pub digest: [u8; 32],
    /// Whose.
    pub domain: TrustDomain,
    /// Digest of the base namespace; `None` while only blocks of an earlier life of the daemon are known of it.
    pub base: Option<[u8; 32]>,
    /// Label of whoever pays for it.
    pub tenant: String,
    /// For whose share its blocks count.
    pub(super) group: GroupId,
    /// Model, for people.
    pub model: String,
    /// Slot size of the blocks that an earlier life of the daemon left of it, for status: its pools are not known then.
    pub found_stride: Option<usize>,
    /// Sessions that registered it, and others who hold on to it.
    holders: usize,
    /// Resident blocks per tier.
    pub resident: BTreeMap<Tier, usize>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Registry {
    sessions: BTreeMap<SessionId, Session>,
    namespaces: BTreeMap<NamespaceId, Namespace>,
    by_digest: HashMap<(TrustDomain, [u8; 32]), NamespaceId>,
    last_session: u64,
    last_namespace: u32,
}

impl Registry {
    /// A new session.
    pub fn open(&mut self, domain: TrustDomain) -> SessionId {
        self.last_session += 1;
        let id = SessionId(self.last_session);
        self.sessions.insert(id, Session { domain, namespaces: HashSet::new(), silent: false });
        id
    }

    /// Forgets a session.
    pub fn close(&mut self, id: SessionId) {
        let Some(session) = self.sessions.remove(&id) else { return };
        for id in session.namespaces {
            if let Some(namespace) = self.namespaces.get_mut(&id) {
                namespace.holders -= 1;
            }
            self.collect(id);
        }
    }

    /// A session.
    pub fn session(&self, id: SessionId) -> Result<&Session, Refused> {
        self.sessions.get(&id).ok_or(Refused::Unknown { what: "session" })
    }

    /// Marks a session as not connected.
    pub fn silence(&mut self, id: SessionId) {
        if let Some(session) = self.sessions.get_mut(&id) {
            session.silent = true;
        }
    }

    /// All sessions.
    pub fn sessions(&self) -> impl Iterator<Item = (&SessionId, &Session)> {
        self.sessions.iter()
    }

    /// Gives a session the right to a namespace.
    pub fn register(
        &mut self,
        session: SessionId,
        digest: [u8; 32],
        base: [u8; 32],
        tenant: &str,
        model: &str,
    ) -> Result<NamespaceId, Refused> {
        let domain = self.session(session)?.domain;
        let known = self.by_digest.get(&(domain, digest)).copied();
        if known.and_then(|id| self.namespaces[&id].base).is_some_and(|known| known != base) {
            return Err(Refused::invalid("base", "the namespace is known with another base"));
        }
        let owner = self.session(session)?;
        let mine = known.is_some_and(|id| owner.namespaces.contains(&id));
        if !mine && owner.namespaces.len() >= NAMESPACES_PER_SESSION_MAX {
            return Err(Refused::Busy { queue: "namespaces" });
        }
        let id = known.unwrap_or_else(|| self.new_namespace(domain, digest));
        let owner = self.sessions.get_mut(&session).ok_or(Refused::Unknown { what: "session" })?;
        let newly_owned = owner.namespaces.insert(id);
        let namespace = self.namespaces.get_mut(&id).expect("it is known, or was just made");
        namespace.holders += usize::from(newly_owned);
        if namespace.base.is_none() {
            namespace.base = Some(base);
            (namespace.tenant, namespace.model) = (tenant.to_owned(), model.to_owned());
        }
        Ok(id)
    }

    fn new_namespace(&mut self, domain: TrustDomain, digest: [u8; 32]) -> NamespaceId {
        self.last_namespace += 1;
        let id = NamespaceId(self.last_namespace);
        self.by_digest.insert((domain, digest), id);
        let (tenant, model, resident) = Default::default();
        let (base, found_stride, holders) = (None, None, 0);
        let group = GroupId::COMMON;
        let namespace =
            Namespace { digest, domain, base, tenant, group, model, found_stride, holders, resident };
        self.namespaces.insert(id, namespace);
        id
    }

    /// For whose share blocks of a namespace count.
    pub fn group_of(&self, id: NamespaceId) -> GroupId {
        self.namespaces.get(&id).map_or(GroupId::COMMON, |namespace| namespace.group)
    }

    /// Blocks of a namespace count for this group from now on. False if they did before.
    pub fn set_group(&mut self, id: NamespaceId, group: GroupId) -> bool {
        let namespace = self.namespaces.get_mut(&id);
        namespace.is_some_and(|namespace| std::mem::replace(&mut namespace.group, group) != group)
    }

    /// The namespace of blocks that an earlier life of the daemon left; not forgotten before [`Registry::let_go`].
    pub fn hold(&mut self, class: Class, digest: [u8; 32]) -> NamespaceId {
        let known = self.by_digest.get(&(class.domain, digest)).copied();
        let id = known.unwrap_or_else(|| self.new_namespace(class.domain, digest));
        let namespace = self.namespaces.get_mut(&id).expect("it is known, or was just made");
        namespace.found_stride = Some(class.stride);
        namespace.holders += 1;
        id
    }

    /// A namespace that is known is not forgotten before [`Registry::let_go`].
    pub fn hold_known(&mut self, id: NamespaceId) {
        if let Some(namespace) = self.namespaces.get_mut(&id) {
            namespace.holders += 1;
        }
    }

    /// Ends a hold.
    pub fn let_go(&mut self, id: NamespaceId) {
        if let Some(namespace) = self.namespaces.get_mut(&id) {
            namespace.holders -= 1;
        }
        self.collect(id);
    }

    /// A session that registered a namespace, and is connected.
    pub fn user_of(&self, id: NamespaceId) -> Option<SessionId> {
        let uses = |session: &Session| !session.silent && session.namespaces.contains(&id);
        self.sessions.iter().find(|(_, session)| uses(session)).map(|(id, _)| *id)
    }

    /// Base namespace of a namespace that the session registered.
    pub fn base_of(&self, session: SessionId, id: NamespaceId) -> Result<[u8; 32], Refused> {
        self.namespace_of(session, id)?.base.ok_or(Refused::Unknown { what: "namespace" })
    }

    /// A namespace that the session registered.
    pub fn namespace_of(&self, session: SessionId, id: NamespaceId) -> Result<&Namespace, Refused> {
        let unknown = Refused::Unknown { what: "namespace" };
        if !self.session(session)?.namespaces.contains(&id) {
            return Err(unknown);
        }
        self.namespaces.get(&id).ok_or(unknown)
    }

    /// A namespace.
    pub fn namespace(&self, id: NamespaceId) -> Option<&Namespace> {
        self.namespaces.get(&id)
    }

    /// All namespaces.
    pub fn namespaces(&self) -> impl Iterator<Item = (&NamespaceId, &Namespace)> {
        self.namespaces.iter()
    }

    /// A block of the namespace became resident.
    pub fn stored(&mut self, id: NamespaceId, tier: Tier) {
        self.stored_many(id, tier, 1);
    }

    /// Blocks of the namespace became resident.
    pub fn stored_many(&mut self, id: NamespaceId, tier: Tier, blocks: usize) {
        if let Some(namespace) = self.namespaces.get_mut(&id) {
            *namespace.resident.entry(tier).or_default() += blocks;
        }
    }

    /// A block of the namespace left.
    pub fn removed(&mut self, id: NamespaceId, tier: Tier) {
        let Some(count) = self.namespaces.get_mut(&id).and_then(|n| n.resident.get_mut(&tier)) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            self.collect(id);
        }
    }

    /// A namespace nobody uses and nothing is in is forgotten; its number is not used again.
    fn collect(&mut self, id: NamespaceId) {
        let unused = |n: &Namespace| n.holders == 0 && n.resident.values().all(|count| *count == 0);
        if self.namespaces.get(&id).is_some_and(unused) {
            let namespace = self.namespaces.remove(&id).expect("it was just there");
            self.by_digest.remove(&(namespace.domain, namespace.digest));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_lives_while_it_is_used_or_holds_blocks() {
        let mut registry = Registry::default();
        let (a, b) = (registry.open(TrustDomain(1)), registry.open(TrustDomain(1)));
        let id = registry.register(a, [1; 32], [9; 32], "t", "m").unwrap();
        assert_eq!(registry.register(b, [1; 32], [9; 32], "t", "m").unwrap(), id);
        assert!(registry.register(a, [1; 32], [8; 32], "t", "m").is_err(), "another base");
        let other = registry.open(TrustDomain(1));
        assert!(registry.namespace_of(other, id).is_err(), "only who registered it may use it");
        registry.stored(id, Tier::Host);
        registry.close(a);
        registry.close(b);
        assert!(registry.namespace(id).is_some());
        registry.removed(id, Tier::Host);
        assert!(registry.namespace(id).is_none());
        let again = registry.register(other, [1; 32], [9; 32], "t", "m").unwrap();
        assert_ne!(again, id, "numbers are not used again");
    }
}
