//! Sessions that stay with their worker, for as long as they come back.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Sessions remembered; beyond, those that are over are looked for, and no new one is taken in while there are none.
const SESSIONS_MAX: usize = 1 << 16;

/// Which worker each session went to last.
#[derive(Debug)]
pub struct Affinity {
    lifetime: Duration,
    sessions: Mutex<HashMap<String, (String, Instant)>>,
}

impl Affinity {
    /// A session is remembered for `lifetime` after its last request.
    pub fn new(lifetime: Duration) -> Self {
        Self { lifetime, sessions: Mutex::default() }
    }

    /// The worker of a session.
    pub fn worker(&self, session: &str, now: Instant) -> Option<String> {
        let sessions = self.sessions.lock();
        let (worker, used) = sessions.get(session)?;
        (now.duration_since(*used) < self.lifetime).then(|| worker.clone())
    }

    /// A session goes to a worker.
    pub fn bind(&self, session: &str, worker: &str, now: Instant) {
        let mut sessions = self.sessions.lock();
        if let Some((known, used)) = sessions.get_mut(session) {
            *used = now;
            worker.clone_into(known);
            return;
        }
        if sessions.len() >= SESSIONS_MAX {
            sessions.retain(|_, (_, used)| now.duration_since(*used) < self.lifetime);
        }
        if sessions.len() < SESSIONS_MAX {
            sessions.insert(session.to_owned(), (worker.to_owned(), now));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_stays_until_it_was_away_for_too_long() {
        let affinity = Affinity::new(Duration::from_secs(10));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        affinity.bind("s", "a", at(0));
        assert_eq!(affinity.worker("s", at(9)).as_deref(), Some("a"));
        affinity.bind("s", "b", at(9));
        assert_eq!(affinity.worker("s", at(18)).as_deref(), Some("b"));
        assert_eq!(affinity.worker("s", at(19)), None);
        assert_eq!(affinity.worker("t", at(0)), None);
    }
}
