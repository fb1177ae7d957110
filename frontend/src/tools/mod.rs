//! Calls of tools, found in what a model says while it says it.
//!
//! A call is told as soon as it is complete. What looks like a call and turns out to be none is text.

mod objects;
mod tagged;
#[cfg(test)]
mod tests;

use std::hash::{BuildHasher, RandomState};

use serde_json::Value;

use crate::openai::{CallDelta, Delta, ToolChoice};
use objects::Objects;
use tagged::Tagged;

/// How a model writes calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, as Qwen and Hermes do.
    Tagged,
    /// Objects with `name` and `parameters`, which are all of the answer, as Llama does.
    Objects,
    /// A list of objects with `name` and `arguments`, which is all of the answer, as Mistral does.
    List,
}

impl Format {
    /// What a chat template tells its model to write. `None`: it knows no tools.
    pub fn of_template(source: &str) -> Option<Self> {
        if source.contains("<tool_call>") {
            Some(Self::Tagged)
        } else if source.contains("[TOOL_CALLS]") {
            Some(Self::List)
        } else if source.contains("tools") {
            Some(Self::Objects)
        } else {
            None
        }
    }
}

/// Finds calls in the text of one choice.
pub struct CallParser {
    mode: Mode,
    names: Names,
}

enum Mode {
    Tagged(Tagged),
    Objects(Objects),
    /// All text is the arguments of a call of this function.
    Arguments {
        name: Option<String>,
    },
}

impl CallParser {
    /// For an answer in which such calls are permitted, or asked for.
    pub fn new(choice: &ToolChoice, format: Option<Format>) -> Self {
        let mode = match (choice, format) {
            (ToolChoice::Function(name), _) => Mode::Arguments { name: Some(name.clone()) },
            (ToolChoice::Auto, Some(Format::Tagged)) => Mode::Tagged(Tagged::default()),
            (ToolChoice::Auto, Some(Format::Objects) | None) => Mode::Objects(Objects::beginning_with('{')),
            (ToolChoice::Required, _) | (ToolChoice::Auto, Some(Format::List)) => {
                Mode::Objects(Objects::beginning_with('['))
            }
        };
        Self { mode, names: Names { nonce: RandomState::new().hash_one(0), given: 0 } }
    }

    /// Goes over the text of `delta`: what is text stays, what is a call becomes one.
    pub fn push(&mut self, delta: &mut Delta) {
        let text = std::mem::take(&mut delta.text);
        match &mut self.mode {
            Mode::Tagged(tagged) => tagged.push(&text, delta, &mut self.names),
            Mode::Objects(objects) => objects.push(&text, delta, &mut self.names),
            Mode::Arguments { name } => {
                if text.is_empty() && name.is_none() {
                    return;
                }
                let head = name.take().map(|name| (self.names.next().1, name));
                delta.calls.push(CallDelta { index: 0, head, arguments: text });
            }
        }
    }

    /// The answer has ended: what was held back is told.
    pub fn end(&mut self, delta: &mut Delta) {
        self.push(delta);
        match &mut self.mode {
            Mode::Tagged(tagged) => tagged.end(delta, &mut self.names),
            Mode::Objects(objects) => objects.end(delta),
            Mode::Arguments { .. } => {}
        }
    }

    /// Whether a tool was called.
    pub fn has_called(&self) -> bool {
        self.names.given > 0
    }
}

/// Numbers and names of an answer's calls.
struct Names {
    nonce: u64,
    given: usize,
}

impl Names {
    /// Nine letters and digits, which every template accepts.
    fn next(&mut self) -> (usize, String) {
        let index = self.given;
        self.given += 1;
        let mut number = self.nonce.wrapping_add(index as u64);
        let letters = (0..9).map(|_| {
            let digit = (number % 36) as u32;
            number /= 36;
            char::from_digit(digit, 36).unwrap_or('0')
        });
        (index, letters.collect())
    }

    /// A call, if that is what the JSON text is.
    fn call(&mut self, text: &str) -> Option<CallDelta> {
        let object: Value = serde_json::from_str(text).ok()?;
        let function = object.get("function").filter(|function| function.is_object()).unwrap_or(&object);
        let name = function.get("name")?.as_str()?.to_owned();
        let arguments = match function.get("arguments").or_else(|| function.get("parameters")) {
            Some(Value::String(text)) => text.clone(),
            Some(arguments @ Value::Object(_)) => arguments.to_string(),
            Some(_) => return None,
            None => "{}".to_owned(),
        };
        let (index, id) = self.next();
        Some(CallDelta { index, head: Some((id, name)), arguments })
    }
}
