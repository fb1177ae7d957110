//! Lookups by the engine's own thread, on a connection of their own.

use std::sync::Arc;
use std::time::Instant;

use kvbm_hash::{Namespace, SequenceHash};
use kvbm_proto::{LOOKUP_CHANNEL, LOOKUP_KEYS_MAX};

use super::ask::{Found, found_in, match_message};
use super::{Attachment, EngineLink, Inner};
use crate::ClientError;
use crate::client::Client;
use crate::engine::settings::EngineSettings;
use crate::lookups::Lookups;

/// What came of a lookup.
pub(super) enum Direct {
    /// The daemon answered, or cannot any more.
    Told(Option<Found>),
    /// It did not answer in time.
    Late,
}

/// Opens the connection if the daemon has it. Without it lookups are asked on the session's stream.
pub(super) async fn open(client: &Client, settings: &EngineSettings) -> Option<Lookups> {
    let hello = client.hello();
    if !hello.features.iter().any(|feature| feature == LOOKUP_CHANNEL) {
        return None;
    }
    let token = kvbm_proto::digest("token", &hello.token).ok()?;
    let (socket, limit) = (settings.socket.clone(), settings.attach_deadline);
    let opened = tokio::task::spawn_blocking(move || Lookups::open(&socket, token, limit)).await;
    match opened.unwrap_or_else(|error| Err(ClientError::unavailable(error))) {
        Ok(lookups) => Some(lookups),
        Err(error) => {
            tracing::warn!(%error, "lookups have no connection of their own");
            None
        }
    }
}

impl EngineLink {
    /// The engine will ask in a moment: whoever answers can be awake by then.
    pub fn expect(&self) {
        if self.0.breaker.is_open() {
            return;
        }
        if let Some(attachment) = self.0.current()
            && let Some(lookups) = attachment.lookups.try_lock().as_ref().and_then(|lookups| lookups.as_ref())
        {
            lookups.expect();
        }
    }
}

impl Inner {
    /// `None`: this one has to be asked on the stream.
    pub(super) fn ask_directly(
        self: &Arc<Self>,
        attachment: &Arc<Attachment>,
        (namespace, keys, skip): (Namespace, &[SequenceHash], usize),
        deadline: Instant,
        meanwhile: &mut dyn FnMut() -> bool,
    ) -> Option<Direct> {
        if keys.len() > LOOKUP_KEYS_MAX {
            return None;
        }
        // A namespace is made known on the stream, with the first lookup in it.
        let namespace_id = attachment.namespaces.try_lock().ok()?.get(&namespace).copied()?;
        let question = match_message(attachment, namespace_id, keys, skip);
        let mut lookups = attachment.lookups.try_lock()?.take()?;
        let answered = lookups.ask(question).and_then(|()| {
            while meanwhile() && Instant::now() < deadline && !lookups.is_answered()? {}
            lookups.answer(deadline)
        });
        match answered.transpose() {
            Some(reply) => {
                let found = self.keep_if_sound(attachment, lookups, reply);
                let found = found.and_then(|reply| found_in(reply, keys.len() - skip));
                Some(Direct::Told(self.judge(attachment, found)))
            }
            None => {
                let (late, attachment) = (self.clone(), attachment.clone());
                self.handle.spawn_blocking(move || late.wait_for_late(&attachment, lookups));
                Some(Direct::Late)
            }
        }
    }

    /// Whether the answer comes says whether the daemon lives; what it brings goes back.
    fn wait_for_late(self: Arc<Self>, attachment: &Arc<Attachment>, mut lookups: Lookups) {
        let answered = lookups.last_answer(Instant::now() + self.patience());
        let answered = answered.and_then(|reply| reply.ok_or(ClientError::Deadline));
        let kept = self.keep_if_sound(attachment, lookups, answered);
        let found = self.judge(attachment, kept.and_then(|reply| found_in(reply, LOOKUP_KEYS_MAX)));
        if let Some((Some(promised), _)) = found {
            self.take_back(attachment, promised.lease);
        }
    }

    /// Puts the connection back unless it failed.
    fn keep_if_sound<T>(
        &self,
        attachment: &Attachment,
        lookups: Lookups,
        answered: Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        if matches!(answered, Ok(_) | Err(ClientError::Refused { .. })) && !lookups.is_over() {
            *attachment.lookups.lock() = Some(lookups);
        }
        answered
    }
}
