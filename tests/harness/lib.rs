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

/// Seeds of each drill: `KVBM_DRILL_SEEDS` of them, else few, from `KVBM_DRILL_FIRST` on, else 0.
pub fn drill_seeds(default: u64) -> std::ops::Range<u64> {
    let first = std::env::var("KVBM_SEED").ok().map(|seed| seed.parse().expect("KVBM_SEED is a number"));
    if let Some(seed) = first {
        return seed..seed + 1;
    }
    let number = |name: &str| {
        let value = std::env::var(name).ok();
        value.map(|n| n.parse().unwrap_or_else(|_| panic!("{name} is a number")))
    };
    let first = number("KVBM_DRILL_FIRST").unwrap_or(0);
    first..first + number("KVBM_DRILL_SEEDS").unwrap_or(default)
}
