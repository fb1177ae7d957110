//! What engines say, by their pin tables, of the leases that they hold.

use kvbm_shm::PinState;

use super::{Manager, Shared};
use crate::error::Refused;
use crate::ledger::{LeaseId, LeasePin, Ledger, Millis, PoolId, SessionId};

impl Shared {
    /// Takes back promises that no rank may begin with any more.
    pub(super) fn settle_withdrawn(&self, ledger: &mut Ledger, now: Millis) {
        for LeasePin { lease, pin, pools } in ledger.take_withdrawn() {
            for pool in pools {
                let taken = self.engines.get(pool).is_none_or(|memory| memory.words.take_back(pin, lease.0));
                if taken {
                    ledger.rank_done(lease, pool, now);
                }
            }
        }
    }

    /// Looks which ranks have cleared their entries.
    pub(in crate::manager) fn read_pins(&self, ledger: &mut Ledger, now: Millis) {
        for LeasePin { lease, pin, pools } in ledger.held_leases() {
            for pool in pools.into_iter().filter(|pool| !self.holds(*pool, pin, lease)) {
                ledger.rank_done(lease, pool, now);
            }
        }
    }

    /// Ends stores of sessions that are over, when the engine's process does not copy for them any more.
    pub(in crate::manager) fn read_write_pins(&self, ledger: &mut Ledger, now: Millis) {
        for (store, pool, pins) in ledger.unreported_stores() {
            let Some(memory) = self.engines.get(pool) else { continue };
            if pins.iter().all(|pin| memory.words.pin(*pin) != PinState::InUse(store.0)) {
                ledger.abandon_store(store, now);
            }
        }
    }

    fn holds(&self, pool: PoolId, pin: u32, lease: LeaseId) -> bool {
        let Some(memory) = self.engines.get(pool) else { return false };
        match memory.words.pin(pin) {
            PinState::Free => false,
            PinState::Promised(id) | PinState::InUse(id) => id == lease.0,
        }
    }
}

impl Manager {
    /// A session is done with a lease: with its own part of it, or with all of it (`whole`).
    pub fn release_lease_of(&self, session: SessionId, lease: LeaseId, whole: bool) -> Result<(), Refused> {
        self.shared.with_ledger(|ledger, now| {
            let mine = ledger.pin_of_rank(session, lease).filter(|_| !whole);
            if ledger.release_engine_lease(session, lease, whole, now)? {
                if let Some((pool, pin)) = mine
                    && self.shared.holds(pool, pin, lease)
                    && let Some(memory) = self.shared.engines.get(pool)
                {
                    memory.words.clear_pin(pin);
                }
                return Ok(());
            }
            ledger.release_lease(session, lease, now)
        })
    }
}
