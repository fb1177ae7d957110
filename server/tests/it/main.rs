//! The daemon from outside: a client that speaks the wire as `docs/wire.md` has it, and nothing else.
#![allow(missing_docs, clippy::unwrap_used)]

mod admin;
mod ahead;
mod attach;
mod authority;
mod client;
mod death;
mod engine;
mod events;
mod flow;
mod lookups;
mod pins;
mod remote;
mod retention;
mod rig;
mod stop;
mod what_if;
