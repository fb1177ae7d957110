use serde_json::{Value, json};

use super::*;

fn tiny() -> Model {
    Model::load(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny"))).unwrap()
}

fn render(template: &str, messages: Value) -> Result<String, TemplateError> {
    let template = ChatTemplate::compile(template, Some("<s>".into()), Some("</s>".into())).unwrap();
    let variables = json!({ "language": "en" });
    template.render(&Conversation {
        messages: &messages,
        add_generation_prompt: true,
        tools: &json!([{ "b": 1, "a": "\u{e9}" }]),
        variables: &variables,
    })
}

#[test]
fn a_prompt_begins_with_one_bos() {
    let model = tiny();
    let plain = model.encode_prompt("Once upon a time").unwrap();
    assert_eq!(plain[0], 0);
    assert_eq!(model.encode_prompt("<|bos|>Once upon a time").unwrap(), plain);
    assert_eq!(model.encode_chat("<|bos|>Once upon a time").unwrap(), plain);
    assert_eq!(model.decode(&plain), "Once upon a time");
}

#[test]
fn the_reference_prompts_are_encoded_to_the_reference_tokens() {
    let model = tiny();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny/reference.json");
    let reference: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    for prompt in reference["prompts"].as_array().unwrap() {
        let ids: Vec<u32> = serde_json::from_value(prompt["ids"].clone()).unwrap();
        assert_eq!(model.encode_prompt(&model.decode(&ids)).unwrap(), ids);
    }
}

#[test]
fn templates_of_python_render() {
    let text = render(
        "{{ bos_token }}{% for m in messages %}\n    {% if m.role.startswith('u') %}\n[{{ m['content'].strip() | upper }}]\n    \
         {% endif %}\n{% endfor %}{% if add_generation_prompt %}{{ language }}:{{ {'a': [1, '<b>']} | tojson }}{% endif %}",
        json!([{ "role": "user", "content": " hi " }]),
    );
    assert_eq!(text.unwrap(), "<s>[HI]\nen:{\"a\": [1, \"<b>\"]}");
}

#[test]
fn what_python_adds_to_the_language_is_known() {
    for (template, text) in [
        ("{{ tools | tojson }}", "[{\"b\": 1, \"a\": \"\u{e9}\"}]"),
        ("{{ tools[0] | tojson(sort_keys=true) }}", "{\"a\": \"\u{e9}\", \"b\": 1}"),
        ("{{ tools[0] | tojson(separators=(',', ':')) }}", "{\"b\":1,\"a\":\"\u{e9}\"}"),
        ("{{ tools[0].a | tojson(ensure_ascii=true) }}", "\"\\u00e9\""),
        ("{{ tools[0] | tojson(indent=2) }}", "{\n  \"b\": 1,\n  \"a\": \"\u{e9}\"\n}"),
        ("a {% generation %}b{%- endgeneration %} c", "a b c"),
        ("{% for k, v in tools[0].items() %}{{ k }}={{ v }};{% endfor %}", "b=1;a=\u{e9};"),
        ("{{ 'a</think>b'.split('</think>')[-1].lstrip('b') }}{{ ' x '.strip() }}", "x"),
        (
            "{% set ns = namespace(n=0) %}{% for m in [1, 2] %}{% set ns.n = ns.n + m %}{% endfor %}{{ ns.n }}",
            "3",
        ),
        ("{% for m in [1, 2, 3][::-1] %}{% if m == 2 %}{% continue %}{% endif %}{{ m }}{% endfor %}", "31"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) }}{{ nothing is defined }}", "<1>False"),
        ("{{ [{'a': 1}, {'a': 2}] | selectattr('a', 'equalto', 2) | map(attribute='a') | join }}", "2"),
        ("{{ messages is iterable and messages is not mapping and 'x' is string }}", "True"),
    ] {
        assert_eq!(render(template, json!([])).unwrap(), text, "{template}");
    }
}

#[test]
fn a_template_may_refuse() {
    let refused = render("{{ raise_exception('roles must alternate') }}", json!([])).unwrap_err();
    assert_eq!(refused.to_string(), "roles must alternate");
}

#[test]
fn text_cannot_have_fewer_tokens_than_the_lower_bound() {
    let model = tiny();
    let text = " the".repeat(1000);
    assert!(model.tokens_min(text.len()) <= model.encode_prompt(&text).unwrap().len());
    assert!(model.tokens_min(1 << 20) > 4096);
}
