//! The daemon: one per node, owner of every KV block on it. [`run`] is `kvbm daemon`; [`Daemon`] is the same for those
//! who embed it.
//!
//! ```text
//!  config ──► Daemon ─┬─ session    gRPC `Cache`, side channel: one task per engine, in order, to the end
//!                     ├─ registry   gRPC `Registry`: workers, numbered events, snapshots, status
//!                     ├─ rights     gRPC `Admin`, and who may change what: pins
//!                     ├─ remote     the same over TCP, for other machines: TLS, token, bounds
//!                     ├─ admin      HTTP: metrics, health, status, pins
//!                     └─ kvbm::Manager, which decides, holds and moves
//! ```
//!
//! Nothing is decided here about blocks, and no KV byte is touched. `docs/wire.md` is the contract.
#![forbid(unsafe_code)]

mod admin;
mod ahead;
mod args;
pub mod config;
mod core;
mod daemon;
mod error;
mod gpus;
pub mod holder;
mod inventory;
pub mod log;
mod metrics;
mod publisher;
pub mod record;
mod registry;
mod remote;
mod rights;
mod run;
mod session;
mod socket;
pub mod status;
mod warm;
mod wire;
mod workers;

pub use args::DaemonArgs;
pub use config::Config;
pub use daemon::{Addresses, Daemon};
pub use error::StartError;
pub use remote::Misfit;
pub use run::run;

/// Random bytes from the kernel.
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => panic!("the kernel has no random bytes: {errno}"),
        }
    }
    bytes
}
