//! Tokens to text, one at a time, without ever emitting half a character.
//!
//! Byte-level tokenizers have a table of bytes per token: a token costs a copy, and an incomplete UTF-8 sequence
//! (at most 3 bytes) waits for the next one. Others are decoded in a sliding window of a few tokens, whose text
//! is what the window says beyond what its already emitted part says.

use std::sync::Arc;

use kvbm_vocabulary::Vocabulary;

use crate::model::Model;

/// Text of one sequence of tokens.
pub enum Detokenizer {
    /// Bytes per token are known.
    Bytes {
        /// Bytes of each token.
        vocabulary: Arc<Vocabulary>,
        /// The beginning of a character, at most 3 bytes.
        pending: Vec<u8>,
    },
    /// Only sequences of tokens can be decoded.
    Window(Window),
}

/// Tokens `[0, read)` have been emitted; `[read, ..)` wait for the end of a character.
pub struct Window {
    model: Arc<Model>,
    tokens: Vec<u32>,
    read: usize,
    emitted: String,
}

/// As many tokens of the prompt as decide whether the first token starts with a space.
const CONTEXT_TOKENS: usize = 5;

/// A character has at most 4 bytes: what waits longer than this is not going to become one.
const WAITING_TOKENS_MAX: usize = 16;

impl Detokenizer {
    /// Continues `prompt`, whose text is not repeated.
    pub fn new(model: &Arc<Model>, prompt: &[u32]) -> Self {
        match model.vocabulary() {
            Some(vocabulary) => Self::Bytes { vocabulary: vocabulary.clone(), pending: Vec::new() },
            None => Self::Window(Window::new(model.clone(), prompt)),
        }
    }

    /// Appends the characters that `token` completes.
    pub fn push(&mut self, token: u32, out: &mut String) {
        match self {
            Self::Bytes { vocabulary, pending } => {
                let bytes = vocabulary.bytes(token);
                if pending.is_empty() {
                    append_characters(bytes, pending, out);
                } else {
                    let mut joined = std::mem::take(pending);
                    joined.extend_from_slice(bytes);
                    append_characters(&joined, pending, out);
                }
            }
            Self::Window(window) => window.push(token, out),
        }
    }

    /// Appends a replacement character for what never became one.
    pub fn flush(&mut self, out: &mut String) {
        match self {
            Self::Bytes { pending, .. } => {
                if !pending.is_empty() {
                    out.push(char::REPLACEMENT_CHARACTER);
                    pending.clear();
                }
            }
            Self::Window(window) => window.flush(out),
        }
    }
}

/// As `String::from_utf8_lossy`, but a beginning of a character at the end goes to `pending`.
fn append_characters(bytes: &[u8], pending: &mut Vec<u8>, out: &mut String) {
    let mut chunks = bytes.utf8_chunks().peekable();
    while let Some(chunk) = chunks.next() {
        out.push_str(chunk.valid());
        let Err(error) = std::str::from_utf8(chunk.invalid()) else { continue };
        if error.error_len().is_none() && chunks.peek().is_none() {
            pending.extend_from_slice(chunk.invalid());
        } else {
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

impl Window {
    fn new(model: Arc<Model>, prompt: &[u32]) -> Self {
        let tokens = prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..].to_vec();
        let emitted = model.decode(&tokens);
        Self { model, read: tokens.len(), tokens, emitted }
    }

    fn push(&mut self, token: u32, out: &mut String) {
        self.tokens.push(token);
        let text = self.model.decode(&self.tokens);
        let new = text.get(self.emitted.len()..).unwrap_or_default();
        let complete = !new.is_empty() && !new.ends_with(char::REPLACEMENT_CHARACTER);
        if complete || self.tokens.len() - self.read >= WAITING_TOKENS_MAX {
            out.push_str(new);
            self.tokens.drain(..self.read);
            self.read = self.tokens.len();
            self.emitted = self.model.decode(&self.tokens);
        }
    }

    fn flush(&mut self, out: &mut String) {
        let text = self.model.decode(&self.tokens);
        out.push_str(text.get(self.emitted.len()..).unwrap_or_default());
        self.tokens.clear();
        self.read = 0;
        self.emitted.clear();
    }
}
