//! KV events of daemons over NATS JetStream: each daemon says once what changes, any number of frontends listen.
//!
//! ```text
//! daemon ── messages, each acknowledged ──► stream KVBM_EVENTS ──► ordered consumer ──► frontend
//!           subject kvbm.v1.events.INSTANCE   (memory, bounded)      one per daemon
//! ```
//!
//! **Invariant.** Nothing here is the truth: messages are numbered, whoever misses some takes a snapshot of the daemon. So
//! the stream is kept in memory, for a short time, and a server that was restarted begins with an empty one.
//!
//! It deliberately knows no blocks: a message is whatever protobuf message it is given.
#![forbid(unsafe_code)]

mod bus;
mod place;

pub use bus::{Bus, Messages, NatsError};
pub use place::Nats;
