//! The engine and the scheduler against the bundled model.
#![allow(clippy::unwrap_used)]

mod bits;
mod disk;
mod gpu;
mod loading;
mod random_weights;
mod reference;
mod scheduling;
mod serving;
mod support;
mod test_cache;
mod turning;
