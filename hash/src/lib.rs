//! The one place where tokens become keys, and token ranges retention. Frontend, connector and daemon agree because
//! they all use this crate.
//!
//! ```text
//! BaseNamespace = H(model, revision, KV dtype, layout, tokens per block, parallel layout)
//! Namespace     = H(base, LoRA, cache salt)
//! chain(0)      = BLAKE3 keyed with the namespace digest  (tokens of block 0)
//! chain(n)      = BLAKE3 keyed with chain(n-1)            (tokens of block n)
//! SequenceHash  = first 16 bytes of chain(n)
//! ```
//!
//! Two blocks have the same key only if everything that determines their KV bytes is the same: the model, the storage
//! format, the adapter, the salt and every token from the first of the sequence on. `docs/wire.md` has golden vectors.
#![forbid(unsafe_code)]

mod chain;
mod namespace;
mod retention;

pub use chain::{Chain, MultimodalItem, SequenceHash, sequence_hashes};
pub use namespace::{BaseNamespace, BaseParts, Namespace};
pub use retention::{Retention, RetentionConfig, RetentionError, TokenRange};
