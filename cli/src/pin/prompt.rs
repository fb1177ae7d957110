//! The tokens of a prompt and the model they are for, as the worker and the frontend see them.

use std::path::{Path, PathBuf};

use clap::Args;
use kvbm_hash::BaseNamespace;

/// As `kvbm worker` has them, under the same variables.
#[derive(Debug, Args)]
pub(super) struct ModelArgs {
    /// Folder of the model
    #[arg(long, env = "KVBM_MODEL_PATH", value_name = "DIR")]
    model: Option<PathBuf>,
    /// Name under which the worker serves it [default: name of the folder]
    #[arg(long, env = "KVBM_WORKER_SERVED_MODEL_NAME", value_name = "NAME")]
    served_model_name: Option<String>,
    /// Revision of the weights that the worker was told [default: a digest of them]
    #[arg(long, env = "KVBM_WORKER_MODEL_REVISION", value_name = "TEXT")]
    model_revision: Option<String>,
    /// Tokens in one block: 16, 32 or 64
    #[arg(long, env = "KVBM_BLOCK_SIZE", default_value_t = 32)]
    block_size: u32,
}

impl ModelArgs {
    pub fn folder(&self) -> Result<&Path, String> {
        self.model.as_deref().ok_or_else(|| "--model is missing: name the folder of the model".to_owned())
    }

    pub fn tokens_per_block(&self) -> Result<u32, String> {
        match self.block_size {
            16 | 32 | 64 => Ok(self.block_size),
            other => Err(format!("invalid --block-size = {other}: permitted is 16, 32 or 64")),
        }
    }

    pub fn base(&self) -> Result<BaseNamespace, String> {
        let given = self.folder()?;
        let failed = |error: &dyn std::fmt::Display| format!("--model {}: {error}", given.display());
        // As the worker does: `.` and links have the name of what they lead to.
        let folder = given.canonicalize().map_err(|error| failed(&error))?;
        let name = match &self.served_model_name {
            Some(name) => name.clone(),
            None => folder.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into()),
        };
        let revision = match &self.model_revision {
            Some(revision) => revision.clone(),
            None => kvbm_worker::model::revision(&folder).map_err(|error| failed(&error))?,
        };
        Ok(kvbm_worker::base_namespace(&name, &revision, self.tokens_per_block()?))
    }
}

#[derive(Debug, Args)]
#[group(multiple = false)]
pub(super) struct PromptArgs {
    /// The prompt, as a request to /v1/completions would have it
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// File with the prompt
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// File with the tokens of the prompt: a JSON list of numbers
    #[arg(long, value_name = "FILE")]
    tokens_file: Option<PathBuf>,
}

impl PromptArgs {
    pub fn tokens(&self, model: &Path) -> Result<Vec<u32>, String> {
        let text = match (&self.prompt, &self.prompt_file, &self.tokens_file) {
            (Some(text), ..) => text.clone(),
            (_, Some(path), _) => read("--prompt-file", path)?,
            (_, _, Some(path)) => return tokens_of(path),
            (None, None, None) => {
                return Err("name the prompt: --prompt, --prompt-file or --tokens-file".to_owned());
            }
        };
        let model = kvbm_frontend::Model::load(model).map_err(|error| format!("--model: {error}"))?;
        model.encode_prompt(&text).map_err(|error| format!("tokenize the prompt: {error}"))
    }
}

fn read(flag: &str, path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{flag} {}: {error}", path.display()))
}

fn tokens_of(path: &Path) -> Result<Vec<u32>, String> {
    let text = read("--tokens-file", path)?;
    serde_json::from_str(&text).map_err(|error| {
        format!("--tokens-file {}: {error}; permitted is a JSON list of token ids", path.display())
    })
}
