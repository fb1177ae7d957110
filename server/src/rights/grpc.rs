//! `kvbm.v1.Admin`: pins over gRPC.

use std::sync::Arc;
use std::time::Duration;

use kvbm::{LivePin, NamespaceId, PinId, Pinned, Refused, TrustDomain};
use kvbm_proto::v1::{self, pin_request};
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status};

use super::{Blocks, By, NamespaceName, RightsError};
use crate::core::Core;
use crate::wire;

/// See the module.
#[derive(Debug)]
pub(crate) struct AdminService {
    core: Arc<Core>,
    door: Door,
}

#[derive(Debug, Clone, Copy)]
enum Door {
    /// The kernel says who it is.
    Socket,
    /// A token has been shown.
    Token,
}

impl AdminService {
    /// For the Unix socket.
    pub fn on_socket(core: Arc<Core>) -> Self {
        Self { core, door: Door::Socket }
    }

    /// For connections that show a token with each request.
    pub fn behind_token(core: Arc<Core>) -> Self {
        Self { core, door: Door::Token }
    }

    fn who<T>(&self, request: &Request<T>) -> Result<By, Status> {
        if self.core.stopping.is_cancelled() {
            return Err(RightsError::Refused(Refused::Closed).into());
        }
        match self.door {
            Door::Token => Ok(By::Operator),
            Door::Socket => {
                let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
                let uid = peer.map(|peer| peer.uid()).filter(|uid| self.core.may_attach(*uid));
                let uid = uid.ok_or(RightsError::Forbidden(
                    "this user may not attach: allowed_uids names those who may",
                ))?;
                let domain = TrustDomain(uid);
                Ok(if domain == self.core.own_domain() { By::Operator } else { By::Domain(domain) })
            }
        }
    }
}

#[tonic::async_trait]
impl v1::admin_server::Admin for AdminService {
    async fn pin(&self, request: Request<v1::PinRequest>) -> Result<Response<v1::PinReply>, Status> {
        let by = self.who(&request)?;
        let message = request.into_inner();
        let (name, blocks) = read(&message)?;
        let lifetime = Duration::from_millis(message.duration_ms);
        Ok(Response::new(reply(&super::pin(&self.core, by, &name, blocks.what(), lifetime)?)))
    }

    async fn unpin(&self, request: Request<v1::UnpinRequest>) -> Result<Response<v1::UnpinReply>, Status> {
        let by = self.who(&request)?;
        super::unpin(&self.core, by, PinId(request.into_inner().pin_id))?;
        Ok(Response::new(v1::UnpinReply {}))
    }

    async fn list_pins(
        &self,
        request: Request<v1::ListPinsRequest>,
    ) -> Result<Response<v1::ListPinsReply>, Status> {
        let pins = super::pins(&self.core, self.who(&request)?);
        let entry = |LivePin { pin, left }: LivePin| v1::PinEntry {
            pin_id: pin.id.0,
            namespace_id: pin.namespace.0,
            blocks: wire::count(pin.blocks),
            bytes: pin.bytes,
            remaining_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX),
        };
        Ok(Response::new(v1::ListPinsReply { pins: pins.into_iter().map(entry).collect() }))
    }
}

fn read(message: &v1::PinRequest) -> Result<(NamespaceName, Blocks), RightsError> {
    let missing = |field| RightsError::Invalid { field, reason: "is missing".to_owned() };
    let name = match message.namespace.as_ref().ok_or_else(|| missing("namespace"))? {
        pin_request::Namespace::NamespaceId(id) => NamespaceName::Id(NamespaceId(*id)),
        pin_request::Namespace::NamespaceDigest(bytes) => {
            NamespaceName::Digest(kvbm_proto::digest("namespace_digest", bytes).map_err(wire::malformed)?)
        }
        pin_request::Namespace::Model(model) => NamespaceName::Model(wire::label("model", model)?.to_owned()),
    };
    let what = match message.blocks.as_ref().ok_or_else(|| missing("blocks"))? {
        pin_request::Blocks::Prefix(bytes) => Blocks::Prefix(wire::hashes("prefix", bytes)?),
        pin_request::Blocks::Keys(bytes) => Blocks::Keys(wire::hashes("keys", bytes)?),
    };
    Ok((name, what))
}

fn reply(pinned: &Pinned) -> v1::PinReply {
    let blocks = pinned.blocks_by_tier.iter().map(|(tier, blocks)| v1::TierBlocks {
        tier: wire::tier(*tier).into(),
        blocks: wire::count(*blocks),
    });
    v1::PinReply {
        pin_id: pinned.id.0,
        blocks: blocks.collect(),
        bytes: pinned.bytes,
        missing: wire::count(pinned.missing),
    }
}
