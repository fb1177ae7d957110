use serde_json::{Value, json};

use super::*;

fn tiny() -> Model {
    Model::load(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny"))).unwrap()
}

fn render(template: &str, messages: Value) -> Result<String, TemplateError> {
    let template = ChatTemplate::compile(template, Some("<s>".into()), Some("</s>".into())).unwrap();
    let variables = json!({ "language": "en" });
    template.render(&Conversation { messages: &messages, add_generation_prompt: true, variables: &variables })
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
