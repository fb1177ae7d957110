//! Parameters that are known but not supported yet: what leaves them without effect is accepted, so that clients
//! that always send them work; anything else is refused by name, never ignored.

use serde_json::Value;

use super::{ApiError, Parameters};

/// A value that means the same as leaving the parameter out. `null` always does.
enum Neutral {
    Number(f64),
    Flag(bool),
    Word(&'static str),
    Empty,
    PlainText,
}

use Neutral::{Empty, Flag, Number, PlainText, Word};

impl Neutral {
    fn is(&self, value: &Value) -> bool {
        match self {
            Number(number) => value.as_f64() == Some(*number),
            Flag(flag) => value.as_bool() == Some(*flag),
            Word(word) => value.as_str() == Some(word),
            Empty => {
                value.as_array().is_some_and(Vec::is_empty)
                    || value.as_object().is_some_and(|object| object.is_empty())
            }
            PlainText => {
                let text = Value::from("text");
                value.get("type") == Some(&text) || value.as_array().is_some_and(|items| items == &[text])
            }
        }
    }
}

/// Parameters that are known and not supported.
#[cfg(test)]
pub const NAMES: [&str; 20] = [
    "suffix",
    "prompt_logprobs",
    "length_penalty",
    "use_beam_search",
    "bad_words",
    "functions",
    "function_call",
    "modalities",
    "audio",
    "prediction",
    "reasoning_effort",
    "web_search_options",
    "prompt_embeds",
    "truncate_prompt_tokens",
    "chat_template",
    "documents",
    "continue_final_message",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "best_of",
];

/// Refuses what is asked for and cannot be done.
pub fn refuse(p: &Parameters) -> Result<(), ApiError> {
    // The best of as many as are wanted are all of them.
    let best_of = p.n.as_f64().unwrap_or(1.0);
    let table: [(&'static str, &Value, &[Neutral]); 20] = [
        ("suffix", &p.suffix, &[Word("")]),
        ("prompt_logprobs", &p.prompt_logprobs, &[Flag(false)]),
        ("length_penalty", &p.length_penalty, &[Number(1.0)]),
        ("use_beam_search", &p.use_beam_search, &[Flag(false)]),
        ("bad_words", &p.bad_words, &[Empty]),
        ("functions", &p.functions, &[Empty]),
        ("function_call", &p.function_call, &[Word("none"), Word("auto")]),
        ("modalities", &p.modalities, &[PlainText]),
        ("audio", &p.audio, &[]),
        ("prediction", &p.prediction, &[]),
        ("reasoning_effort", &p.reasoning_effort, &[Word("none")]),
        ("web_search_options", &p.web_search_options, &[]),
        ("prompt_embeds", &p.prompt_embeds, &[]),
        ("truncate_prompt_tokens", &p.truncate_prompt_tokens, &[]),
        ("chat_template", &p.chat_template, &[]),
        ("documents", &p.documents, &[Empty]),
        ("continue_final_message", &p.continue_final_message, &[Flag(false)]),
        ("include_stop_str_in_output", &p.include_stop_str_in_output, &[Flag(false)]),
        ("skip_special_tokens", &p.skip_special_tokens, &[Flag(true)]),
        ("best_of", &p.best_of, &[Number(best_of)]),
    ];
    for (name, value, neutral) in table {
        check(name, value, neutral)?;
    }
    Ok(())
}

fn check(name: &'static str, value: &Value, neutral: &[Neutral]) -> Result<(), ApiError> {
    if value.is_null() || neutral.iter().any(|neutral| neutral.is(value)) {
        return Ok(());
    }
    Err(ApiError::parameter(
        name,
        format!("This value of '{name}' is not supported yet. Leave '{name}' out."),
    ))
}
