//! The connector against a scripted daemon in the same process, and against one in a process of its own that is killed.
#![allow(clippy::unwrap_used)]

mod apart;
mod cache;
mod client;
mod detached;
mod disk;
mod engine;
mod mock;
mod process;
