//! Pins and tenants: what users ask to be kept, and what they have.

use std::time::Duration;

use super::Manager;
use crate::error::Refused;
use crate::ledger::{Millis, NamespaceId, PinId, PinInfo, PinWhat, Pinned, SessionId, TenantUsage};

/// A pin, and how long it lasts yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LivePin {
    /// The pin.
    pub pin: PinInfo,
    /// Until its end.
    pub left: Duration,
}

impl Manager {
    /// Keeps blocks of a namespace where they are, for so long. A `session` may do that in namespaces that it registered;
    /// none: a person does.
    pub fn pin(
        &self,
        session: Option<SessionId>,
        namespace: NamespaceId,
        what: PinWhat<'_>,
        lasting: Duration,
    ) -> Result<Pinned, Refused> {
        let lasting = lasting.as_millis().try_into().unwrap_or(u64::MAX);
        self.shared.with_ledger(|ledger, now| {
            if let Some(session) = session {
                ledger.may_use(session, namespace)?;
            }
            ledger.pin_blocks(namespace, what, Millis(now.0.saturating_add(lasting)), now)
        })
    }

    /// Ends a pin.
    pub fn unpin(&self, pin: PinId) -> Result<(), Refused> {
        self.shared.with_ledger(|ledger, now| ledger.unpin(pin, now))
    }

    /// All pins.
    pub fn pins(&self) -> Vec<LivePin> {
        let ledger = self.shared.ledger.lock();
        let now = self.shared.now();
        let left = |until: Millis| Duration::from_millis(until.0.saturating_sub(now.0));
        ledger.pins().into_iter().map(|pin| LivePin { pin, left: left(pin.until) }).collect()
    }

    /// What tenants have and may have in each tier. Those without a quota are one, under no label.
    pub fn tenants(&self) -> Vec<TenantUsage> {
        self.inspect(|ledger| ledger.tenants())
    }
}
