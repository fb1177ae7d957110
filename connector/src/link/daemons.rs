//! Which daemon process is which, and the kernel's word when one is dead.

use std::sync::Arc;

use kvbm_shm::ProcessWatch;
use tokio::task::JoinSet;

use crate::exchange::{Arrival, Inbox};
use crate::pool_table::DaemonId;
use crate::side::death;

/// Daemons whose process the kernel does not name all count as one: the answer of any ends the quarantine.
const UNNAMED: DaemonId = DaemonId(0);

/// The daemons that were met and are not known to be dead.
pub(super) struct Daemons {
    met: Vec<(DaemonId, Arc<ProcessWatch>)>,
    next: u64,
    watches: JoinSet<()>,
    inbox: Arc<Inbox>,
}

impl Daemons {
    pub fn new(inbox: Arc<Inbox>) -> Self {
        Self { met: Vec::new(), next: 1, watches: JoinSet::new(), inbox }
    }

    /// The name of the process behind `watch`.
    pub fn identify(&mut self, watch: Option<&Arc<ProcessWatch>>) -> DaemonId {
        let Some(watch) = watch else { return UNNAMED };
        while self.watches.try_join_next().is_some() {}
        self.met.retain(|(_, met)| !met.is_dead());
        if let Some((daemon, _)) = self.met.iter().find(|(_, met)| met.pid() == watch.pid()) {
            return *daemon;
        }
        let daemon = DaemonId(self.next);
        self.next += 1;
        self.met.push((daemon, watch.clone()));
        let (watch, inbox) = (watch.clone(), self.inbox.clone());
        self.watches.spawn(async move {
            death(watch).await;
            inbox.push(0, Arrival::DaemonDead { daemon });
        });
        daemon
    }

    pub fn is_dead(&self, daemon: DaemonId) -> bool {
        self.met.iter().any(|(met, watch)| *met == daemon && watch.is_dead())
    }
}
