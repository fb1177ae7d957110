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
/// something at once, `meanwhile` is run when it is under way.
pub(super) fn until<F: Future + Unpin>(
    future: &mut F,
    deadline: Instant,
    meanwhile: &mut dyn FnMut(),
) -> Option<F::Output> {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    if let Poll::Ready(answer) = Pin::new(&mut *future).poll(&mut context) {
        return Some(answer);
    }
    meanwhile();
    loop {
        if let Poll::Ready(answer) = Pin::new(&mut *future).poll(&mut context) {
            return Some(answer);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        std::thread::park_timeout(left);
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
        let mut times = 0;
        assert_eq!(until(&mut answered, Instant::now() + Duration::from_millis(5), &mut || times += 1), None);
        assert_eq!(times, 1, "meanwhile");
        let later = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(5));
            answer.send(7).unwrap();
        });
        let long = Instant::now() + Duration::from_secs(60);
        assert_eq!(until(&mut answered, long, &mut || {}), Some(Ok(7)));
        later.join().unwrap();
        let (answer, mut answered) = oneshot::channel();
        answer.send(8).unwrap();
        let unused = &mut || panic!("there is nothing to wait for");
        assert_eq!(until(&mut answered, long, unused), Some(Ok(8)));
    }
}
