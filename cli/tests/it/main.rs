//! The binary from outside.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod conversation;
mod replay;
