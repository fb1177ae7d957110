//! Chat templates: Jinja as the model's publishers write it, for Python's implementation.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value, context};

use super::{python_json, strftime};

/// The conversation could not be rendered: the template refused it, or is wrong.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TemplateError(String);

/// What a template is given.
pub struct Conversation<'a> {
    /// Objects with `role` and `content`.
    pub messages: &'a serde_json::Value,
    /// Whether the text ends where the assistant is to speak.
    pub add_generation_prompt: bool,
    /// Tools that may be called, as the API lists them; `null` for none.
    pub tools: &'a serde_json::Value,
    /// Further variables, by name; `null` for none.
    pub variables: &'a serde_json::Value,
}

/// A compiled template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: Value,
    eos: Value,
}

const NAME: &str = "chat";

impl ChatTemplate {
    pub fn compile(source: &str, bos: Option<String>, eos: Option<String>) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let syntax =
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(refused)?;
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", python_json::filter);
        environment.add_template_owned(NAME, without_training_marks(source)).map_err(refused)?;
        Ok(Self { environment, bos: Value::from(bos), eos: Value::from(eos) })
    }

    pub fn render(&self, conversation: &Conversation<'_>) -> Result<String, TemplateError> {
        let template = self.environment.get_template(NAME).map_err(refused)?;
        let given = context! {
            messages => Value::from(Serde(conversation.messages)),
            add_generation_prompt => conversation.add_generation_prompt,
            tools => Value::from(Serde(conversation.tools)),
            bos_token => self.bos.clone(),
            eos_token => self.eos.clone(),
        };
        let variables = Value::from(Serde(conversation.variables));
        let context = if variables.is_none() {
            given
        } else {
            context! { ..given, ..variables }
        };
        template.render(context).map_err(refused)
    }
}

/// Without the marks around what a model is trained to say, a block that Python's library adds to the language.
fn without_training_marks(source: &str) -> String {
    let mut source = source.to_owned();
    for name in ["generation", "endgeneration"] {
        for (begin, end) in [("", ""), ("-", ""), ("", "-"), ("-", "-")] {
            // A comment takes the same spaces away.
            let comment = format!("{{#{begin} {end}#}}");
            source = source.replace(&format!("{{%{begin} {name} {end}%}}"), &comment);
        }
    }
    source
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The present time in UTC.
fn strftime_now(format: String) -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    strftime::format(&format, seconds)
}

fn refused(error: Error) -> TemplateError {
    TemplateError(error.detail().map_or_else(|| error.to_string(), str::to_owned))
}
