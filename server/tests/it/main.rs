//! The daemon from outside: a client that speaks the wire as `docs/wire.md` has it, and nothing else.
#![allow(missing_docs, clippy::unwrap_used)]

mod admin;
mod attach;
mod authority;
mod client;
mod death;
mod events;
mod flow;
mod remote;
mod rig;
mod stop;
