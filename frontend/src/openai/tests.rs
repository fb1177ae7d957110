use bytes::BytesMut;
use kvbm_hash::{Retention, RetentionConfig};
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
