//! The OpenAI API as JSON: what is asked, what is answered. Nothing here knows of workers.

mod answer;
mod chat;
mod chunk;
mod error;
mod options;
mod parameters;
mod prompt;
mod retention;
mod tenant;
mod unsupported;
mod usage;

pub use answer::{Finish, answer_body};
pub use chat::messages;
pub use chunk::ChunkWriter;
pub use error::{ApiError, ErrorKind};
pub use options::Options;
pub use parameters::Parameters;
pub use prompt::{PromptItem, prompts};
pub use tenant::tenant;
pub use usage::{CachedTokens, Usage};

#[cfg(test)]
mod tests;
