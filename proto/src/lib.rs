//! The wire between engines, daemon and frontend: generated code from `kvbm/v1/*.proto`, and checked conversions of
//! what protobuf cannot check (lengths of keys, digests and tokens; retention). `docs/wire.md` specifies the protocol.
#![forbid(unsafe_code)]

mod packed;
mod retention;

pub use packed::{Malformed, SideMessage, digest, key, keys, optional_key, pack_keys, uuid};
pub use retention::{entry_retention, retention_of_blocks, retention_runs, set_entry_retention};

/// The version in `Hello`. Raised when an old peer would misunderstand a new one.
pub const PROTOCOL_VERSION: u32 = 1;

/// Bytes in one gRPC message, at most: a snapshot part or the table of a large pool.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// In `HelloReply.features`: lookups may be asked on a connection of their own.
pub const LOOKUP_CHANNEL: &str = "lookup_channel";

/// Keys in a lookup on that connection, at most; more are asked for on the session's stream.
pub const LOOKUP_KEYS_MAX: usize = 4096;

/// Bytes in one of its packets, at most: less than what a socket takes at once by default.
pub const LOOKUP_BYTES_MAX: usize = 160 << 10;

/// Generated from `kvbm/v1/*.proto`.
#[allow(missing_docs, clippy::all, clippy::undocumented_unsafe_blocks)]
pub mod v1 {
    tonic::include_proto!("kvbm.v1");
}
