//! A Hugging Face model folder: its configuration, its weights, its revision.

mod config;
mod revision;
mod rope;
mod weights;

pub use config::Config;
pub use revision::revision;
pub use rope::{Rope, RopeScaling};
pub use weights::{Tensor, Weights};
