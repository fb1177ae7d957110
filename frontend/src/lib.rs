//! The OpenAI HTTP frontend: prompts in, tokens to a worker, text out.
//!
//! ```text
//! HTTP request -> serve (body, routes) -> openai (parse, validate) -> model (template, tokenizer)
//!              -> router (which worker) -> generation (tokens to text, stop strings) -> openai (chunks, answer)
//! upstream: requests for models of other OpenAI servers pass through
//! discovery: daemons, workers and other servers that come and go
//! fleet: which workers there are, told by the daemon or by flags; each kept connected by its own task
//! ```
//!
//! **Invariants.** A request that its client gave up is cancelled at the worker at once: everything that belongs to
//! a request is owned by its response, there is no task per request. Text never holds half a character. Nothing
//! is sent to the client before the first token, so a worker that fails before it costs nothing but time.
//!
//! It deliberately does not cache or schedule; it hashes prompts only to know where their blocks are.
#![forbid(unsafe_code)]

mod args;
mod detokenizer;
pub mod discovery;
mod error;
mod fleet;
mod generation;
mod metrics;
mod model;
mod openai;
mod request_id;
mod router;
mod serve;
mod silence;
mod stop;
mod tools;
mod transcript;
mod upstream;

pub use args::{Config, FrontendArgs, RouterArgs};
pub use detokenizer::Detokenizer;
pub use error::FrontendError;
pub use fleet::{Daemon, DaemonFiles, Endpoint, Unusable};
pub use model::{Model, ModelError};
pub use openai::read_body;
pub use router::{
    Burden, Busy, Chooser, DisaggConfig, Events, Fingerprint, Homes, Index, Load, Overlap, RouterConfig,
    RouterMode, Source, SourceId, Strategy, Tier, Weights,
};
pub use serve::{Times, run};
pub use stop::StopFilter;
pub use tools::Format as ToolCallFormat;
pub use upstream::UpstreamUrl;
