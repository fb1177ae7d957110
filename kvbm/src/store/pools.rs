//! Mapped device pools by number.

use std::collections::HashMap;
use std::sync::Arc;

use kvbm_shm::PoolMemory;
use parking_lot::RwLock;

use crate::ledger::PoolId;

/// Copies in flight hold their own reference: memory stays mapped until they ended.
#[derive(Debug, Default)]
pub(crate) struct Pools(RwLock<HashMap<PoolId, Arc<PoolMemory>>>);

impl Pools {
    pub fn insert(&self, id: PoolId, memory: Arc<PoolMemory>) {
        self.0.write().insert(id, memory);
    }

    pub fn get(&self, id: PoolId) -> Option<Arc<PoolMemory>> {
        self.0.read().get(&id).cloned()
    }

    /// Takes out what is no longer known.
    pub fn take_all_but(&self, known: impl Fn(PoolId) -> bool) -> Vec<Arc<PoolMemory>> {
        self.0.write().extract_if(|id, _| !known(*id)).map(|(_, memory)| memory).collect()
    }
}
