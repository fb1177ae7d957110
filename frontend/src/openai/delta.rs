//! What a choice said since it was last asked.

/// Text, and what belongs to it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Delta {
    pub text: String,
    /// Tokens of that text, if they are asked for.
    pub scores: Vec<Score>,
    /// Calls of tools, whole or in parts.
    pub calls: Vec<CallDelta>,
}

/// A token, and how likely it was.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    pub bytes: Vec<u8>,
    /// Natural logarithm; `None`: nothing comes before the first token of a prompt.
    pub logprob: Option<f32>,
    /// The likeliest tokens in its place, best first.
    pub top: Vec<(Vec<u8>, f32)>,
    /// Characters of text before it.
    pub offset: usize,
}

/// A part of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallDelta {
    pub index: usize,
    /// Its id and the name of the function, with its first part.
    pub head: Option<(String, String)>,
    /// Goes on behind what came before.
    pub arguments: String,
}

impl Delta {
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.scores.is_empty() && self.calls.is_empty()
    }

    pub fn clear(&mut self) {
        self.text.clear();
        self.scores.clear();
        self.calls.clear();
    }
}
