//! The conversation: what was said so far, and how it goes on.

use std::io::{BufRead, IsTerminal, Write, stdin, stdout};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

use super::RunArgs;
use super::client::post;

/// See the module.
pub(super) struct Talk {
    address: SocketAddr,
    /// What all requests have in common.
    base: Value,
    /// Said before anything else.
    system: Vec<Value>,
    messages: Vec<Value>,
    /// Set by an interrupt: the answer is not wanted any more.
    interrupted: Arc<AtomicBool>,
}

impl Talk {
    pub fn new(address: SocketAddr, args: &RunArgs, runtime: &tokio::runtime::Handle) -> Self {
        let mut base =
            json!({ "model": "model", "stream": true, "stream_options": { "include_usage": true } });
        let given = [
            ("max_tokens", args.max_tokens.map(Value::from)),
            ("temperature", args.temperature.map(Value::from)),
            ("seed", args.seed.map(Value::from)),
        ];
        for (name, value) in given {
            if let Some(value) = value {
                base[name] = value;
            }
        }
        let system: Vec<Value> =
            args.system.iter().map(|text| json!({ "role": "system", "content": text })).collect();
        let interrupted = Arc::new(AtomicBool::new(false));
        let flag = interrupted.clone();
        runtime.spawn(async move {
            while tokio::signal::ctrl_c().await.is_ok() {
                // The second one in a row leaves.
                if flag.swap(true, Ordering::Relaxed) {
                    std::process::exit(130);
                }
            }
        });
        Self { address, base, messages: system.clone(), system, interrupted }
    }

    /// Answers the prompt, or what is typed until there is no more.
    pub fn go_on(mut self, prompt: Option<String>) -> Result<(), String> {
        if let Some(prompt) = prompt {
            return self.answer(&prompt).map(drop);
        }
        let terminal = stdin().is_terminal();
        if terminal {
            println!("Type a message. /clear forgets the conversation, /exit leaves.");
        }
        loop {
            if terminal {
                print!("> ");
                stdout().flush().map_err(|error| error.to_string())?;
            }
            let mut line = String::new();
            if stdin().lock().read_line(&mut line).map_err(|error| error.to_string())? == 0 {
                return Ok(());
            }
            self.interrupted.store(false, Ordering::Relaxed);
            match line.trim() {
                "" => {}
                "/exit" | "/quit" => return Ok(()),
                "/clear" => self.messages = self.system.clone(),
                command if command.starts_with('/') => {
                    println!("/clear forgets the conversation, /exit leaves.")
                }
                text => {
                    let said = self.messages.len();
                    match self.answer(text) {
                        Ok(tokens) if terminal => println!("[{tokens}]"),
                        Ok(_) => {}
                        // What could not be answered was not said.
                        Err(error) if terminal => {
                            self.messages.truncate(said);
                            println!("{error}");
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
        }
    }

    /// Prints the answer while it comes; returns what it cost.
    fn answer(&mut self, text: &str) -> Result<String, String> {
        self.messages.push(json!({ "role": "user", "content": text }));
        let mut body = self.base.clone();
        body["messages"] = Value::Array(self.messages.clone());
        let (mut answer, mut usage, begin) = (String::new(), Value::Null, Instant::now());
        let interrupted = self.interrupted.clone();
        post(self.address, "/v1/chat/completions", &body, |event| {
            if let Some(piece) = event["choices"][0]["delta"]["content"].as_str() {
                answer.push_str(piece);
                print!("{piece}");
                // What cannot be printed now is printed with the next piece.
                let _ = stdout().flush();
            }
            if event["usage"].is_object() {
                usage = event["usage"].clone();
            }
            !interrupted.load(Ordering::Relaxed)
        })?;
        println!();
        self.messages.push(json!({ "role": "assistant", "content": answer }));
        let seconds = begin.elapsed().as_secs_f64();
        let count = |name: &str| usage[name].as_u64().unwrap_or(0);
        let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
        Ok(format!(
            "{} tokens of prompt, {cached} of them cached; {} tokens in {seconds:.1} s",
            count("prompt_tokens"),
            count("completion_tokens"),
        ))
    }
}
