//! All that is done to a body before a model is looked for. For fuzzing.

use super::{Options, Parameters, messages, prompts};
use crate::metrics::Api;

/// Reads a body as both APIs would, as far as that goes without a model.
pub fn read_body(body: &[u8]) {
    for api in [Api::Completions, Api::Chat] {
        let Ok(parameters) = Parameters::parse(body) else { return };
        if let Ok(options) = Options::of(&parameters, api) {
            assert!(options.choices >= 1 && !options.model.is_empty());
            // Whatever is asked of the answer can be written down.
            drop(options.guide().map(|guided| guided.message()));
        }
        match api {
            Api::Completions => drop(prompts(parameters.prompt)),
            Api::Chat => drop(messages(parameters.messages)),
        }
    }
}
