//! The OpenAI HTTP frontend: prompts in, tokens to a worker, text out.
//!
//! ```text
//! HTTP request -> serve (body, routes) -> openai (parse, validate) -> model (template, tokenizer)
//!              -> router (which worker) -> generation (tokens to text, stop strings) -> openai (chunks, answer)
//! fleet: which workers there are, told by the daemon or by flags; each kept connected by its own task
//! ```
//!
//! **Invariants.** A request that its client gave up is cancelled at the worker at once: everything that belongs to
//! a request is owned by its response, there is no task per request. Text never holds half a character. Nothing
//! is sent to the client before the first token, so a worker that fails before it costs nothing but time.
//!
//! It deliberately does not cache, hash or schedule.
#![forbid(unsafe_code)]

mod args;
mod detokenizer;
mod error;
mod fleet;
mod generation;
mod metrics;
mod model;
mod openai;
mod request_id;
mod router;
mod serve;
mod stop;

pub use args::{Config, FrontendArgs};
pub use detokenizer::Detokenizer;
pub use error::FrontendError;
pub use fleet::{Daemon, DaemonFiles, Endpoint, Unusable};
pub use model::{Model, ModelError};
pub use serve::run;
pub use stop::StopFilter;
