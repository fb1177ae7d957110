//! Which questions are open, and how long their answers may take.
//!
//! The engine's thread opens questions, and forgets all when it detaches; the link closes them and looks after the time.
//! Each is of one attempt: what the engine asks before it hears that the attempt is over does not count against the
//! next. What the link itself sends is timed here too. A process that was itself
//! stopped has not waited for anybody: when the clock jumped while nobody looked, all deadlines move with it.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::exchange::{Attempt, QuestionId};

/// A timer that fires this much too late says that this process was not running.
const STOPPED_AFTER: Duration = Duration::from_millis(100);

/// What it then gets to catch up.
const CATCH_UP: Duration = Duration::from_millis(20);

/// Stands for the command that the link is sending. No question has this number.
pub(crate) const SENDING: QuestionId = 0;

#[derive(Debug, Clone, Copy)]
struct Due {
    attempt: Attempt,
    /// When to go on without the answer. `None`: passed, or the question has no such time.
    miss_at: Option<Instant>,
    /// When to give up on the daemon.
    fail_at: Instant,
}

/// What the passing of time meant.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Expired {
    /// These questions count as not answered; an answer may still come.
    Missed(Vec<QuestionId>),
    /// An answer that is needed does not come.
    Failed,
}

/// The open questions.
#[derive(Debug, Default)]
pub(crate) struct Desk {
    open: Mutex<HashMap<QuestionId, Due>>,
    changed: Notify,
}

impl Desk {
    /// A question is asked at `now`.
    pub fn open(
        &self,
        attempt: Attempt,
        question: QuestionId,
        now: Instant,
        miss: Option<Duration>,
        fail: Duration,
    ) {
        let due = Due { attempt, miss_at: miss.map(|miss| now + miss), fail_at: now + fail };
        self.open.lock().insert(question, due);
        self.changed.notify_one();
    }

    /// It is answered.
    pub fn close(&self, question: QuestionId) {
        self.open.lock().remove(&question);
    }

    /// Nobody waits any more.
    pub fn clear(&self) {
        self.open.lock().clear();
    }

    /// When time matters next to `attempt`.
    pub fn next(&self, attempt: Attempt) -> Option<Instant> {
        self.open
            .lock()
            .values()
            .filter(|due| due.attempt == attempt)
            .map(|due| due.miss_at.map_or(due.fail_at, |miss| miss.min(due.fail_at)))
            .min()
    }

    /// Ends when a question was opened.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What of `attempt` is due at `now`, when the look was planned for `planned`.
    pub fn expire(&self, attempt: Attempt, planned: Instant, now: Instant) -> Expired {
        let mut open = self.open.lock();
        let late = now.saturating_duration_since(planned);
        if late > STOPPED_AFTER {
            // Answers that arrived meanwhile are read before the next look.
            for due in open.values_mut() {
                due.miss_at = due.miss_at.map(|at| at + late + CATCH_UP);
                due.fail_at += late + CATCH_UP;
            }
            return Expired::Missed(Vec::new());
        }
        if open.values().any(|due| due.attempt == attempt && due.fail_at <= now) {
            return Expired::Failed;
        }
        let of_attempt = open.iter_mut().filter(|(_, due)| due.attempt == attempt);
        let missed = of_attempt.filter(|(_, due)| due.miss_at.is_some_and(|at| at <= now));
        Expired::Missed(
            missed
                .map(|(question, due)| {
                    due.miss_at = None;
                    *question
                })
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_question_is_missed_once_and_then_fails() {
        let (desk, start) = (Desk::default(), Instant::now());
        desk.open(1, 7, start, Some(20 * MS), 250 * MS);
        desk.open(1, 8, start, None, 300 * MS);
        assert_eq!(desk.next(1), Some(start + 20 * MS));
        assert_eq!(desk.expire(1, start + 20 * MS, start + 21 * MS), Expired::Missed(vec![7]));
        assert_eq!(desk.next(1), Some(start + 250 * MS));
        assert_eq!(desk.expire(1, start + 250 * MS, start + 250 * MS), Expired::Failed);
        desk.close(7);
        assert_eq!(desk.next(1), Some(start + 300 * MS));
        desk.clear();
        assert_eq!(desk.next(1), None);
    }

    #[test]
    fn time_in_which_this_process_was_stopped_does_not_count() {
        let (desk, start) = (Desk::default(), Instant::now());
        desk.open(1, 7, start, Some(20 * MS), 250 * MS);
        assert_eq!(desk.expire(1, start + 20 * MS, start + 5000 * MS), Expired::Missed(vec![]));
        let next = desk.next(1).unwrap();
        assert!(next > start + 5000 * MS);
        assert_eq!(desk.expire(1, next, next), Expired::Missed(vec![7]));
    }

    #[test]
    fn what_was_asked_of_an_earlier_attempt_does_not_count_against_the_next() {
        let (desk, start) = (Desk::default(), Instant::now());
        desk.open(1, 7, start, Some(20 * MS), 250 * MS);
        assert_eq!(desk.next(2), None);
        let later = start + 300 * MS;
        assert_eq!(desk.expire(2, later, later), Expired::Missed(vec![]));
        desk.open(2, 8, start, None, 400 * MS);
        assert_eq!(desk.next(2), Some(start + 400 * MS));
        assert_eq!(desk.expire(2, later, later), Expired::Missed(vec![]));
    }
}
