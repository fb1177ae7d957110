//! Calls between tags, with text around them.

use super::Names;
use crate::openai::Delta;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// Text that may contain calls.
#[derive(Default)]
pub(super) struct Tagged {
    /// Not told yet: outside of a call the beginning of a tag, and spaces in front of it; inside, the call so far.
    held: String,
    inside: bool,
    /// Spaces behind a call are no text.
    behind_call: bool,
}

impl Tagged {
    pub fn push(&mut self, text: &str, delta: &mut Delta, names: &mut Names) {
        self.held.push_str(text);
        loop {
            if self.inside {
                let Some(end) = self.held.find(CLOSE) else { return };
                let body: String = self.held.drain(..end + CLOSE.len()).collect();
                self.close(&body[..end], &body[end..], delta, names);
            } else if let Some(start) = self.held.find(OPEN) {
                let before: String = self.held.drain(..start + OPEN.len()).collect();
                self.tell(before[..start].trim_end(), delta);
                self.inside = true;
            } else {
                let keep = self.undecided();
                let certain: String = self.held.drain(..keep).collect();
                self.tell(&certain, delta);
                return;
            }
        }
    }

    pub fn end(&mut self, delta: &mut Delta, names: &mut Names) {
        let held = std::mem::take(&mut self.held);
        if self.inside {
            self.close(&held, "", delta, names);
        } else if !(self.behind_call && held.trim().is_empty()) {
            delta.text.push_str(&held);
        }
    }

    fn close(&mut self, body: &str, tag: &str, delta: &mut Delta, names: &mut Names) {
        self.inside = false;
        match names.call(body.trim()) {
            Some(call) => {
                delta.calls.push(call);
                self.behind_call = true;
            }
            None => [OPEN, body, tag].into_iter().for_each(|part| delta.text.push_str(part)),
        }
    }

    fn tell(&mut self, text: &str, delta: &mut Delta) {
        let text = if self.behind_call { text.trim_start() } else { text };
        if !text.is_empty() {
            self.behind_call = false;
            delta.text.push_str(text);
        }
    }

    /// Where the end of `held` starts that may be a tag, or spaces in front of one.
    fn undecided(&self) -> usize {
        let longest = OPEN.len().min(self.held.len());
        let tag = (1..=longest).rev().find(|&length| self.held.ends_with(&OPEN[..length])).unwrap_or(0);
        self.held[..self.held.len() - tag].trim_end().len()
    }
}
