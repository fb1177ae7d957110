//! MOVES: a bounded queue and a thread per route; every batch ends exactly once, as done or failed.
//!
//! Onboard goes first: while one runs, the offload thread waits between two blocks, for a bounded time.

mod gate;
mod in_order;
mod queue;

pub(crate) use gate::Gate;
pub(crate) use in_order::InOrder;
pub(crate) use queue::BoundedQueue;
