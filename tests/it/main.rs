//! Integration tests and short drills. `make drill` runs the drills at full length.
#![allow(clippy::unwrap_used, clippy::type_complexity, reason = "tests fail by panicking")]

mod cache;
mod disk;
mod drills;
mod engine_process;
mod fleet;
mod keys;
mod peers;
mod pins;
mod quotas;
mod replay;
mod retention;
mod serve;
mod traces;
