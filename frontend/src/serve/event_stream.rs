//! The body of a streamed answer. It is polled by the client's connection and polls the workers' streams: between
//! the two there is no task and no queue, so a slow client slows the worker down and one that left ends it.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame};
use tokio::time::{Instant, Sleep, sleep_until};

use super::answer::{cached, usage};
use super::choice::Choice;
use crate::generation::Progress;
use crate::metrics::RequestRecord;
use crate::openai::{ApiError, ChunkWriter, Delta};

/// Events that are there already go out together, up to about so many bytes.
const FRAME_BYTES: usize = 16 << 10;

/// Times that answers keep to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    /// Longest time for a whole answer.
    pub request: Option<Duration>,
    /// Pause after which a stream says that it is alive.
    pub keep_alive: Option<Duration>,
}

impl Times {
    /// How long a stream waits for its first token before it begins without.
    pub fn first_token(&self) -> Option<Duration> {
        self.keep_alive.into_iter().chain(self.request).min()
    }
}

/// The times of one answer.
pub struct Timing {
    keep_alive: Option<(Duration, Pin<Box<Sleep>>)>,
    end: Option<(Duration, Instant, Pin<Box<Sleep>>)>,
}

impl Timing {
    /// Of an answer that begins now.
    pub fn begin(times: &Times) -> Self {
        let now = Instant::now();
        let sleep = |time: Duration| Box::pin(sleep_until(now + time));
        Self {
            keep_alive: times.keep_alive.map(|time| (time, sleep(time))),
            end: times.request.map(|time| (time, now + time, sleep(time))),
        }
    }

    /// The answer has taken too long.
    pub fn is_over(&self) -> bool {
        self.end.as_ref().is_some_and(|(_, end, _)| Instant::now() >= *end)
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Option<ApiError> {
        let (time, _, sleep) = self.end.as_mut()?;
        sleep.as_mut().poll(cx).is_ready().then(|| ApiError::response_timeout(*time))
    }

    fn poll_keep_alive(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some((time, sleep)) = &mut self.keep_alive else { return Poll::Pending };
        if sleep.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        sleep.as_mut().reset(Instant::now() + *time);
        // It wakes only if it is asked again.
        let _ = sleep.as_mut().poll(cx);
        Poll::Ready(())
    }

    /// Something was said.
    fn is_alive(&mut self) {
        if let Some((time, sleep)) = &mut self.keep_alive {
            sleep.as_mut().reset(Instant::now() + *time);
        }
    }
}

/// Choices that have not come to their first token.
pub type Opening = Pin<Box<dyn Future<Output = Result<Vec<Choice>, ApiError>> + Send>>;

/// Events of all choices, as they come.
pub struct EventStream {
    opening: Option<Opening>,
    choices: Vec<Choice>,
    writer: ChunkWriter,
    include_usage: bool,
    record: RequestRecord,
    timing: Timing,
    /// Which choices have begun.
    role_sent: Vec<bool>,
    delta: Delta,
    out: BytesMut,
    ended: bool,
}

impl EventStream {
    /// Of choices that have come to their first token.
    pub fn of(
        choices: Vec<Choice>,
        writer: ChunkWriter,
        include_usage: bool,
        record: RequestRecord,
        timing: Timing,
    ) -> Self {
        let role_sent = vec![false; choices.len()];
        let (delta, out) = (Delta::default(), BytesMut::with_capacity(1024));
        let opening = None;
        Self { opening, choices, writer, include_usage, record, timing, role_sent, delta, out, ended: false }
    }

    /// Of choices that have not; until they have, the stream only says that it is alive.
    pub fn opening(
        opening: Opening,
        writer: ChunkWriter,
        include_usage: bool,
        record: RequestRecord,
        timing: Timing,
    ) -> Self {
        let mut stream = Self::of(Vec::new(), writer, include_usage, record, timing);
        stream.opening = Some(opening);
        ChunkWriter::keep_alive(&mut stream.out);
        stream
    }

    fn fill(&mut self, cx: &mut Context<'_>) {
        if let Some(error) = self.timing.poll_end(cx) {
            return self.fail(&error);
        }
        if let Some(opening) = &mut self.opening {
            match opening.as_mut().poll(cx) {
                Poll::Pending => return,
                Poll::Ready(Err(error)) => return self.fail(&error),
                Poll::Ready(Ok(choices)) => {
                    self.opening = None;
                    self.role_sent = vec![false; choices.len()];
                    self.choices = choices;
                }
            }
        }
        for index in 0..self.choices.len() {
            while !self.choices[index].is_finished() && self.out.len() < FRAME_BYTES {
                self.delta.clear();
                match self.choices[index].poll(cx, &mut self.delta) {
                    Poll::Pending => break,
                    Poll::Ready(Ok(progress)) => self.write(index, progress),
                    Poll::Ready(Err(error)) => return self.fail(&error),
                }
            }
        }
        if self.choices.iter().all(Choice::is_finished) {
            self.end();
        }
    }

    fn write(&mut self, index: usize, progress: Progress) {
        self.record.tokens(index, progress.tokens);
        if !std::mem::replace(&mut self.role_sent[index], true) {
            self.writer.role(index, &mut self.out);
        }
        if !self.delta.is_empty() {
            self.writer.delta(index, &self.delta, &mut self.out);
        }
        if let Some(reason) = progress.finish {
            self.writer.finish(index, reason, &mut self.out);
        }
    }

    fn end(&mut self) {
        let usage = usage(&self.choices);
        if self.include_usage {
            self.writer.usage(usage, &mut self.out);
        }
        ChunkWriter::done(&mut self.out);
        self.record.succeed(usage.completion_tokens, cached(&self.choices).total());
        self.ended = true;
    }

    fn fail(&mut self, error: &ApiError) {
        ChunkWriter::error(error, &mut self.out);
        self.record.fail(error.kind);
        self.opening = None;
        self.choices.clear();
        self.ended = true;
    }
}

impl Body for EventStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let stream = self.get_mut();
        if !stream.ended {
            stream.fill(cx);
        }
        if stream.out.is_empty() && !stream.ended {
            match stream.timing.poll_keep_alive(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(()) => ChunkWriter::keep_alive(&mut stream.out),
            }
        } else {
            stream.timing.is_alive();
        }
        if !stream.out.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(stream.out.split().freeze()))));
        }
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.ended && self.out.is_empty()
    }
}
