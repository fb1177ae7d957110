//! What operators may change: pins. The same for every door: gRPC on the socket and over TCP, and admin HTTP.
//!
//! Who comes through the socket as another user than the daemon's sees and changes only what is in its own trust
//! domain. The daemon's user, whoever has a token, and whoever reaches admin HTTP where it is open, may change all.

mod error;
mod grpc;

use std::time::Duration;

use kvbm::ledger::Namespace;
use kvbm::{LivePin, NamespaceId, PinId, PinWhat, Pinned, Refused, TrustDomain};
use kvbm_hash::SequenceHash;

use crate::core::Core;
pub(crate) use error::RightsError;
pub(crate) use grpc::AdminService;

/// Blocks of one pin, at most.
pub(crate) const PIN_BLOCKS_MAX: usize = 1 << 16;
/// Longest life of a pin.
const LIFETIME_MAX: Duration = Duration::from_secs(366 * 86_400);
/// Namespaces that an error names.
const NAMED_MAX: usize = 8;

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    /// May change all.
    Operator,
    /// May change what is its own.
    Domain(TrustDomain),
}

impl By {
    fn may(self, domain: TrustDomain) -> bool {
        match self {
            Self::Operator => true,
            Self::Domain(own) => own == domain,
        }
    }
}

/// Which blocks are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Blocks {
    /// From the first of the sequence on.
    Prefix(Vec<SequenceHash>),
    /// Any, with those before them.
    Keys(Vec<SequenceHash>),
}

impl Blocks {
    /// As the block manager wants it.
    pub fn what(&self) -> PinWhat<'_> {
        match self {
            Self::Prefix(keys) => PinWhat::Prefix(keys),
            Self::Keys(keys) => PinWhat::Keys(keys),
        }
    }
}

/// How a namespace is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NamespaceName {
    Id(NamespaceId),
    Digest([u8; 32]),
    /// The only one of that model.
    Model(String),
}

impl NamespaceName {
    fn fits(&self, id: NamespaceId, namespace: &Namespace) -> bool {
        match self {
            Self::Id(wanted) => *wanted == id,
            Self::Digest(digest) => namespace.digest == *digest,
            Self::Model(model) => namespace.model == *model,
        }
    }
}

impl std::fmt::Display for NamespaceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Id(id) => write!(f, "namespace {}", id.0),
            Self::Digest(digest) => {
                write!(f, "namespace with digest {}", blake3::Hash::from(*digest).to_hex())
            }
            Self::Model(model) => write!(f, "namespace of model {model:?}"),
        }
    }
}

/// Pins what is resident of some blocks.
pub(crate) fn pin(
    core: &Core,
    by: By,
    name: &NamespaceName,
    what: PinWhat<'_>,
    lifetime: Duration,
) -> Result<Pinned, RightsError> {
    let (PinWhat::Prefix(keys) | PinWhat::Keys(keys)) = what;
    let (asked, field) = (keys.len(), if matches!(what, PinWhat::Prefix(_)) { "prefix" } else { "keys" });
    if !(1..=PIN_BLOCKS_MAX).contains(&asked) {
        let reason = format!("{asked} blocks; permitted are 1 to {PIN_BLOCKS_MAX}");
        return Err(RightsError::Invalid { field, reason });
    }
    if lifetime.is_zero() || lifetime > LIFETIME_MAX {
        let reason = format!(
            "{} s; permitted are more than 0 and at most {} s",
            lifetime.as_secs_f64(),
            LIFETIME_MAX.as_secs()
        );
        return Err(RightsError::Invalid { field: "duration", reason });
    }
    let namespace = find(core, by, name)?;
    let pinned = core.manager.pin(None, namespace, what, lifetime).map_err(|refused| match refused {
        Refused::Invalid { field: "keys", .. } => {
            RightsError::NothingResident { name: name.to_string(), asked }
        }
        other => other.into(),
    })?;
    tracing::info!(pin = pinned.id.0, namespace = namespace.0, bytes = pinned.bytes, "blocks are pinned");
    Ok(pinned)
}

/// Ends a pin.
pub(crate) fn unpin(core: &Core, by: By, id: PinId) -> Result<(), RightsError> {
    if !pins(core, by).iter().any(|live| live.pin.id == id) {
        return Err(RightsError::UnknownPin(id));
    }
    core.manager.unpin(id)?;
    tracing::info!(pin = id.0, "a pin is ended");
    Ok(())
}

/// Pins that somebody may see.
pub(crate) fn pins(core: &Core, by: By) -> Vec<LivePin> {
    let domain = |id| core.manager.inspect(|ledger| ledger.namespace(id).map(|found| found.domain));
    core.manager
        .pins()
        .into_iter()
        .filter(|live| domain(live.pin.namespace).is_some_and(|domain| by.may(domain)))
        .collect()
}

/// The namespace of that name, if `by` may do something about it.
pub(crate) fn find(core: &Core, by: By, name: &NamespaceName) -> Result<NamespaceId, RightsError> {
    let found: Vec<(NamespaceId, TrustDomain)> = core.manager.inspect(|ledger| {
        let all = ledger.namespaces().filter(|(id, namespace)| name.fits(**id, namespace));
        all.filter(|(_, namespace)| by.may(namespace.domain))
            .map(|(id, namespace)| (*id, namespace.domain))
            .collect()
    });
    let own = || found.iter().filter(|(_, domain)| *domain == core.own_domain());
    match (found.as_slice(), own().count()) {
        ([], _) => Err(RightsError::UnknownNamespace { name: name.to_string() }),
        ([(id, _)], _) => Ok(*id),
        // Two users may have the same model and salt: whoever is both, the daemon's user and one of them, means his.
        (_, 1) => Ok(own().next().expect("there is one").0),
        (many, _) => {
            let ids: Vec<String> = many.iter().take(NAMED_MAX).map(|(id, _)| id.0.to_string()).collect();
            Err(RightsError::Ambiguous { name: name.to_string(), count: many.len(), ids: ids.join(", ") })
        }
    }
}

#[cfg(test)]
mod tests;
