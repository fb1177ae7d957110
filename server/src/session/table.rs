//! All sessions, for those who look at them from outside: the side channel and the status.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use kvbm::SessionId;
use kvbm_shm::SideSocket;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::side::Side;
use crate::status::SessionStatus;

/// What the client proves itself with on the side channel.
pub(crate) type Token = [u8; 32];

/// See the module. One lock, held for a lookup.
#[derive(Debug, Default)]
pub(crate) struct Sessions(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    waiting: HashMap<Token, Waiting>,
    sessions: BTreeMap<SessionId, View>,
}

#[derive(Debug)]
struct Waiting {
    session: SessionId,
    uid: u32,
    side: oneshot::Sender<Side>,
}

/// A session as others see it.
#[derive(Debug)]
struct View {
    uid: u32,
    client: String,
    pid: Option<u32>,
    phase: Phase,
    opened: Instant,
    over: CancellationToken,
    token: Token,
    lookups: Option<OpenLookups>,
}

/// A connection for lookups.
#[derive(Debug)]
struct OpenLookups {
    socket: SideSocket,
    /// Closed when the thread that serves it has ended.
    ended: oneshot::Receiver<()>,
}

/// How far a session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Without a side channel.
    Attaching,
    /// Being served.
    Attached,
    /// Not connected; its process is not known to be dead.
    Silent,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Attaching => "attaching",
            Self::Attached => "attached",
            Self::Silent => "silent",
        }
    }
}

/// What a new session waits for.
#[derive(Debug)]
pub(crate) struct Entered {
    /// The side channel, once bound.
    pub side: oneshot::Receiver<Side>,
    /// Cancelled when another session has taken over all that this one held.
    pub over: CancellationToken,
}

impl Sessions {
    /// Adds a session unless there are `max`.
    pub fn enter(&self, id: SessionId, uid: u32, client: String, token: Token, max: u64) -> Option<Entered> {
        let mut inner = self.0.lock();
        if inner.sessions.len() as u64 >= max {
            return None;
        }
        let (sender, side) = oneshot::channel();
        let over = CancellationToken::new();
        inner.waiting.insert(token, Waiting { session: id, uid, side: sender });
        let (opened, phase) = (Instant::now(), Phase::Attaching);
        let (pid, lookups) = (None, None);
        let view = View { uid, client, pid, phase, opened, over: over.clone(), token, lookups };
        inner.sessions.insert(id, view);
        Some(Entered { side, over })
    }

    /// Gives a side channel to the session with this token.
    pub fn bind(&self, token: &Token, uid: u32, side: Side) -> Result<(), String> {
        let mut inner = self.0.lock();
        let Some(waiting) = inner.waiting.remove(token) else {
            return Err("its token is of no session".to_owned());
        };
        if waiting.uid != uid {
            return Err(format!("user {uid} presents the token of user {}", waiting.uid));
        }
        if let Some(view) = inner.sessions.get_mut(&waiting.session) {
            view.pid = Some(side.pid());
        }
        // The session may have ended this moment.
        waiting.side.send(side).map_err(|_| "its session has ended".to_owned())
    }

    /// Gives a connection for lookups to the attached session with this token, which has none yet. What is returned with
    /// the session is dropped when nothing is looked up there any more.
    pub fn open_lookups(
        &self,
        token: &Token,
        uid: u32,
        socket: SideSocket,
    ) -> Result<(SessionId, oneshot::Sender<()>), String> {
        let mut inner = self.0.lock();
        let of_token = inner.sessions.iter_mut().find(|(_, view)| view.token == *token);
        let Some((session, view)) = of_token.filter(|(_, view)| view.phase == Phase::Attached) else {
            return Err("its token is of no attached session".to_owned());
        };
        if view.uid != uid {
            return Err(format!("user {uid} presents the token of user {}", view.uid));
        }
        if view.lookups.is_some() {
            return Err("its session has a connection for lookups".to_owned());
        }
        let (ended, has_ended) = oneshot::channel();
        view.lookups = Some(OpenLookups { socket, ended: has_ended });
        Ok((*session, ended))
    }

    /// Returns when nothing is looked up in a session any more, and nothing will be.
    pub async fn end_lookups(&self, id: SessionId) {
        let lookups = self.0.lock().sessions.get_mut(&id).and_then(|view| {
            view.phase = Phase::Silent;
            view.lookups.take()
        });
        if let Some(lookups) = lookups {
            lookups.socket.hang_up();
            let _ = lookups.ended.await;
        }
    }

    pub fn set_phase(&self, id: SessionId, phase: Phase) {
        if let Some(view) = self.0.lock().sessions.get_mut(&id) {
            view.phase = phase;
        }
    }

    /// Ends sessions that the block manager does not know any more.
    pub fn end_forgotten(&self, is_known: impl Fn(SessionId) -> bool) {
        let inner = self.0.lock();
        inner.sessions.iter().filter(|(id, _)| !is_known(**id)).for_each(|(_, view)| view.over.cancel());
    }

    pub fn leave(&self, id: SessionId) {
        let mut inner = self.0.lock();
        let lookups = inner.sessions.remove(&id).and_then(|view| view.lookups);
        lookups.into_iter().for_each(|lookups| lookups.socket.hang_up());
        inner.waiting.retain(|_, waiting| waiting.session != id);
    }

    /// Number of sessions, silent ones included.
    pub fn count(&self) -> usize {
        self.0.lock().sessions.len()
    }

    /// All sessions.
    pub fn status(&self) -> Vec<SessionStatus> {
        let inner = self.0.lock();
        let of = |(id, view): (&SessionId, &View)| SessionStatus {
            id: id.0,
            pid: view.pid,
            uid: view.uid,
            client: view.client.clone(),
            state: view.phase.name().to_owned(),
            age_s: view.opened.elapsed().as_secs_f64(),
        };
        inner.sessions.iter().map(of).collect()
    }
}
