use proptest::prelude::*;

use super::*;

/// Text and calls of an answer that comes in these pieces.
fn parse(choice: &ToolChoice, format: Option<Format>, pieces: &[&str]) -> (String, Vec<(String, String)>) {
    let mut parser = CallParser::new(choice, format);
    let mut text = String::new();
    let mut calls: Vec<(String, String)> = Vec::new();
    let mut take = |delta: Delta| {
        text.push_str(&delta.text);
        for call in delta.calls {
            match call.head {
                Some((id, name)) => {
                    assert_eq!((call.index, id.len()), (calls.len(), 9));
                    calls.push((name, call.arguments));
                }
                None => calls[call.index].1.push_str(&call.arguments),
            }
        }
    };
    for piece in pieces {
        let mut delta = Delta { text: (*piece).to_owned(), ..Delta::default() };
        parser.push(&mut delta);
        take(delta);
    }
    let mut delta = Delta::default();
    parser.end(&mut delta);
    take(delta);
    assert_eq!(parser.has_called(), !calls.is_empty());
    (text, calls)
}

/// How calls are written, what is said, and what of it is text and which calls.
type Case = (Option<Format>, &'static str, &'static str, &'static [(&'static str, &'static str)]);

const CASES: [Case; 15] = [
    (
        Some(Format::Tagged),
        "Let me look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Ulm\"}}\n</tool_call>",
        "Let me look.",
        &[("weather", r#"{"city":"Ulm"}"#)],
    ),
    (
        Some(Format::Tagged),
        "<tool_call>{\"name\":\"a\",\"arguments\":{}}</tool_call>\n<tool_call>{\"name\":\"b\"}</tool_call>\n",
        "",
        &[("a", "{}"), ("b", "{}")],
    ),
    (Some(Format::Tagged), "1 < 2, <tool and no call\n", "1 < 2, <tool and no call\n", &[]),
    (Some(Format::Tagged), "<tool_call>oh no</tool_call> what", "<tool_call>oh no</tool_call> what", &[]),
    (Some(Format::Tagged), "<tool_call>{\"name\":\"a\",\"arg", "<tool_call>{\"name\":\"a\",\"arg", &[]),
    (Some(Format::Tagged), "<tool_call>{\"name\":\"a\"}", "", &[("a", "{}")]),
    (
        Some(Format::Objects),
        "{\"name\": \"weather\", \"parameters\": {\"city\": \"a \\\"{\\\" b\"}}",
        "",
        &[("weather", r#"{"city":"a \"{\" b"}"#)],
    ),
    (
        Some(Format::Objects),
        "<|python_tag|>{\"name\": \"a\", \"parameters\": {}}; {\"name\": \"b\", \"parameters\": {\"x\": {}}}",
        "",
        &[("a", "{}"), ("b", r#"{"x":{}}"#)],
    ),
    (Some(Format::Objects), "The answer is {42}.", "The answer is {42}.", &[]),
    (Some(Format::Objects), "{\"city\": \"Ulm\"} is JSON", "{\"city\": \"Ulm\"} is JSON", &[]),
    (Some(Format::Objects), "{\"name\": \"a\", \"param", "{\"name\": \"a\", \"param", &[]),
    (
        Some(Format::List),
        "[TOOL_CALLS] [{\"name\": \"a\", \"arguments\": {\"x\": [1]}}, {\"name\": \"b\", \"arguments\": \"{}\"}]",
        "",
        &[("a", r#"{"x":[1]}"#), ("b", "{}")],
    ),
    (Some(Format::List), " [{\"name\": \"a\", \"arguments\": {}}]\n", "", &[("a", "{}")]),
    (Some(Format::List), "[1, 2]", "[1, 2]", &[]),
    (Some(Format::List), "  plain", "  plain", &[]),
];

fn owned(calls: &[(&str, &str)]) -> Vec<(String, String)> {
    calls.iter().map(|(name, arguments)| ((*name).to_owned(), (*arguments).to_owned())).collect()
}

#[test]
fn calls_are_told_from_text() {
    for (format, answer, text, calls) in CASES {
        let got = parse(&ToolChoice::Auto, format, &[answer]);
        assert_eq!(got, (text.to_owned(), owned(calls)), "{answer}");
    }
}

#[test]
fn a_call_that_has_to_be_made_is_one() {
    let function = ToolChoice::Function("weather".into());
    let got = parse(&function, None, &["{\"city\"", ": \"Ulm\"}"]);
    assert_eq!(got, (String::new(), owned(&[("weather", "{\"city\": \"Ulm\"}")])));
    let list = "[{\"name\": \"a\", \"arguments\": {\"x\": 1}},{\"name\": \"a\", \"arguments\": {}}]";
    let got = parse(&ToolChoice::Required, Some(Format::Tagged), &[list]);
    assert_eq!(got, (String::new(), owned(&[("a", "{\"x\":1}"), ("a", "{}")])));
}

#[test]
fn a_template_tells_the_format() {
    let of = Format::of_template;
    assert_eq!(of("{% if tools %}<tool_call></tool_call>{% endif %}"), Some(Format::Tagged));
    assert_eq!(of("{% if tools %}[AVAILABLE_TOOLS][TOOL_CALLS]{% endif %}"), Some(Format::List));
    assert_eq!(of("{% if tools is not none %}<|python_tag|>{% endif %}"), Some(Format::Objects));
    assert_eq!(of("{{ messages[0].content }}"), None);
}

proptest! {
    #[test]
    fn how_an_answer_is_split_makes_no_difference(case in 0..CASES.len(), cuts in prop::collection::vec(0usize..100, 0..20)) {
        let (format, answer, text, calls) = CASES[case];
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(answer.len())).collect();
        cuts.extend([0, answer.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&str> = cuts.windows(2).map(|pair| &answer[pair[0]..pair[1]]).collect();
        prop_assert_eq!(parse(&ToolChoice::Auto, format, &pieces), (text.to_owned(), owned(calls)));
    }

    #[test]
    fn nothing_that_is_said_is_lost_or_a_panic(format in 0..3usize, pieces in prop::collection::vec("[\\[{}\":,a<>/_tool_call\\\\ \n]{0,8}", 0..12)) {
        let format = [Format::Tagged, Format::Objects, Format::List][format];
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        let (text, calls) = parse(&ToolChoice::Auto, Some(format), &pieces);
        prop_assert!(!calls.is_empty() || text.trim() == pieces.concat().trim());
    }
}
