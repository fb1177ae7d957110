//! A model that is ready to be loaded into an engine.

use std::path::Path;

use super::{Config, Weights, revision};
use crate::{EngineOptions, Result};

/// What an engine needs to know of a model.
pub struct OpenModel {
    /// Dimensions; the context length is that of the options if shorter.
    pub config: Config,
    /// Weights.
    pub weights: Weights,
    /// Which weights these are.
    pub revision: String,
}

impl OpenModel {
    /// Opens the model in `folder`, or random weights with the end tokens of that folder.
    pub fn open(folder: &Path, options: &EngineOptions) -> Result<Self> {
        let mut config = Config::load(folder)?;
        let (weights, digest) = match options.random_weights {
            Some(shape) => {
                config = shape.config(&config);
                (Weights::random(), Some(shape.revision()))
            }
            None => (Weights::open(folder)?, None),
        };
        if let Some(context_length) = options.context_length {
            config.context_length = config.context_length.min(context_length);
        }
        let revision = match options.revision.clone().or(digest) {
            Some(revision) => revision,
            None => revision(folder)?,
        };
        Ok(Self { config, weights, revision })
    }
}
