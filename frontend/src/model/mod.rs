//! What the frontend knows of a model: its tokenizer, its chat template, how its sequences end.

mod files;
mod library;
mod python_json;
mod strftime;
mod template;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvbm_vocabulary::{Alphabet, Vocabulary};
use tokenizers::Tokenizer;

pub use library::Library;
pub use template::TemplateError;

use crate::tools::Format;
use files::Files;
use template::ChatTemplate;

/// A folder does not hold what is needed of a model.
#[derive(Debug, Clone, thiserror::Error)]
#[error("cannot read {}: {reason}", path.display())]
pub struct ModelError {
    path: PathBuf,
    reason: String,
}

/// Tokenizer and chat template of a model, read once and shared.
pub struct Model {
    tokenizer: Tokenizer,
    vocabulary: Arc<Vocabulary>,
    template: Option<ChatTemplate>,
    /// How the template has tools called.
    call_format: Option<Format>,
    bos: Option<u32>,
    /// `add_bos_token` of tokenizer_config.json; absent: the tokenizer's post-processor decides.
    add_bos: Option<bool>,
    eos: Vec<u32>,
    defaults: Defaults,
    vocabulary_len: usize,
}

/// What generation_config.json says of requests that say nothing.
#[derive(Debug, Clone, Default)]
pub struct Defaults {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
}

impl Defaults {
    /// Values that would be refused in a request are left out.
    fn of(files: &Files) -> Self {
        let within = |name: &str, least: f32, most: f32| {
            files.generation_number(name).filter(|value| (least..=most).contains(value))
        };
        Self {
            temperature: within("temperature", 0.0, 2.0),
            top_p: within("top_p", f32::MIN_POSITIVE, 1.0),
            top_k: within("top_k", 1.0, 1e6).map(|top_k| top_k as u32),
            min_p: within("min_p", 0.0, 1.0),
            repetition_penalty: within("repetition_penalty", f32::MIN_POSITIVE, 100.0),
        }
    }
}

impl Model {
    /// Reads tokenizer.json, and tokenizer_config.json, generation_config.json and chat_template.jinja where there
    /// are such.
    pub fn load(folder: &Path) -> Result<Self, ModelError> {
        Self::from_files(&Files::read(folder)?)
    }

    fn from_files(files: &Files) -> Result<Self, ModelError> {
        let tokenizer = Tokenizer::from_bytes(&files.tokenizer)
            .map_err(|error| files.error("tokenizer.json", error.to_string()))?;
        let bos_text = files.special_token("bos_token");
        let eos_text = files.special_token("eos_token");
        let template = match files.chat_template() {
            Some(source) => Some(
                ChatTemplate::compile(source, bos_text.clone(), eos_text.clone())
                    .map_err(|error| files.error("the chat template", error.to_string()))?,
            ),
            None => None,
        };
        let mut eos = files.generation_eos();
        eos.extend(eos_text.and_then(|text| tokenizer.token_to_id(&text)));
        eos.sort_unstable();
        eos.dedup();
        Ok(Self {
            vocabulary: Arc::new(Vocabulary::of(&tokenizer)),
            template,
            call_format: files.chat_template().and_then(Format::of_template),
            bos: bos_text.and_then(|text| tokenizer.token_to_id(&text)),
            add_bos: files.tokenizer_config.get("add_bos_token").and_then(serde_json::Value::as_bool),
            eos,
            defaults: Defaults::of(files),
            vocabulary_len: tokenizer.get_vocab_size(true),
            tokenizer,
        })
    }

    /// Tokens of a plain prompt, with the beginning-of-sequence token if the model wants one and the text has none.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, String> {
        let tokens = self.encode(text, self.add_bos != Some(false))?;
        Ok(self.with_bos(tokens))
    }

    /// Tokens of a rendered conversation, where the template has put the special tokens.
    pub fn encode_chat(&self, text: &str) -> Result<Vec<u32>, String> {
        let tokens = self.encode(text, false)?;
        Ok(self.with_bos(tokens))
    }

    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        let encoding =
            self.tokenizer.encode_fast(text, add_special_tokens).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().to_vec())
    }

    fn with_bos(&self, mut tokens: Vec<u32>) -> Vec<u32> {
        if let (Some(true), Some(bos)) = (self.add_bos, self.bos)
            && tokens.first() != Some(&bos)
        {
            tokens.insert(0, bos);
        }
        tokens
    }

    /// The conversation as the model was trained to see it. `None`: the model has no chat template.
    pub fn render_chat(&self, context: &template::Conversation<'_>) -> Option<Result<String, TemplateError>> {
        self.template.as_ref().map(|template| template.render(context))
    }

    /// How the model writes calls of tools. `None`: its template knows none.
    pub fn call_format(&self) -> Option<Format> {
        self.call_format
    }

    /// Text of tokens, special ones left out.
    pub fn decode(&self, tokens: &[u32]) -> String {
        self.tokenizer.decode(tokens, true).unwrap_or_default()
    }

    /// Bytes per token, where the tokenizer works on bytes.
    pub fn vocabulary(&self) -> Option<&Arc<Vocabulary>> {
        Some(&self.vocabulary).filter(|vocabulary| vocabulary.alphabet() == Alphabet::Bytes)
    }

    /// Bytes of a token's text by itself, for a reader: a special token has its name.
    pub fn token_bytes(&self, token: u32) -> Vec<u8> {
        match self.vocabulary.bytes(token) {
            [] => self.tokenizer.id_to_token(token).unwrap_or_default().into_bytes(),
            bytes => bytes.to_vec(),
        }
    }

    /// No text of so many bytes has fewer tokens than this.
    pub fn tokens_min(&self, text_bytes: usize) -> usize {
        let longest = self.vocabulary().filter(|_| self.tokenizer.get_normalizer().is_none());
        longest.map_or(0, |vocabulary| text_bytes / vocabulary.longest().max(1))
    }

    /// Tokens that end a sequence and have no text, ascending.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// What requests that say nothing are sampled with.
    pub fn defaults(&self) -> &Defaults {
        &self.defaults
    }

    /// Number of tokens that the tokenizer knows.
    pub fn vocabulary_len(&self) -> usize {
        self.vocabulary_len
    }
}

pub use template::Conversation;

#[cfg(test)]
mod tests;
