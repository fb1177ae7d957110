//! Lookups of an engine on a connection of their own, each answered by the thread that reads it.
//!
//! The session's stream does as well, but there a lookup passes through queues and wakes four threads one after another,
//! while the engine's scheduler stands still. A client that says that a lookup is coming finds this thread awake.

use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use kvbm::ledger::{EngineAsks, Matched};
use kvbm::{LeaseId, NamespaceId, Refused, Retention, SessionId};
use kvbm_hash::SequenceHash;
use kvbm_proto::v1::{self, ClientMessage, ServerMessage, client_message::Body as Ask, server_message::Body};
use kvbm_proto::{LOOKUP_BYTES_MAX, SideMessage};
use kvbm_shm::{Received, SideSocket};
use prost::Message;

use super::table::Token;
use crate::core::Core;
use crate::wire::{self, invalid};

/// How long a lookup that was said to come is waited for awake: reading and hashing a long prompt takes less.
const AWAKE: Duration = Duration::from_millis(1);

/// On fewer cores whoever stays awake is in the way of whom it waits for.
const CORES_TO_STAY_AWAKE: usize = 4;

/// How long to sleep before looking whether there is anything to look at.
const ASLEEP: Duration = Duration::from_secs(60);

/// Gives the connection to the session with this token and answers what is asked there until one of them ends.
pub(super) fn start(core: &Arc<Core>, token: &Token, uid: u32, socket: SideSocket) -> Result<(), String> {
    let of_session = socket.try_clone().map_err(|error| error.to_string())?;
    let (session, ended) = core.sessions.open_lookups(token, uid, of_session)?;
    socket.send(&SideMessage::Bound.encode(), None).map_err(|error| error.to_string())?;
    let core = Arc::clone(core);
    let thread = std::thread::Builder::new().name("kvbm-lookups".into());
    let serve = move || {
        let socket = HangsUp(socket);
        let reason = serve(&core, session, &socket.0);
        tracing::debug!(session = session.0, reason, "no lookups any more");
        drop((socket, core));
        drop(ended);
    };
    thread.spawn(serve).map(drop).map_err(|error| format!("start a thread for its lookups: {error}"))
}

/// The client sees the end, however it comes about and whoever has the socket as well.
struct HangsUp(SideSocket);

impl Drop for HangsUp {
    fn drop(&mut self) {
        self.0.hang_up();
    }
}

/// Says why it ended.
fn serve(core: &Core, session: SessionId, socket: &SideSocket) -> String {
    let stays_awake = available_parallelism().is_ok_and(|cores| cores.get() >= CORES_TO_STAY_AWAKE);
    let mut awake = Duration::ZERO;
    let mut buffer = vec![0; LOOKUP_BYTES_MAX];
    loop {
        let bytes = match socket.receive_within(&mut buffer, awake, ASLEEP) {
            Ok(Received::Packet(bytes)) => bytes,
            Ok(Received::Nothing) => continue,
            Ok(Received::End) => return "the client or the session ended".into(),
            Err(error) => return error.to_string(),
        };
        let Ok(ClientMessage { id, body, .. }) = ClientMessage::decode(&buffer[..bytes]) else {
            return "a packet is no message".into();
        };
        let answer = match body {
            // A notice.
            Some(Ask::Ping(_)) if id == 0 => {
                awake = if stays_awake { AWAKE } else { Duration::ZERO };
                continue;
            }
            Some(Ask::Ping(_)) => Ok(Body::Pong(v1::Pong {})),
            Some(_) if core.stopping.is_cancelled() => Err(Refused::Closed),
            Some(Ask::Match(message)) => find(core, session, &message),
            _ => Err(invalid("body", "is to be a lookup on a connection for lookups")),
        };
        awake = Duration::ZERO;
        let body = answer.unwrap_or_else(|refused| Body::Refused(wire::refused(&refused)));
        let lease = match &body {
            Body::Match(reply) => reply.lease_id,
            _ => 0,
        };
        let message = ServerMessage { id, body: Some(body) };
        if let Err(error) = socket.send(&message.encode_to_vec(), None) {
            // Nobody will ever hear of it. Without effect if it is none, or the session has ended as well.
            let _ = core.manager.release_lease_of(session, LeaseId(lease), true);
            return error.to_string();
        }
    }
}

fn find(core: &Core, session: SessionId, message: &v1::Match) -> Result<Body, Refused> {
    let keys = wire::hashes("keys", &message.keys)?;
    let retention = wire::match_retention(message, keys.len())?;
    find_for_engine(core, session, message, &keys, &retention)
}

/// A lookup of an engine that owns its pool.
pub(super) fn find_for_engine(
    core: &Core,
    session: SessionId,
    message: &v1::Match,
    keys: &[SequenceHash],
    retention: &[Option<Retention>],
) -> Result<Body, Refused> {
    let namespace = NamespaceId(message.namespace_id);
    let skip = usize::try_from(message.skip_blocks).unwrap_or(usize::MAX);
    let asks = EngineAsks { hashes: keys, skip, hold: message.hold, retention };
    let found = core.manager.match_for_engine(session, namespace, asks)?;
    let matched: &Matched = &found.matched;
    if let Some(recorder) = &core.recorder {
        recorder.matched(&core.manager, namespace, keys.to_vec(), matched);
    }
    let slots = message.hold.then(|| v1::Slots {
        segments: found.slots.iter().map(|(place, _)| place.segment.0).collect(),
        indices: found.slots.iter().map(|(place, _)| place.index).collect(),
        generations: found.slots.iter().map(|(_, generation)| *generation).collect(),
        pins: Vec::new(),
    });
    let lease_ms = if message.hold { 0 } else { u32::try_from(core.config.lease_ms).unwrap_or(u32::MAX) };
    Ok(Body::Match(v1::MatchReply {
        device: Vec::new(),
        host_blocks: wire::count(matched.host_blocks),
        disk_blocks: wire::count(matched.disk_blocks),
        lease_id: matched.lease.map_or(0, |lease| lease.0),
        lease_ms,
        slots,
        pin: found.pin.map_or(0, |pin| pin.pin),
        peer_blocks: 0,
    }))
}
