//! Calls as JSON objects that are the whole answer, one after the other or in a list.

use super::Names;
use crate::openai::Delta;

/// What special tokens look like where a tokenizer does not hide them.
const MARKS: [&str; 2] = ["<|python_tag|>", "[TOOL_CALLS]"];

/// An answer that is either text, or calls and nothing else.
pub(super) struct Objects {
    first: char,
    held: String,
    state: State,
}

enum State {
    /// Only spaces so far.
    Undecided,
    /// Objects, separated by whatever is no brace. `held` begins where the next one does, or in front of that.
    Calls(Scan),
    Text,
}

/// How far the object at the beginning of `held` has been read.
#[derive(Default)]
struct Scan {
    at: usize,
    depth: usize,
    begin: usize,
    in_string: bool,
    escaped: bool,
}

impl Objects {
    /// Calls begin with this character; everything else is text.
    pub fn beginning_with(first: char) -> Self {
        Self { first, held: String::new(), state: State::Undecided }
    }

    pub fn push(&mut self, text: &str, delta: &mut Delta, names: &mut Names) {
        if let State::Text = self.state {
            delta.text.push_str(text);
            return;
        }
        self.held.push_str(text);
        if let State::Undecided = self.state {
            let begun = self.held.trim_start();
            if let Some(rest) = MARKS.iter().find_map(|mark| begun.strip_prefix(mark)) {
                self.held = rest.to_owned();
            }
            let begun = self.held.trim_start();
            if begun.is_empty() || MARKS.iter().any(|mark| mark.starts_with(begun)) && begun != "[" {
                return;
            }
            self.state =
                if begun.starts_with(self.first) { State::Calls(Scan::default()) } else { State::Text };
        }
        match &mut self.state {
            State::Calls(scan) => {
                while let Some(object) = scan.next(&self.held) {
                    let text = &self.held[object.clone()];
                    match names.call(text) {
                        Some(call) => delta.calls.push(call),
                        None => {
                            // It was no call after all.
                            delta.text.push_str(&self.held);
                            self.held.clear();
                            self.state = State::Text;
                            return;
                        }
                    }
                    self.held.drain(..object.end);
                    *scan = Scan::default();
                }
            }
            State::Text | State::Undecided => delta.text.push_str(&std::mem::take(&mut self.held)),
        }
    }

    /// What is left is no call; separators behind one are nothing.
    pub fn end(&mut self, delta: &mut Delta) {
        let held = std::mem::take(&mut self.held);
        let separators = |c: char| c.is_whitespace() || "];,".contains(c);
        if !(delta.text.is_empty() && held.trim_matches(separators).is_empty()) {
            delta.text.push_str(&held);
        }
    }
}

impl Scan {
    /// The first object that is complete.
    fn next(&mut self, text: &str) -> Option<std::ops::Range<usize>> {
        for (offset, byte) in text.bytes().enumerate().skip(self.at) {
            self.at = offset + 1;
            if self.in_string {
                match (self.escaped, byte) {
                    (true, _) => self.escaped = false,
                    (false, b'\\') => self.escaped = true,
                    (false, b'"') => self.in_string = false,
                    (false, _) => {}
                }
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' => {
                    if self.depth == 0 {
                        self.begin = offset;
                    }
                    self.depth += 1;
                }
                b'}' if self.depth > 0 => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return Some(self.begin..offset + 1);
                    }
                }
                _ => {}
            }
        }
        None
    }
}
