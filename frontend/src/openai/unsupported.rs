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

/// Refuses what is asked for and cannot be done.
pub fn refuse(p: &Parameters) -> Result<(), ApiError> {
    let table: [(&'static str, &Value, &[Neutral]); 37] = [
        ("n", &p.n, &[Number(1.0)]),
        ("best_of", &p.best_of, &[Number(1.0)]),
        ("echo", &p.echo, &[Flag(false)]),
        ("suffix", &p.suffix, &[Word("")]),
        ("logprobs", &p.logprobs, &[Flag(false)]),
        ("top_logprobs", &p.top_logprobs, &[Number(0.0)]),
        ("prompt_logprobs", &p.prompt_logprobs, &[Flag(false)]),
        ("top_p", &p.top_p, &[Number(1.0)]),
        ("top_k", &p.top_k, &[Number(0.0), Number(-1.0)]),
        ("min_p", &p.min_p, &[Number(0.0)]),
        ("presence_penalty", &p.presence_penalty, &[Number(0.0)]),
        ("frequency_penalty", &p.frequency_penalty, &[Number(0.0)]),
        ("repetition_penalty", &p.repetition_penalty, &[Number(1.0)]),
        ("length_penalty", &p.length_penalty, &[Number(1.0)]),
        ("use_beam_search", &p.use_beam_search, &[Flag(false)]),
        ("logit_bias", &p.logit_bias, &[Empty]),
        ("bad_words", &p.bad_words, &[Empty]),
        ("tools", &p.tools, &[Empty]),
        ("tool_choice", &p.tool_choice, &[Word("none"), Word("auto")]),
        ("functions", &p.functions, &[Empty]),
        ("function_call", &p.function_call, &[Word("none"), Word("auto")]),
        ("response_format", &p.response_format, &[PlainText]),
        ("structured_outputs", &p.structured_outputs, &[Empty]),
        ("guided_json", &p.guided_json, &[]),
        ("guided_regex", &p.guided_regex, &[]),
        ("guided_choice", &p.guided_choice, &[Empty]),
        ("guided_grammar", &p.guided_grammar, &[]),
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
    ];
    for (name, value, neutral) in table {
        check(name, value, neutral)?;
    }
    check("include_stop_str_in_output", &p.include_stop_str_in_output, &[Flag(false)])?;
    check("skip_special_tokens", &p.skip_special_tokens, &[Flag(true)])
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
