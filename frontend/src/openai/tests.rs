use bytes::BytesMut;
use kvbm_hash::{Retention, RetentionConfig};
use serde_json::{Value, json};

use super::*;
use crate::metrics::Api;

fn options(fields: Value) -> Result<Options, Value> {
    let mut body = json!({ "model": "tiny" });
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let parameters = Parameters::parse(body.to_string().as_bytes()).unwrap();
    Options::of(&parameters, Api::Completions)
        .map_err(|error| serde_json::from_slice::<Value>(&error.json()).unwrap()["error"].take())
}

fn chat_options(fields: Value) -> Result<Options, Value> {
    let mut body = json!({ "model": "tiny" });
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let parameters = Parameters::parse(body.to_string().as_bytes()).unwrap();
    Options::of(&parameters, Api::Chat)
        .map_err(|error| serde_json::from_slice::<Value>(&error.json()).unwrap()["error"].take())
}

fn tool(name: &str) -> Value {
    let parameters = json!({ "type": "object", "properties": { "x": { "$ref": "#/$defs/x" } },
        "$defs": { "x": { "type": "integer" } } });
    json!({ "type": "function", "function": { "name": name, "parameters": parameters } })
}

#[test]
fn neutral_values_of_what_is_not_supported_are_accepted() {
    options(json!({
        "n": 1, "best_of": 1, "echo": false, "suffix": null, "logprobs": false, "top_p": 1.0,
        "top_k": -1, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
        "logit_bias": {}, "tools": [], "tool_choice": "auto", "response_format": { "type": "text" },
        "modalities": ["text"], "user": "u", "metadata": {}, "store": false, "something_new": [1],
        "stream_options": { "include_usage": true }, "parallel_tool_calls": true, "min_tokens": 0,
        "guided_choice": [], "structured_outputs": { "json": null, "disable_fallback": false },
    }))
    .unwrap();
    options(json!({ "n": 3, "best_of": 3 })).unwrap();
    chat_options(json!({ "logprobs": false, "top_logprobs": 0, "tools": null })).unwrap();
}

#[test]
fn anything_else_is_refused_by_name() {
    for (name, value) in [
        ("n", json!(0)),
        ("n", json!(129)),
        ("n", json!(1.5)),
        ("best_of", json!(3)),
        ("echo", json!("yes")),
        ("suffix", json!("x")),
        ("logprobs", json!(true)),
        ("logprobs", json!(21)),
        ("logprobs", json!(-1)),
        ("top_logprobs", json!(1)),
        ("top_p", json!(0)),
        ("top_p", json!(1.1)),
        ("top_p", json!("one")),
        ("top_k", json!(-2)),
        ("top_k", json!(1.5)),
        ("min_p", json!(2)),
        ("frequency_penalty", json!(2.5)),
        ("presence_penalty", json!("high")),
        ("repetition_penalty", json!(0)),
        ("repetition_penalty", json!(-1)),
        ("logit_bias", json!([5])),
        ("logit_bias", json!({ "five": 1 })),
        ("logit_bias", json!({ "5": 101 })),
        ("logit_bias", json!({ "-5": 1 })),
        ("tools", json!([{ "type": "function" }])),
        ("tool_choice", json!("required")),
        ("response_format", json!("json")),
        ("response_format", json!({ "type": "xml" })),
        ("response_format", json!({ "type": "json_schema" })),
        ("guided_json", json!("{")),
        ("guided_json", json!(5)),
        ("guided_regex", json!("")),
        ("guided_choice", json!([1])),
        ("guided_choice", json!([""])),
        ("guided_grammar", json!({})),
        ("structured_outputs", json!({ "xml": "x" })),
        ("structured_outputs", json!({ "regex": "a", "json": {} })),
        ("modalities", json!(["text", "audio"])),
        ("min_tokens", json!(-4)),
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
    for (fields, param) in [
        (json!({ "min_tokens": 5, "max_tokens": 4 }), "min_tokens"),
        (json!({ "top_k": 5, "nvext": { "top_k": 6 } }), "nvext.top_k"),
        (json!({ "nvext": { "lora": "" } }), "nvext.lora"),
        (json!({ "nvext": { "lora": 5 } }), "nvext.lora"),
        (json!({ "guided_regex": "a", "guided_choice": ["a"] }), "guided_choice"),
        (json!({ "guided_regex": "a", "response_format": { "type": "json_object" } }), "guided_regex"),
        (json!({ "tools": [tool("f")] }), "tools"),
    ] {
        assert_eq!(options(fields).unwrap_err()["param"], param);
    }
    let tools = json!([tool("f")]);
    for (fields, param) in [
        (json!({ "logprobs": 5 }), "logprobs"),
        (json!({ "top_logprobs": 5 }), "top_logprobs"),
        (json!({ "logprobs": true, "top_logprobs": 21 }), "top_logprobs"),
        (json!({ "echo": true }), "echo"),
        (json!({ "tools": {} }), "tools"),
        (json!({ "tools": [{ "type": "function", "function": { "name": "a b" } }] }), "tools"),
        (json!({ "tools": [{ "type": "function", "function": { "name": "a", "parameters": 5 } }] }), "tools"),
        (json!({ "tools": tools, "tool_choice": "always" }), "tool_choice"),
        (
            json!({ "tools": tools, "tool_choice": { "type": "function", "function": { "name": "g" } } }),
            "tool_choice",
        ),
        (json!({ "tools": tools, "tool_choice": { "function": { "name": "f" } } }), "tool_choice"),
        (json!({ "tools": tools, "tool_choice": "required", "guided_regex": "a" }), "tool_choice"),
        (json!({ "tools": tools, "parallel_tool_calls": 1 }), "parallel_tool_calls"),
    ] {
        assert_eq!(chat_options(fields).unwrap_err()["param"], param);
    }
}

#[test]
fn options_are_read() {
    let read = options(json!({
        "max_tokens": 7, "max_completion_tokens": 9, "temperature": 0, "seed": -1, "stop": "x",
        "nvext": { "cache_salt": "pepper", "ignore_eos": true, "top_k": 5, "lora": "terse" }, "stream": true, "n": 2, "logprobs": 3,
        "logit_bias": { "5": -100, "7": 0.5 }, "top_p": 0.5, "top_k": 5, "min_p": 0.25, "repetition_penalty": 1.5,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "min_tokens": 2,
    }))
    .unwrap();
    assert_eq!((read.max_tokens, read.choices, read.stop.as_slice()), (Some(9), 2, &["x".to_owned()][..]));
    assert_eq!((read.cache_salt.as_str(), read.lora.as_str()), ("pepper", "terse"));
    assert!(read.ignore_eos && read.stream && !read.include_usage);
    let sampling = Sampling {
        temperature: Some(0.0),
        seed: Some(u64::MAX),
        top_p: Some(0.5),
        top_k: Some(5),
        min_p: Some(0.25),
        repetition_penalty: Some(1.5),
        presence_penalty: 0.5,
        frequency_penalty: -0.5,
        logit_bias: [(5, -100.0), (7, 0.5)].into(),
        min_tokens: 2,
        logprobs: Some(3),
    };
    assert_eq!(read.sampling, sampling);
    assert_eq!(options(json!({ "echo": true, "max_tokens": 0 })).unwrap().max_tokens, Some(0));
    let chat = |fields| chat_options(fields).unwrap().sampling.logprobs;
    assert_eq!(chat(json!({ "logprobs": true, "top_logprobs": 2 })), Some(2));
    assert_eq!(chat(json!({ "logprobs": true })), Some(0));
}

#[test]
fn guides_are_read_in_every_spelling() {
    use kvbm_proto::v1::guide::Kind;
    let kind = |fields: Value| options(fields).unwrap().guide().map(|guided| guided.kind);
    let schema = json!({ "type": "object", "properties": { "b": {}, "a": {} } });
    let expected = Some(Kind::JsonSchema(schema.to_string()));
    for fields in [
        json!({ "guided_json": schema }),
        json!({ "guided_json": schema.to_string() }),
        json!({ "nvext": { "guided_json": schema } }),
        json!({ "nvext": { "guided_decoding": { "json": schema } } }),
        json!({ "structured_outputs": { "json": schema } }),
        json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": schema } } }),
    ] {
        assert_eq!(kind(fields), expected);
    }
    let object = Some(Kind::JsonSchema(r#"{"type":"object"}"#.to_owned()));
    assert_eq!(kind(json!({ "response_format": { "type": "json_object" } })), object);
    assert_eq!(kind(json!({ "structured_outputs": { "json_object": true } })), object);
    assert_eq!(kind(json!({ "guided_regex": "a+" })), Some(Kind::Regex("a+".to_owned())));
    assert_eq!(
        kind(json!({ "nvext": { "guided_grammar": "start: \"a\"" } })),
        Some(Kind::Lark("start: \"a\"".to_owned()))
    );
    let choices = kvbm_proto::v1::Choices { texts: vec!["a".to_owned(), "b".to_owned()] };
    assert_eq!(kind(json!({ "guided_choice": ["a", "b"] })), Some(Kind::Choice(choices)));
}

#[test]
fn a_call_that_has_to_be_made_has_a_schema() {
    use kvbm_proto::v1::guide::Kind;
    let schema = |fields: Value| match chat_options(fields).unwrap().guide().map(|guided| guided.kind) {
        Some(Kind::JsonSchema(text)) => serde_json::from_str::<Value>(&text).unwrap(),
        _ => Value::Null,
    };
    let tools = json!([tool("f"), { "type": "function", "function": { "name": "g" } }]);
    assert_eq!(schema(json!({ "tools": tools })), Value::Null);
    assert_eq!(schema(json!({ "tools": tools, "tool_choice": "none" })), Value::Null);
    let named = json!({ "type": "function", "function": { "name": "f" } });
    assert_eq!(schema(json!({ "tools": tools, "tool_choice": named })), tools[0]["function"]["parameters"]);
    let list = schema(json!({ "tools": tools, "tool_choice": "required", "parallel_tool_calls": false }));
    assert_eq!((&list["minItems"], &list["maxItems"]), (&json!(1), &json!(1)));
    assert_eq!(list["$defs"]["x"]["type"], "integer");
    assert_eq!(list["items"]["anyOf"][1]["properties"]["name"]["const"], "g");
}

/// Names of the fields that a type is read from.
fn fields_of<'de, T: serde::Deserialize<'de>>() -> Vec<&'static str> {
    struct Names<'a>(&'a mut Vec<&'static str>);
    impl<'de> serde::Deserializer<'de> for Names<'_> {
        type Error = serde::de::value::Error;
        fn deserialize_any<V: serde::de::Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(serde::de::Error::custom("not a struct"))
        }
        fn deserialize_struct<V: serde::de::Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, Self::Error> {
            self.0.extend(fields);
            Err(serde::de::Error::custom("enough"))
        }
        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
            newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }
    let mut names = Vec::new();
    assert!(T::deserialize(Names(&mut names)).is_err());
    names
}

#[test]
fn every_parameter_is_documented_and_described() {
    let read: std::collections::BTreeSet<&str> = fields_of::<Parameters>().into_iter().collect();
    let listed: std::collections::BTreeSet<&str> = catalog::PARAMETERS.iter().map(|p| p.name).collect();
    let refused: std::collections::BTreeSet<&str> = unsupported::NAMES.into_iter().collect();
    assert!(listed.is_disjoint(&refused));
    assert_eq!(read, &listed | &refused);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/api.md");
    let document = std::fs::read_to_string(path).unwrap();
    for parameter in catalog::PARAMETERS {
        let apis = match parameter.apis {
            catalog::Apis::Both => "both",
            catalog::Apis::Completions => "completions",
            catalog::Apis::Chat => "chat",
        };
        let row = format!("| `{}` | {apis} | {} |", parameter.name, parameter.about);
        assert!(document.lines().any(|line| line == row), "docs/api.md lacks the row {row}");
        serde_json::from_str::<Value>(parameter.schema).unwrap();
    }
    for name in refused {
        assert!(document.contains(&format!("`{name}`")), "docs/api.md does not say that {name} is refused");
    }
    let rows = document.lines().filter(|line| line.starts_with("| `") && line.matches(" | ").count() == 2);
    assert_eq!(rows.count(), listed.len(), "docs/api.md has a row of a parameter that is not there");
    let described = openapi();
    for path in described["paths"].as_object().unwrap().keys() {
        assert!(document.contains(path.as_str()), "docs/api.md does not say what is at {path}");
    }
    let properties = &described["components"]["schemas"]["ChatCompletionRequest"]["properties"];
    assert!(properties["messages"]["description"].is_string() && properties["prompt"].is_null());
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
    let call =
        json!({ "id": "1", "type": "function", "function": { "name": "f", "arguments": "{\"x\": 1}" } });
    let read = messages(json!([{ "role": "assistant", "content": null, "tool_calls": [call] }])).unwrap();
    assert_eq!(read[0]["tool_calls"][0]["function"]["arguments"], json!({ "x": 1 }));
    for wrong in [
        json!(null),
        json!([]),
        json!(["x"]),
        json!([{ "content": "x" }]),
        json!([{ "role": "user" }]),
        json!([{ "role": "user", "content": [{ "type": "image_url" }] }]),
        json!([{ "role": "user", "content": [{ "type": "text" }] }]),
        json!([{ "role": "assistant", "tool_calls": {} }]),
        json!([{ "role": "assistant", "tool_calls": [{ "function": {} }] }]),
        json!([{ "role": "assistant", "tool_calls": [{ "function": { "name": "f", "arguments": "{" } }] }]),
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
        let delta = Delta { text: "a \"b\"\n\u{20ac}".to_owned(), ..Delta::default() };
        writer.delta(0, &delta, &mut out);
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

#[test]
fn retention_is_read_in_every_form_and_place() {
    let full = json!({
        "token_range_retention_configs": [
            { "token_start": 64, "token_end": null, "priority": 50, "duration_ms": null },
            { "token_start": 0, "token_end": 64, "priority": 0, "duration_ms": 30000 },
        ],
        "decode_retention_priority": 20, "decode_duration_ms": 5, "transfer_mode": "DRAM", "directory": "",
    });
    let read = |fields: Value| options(fields).unwrap().retention;
    let config = read(json!({ "kv_cache_retention_config": full })).unwrap();
    let ms = std::time::Duration::from_millis;
    let kept = |priority, duration: Option<u64>| Retention { priority, duration: duration.map(ms) };
    assert_eq!(
        config.per_block(32, 96),
        [kept(0, Some(30_000)), kept(0, Some(30_000)), kept(50, None)].map(Some)
    );
    assert_eq!(config.decode(), kept(20, Some(5)));
    let nvext = read(json!({ "nvext": { "kv_cache_retention_config": full } }));
    assert_eq!(nvext.as_ref(), Some(&config));
    let both = json!({ "kv_cache_retention_config": full, "nvext": { "kv_cache_retention_config": full } });
    assert_eq!(read(both), nvext);
    let short = read(json!({ "kv_cache_retention_config": { "priority": 90, "duration_ms": 30000 } }));
    assert_eq!(short, Some(RetentionConfig::uniform(kept(90, Some(30_000))).unwrap()));
    let open = json!([{ "token_start": 0 }]);
    let open =
        read(json!({ "kv_cache_retention_config": { "token_range_retention_configs": open } })).unwrap();
    assert_eq!((open.per_block(32, 32), open.decode()), (vec![Some(kept(35, None))], kept(35, None)));
    assert_eq!(read(json!({ "kv_cache_retention_config": {} })), Some(RetentionConfig::default()));
    assert_eq!(read(json!({ "kv_cache_retention_config": null, "nvext": {} })), None);
}

#[test]
fn retention_that_is_wrong_is_refused_with_the_whole_path() {
    let range = |more: Value| {
        let mut range = json!({ "token_start": 0, "token_end": 8 });
        range.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let fine = json!({ "token_start": 100, "token_end": null, "priority": null });
        json!({ "token_range_retention_configs": [fine, range] })
    };
    for (config, field) in [
        (json!(5), ""),
        (json!([]), ""),
        (json!({ "priority": 101 }), ".priority"),
        (json!({ "priority": -1 }), ".priority"),
        (json!({ "priority": 50.5 }), ".priority"),
        (json!({ "priority": "high" }), ".priority"),
        (json!({ "priority": true }), ".priority"),
        (json!({ "priority": 1e300 }), ".priority"),
        (json!({ "duration_ms": -5 }), ".duration_ms"),
        (json!({ "duration_ms": 3_155_760_000_001_u64 }), ".duration_ms"),
        (json!({ "priority": 5, "decode_retention_priority": 5 }), ".priority"),
        (json!({ "prio": 5 }), ".prio"),
        (json!({ "decode_retention_priority": 101 }), ".decode_retention_priority"),
        (json!({ "decode_duration_ms": "5" }), ".decode_duration_ms"),
        (json!({ "token_range_retention_configs": {} }), ".token_range_retention_configs"),
        (json!({ "token_range_retention_configs": [7] }), ".token_range_retention_configs[0]"),
        (json!({ "token_range_retention_configs": [{}] }), ".token_range_retention_configs[0].token_start"),
        (range(json!({ "priority": 101 })), ".token_range_retention_configs[1].priority"),
        (range(json!({ "priority": 256 })), ".token_range_retention_configs[1].priority"),
        (range(json!({ "duration_ms": -1 })), ".token_range_retention_configs[1].duration_ms"),
        (range(json!({ "token_start": -1 })), ".token_range_retention_configs[1].token_start"),
        (range(json!({ "token_start": 4_294_967_296_u64 })), ".token_range_retention_configs[1].token_start"),
        (range(json!({ "token_end": 0 })), ".token_range_retention_configs[1].token_end"),
        (range(json!({ "token_end": 101 })), ".token_range_retention_configs[0].token_start"),
        (range(json!({ "token_end": null })), ".token_range_retention_configs[0].token_start"),
        (range(json!({ "end": 5 })), ".token_range_retention_configs[1].end"),
    ] {
        let name = "kv_cache_retention_config";
        for (body, place) in [
            (json!({ name: config }), name.to_owned()),
            (json!({ "nvext": { name: config } }), format!("nvext.{name}")),
        ] {
            let error = options(body).unwrap_err();
            assert_eq!(error["param"], format!("{place}{field}"), "{config}: {error}");
            assert_eq!(error["type"], "invalid_request_error");
            assert!(error["message"].as_str().unwrap().contains(&format!("{place}{field}")), "{error}");
        }
    }
    let differing = json!({
        "kv_cache_retention_config": { "priority": 50 }, "nvext": { "kv_cache_retention_config": { "priority": 51 } },
    });
    assert_eq!(options(differing).unwrap_err()["param"], "nvext.kv_cache_retention_config");
}

#[test]
fn a_tenant_is_named_by_header_or_body_but_not_by_both_differently() {
    let named = |header: &[&str], body: Value| -> Result<String, Value> {
        let mut headers = http::HeaderMap::new();
        header.iter().for_each(|value| {
            headers.append("x-kvbm-tenant", http::HeaderValue::from_str(value).unwrap());
        });
        let options = options(json!({ "nvext": { "tenant": body } }))?;
        tenant(&headers, options.tenant)
            .map_err(|error| serde_json::from_slice::<Value>(&error.json()).unwrap()["error"].take())
    };
    assert_eq!(named(&[], json!(null)), Ok(String::new()));
    assert_eq!(named(&["acme"], json!(null)), Ok("acme".into()));
    assert_eq!(named(&[], json!("acme")), Ok("acme".into()));
    assert_eq!(named(&["acme"], json!("acme")), Ok("acme".into()));
    for (header, body, param) in [
        (&["acme"][..], json!("other"), "nvext.tenant"),
        (&[], json!(""), "nvext.tenant"),
        (&[], json!(5), "nvext.tenant"),
        (&[], json!("x".repeat(257)), "nvext.tenant"),
        (&[""], json!(null), "x-kvbm-tenant"),
        (&["\u{fc}"], json!(null), "x-kvbm-tenant"),
        (&["acme", "acme"], json!(null), "x-kvbm-tenant"),
    ] {
        assert_eq!(named(header, body.clone()).unwrap_err()["param"], param, "{header:?} {body}");
    }
}
