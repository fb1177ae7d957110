//! The frontend against scripted workers and a scripted daemon, over real sockets.
#![allow(clippy::unwrap_used, reason = "helpers of tests, outside of test functions")]

mod answers;
mod bad_input;
mod bodies;
mod client;
mod disagg;
mod discovery;
mod failures;
mod frontend;
mod migration;
mod mock;
mod remote;
mod routing;
mod shapes;
mod text;
mod upstreams;
