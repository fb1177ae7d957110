//! Tokens of one answer on their way to text: whole characters, up to the first stop string, each token listed with the
//! text that it begins.

use std::collections::VecDeque;
use std::sync::Arc;

use kvbm_proto::v1::Logprobs;

use crate::detokenizer::Detokenizer;
use crate::model::Model;
use crate::openai::{Delta, Score};
use crate::stop::StopFilter;

/// See the module.
pub struct Transcript {
    model: Arc<Model>,
    detokenizer: Detokenizer,
    filter: StopFilter,
    /// Scratch: the text of one token, on its way to the filter.
    piece: String,
    /// Bytes of text that tokens have made, and that were let through.
    made: usize,
    released: usize,
    /// Characters that tokens have made, a repeated prompt included.
    characters: usize,
    /// Tokens whose text waits, with the byte at which it begins.
    waiting: VecDeque<(usize, Score)>,
}

impl Transcript {
    /// Of an answer to `prompt`.
    pub fn new(model: &Arc<Model>, prompt: &[u32], stop: Vec<String>) -> Self {
        Self {
            model: model.clone(),
            detokenizer: Detokenizer::new(model, prompt),
            filter: StopFilter::new(stop),
            piece: String::new(),
            made: 0,
            released: 0,
            characters: 0,
            waiting: VecDeque::new(),
        }
    }

    /// The text of the prompt, in front of all else; its tokens are listed if there are scores, one for each but the
    /// first.
    pub fn repeat(&mut self, prompt: &[u32], scores: Option<&[Logprobs]>, out: &mut Delta) {
        let mut detokenizer = Detokenizer::new(&self.model, &[]);
        let mut text = String::new();
        for (index, token) in prompt.iter().enumerate() {
            if let Some(scores) = scores {
                let found = index.checked_sub(1).and_then(|before| scores.get(before));
                let offset = self.characters + text.chars().count();
                out.scores.push(score(&self.model, *token, found, offset));
            }
            detokenizer.push(*token, &mut text);
        }
        detokenizer.flush(&mut text);
        self.characters += text.chars().count();
        out.text.push_str(&text);
    }

    /// Takes in one more token; true when its text completes a stop string, which ends the answer. `early`: it does not.
    #[must_use]
    pub fn push(&mut self, token: u32, found: Option<&Logprobs>, early: bool, out: &mut Delta) -> bool {
        if self.filter.is_idle() && found.is_none() {
            self.detokenizer.push(token, &mut out.text);
            return false;
        }
        self.piece.clear();
        self.detokenizer.push(token, &mut self.piece);
        if let Some(found) = found {
            let score = score(&self.model, token, Some(found), self.characters);
            self.waiting.push_back((self.made, score));
        }
        let stopped = self.let_through(early, out);
        self.list(stopped, out);
        stopped
    }

    /// No token follows: tells what was held back; true when that completes a stop string.
    #[must_use]
    pub fn end(&mut self, out: &mut Delta) -> bool {
        self.piece.clear();
        self.detokenizer.flush(&mut self.piece);
        let stopped = self.let_through(false, out);
        if !stopped {
            self.filter.flush(&mut out.text);
            self.released = self.made;
        }
        self.list(stopped, out);
        stopped
    }

    fn let_through(&mut self, early: bool, out: &mut Delta) -> bool {
        self.made += self.piece.len();
        self.characters += self.piece.chars().count();
        let before = out.text.len();
        let stopped = if early {
            out.text.push_str(&self.piece);
            false
        } else {
            self.filter.push(&self.piece, &mut out.text)
        };
        self.released += out.text.len() - before;
        stopped
    }

    /// Lists the tokens whose text is out; when the answer is cut, those of which some is.
    fn list(&mut self, cut: bool, out: &mut Delta) {
        let all = self.released == self.made;
        while let Some((begin, _)) = self.waiting.front() {
            let next = self.waiting.get(1).map_or(self.made, |(next, _)| *next);
            let is_out = all || next <= self.released || (cut && *begin < self.released);
            if !is_out {
                return;
            }
            out.scores.extend(self.waiting.pop_front().map(|(_, score)| score));
        }
    }
}

fn score(model: &Model, token: u32, found: Option<&Logprobs>, offset: usize) -> Score {
    let top = found.into_iter().flat_map(|found| found.top_ids.iter().zip(&found.top_logprobs));
    Score {
        bytes: model.token_bytes(token),
        logprob: found.map(|found| found.logprob),
        top: top.map(|(token, logprob)| (model.token_bytes(*token), *logprob)).collect(),
        offset,
    }
}
