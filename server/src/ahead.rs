//! What frontends ask for a request before its worker does: blocks brought from disk, and blocks that one worker computed
//! kept until another has them.

use std::time::Duration;

use kvbm::{NamespaceId, PinId, PinWhat, TrustDomain};
use kvbm_hash::SequenceHash;
use kvbm_proto::v1;
use tokio::time::{Instant, timeout_at};
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Status};

use crate::core::Core;
use crate::rights::{self, By, NamespaceName, PIN_BLOCKS_MAX, RightsError};
use crate::wire;

/// Longest wait for blocks on their way, and longest life of what is pinned for it.
const WAIT_MAX: Duration = Duration::from_secs(60);
const LEASE_MAX: Duration = Duration::from_secs(600);

/// Who asks: the kernel says it of a peer on the socket; who came over TCP was let in at the door.
fn who<T>(core: &Core, request: &Request<T>) -> Result<By, Status> {
    if core.stopping.is_cancelled() {
        return Err(Status::unavailable("the daemon is stopping"));
    }
    let Some(info) = request.extensions().get::<UdsConnectInfo>() else { return Ok(By::Operator) };
    let uid = info.peer_cred.map(|peer| peer.uid()).filter(|uid| core.may_attach(*uid));
    let uid = uid.ok_or_else(|| Status::permission_denied("this user may not attach"))?;
    let domain = TrustDomain(uid);
    Ok(if domain == core.own_domain() { By::Operator } else { By::Domain(domain) })
}

/// The blocks that a request names.
struct Asked {
    namespace: NamespaceId,
    keys: Vec<SequenceHash>,
}

fn asked(core: &Core, by: By, digest: &[u8], keys: &[u8]) -> Result<Asked, Status> {
    let invalid = |error: RightsError| Status::from(error);
    let digest = kvbm_proto::digest("namespace_digest", digest);
    let digest = digest.map_err(|error| invalid(wire::malformed(error).into()))?;
    let keys = wire::hashes("keys", keys).map_err(|refused| invalid(refused.into()))?;
    if !(1..=PIN_BLOCKS_MAX).contains(&keys.len()) {
        let reason = format!("{} blocks; permitted are 1 to {PIN_BLOCKS_MAX}", keys.len());
        return Err(invalid(RightsError::Invalid { field: "keys", reason }));
    }
    let namespace = rights::find(core, by, &NamespaceName::Digest(digest))?;
    Ok(Asked { namespace, keys })
}

/// Begins to promote what disk has.
pub(crate) fn prefetch(
    core: &Core,
    request: Request<v1::PrefetchKeysRequest>,
) -> Result<v1::PrefetchReply, Status> {
    let by = who(core, &request)?;
    let message = request.into_inner();
    let Asked { namespace, keys } = asked(core, by, &message.namespace_digest, &message.keys)?;
    let found = core.manager.prefetch_ahead(namespace, &keys).map_err(RightsError::from)?;
    Ok(v1::PrefetchReply {
        host_blocks: wire::count(found.host_blocks),
        promoting_blocks: wire::count(found.promoting_blocks),
    })
}

/// Pins blocks wherever they are, then waits until they are in host memory. A pin that the budget does not allow is left
/// out: then they may be evicted before they are used, and are computed again.
pub(crate) async fn hand_over(
    core: &Core,
    request: Request<v1::HandOverRequest>,
) -> Result<v1::HandOverReply, Status> {
    let by = who(core, &request)?;
    let message = request.into_inner();
    let Asked { namespace, keys } = asked(core, by, &message.namespace_digest, &message.keys)?;
    let deadline = Instant::now() + Duration::from_millis(message.wait_ms.into()).min(WAIT_MAX);
    let lease = Duration::from_millis(message.lease_ms.into()).min(LEASE_MAX);
    let mut changed = core.events_changed.subscribe();
    let mut pin = Pin { core, id: None };
    let mut missing = keys.len();
    loop {
        changed.mark_unchanged();
        if missing > 0
            && let Ok(pinned) = core.manager.pin(None, namespace, PinWhat::Prefix(&keys), lease)
        {
            // More of them are there than before: they may be on their way from the worker themselves.
            pin = Pin { core, id: Some(pinned.id) };
            missing = pinned.missing;
        }
        let host_blocks = core.manager.inspect(|ledger| ledger.look_at_prefix(namespace, &keys)).host_blocks;
        let all = host_blocks == keys.len();
        if all || !matches!(timeout_at(deadline, changed.changed()).await, Ok(Ok(()))) {
            let host_blocks = wire::count(host_blocks);
            return Ok(v1::HandOverReply { host_blocks, pin_id: pin.keep().map_or(0, |pin| pin.0) });
        }
    }
}

/// Ends a pin of [`hand_over`]. One that has ended by itself is no error.
pub(crate) fn end_hand_over(
    core: &Core,
    request: &Request<v1::EndHandOverRequest>,
) -> Result<v1::EndHandOverReply, Status> {
    let by = who(core, request)?;
    match rights::unpin(core, by, PinId(request.get_ref().pin_id)) {
        Ok(()) | Err(RightsError::UnknownPin(_)) => Ok(v1::EndHandOverReply {}),
        Err(error) => Err(error.into()),
    }
}

/// A pin that ends when the call is dropped: its client has left and does not know the pin.
struct Pin<'a> {
    core: &'a Core,
    id: Option<PinId>,
}

impl Pin<'_> {
    fn keep(mut self) -> Option<PinId> {
        self.id.take()
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        if let Some(pin) = self.id {
            // It may have ended by its time.
            let _ = self.core.manager.unpin(pin);
        }
    }
}
