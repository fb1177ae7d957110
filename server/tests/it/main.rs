//! The daemon from outside: a client that speaks the wire as `docs/wire.md` has it, and nothing else.
#![allow(missing_docs, clippy::unwrap_used)]

mod admin;
mod attach;
mod client;
mod death;
mod events;
mod flow;
mod rig;
mod stop;
