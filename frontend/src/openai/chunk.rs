//! Server-sent events of a streamed answer. What is the same in every chunk is written once per request.

use bytes::{BufMut, BytesMut};

use serde_json::{Value, json};

use super::logprobs::logprobs;
use super::{ApiError, Delta, Finish, Score, Usage};
use crate::metrics::Api;

/// Writes the chunks of one answer.
pub struct ChunkWriter {
    api: Api,
    /// `data: {... "choices":[`
    head: Vec<u8>,
    /// What follows `choices`: with usage asked for, each chunk has the field.
    tail: &'static [u8],
}

impl ChunkWriter {
    /// For an answer of this name.
    pub fn new(api: Api, id: &str, created: u64, model: &str, include_usage: bool) -> Self {
        let object = match api {
            Api::Completions => "text_completion",
            Api::Chat => "chat.completion.chunk",
        };
        let mut head = b"data: {\"id\":".to_vec();
        write_json(&mut head, id);
        head.extend_from_slice(
            format!(",\"object\":\"{object}\",\"created\":{created},\"model\":").as_bytes(),
        );
        write_json(&mut head, model);
        head.extend_from_slice(b",\"choices\":[");
        let tail: &[u8] = if include_usage { b"],\"usage\":null}\n\n" } else { b"]}\n\n" };
        Self { api, head, tail }
    }

    /// The chunk that opens a choice of a conversation.
    pub fn role(&self, index: usize, out: &mut BytesMut) {
        if self.api == Api::Chat {
            self.choice(index, b"\"delta\":{\"role\":\"assistant\",\"content\":\"\"}", None, out);
        }
    }

    /// A piece of what is said.
    pub fn delta(&self, index: usize, delta: &Delta, out: &mut BytesMut) {
        out.extend_from_slice(&self.head);
        self.index(index, out);
        let (before, after): (&[u8], &[u8]) = match self.api {
            Api::Completions => (b"\"text\":", b""),
            Api::Chat => (b"\"delta\":{\"content\":", b"}"),
        };
        if delta.calls.is_empty() {
            out.extend_from_slice(before);
            write_json(&mut out.writer(), &delta.text);
            out.extend_from_slice(after);
        } else {
            out.extend_from_slice(b"\"delta\":");
            write_json(&mut out.writer(), &calls(delta));
        }
        self.end_choice(&delta.scores, None, out);
    }

    /// The chunk that ends a choice.
    pub fn finish(&self, index: usize, reason: Finish, out: &mut BytesMut) {
        let content: &[u8] = match self.api {
            Api::Completions => b"\"text\":\"\"",
            Api::Chat => b"\"delta\":{}",
        };
        self.choice(index, content, Some(reason), out);
    }

    /// The chunk with the cost, which has no choice.
    pub fn usage(&self, usage: Usage, out: &mut BytesMut) {
        out.extend_from_slice(&self.head);
        out.extend_from_slice(b"],\"usage\":");
        write_json(&mut out.writer(), &usage);
        out.extend_from_slice(b"}\n\n");
    }

    /// A comment, which clients skip: the answer is still being made.
    pub fn keep_alive(out: &mut BytesMut) {
        out.extend_from_slice(b": keep-alive\n\n");
    }

    /// The end of the stream.
    pub fn done(out: &mut BytesMut) {
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// An error in the middle of the stream.
    pub fn error(error: &ApiError, out: &mut BytesMut) {
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(&error.json());
        out.extend_from_slice(b"\n\n");
    }

    fn choice(&self, index: usize, content: &[u8], reason: Option<Finish>, out: &mut BytesMut) {
        out.extend_from_slice(&self.head);
        self.index(index, out);
        out.extend_from_slice(content);
        self.end_choice(&[], reason, out);
    }

    fn index(&self, index: usize, out: &mut BytesMut) {
        out.extend_from_slice(b"{\"index\":");
        write_json(&mut out.writer(), &index);
        out.put_u8(b',');
    }

    fn end_choice(&self, scores: &[Score], reason: Option<Finish>, out: &mut BytesMut) {
        if scores.is_empty() {
            out.extend_from_slice(b",\"logprobs\":null");
        } else {
            out.extend_from_slice(b",\"logprobs\":");
            write_json(&mut out.writer(), &logprobs(self.api, scores));
        }
        out.extend_from_slice(b",\"finish_reason\":");
        match reason {
            None => out.extend_from_slice(b"null}"),
            Some(reason) => {
                out.put_u8(b'"');
                out.extend_from_slice(reason.label().as_bytes());
                out.extend_from_slice(b"\"}");
            }
        }
        out.extend_from_slice(self.tail);
    }
}

/// The object `delta` with calls of tools, and with text if there is some.
fn calls(delta: &Delta) -> Value {
    let calls = delta.calls.iter().map(|call| match &call.head {
        Some((id, name)) => json!({
            "index": call.index, "id": id, "type": "function",
            "function": { "name": name, "arguments": call.arguments },
        }),
        None => json!({ "index": call.index, "function": { "arguments": call.arguments } }),
    });
    let mut object = json!({ "tool_calls": calls.collect::<Vec<_>>() });
    if !delta.text.is_empty() {
        object["content"] = json!(delta.text);
    }
    object
}

/// Memory does not refuse to be written to, and strings and numbers always have a JSON form.
fn write_json<T: serde::Serialize + ?Sized>(out: &mut impl std::io::Write, value: &T) {
    let written = serde_json::to_writer(out, value);
    debug_assert!(written.is_ok());
}
