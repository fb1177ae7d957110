//! How long a worker has said nothing.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

/// Watches one stream. Its timer is set when nothing is there, and moved only when it has run out: tokens are many, and
/// timers are not free.
pub struct Silence {
    longest: Option<Duration>,
    last: Instant,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Silence {
    /// Silence of `longest` is too long; `None`: none is.
    pub fn new(longest: Option<Duration>) -> Self {
        Self { longest, last: Instant::now(), timer: None }
    }

    /// Since when it lasts.
    pub fn since(&self) -> Instant {
        self.last
    }

    /// Something was said.
    pub fn broken(&mut self) {
        self.last = Instant::now();
    }

    /// Ready when it has lasted too long.
    pub fn poll_too_long(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(longest) = self.longest else { return Poll::Pending };
        let end = self.last + longest;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(end)));
        loop {
            ready!(timer.as_mut().poll(cx));
            if Instant::now() >= end {
                return Poll::Ready(());
            }
            timer.as_mut().reset(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_lasts_from_the_last_word_on() {
        let mut silence = Silence::new(Some(Duration::from_secs(10)));
        let mut too_long = async || poll_fn(|cx| Poll::Ready(silence.poll_too_long(cx).is_ready())).await;
        assert!(!too_long().await);
        advance(Duration::from_secs(9)).await;
        assert!(!too_long().await);
        let mut silence = Silence::new(Some(Duration::from_secs(10)));
        advance(Duration::from_secs(9)).await;
        silence.broken();
        advance(Duration::from_secs(9)).await;
        let mut too_long = async || poll_fn(|cx| Poll::Ready(silence.poll_too_long(cx).is_ready())).await;
        assert!(!too_long().await);
        advance(Duration::from_secs(2)).await;
        assert!(too_long().await);
    }
}
