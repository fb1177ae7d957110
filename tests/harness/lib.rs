//! Real processes to test: the `kvbm` binary that was built before the tests (`make test` does).
//!
//! Nothing here sleeps to wait for something: conditions are polled, with a limit that only a failure reaches.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a harness fails by panicking")]

mod conversation;
mod disk_file;
mod frontend;
mod keyed_engine;
mod node;
mod process;
mod random;
mod reference;
mod up;
mod wait;
mod worker_client;

pub use conversation::{Conversation, Turn, conversations};
pub use disk_file::{disk_file, flip_entry, flip_header, flip_payload, set_version};
pub use frontend::{Frontend, Streamed};
pub use keyed_engine::{KeyedChain, KeyedEngine, KeyedModel};
pub use node::{DaemonOptions, Node, WorkerOptions, get, get_any, metric_in};
pub use process::{Process, program};
pub use random::Random;
pub use reference::Reference;
pub use up::Up;
pub use wait::{eventually, eventually_within};
pub use worker_client::{Answer, WorkerClient};

use std::path::PathBuf;

/// The bundled model, or `KVBM_TEST_MODEL`.
pub fn tiny_model() -> PathBuf {
    if let Some(model) = std::env::var_os("KVBM_TEST_MODEL") {
        return model.into();
    }
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/tiny").canonicalize().unwrap()
}

/// Whether workers compute on a GPU: `KVBM_TEST_DEVICE` names it.
pub fn on_gpu() -> bool {
    std::env::var_os("KVBM_TEST_DEVICE").is_some()
}

/// Number of seeds of each drill: `KVBM_DRILL_SEEDS`, else few.
pub fn drill_seeds(default: u64) -> std::ops::Range<u64> {
    let first = std::env::var("KVBM_SEED").ok().map(|seed| seed.parse().expect("KVBM_SEED is a number"));
    if let Some(seed) = first {
        return seed..seed + 1;
    }
    let count =
        std::env::var("KVBM_DRILL_SEEDS").ok().map(|n| n.parse().expect("KVBM_DRILL_SEEDS is a number"));
    0..count.unwrap_or(default)
}
