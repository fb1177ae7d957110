//! Waiting for an answer on the engine's own thread.
//!
//! The thread looks at the answer by itself, so that no other thread has to be woken in between, and at the clock by
//! itself, so that the deadline holds whatever the runtime is doing.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::Instant;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// What the future comes to, if it does before the deadline. It may go on elsewhere afterwards. Unless it comes to
/// something at once, `meanwhile` is run while it is under way, as long as it returns true.
pub(super) fn until<F: Future + Unpin>(
    future: &mut F,
    deadline: Instant,
    meanwhile: &mut dyn FnMut() -> bool,
) -> Option<F::Output> {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    if let Poll::Ready(answer) = Pin::new(&mut *future).poll(&mut context) {
        return Some(answer);
    }
    let mut more = true;
    loop {
        more = more && meanwhile();
        if let Poll::Ready(answer) = Pin::new(&mut *future).poll(&mut context) {
            return Some(answer);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        if !more {
            std::thread::park_timeout(left);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;

    #[test]
    fn an_answer_is_had_when_it_comes_and_a_late_one_by_who_goes_on_waiting() {
        let (answer, mut answered) = oneshot::channel();
        assert_eq!(until(&mut answered, Instant::now() + Duration::from_millis(5), &mut || false), None);
        let later = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(5));
            answer.send(7).unwrap();
        });
        let long = Instant::now() + Duration::from_secs(60);
        assert_eq!(until(&mut answered, long, &mut || false), Some(Ok(7)));
        later.join().unwrap();
        let (answer, mut answered) = oneshot::channel();
        let (mut answer, mut parts) = (Some(answer), 0);
        let mut meanwhile = || {
            parts += 1;
            if parts == 3 {
                answer.take().unwrap().send(9).unwrap();
            }
            true
        };
        assert_eq!(until(&mut answered, long, &mut meanwhile), Some(Ok(9)));
        assert_eq!(parts, 3, "nothing more is done once the answer is there");
        let (answer, mut answered) = oneshot::channel();
        answer.send(8).unwrap();
        let unused = &mut || panic!("there is nothing to wait for");
        assert_eq!(until(&mut answered, long, unused), Some(Ok(8)));
    }
}
