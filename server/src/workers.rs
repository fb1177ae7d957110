//! The worker registry: who serves inference on this node, as long as its session lives.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvbm::{PoolId, Refused, SessionId};
use kvbm_proto::v1::{RegisterWorker, WorkerEntry, WorkerList};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::status::WorkerStatus;
use crate::wire::{invalid, label};

/// One worker per session. One lock, held to change and publish.
#[derive(Debug)]
pub(crate) struct Workers {
    entries: Mutex<BTreeMap<SessionId, WorkerEntry>>,
    published: watch::Sender<Arc<WorkerList>>,
}

impl Default for Workers {
    fn default() -> Self {
        Self { entries: Mutex::default(), published: watch::Sender::new(Arc::default()) }
    }
}

impl Workers {
    /// Adds or changes the worker of a session, with the base namespace of its pool if it has one. A worker that comes
    /// back under its name replaces what is left of its former session.
    pub fn register(
        &self,
        session: SessionId,
        pid: u32,
        worker: RegisterWorker,
        base: Option<[u8; 32]>,
    ) -> Result<(), Refused> {
        check(&worker)?;
        let mut entries = self.entries.lock();
        let name = worker.worker_id.as_str();
        entries.retain(|id, entry| {
            *id == session || entry.worker.as_ref().is_none_or(|other| other.worker_id != name)
        });
        let base_namespace = base.map_or_else(Vec::new, Vec::from);
        let entry = WorkerEntry { worker: Some(worker), pid, session_id: session.0, base_namespace };
        entries.insert(session, entry);
        self.publish(&entries);
        Ok(())
    }

    /// The session ended.
    pub fn remove(&self, session: SessionId) {
        let mut entries = self.entries.lock();
        if entries.remove(&session).is_some() {
            self.publish(&entries);
        }
    }

    fn publish(&self, entries: &BTreeMap<SessionId, WorkerEntry>) {
        self.published.send_replace(Arc::new(WorkerList { workers: entries.values().cloned().collect() }));
    }

    /// The list now and each time it changes.
    pub fn watch(&self) -> watch::Receiver<Arc<WorkerList>> {
        self.published.subscribe()
    }

    /// The worker that uses a pool, by pool.
    pub fn by_pool(&self) -> BTreeMap<PoolId, String> {
        let list = Arc::clone(&self.published.borrow());
        let workers = list.workers.iter().filter_map(|entry| entry.worker.as_ref());
        workers.map(|worker| (PoolId(worker.pool_id), worker.worker_id.clone())).collect()
    }

    /// For the status.
    pub fn status(&self) -> Vec<WorkerStatus> {
        let of = |entry: &WorkerEntry| {
            let worker = entry.worker.clone().unwrap_or_default();
            WorkerStatus {
                id: worker.worker_id,
                pid: entry.pid,
                model: worker.model,
                role: worker.role,
                state: worker.state,
                session: entry.session_id,
                endpoint: worker.endpoint,
            }
        };
        self.published.borrow().workers.iter().map(of).collect()
    }
}

fn check(worker: &RegisterWorker) -> Result<(), Refused> {
    for (field, text) in [
        ("worker_id", &worker.worker_id),
        ("endpoint", &worker.endpoint),
        ("model", &worker.model),
        ("model_path", &worker.model_path),
    ] {
        label(field, text)?;
    }
    if worker.worker_id.is_empty() {
        return Err(invalid("worker_id", "is empty"));
    }
    if !["unix:", "http://"].iter().any(|scheme| worker.endpoint.starts_with(scheme)) {
        return Err(invalid("endpoint", "neither unix:/path nor http://host:port"));
    }
    if !["prefill", "decode", "both"].contains(&worker.role.as_str()) {
        return Err(invalid("role", "none of prefill, decode, both"));
    }
    if !["ready", "draining"].contains(&worker.state.as_str()) {
        return Err(invalid("state", "neither ready nor draining"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(id: &str, state: &str) -> RegisterWorker {
        RegisterWorker {
            worker_id: id.into(),
            endpoint: "unix:/w".into(),
            role: "both".into(),
            state: state.into(),
            pool_id: 3,
            ..Default::default()
        }
    }

    #[test]
    fn the_list_follows_sessions_and_a_returning_worker_replaces_itself() {
        let workers = Workers::default();
        let mut watch = workers.watch();
        let ids = |watch: &mut watch::Receiver<Arc<WorkerList>>| {
            let list = Arc::clone(&watch.borrow_and_update());
            list.workers
                .iter()
                .map(|entry| (entry.session_id, entry.worker.clone().unwrap().state))
                .collect::<Vec<_>>()
        };
        assert_eq!(ids(&mut watch), []);
        workers.register(SessionId(1), 10, worker("a", "ready"), None).unwrap();
        workers.register(SessionId(2), 20, worker("b", "ready"), None).unwrap();
        workers.register(SessionId(1), 10, worker("a", "draining"), None).unwrap();
        assert_eq!(ids(&mut watch), [(1, "draining".to_owned()), (2, "ready".to_owned())]);
        workers.register(SessionId(3), 10, worker("a", "ready"), None).unwrap();
        assert_eq!(ids(&mut watch), [(2, "ready".to_owned()), (3, "ready".to_owned())]);
        assert_eq!(workers.by_pool()[&PoolId(3)], "a");
        workers.remove(SessionId(1));
        assert!(!watch.has_changed().unwrap());
        workers.remove(SessionId(3));
        assert_eq!(ids(&mut watch).len(), 1);
    }

    #[test]
    fn nonsense_is_refused_by_field() {
        let workers = Workers::default();
        let field = |worker| match workers.register(SessionId(1), 1, worker, None) {
            Err(Refused::Invalid { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(worker("", "ready")), "worker_id");
        assert_eq!(field(worker("a", "busy")), "state");
        assert_eq!(field(RegisterWorker { role: "x".into(), ..worker("a", "ready") }), "role");
        assert_eq!(field(RegisterWorker { endpoint: "tcp".into(), ..worker("a", "ready") }), "endpoint");
        assert_eq!(field(RegisterWorker { model: "m".repeat(5000), ..worker("a", "ready") }), "model");
    }
}
