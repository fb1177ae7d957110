//! The worker's place in the daemon's registry: a session that does nothing else.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use crate::{Client, ClientError, WorkerRegistration};

/// Between attempts.
const PAUSE: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(5);
const DEADLINE: Duration = Duration::from_secs(5);

/// For ever.
pub(super) async fn run(
    daemon: PathBuf,
    worker: WorkerRegistration,
    mut state: watch::Receiver<&'static str>,
) {
    let mut pause = PAUSE;
    loop {
        match listed(&daemon, &worker, &mut state).await {
            Ok(reason) => {
                pause = PAUSE;
                tracing::info!(reason, "not listed any more");
            }
            Err(error) => {
                if matches!(error, ClientError::Refused { .. }) {
                    tracing::warn!(%error, "the daemon does not list this worker");
                }
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
        sleep(pause).await;
    }
}

async fn listed(
    daemon: &Path,
    worker: &WorkerRegistration,
    state: &mut watch::Receiver<&'static str>,
) -> Result<String, ClientError> {
    let client = Client::connect_as(daemon, &worker.worker_id, DEADLINE).await?;
    loop {
        let now = (*state.borrow_and_update()).to_owned();
        client.register_worker(WorkerRegistration { state: now, ..worker.clone() }.message(0)).await?;
        tokio::select! {
            reason = client.ended() => return Ok(reason),
            changed = state.changed() => {
                if changed.is_err() {
                    return Ok("stopped".into());
                }
            }
        }
    }
}
