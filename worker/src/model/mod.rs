//! A Hugging Face model folder: its configuration, its weights, its revision.

mod config;
mod opened;
mod random;
mod revision;
mod rope;
mod shape;
mod weights;

pub use config::{AttentionBias, Config};
pub use opened::OpenModel;
pub(crate) use random::RandomTensor;
pub use revision::revision;
pub use rope::{Rope, RopeScaling};
pub use shape::Shape;
pub(crate) use weights::Origin;
pub use weights::{Tensor, Weights};
