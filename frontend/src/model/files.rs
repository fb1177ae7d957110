//! The files of a model's folder that the frontend reads.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::ModelError;

/// Contents of the files; absent optional ones are `null`.
pub struct Files {
    folder: PathBuf,
    pub tokenizer: Vec<u8>,
    pub tokenizer_config: Value,
    generation_config: Value,
    template_file: Option<String>,
}

impl Files {
    pub fn read(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("tokenizer.json");
        let tokenizer =
            std::fs::read(&path).map_err(|error| ModelError { path, reason: error.to_string() })?;
        Ok(Self {
            tokenizer,
            tokenizer_config: optional_json(folder, "tokenizer_config.json")?,
            generation_config: optional_json(folder, "generation_config.json")?,
            template_file: std::fs::read_to_string(folder.join("chat_template.jinja")).ok(),
            folder: folder.to_owned(),
        })
    }

    /// Equal for folders of equal content.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.tokenizer.hash(&mut hasher);
        self.tokenizer_config.to_string().hash(&mut hasher);
        self.generation_config.to_string().hash(&mut hasher);
        self.template_file.hash(&mut hasher);
        hasher.finish()
    }

    pub fn error(&self, file: &str, reason: String) -> ModelError {
        ModelError { path: self.folder.join(file), reason }
    }

    /// A special token's text, which is written plainly or as an object with flags.
    pub fn special_token(&self, name: &str) -> Option<String> {
        let token = self.tokenizer_config.get(name)?;
        let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
        Some(text.to_owned())
    }

    /// From its own file, from tokenizer_config.json, or the one named `default` there.
    pub fn chat_template(&self) -> Option<&str> {
        if let Some(template) = &self.template_file {
            return Some(template);
        }
        let template = self.tokenizer_config.get("chat_template")?;
        if let Some(text) = template.as_str() {
            return Some(text);
        }
        let named = template.as_array()?.iter().find(|entry| entry["name"] == "default")?;
        named["template"].as_str()
    }

    pub fn generation_eos(&self) -> Vec<u32> {
        let ids = match self.generation_config.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.as_slice(),
            Some(id) => std::slice::from_ref(id),
            None => &[],
        };
        ids.iter().filter_map(|id| id.as_u64()?.try_into().ok()).collect()
    }

    /// What requests that say nothing are sampled with.
    pub fn generation_number(&self, name: &str) -> Option<f32> {
        self.generation_config.get(name)?.as_f64().map(|value| value as f32)
    }
}

fn optional_json(folder: &Path, name: &str) -> Result<Value, ModelError> {
    let path = folder.join(name);
    let failed = |reason: String| ModelError { path: path.clone(), reason };
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(failed(error.to_string())),
    }
}
