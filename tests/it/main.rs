//! Integration tests and short drills. `make drill` runs the drills at full length.

mod cache;
mod drills;
mod keys;
mod serve;
