//! Guided decoding: only tokens after which the text can still become what was asked for.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use kvbm_vocabulary::Vocabulary;
use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use tokenizers::Tokenizer;
use toktrie::{ApproximateTokEnv, TokRxInfo, TokTrie};

/// Spaces between the parts of a JSON text: as many as an indented one needs, but not without end, which is what a model
/// that does not know what to say prefers.
const JSON_WHITESPACE: &str = r"[\x20\x0A\x0D\x09]{0,32}";
/// Longest grammar, bytes.
const GRAMMAR_BYTES_MAX: usize = 1 << 20;
/// Most choices.
const CHOICES_MAX: usize = 4096;

/// What an answer is to look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Grammar {
    /// A JSON schema, as text.
    JsonSchema(String),
    /// A regular expression for the whole answer.
    Regex(String),
    /// A grammar in Lark's syntax.
    Lark(String),
    /// One of these texts.
    Choice(Vec<String>),
}

/// Makes guides for the model in a folder. Its tokenizer is read when the first one is made.
pub struct Guides {
    folder: PathBuf,
    eos_token_ids: Vec<u32>,
    factory: OnceLock<Result<ParserFactory, String>>,
}

/// What an answer has to look like, and how far it is.
#[derive(Clone)]
pub struct Guide(Box<Matcher>);

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Guide")
    }
}

impl Guides {
    /// For a model whose sequences end with one of these tokens.
    pub fn new(folder: &Path, eos_token_ids: Vec<u32>) -> Self {
        Self { folder: folder.to_owned(), eos_token_ids, factory: OnceLock::new() }
    }

    /// A guide at its beginning, or what is wrong with the grammar. This can take as long as the grammar is difficult,
    /// up to about a second.
    pub fn guide(&self, grammar: &Grammar) -> Result<Guide, String> {
        let factory = self.factory.get_or_init(|| factory(&self.folder, &self.eos_token_ids));
        let parser = factory.as_ref().map_err(Clone::clone)?.create_parser(grammar.top_level()?);
        let parser = parser.map_err(|error| error.to_string())?;
        let matcher = Matcher::new(Ok(parser));
        match matcher.get_error() {
            None => Ok(Guide(Box::new(matcher))),
            Some(error) => Err(error),
        }
    }
}

fn factory(folder: &Path, eos_token_ids: &[u32]) -> Result<ParserFactory, String> {
    let path = folder.join("tokenizer.json");
    let tokenizer =
        Tokenizer::from_file(&path).map_err(|error| format!("read {}: {error}", path.display()))?;
    let vocabulary = Vocabulary::of(&tokenizer);
    let words: Vec<Vec<u8>> = (0..vocabulary.len() as u32).map(|id| vocabulary.bytes(id).to_vec()).collect();
    let eos: Vec<u32> =
        eos_token_ids.iter().copied().filter(|token| (*token as usize) < words.len()).collect();
    let first = *eos.first().ok_or("the model has no end-of-sequence token, without which no answer ends")?;
    let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, first), &words).with_eos_tokens(&eos);
    let environment: toktrie::TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let mut factory = ParserFactory::new_simple(&environment).map_err(|error| error.to_string())?;
    // What is wrong is in the error; the state of the parser is not for clients.
    factory.quiet().limits_mut().verbose_errors = false;
    Ok(factory)
}

impl Grammar {
    fn top_level(&self) -> Result<TopLevelGrammar, String> {
        let bytes = match self {
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) => text.len(),
            Self::Choice(texts) => texts.iter().map(String::len).sum(),
        };
        if bytes > GRAMMAR_BYTES_MAX {
            return Err(format!("it has {bytes} bytes, at most {GRAMMAR_BYTES_MAX} are possible"));
        }
        match self {
            Self::JsonSchema(text) => {
                let mut schema: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
                if let Value::Object(fields) = &mut schema {
                    fields.entry("x-guidance").or_insert(json!({ "whitespace_pattern": JSON_WHITESPACE }));
                }
                Ok(TopLevelGrammar::from_json_schema(schema))
            }
            Self::Regex(text) => Ok(TopLevelGrammar::from_regex(text)),
            Self::Lark(text) => Ok(TopLevelGrammar::from_lark(text.clone())),
            Self::Choice(texts) if texts.is_empty() || texts.len() > CHOICES_MAX => {
                Err(format!("there are {} choices, 1 to {CHOICES_MAX} are possible", texts.len()))
            }
            Self::Choice(texts) => {
                let quoted: Vec<String> = texts.iter().map(|text| json!(text).to_string()).collect();
                Ok(TopLevelGrammar::from_lark(format!("start: {}", quoted.join(" | "))))
            }
        }
    }
}

impl Guide {
    /// Forbids the tokens that cannot come next.
    pub(super) fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let allowed = self.0.compute_mask_or_eos().map_err(|error| error.to_string())?;
        for (token, logit) in logits.iter_mut().enumerate() {
            if token >= allowed.len() || !allowed.is_allowed(token as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Goes on behind tokens that were generated.
    pub(super) fn accept(&mut self, tokens: &[u32]) -> Result<(), String> {
        for token in tokens {
            if self.is_complete() {
                return Ok(());
            }
            self.0.consume_token(*token).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Nothing may follow.
    pub(super) fn is_complete(&self) -> bool {
        self.0.is_stopped() && !self.0.is_error()
    }
}
