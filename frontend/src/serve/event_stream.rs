//! The body of a streamed answer. It is polled by the client's connection and polls the workers' streams: between
//! the two there is no task and no queue, so a slow client slows the worker down and one that left ends it.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame};

use super::answer::{cached, usage};
use crate::generation::{Generation, Progress};
use crate::metrics::RequestRecord;
use crate::openai::{ApiError, ChunkWriter};

/// Events that are there already go out together, up to about so many bytes.
const FRAME_BYTES: usize = 16 << 10;

/// Events of all choices, as they come.
pub struct EventStream {
    generations: Vec<Generation>,
    writer: ChunkWriter,
    include_usage: bool,
    record: RequestRecord,
    /// Which choices have begun.
    role_sent: Vec<bool>,
    text: String,
    out: BytesMut,
    ended: bool,
}

impl EventStream {
    /// Of generations that have come to their first token.
    pub fn new(
        generations: Vec<Generation>,
        writer: ChunkWriter,
        include_usage: bool,
        record: RequestRecord,
    ) -> Self {
        let role_sent = vec![false; generations.len()];
        let (text, out) = (String::new(), BytesMut::with_capacity(1024));
        Self { generations, writer, include_usage, record, role_sent, text, out, ended: false }
    }

    fn fill(&mut self, cx: &mut Context<'_>) {
        for index in 0..self.generations.len() {
            while !self.generations[index].is_finished() && self.out.len() < FRAME_BYTES {
                self.text.clear();
                match self.generations[index].poll(cx, &mut self.text) {
                    Poll::Pending => break,
                    Poll::Ready(Ok(progress)) => self.write(index, progress),
                    Poll::Ready(Err(error)) => return self.fail(&error),
                }
            }
        }
        if self.generations.iter().all(Generation::is_finished) {
            self.end();
        }
    }

    fn write(&mut self, index: usize, progress: Progress) {
        self.record.tokens(progress.tokens);
        if !std::mem::replace(&mut self.role_sent[index], true) {
            self.writer.role(index, &mut self.out);
        }
        if !self.text.is_empty() {
            self.writer.text(index, &self.text, &mut self.out);
        }
        if let Some(reason) = progress.finish {
            self.writer.finish(index, reason, &mut self.out);
        }
    }

    fn end(&mut self) {
        let usage = usage(&self.generations);
        if self.include_usage {
            self.writer.usage(usage, &mut self.out);
        }
        ChunkWriter::done(&mut self.out);
        self.record.succeed(usage.completion_tokens, cached(&self.generations).total());
        self.ended = true;
    }

    fn fail(&mut self, error: &ApiError) {
        ChunkWriter::error(error, &mut self.out);
        self.record.fail(error.kind);
        self.generations.clear();
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
        if !stream.out.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(stream.out.split().freeze()))));
        }
        if stream.ended { Poll::Ready(None) } else { Poll::Pending }
    }

    fn is_end_stream(&self) -> bool {
        self.ended && self.out.is_empty()
    }
}
