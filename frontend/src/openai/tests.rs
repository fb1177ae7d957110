use bytes::BytesMut;
use serde_json::{Value, json};

use super::*;
use crate::metrics::Api;

fn options(fields: Value) -> Result<Options, Value> {
    let mut body = json!({ "model": "tiny" });
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let parameters = Parameters::parse(body.to_string().as_bytes()).unwrap();
    Options::of(&parameters)
        .map_err(|error| serde_json::from_slice::<Value>(&error.json()).unwrap()["error"].take())
}

#[test]
fn neutral_values_of_what_is_not_supported_are_accepted() {
    options(json!({
        "n": 1, "best_of": 1, "echo": false, "suffix": null, "logprobs": false, "top_logprobs": 0, "top_p": 1.0,
        "top_k": -1, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
        "logit_bias": {}, "tools": [], "tool_choice": "auto", "response_format": { "type": "text" },
        "modalities": ["text"], "user": "u", "metadata": {}, "store": false, "something_new": [1],
        "stream_options": { "include_usage": true }, "parallel_tool_calls": true, "min_tokens": 0,
    }))
    .unwrap();
    options(json!({ "min_tokens": 16, "ignore_eos": true })).unwrap();
}

#[test]
fn anything_else_is_refused_by_name() {
    for (name, value) in [
        ("n", json!(2)),
        ("n", json!(0)),
        ("best_of", json!(3)),
        ("echo", json!(true)),
        ("suffix", json!("x")),
        ("logprobs", json!(true)),
        ("logprobs", json!(5)),
        ("top_logprobs", json!(1)),
        ("top_p", json!(0.9)),
        ("top_p", json!("one")),
        ("top_k", json!(40)),
        ("frequency_penalty", json!(0.5)),
        ("presence_penalty", json!(-1)),
        ("logit_bias", json!({ "5": 1 })),
        ("tools", json!([{ "type": "function" }])),
        ("tool_choice", json!("required")),
        ("response_format", json!({ "type": "json_object" })),
        ("modalities", json!(["text", "audio"])),
        ("min_tokens", json!(4)),
        ("temperature", json!(-0.1)),
        ("temperature", json!("hot")),
        ("seed", json!(1.5)),
        ("stop", json!("")),
        ("stop", json!([1])),
        ("stop", json!(vec!["x"; 17])),
        ("stop_token_ids", json!([-1])),
        ("stream", json!("yes")),
        ("stream_options", json!(true)),
        ("cache_salt", json!(5)),
        ("nvext", json!([])),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-5)),
        ("max_tokens", json!(1.5)),
        ("max_tokens", json!("10")),
        ("max_completion_tokens", json!(-1)),
        ("model", json!(null)),
        ("model", json!("")),
    ] {
        let error = options(json!({ name: value })).unwrap_err();
        assert_eq!(error["param"], name, "{value}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(error["message"].as_str().unwrap().contains(name), "{error}");
    }
}

#[test]
fn options_are_read() {
    let options = options(json!({
        "max_tokens": 7, "max_completion_tokens": 9, "temperature": 0, "seed": -1, "stop": "x",
        "nvext": { "cache_salt": "pepper", "ignore_eos": true }, "stream": true,
    }))
    .unwrap();
    assert_eq!((options.max_tokens, options.temperature, options.seed), (Some(9), Some(0.0), Some(u64::MAX)));
    assert_eq!((options.stop.as_slice(), options.cache_salt.as_str()), (&["x".to_owned()][..], "pepper"));
    assert!(options.ignore_eos && options.stream && !options.include_usage);
}

#[test]
fn prompts_are_read_in_every_shape() {
    let text = |text: &str| PromptItem::Text(text.to_owned());
    assert_eq!(prompts(json!("a")).unwrap(), [text("a")]);
    assert_eq!(prompts(json!(["a", "b"])).unwrap(), [text("a"), text("b")]);
    assert_eq!(prompts(json!([1, 2])).unwrap(), [PromptItem::Tokens(vec![1, 2])]);
    assert_eq!(
        prompts(json!([[1], [2]])).unwrap(),
        [PromptItem::Tokens(vec![1]), PromptItem::Tokens(vec![2])]
    );
    for wrong in
        [json!(null), json!(""), json!([]), json!([""]), json!([[]]), json!(5), json!([1, "a"]), json!([-1])]
    {
        assert!(prompts(wrong.clone()).is_err(), "{wrong}");
    }
}

#[test]
fn messages_are_checked_and_parts_joined() {
    let parts = json!([{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }]);
    let read = messages(json!([{ "role": "user", "content": parts }, { "role": "assistant" }])).unwrap();
    assert_eq!(read[0]["content"], "ab");
    for wrong in [
        json!(null),
        json!([]),
        json!(["x"]),
        json!([{ "content": "x" }]),
        json!([{ "role": "user" }]),
        json!([{ "role": "user", "content": [{ "type": "image_url" }] }]),
    ] {
        assert!(messages(wrong.clone()).is_err(), "{wrong}");
    }
}

#[test]
fn chunks_are_json() {
    for api in [Api::Completions, Api::Chat] {
        let writer = ChunkWriter::new(api, "id-\"1\"", 5, "tiny", true);
        let mut out = BytesMut::new();
        writer.role(0, &mut out);
        writer.text(0, "a \"b\"\n\u{20ac}", &mut out);
        writer.finish(1, Finish::Length, &mut out);
        writer.usage(Usage::new(3, 4, CachedTokens { device: 1, host: 1, disk: 0 }), &mut out);
        let text = String::from_utf8(out.to_vec()).unwrap();
        let chunks: Vec<Value> = text
            .split_terminator("\n\n")
            .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
            .collect();
        let [.., piece, last, usage] = chunks.as_slice() else { panic!() };
        let choice = &piece["choices"][0];
        let content = if api == Api::Chat { &choice["delta"]["content"] } else { &choice["text"] };
        assert_eq!((content, &piece["id"]), (&json!("a \"b\"\n\u{20ac}"), &json!("id-\"1\"")));
        assert!(piece.get("usage").unwrap().is_null());
        assert_eq!(
            (&last["choices"][0]["finish_reason"], &last["choices"][0]["index"]),
            (&json!("length"), &json!(1))
        );
        assert_eq!(usage["usage"]["total_tokens"], 7);
        assert_eq!(usage["usage"]["prompt_tokens_details"]["cached_tokens"], 2);
        assert_eq!(usage["choices"], json!([]));
    }
}

#[test]
fn bodies_that_are_no_json_object_are_refused() {
    for body in [&b""[..], b"{", b"[]", b"[\"tiny\"]", b"null", b"{\"model\": \"\xff\"}", b"{\"a\":1}x"] {
        assert!(Parameters::parse(body).is_err());
    }
}
