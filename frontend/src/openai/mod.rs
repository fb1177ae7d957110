//! The OpenAI API as JSON: what is asked, what is answered. Nothing here knows of workers.

mod answer;
mod catalog;
mod chat;
mod chunk;
mod delta;
mod error;
mod fields;
mod guide;
mod logprobs;
mod openapi;
mod options;
mod parameters;
mod prompt;
mod retention;
mod sampling;
mod tenant;
mod tools;
mod unsupported;
mod usage;
mod whole;

pub use answer::{Finish, Said, answer_body};
pub use chat::messages;
pub use chunk::ChunkWriter;
pub use delta::{CallDelta, Delta, Score};
pub use error::{ApiError, ErrorKind};
pub use fields::flag;
pub use openapi::openapi;
pub use options::Options;
pub use parameters::Parameters;
pub use prompt::{PromptItem, prompts};
pub use sampling::Sampling;
pub use tenant::tenant;
pub use tools::{ToolChoice, Tools};
pub use usage::{CachedTokens, Usage};
pub use whole::read_body;

#[cfg(test)]
mod tests;
