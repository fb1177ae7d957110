//! What all parts of the daemon share. Owned by [`crate::Daemon`], which starts and stops them.

use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::time::Instant;

use kvbm::ledger::Owner;
use kvbm::{DiskState, Manager, NamespaceId, PoolId, Refused, SessionId, Tier, TrustDomain};
use kvbm_proto::v1;
use kvbm_shm::PoolLayout;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::Config;
use crate::config::memory;
use crate::gpus::NodeGpus;
use crate::metrics::Refusals;
use crate::record::Recorder;
use crate::remote::{Door, Token};
use crate::session::Sessions;
use crate::workers::Workers;

#[derive(Debug)]
pub(crate) struct Core {
    pub config: Config,
    pub manager: Manager,
    /// Writes down what engines do, if that is wanted.
    pub recorder: Option<Recorder>,
    pub sessions: Sessions,
    pub workers: Workers,
    pub refusals: Refusals,
    /// What changes over admin HTTP must show.
    pub admin_token: Option<Token>,
    /// Who is let in over TCP, and who was not.
    pub door: Door,
    /// Changes when events were appended.
    pub events_changed: watch::Sender<()>,
    /// Changes when engines may have to be given host memory.
    pub segments_changed: watch::Sender<()>,
    /// No new work: everything is answered with `CLOSED`.
    pub stopping: CancellationToken,
    /// Copies have ended: streams end.
    pub closing: CancellationToken,
    /// Streams have ended: connections are closed.
    pub hanging_up: CancellationToken,
    /// Everything that runs beside the servers.
    pub tasks: TaskTracker,
    pub started: Instant,
    /// Tells this life of the daemon from others: its events are numbered from 1.
    pub instance: String,
    /// Base URL of the admin HTTP server.
    pub admin: OnceLock<String>,
    /// URL of gRPC over TCP, if that is served.
    pub grpc: OnceLock<String>,
    /// What was found at the start; not set: none.
    pub gpus: OnceLock<NodeGpus>,
    own_uid: u32,
}

impl Core {
    pub fn new(
        config: Config,
        manager: Manager,
        recorder: Option<Recorder>,
        admin_token: Option<Token>,
    ) -> Self {
        let events_changed = watch::Sender::new(());
        let wake = events_changed.clone();
        manager.events().listen(move || {
            wake.send_replace(());
        });
        let segments_changed = watch::Sender::new(());
        let given = segments_changed.clone();
        manager.listen_segments(move || {
            given.send_replace(());
        });
        Self {
            config,
            manager,
            recorder,
            sessions: Sessions::default(),
            workers: Workers::default(),
            refusals: Refusals::default(),
            admin_token,
            door: Door::default(),
            events_changed,
            segments_changed,
            stopping: CancellationToken::new(),
            closing: CancellationToken::new(),
            hanging_up: CancellationToken::new(),
            tasks: TaskTracker::new(),
            started: Instant::now(),
            instance: crate::random::<16>().iter().map(|byte| format!("{byte:02x}")).collect(),
            admin: OnceLock::new(),
            grpc: OnceLock::new(),
            gpus: OnceLock::new(),
            own_uid: rustix::process::geteuid().as_raw(),
        }
    }

    /// Whether processes of a user are served: our own, and those configured.
    pub fn may_attach(&self, uid: u32) -> bool {
        uid == self.own_uid || self.config.allowed_uids.contains(&uid)
    }

    /// The trust domain of the daemon's own user.
    pub fn own_domain(&self) -> TrustDomain {
        TrustDomain(self.own_uid)
    }

    /// Pools that a session writes, connected or silent.
    pub fn pool_count(&self, session: SessionId) -> usize {
        self.manager.inspect(|ledger| {
            let owned = ledger.pools().filter(|(id, _)| ledger.pool_owner(*id) == Some(session)).count();
            let engines = ledger.engine_pools().filter(|(_, pool)| pool.session() == Some(session));
            owned + engines.count()
        })
    }

    pub fn owns_pool(&self, session: SessionId, pool: PoolId) -> bool {
        self.manager.inspect(|ledger| {
            let of_engine = ledger.engine_pool(pool).and_then(|pool| pool.session());
            ledger.pool_owner(pool).or(of_engine) == Some(session)
        })
    }

    /// Ends sessions whose last holding was adopted by another.
    pub fn end_forgotten_sessions(&self) {
        let known: BTreeSet<SessionId> =
            self.manager.inspect(|ledger| ledger.sessions().map(|(id, _)| *id).collect());
        self.sessions.end_forgotten(|id| known.contains(&id));
    }

    /// A pool that would not fit beside the host tier is refused before anything is written to it. Pools that nobody
    /// has come for give way first.
    /// Whether a GPU has the memory, only it can say.
    pub fn check_memory(&self, device: &str, layout: PoolLayout) -> Result<(), Refused> {
        if kvbm::is_gpu(device) {
            return Ok(());
        }
        self.fits(layout).or_else(|_| {
            self.manager.drop_orphan_pools();
            self.fits(layout)
        })
    }

    fn fits(&self, layout: PoolLayout) -> Result<(), Refused> {
        let wanted = (layout.stride() as u64).saturating_mul(layout.block_count.into());
        let (planned, populated) = self.manager.host_bytes();
        let Some(available) = memory::available_bytes() else { return Ok(()) };
        let available = available.saturating_sub(planned.saturating_sub(populated));
        if wanted <= available {
            return Ok(());
        }
        let blocks = |bytes: u64| usize::try_from(bytes / layout.stride() as u64).unwrap_or(usize::MAX);
        Err(Refused::Exhausted { tier: Tier::Device, wanted: blocks(wanted), available: blocks(available) })
    }

    /// Digests of namespaces, each once.
    pub fn known_namespaces(&self, ids: impl Iterator<Item = NamespaceId>) -> Vec<v1::KnownNamespace> {
        let ids: BTreeSet<NamespaceId> = ids.collect();
        self.manager.inspect(|ledger| {
            let known = ids.into_iter().filter_map(|id| Some((id, ledger.namespace(id)?)));
            known
                .map(|(id, namespace)| v1::KnownNamespace {
                    namespace_id: id.0,
                    digest: namespace.digest.to_vec(),
                })
                .collect()
        })
    }

    /// Why the daemon is not ready, if it is not.
    pub fn reasons_not_ready(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.stopping.is_cancelled() {
            reasons.push("the daemon is stopping".to_owned());
        }
        let (planned, populated) = self.manager.host_bytes();
        if planned > 0 && populated == 0 {
            reasons.push(match self.manager.host_error() {
                Some(error) => format!("no host memory can be had: {error}"),
                None => "no host memory is populated yet".to_owned(),
            });
        }
        if let Some(DiskState::Out(reason)) = self.manager.disk().map(|disk| disk.state) {
            reasons.push(format!("the disk tier is out of service: {reason}"));
        }
        reasons
    }

    /// Whether a pool's writer is connected.
    pub fn owner_state(owner: Owner) -> (&'static str, Option<SessionId>) {
        match owner {
            Owner::Session(id) => ("attached", Some(id)),
            Owner::Silent(id) => ("silent", Some(id)),
            Owner::Orphan(_) => ("orphan", None),
            Owner::Retired => ("retired", None),
        }
    }
}
