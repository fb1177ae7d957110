//! From tokens to text: no half characters, exact stops, whatever the tokens are.

use std::sync::Arc;

use kvbm_frontend::{Detokenizer, Model, StopFilter};
use kvbm_proto::v1::FinishReason;
use proptest::prelude::*;
use serde_json::json;

use crate::client::{Open, post};
use crate::frontend::Frontend;
use crate::mock::{MockWorker, Script, say, tiny, tokens};

#[tokio::test]
async fn characters_split_over_tokens_come_whole() {
    let folder = tempfile::tempdir().unwrap();
    let text = "caf\u{e9} \u{65e5}\u{672c} \u{1f642}!";
    assert!(tokens(text).len() > text.chars().count(), "each of these characters must be several tokens");
    let worker = MockWorker::start(folder.path(), "w", "tiny", say(text));
    let frontend = Frontend::of(&[&worker]).await;
    let request = json!({ "model": "tiny", "prompt": "Once", "stream": true });
    let events = post(frontend.address, "/v1/completions", request).await.events();
    let pieces: Vec<&str> =
        events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
    assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
    assert_eq!(pieces.concat(), text);

    // A character that never becomes whole is told at the end.
    let mut half = tokens("\u{1f642}");
    half.pop();
    worker.set(Script::Say(half.into_iter().map(|token| vec![token]).collect(), FinishReason::Length));
    let request = json!({ "model": "tiny", "prompt": "Once" });
    assert_eq!(
        post(frontend.address, "/v1/completions", request).await.json()["choices"][0]["text"],
        "\u{fffd}"
    );
}

#[tokio::test]
async fn a_stop_string_across_tokens_ends_the_answer_and_the_request() {
    let folder = tempfile::tempdir().unwrap();
    let text = " there was a little girl. She had a dog";
    let worker = MockWorker::start(folder.path(), "w", "tiny", Script::Hang(tokens(text)));
    let frontend = Frontend::of(&[&worker]).await;
    let stop = "tle gi";
    let said = tokens(text);
    let needed = (1..said.len()).find(|&count| tiny().decode(&said[..count]).contains(stop)).unwrap();
    for (count, stop) in [(1, json!(stop)), (2, json!(["never", stop])), (3, json!([stop, "dog"]))] {
        let request = json!({ "model": "tiny", "prompt": "Once", "stop": stop });
        let body = post(frontend.address, "/v1/completions", request).await.json();
        assert_eq!(body["choices"][0]["text"], " there was a lit");
        assert_eq!(body["choices"][0]["finish_reason"], "stop");
        assert_eq!(body["usage"]["completion_tokens"], needed);
        worker.cancelled(count).await;
    }
    // What may become a stop string is held back, and given when it does not.
    worker.set(Script::Hang(tokens(" a li")));
    let request = json!({ "model": "tiny", "prompt": "Once", "stop": " little", "stream": true });
    let mut open = Open::post(frontend.address, "/v1/completions", request.clone()).await;
    let text = open.next().await.unwrap();
    assert!(text.contains("\" a\"") && !text.contains("li\""), "{text}");
    drop(open);
    worker.set(say(" a li"));
    let events = post(frontend.address, "/v1/completions", request).await.events();
    let text: String = events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, " a li");
}

/// A tokenizer whose tokens are words and, for what it does not know, bytes; it cannot be decoded token by token.
fn word_model() -> Arc<Model> {
    let folder = tempfile::tempdir().unwrap();
    let mut vocabulary =
        json!({ "<unk>": 0, "<s>": 1, "</s>": 2, "\u{2581}the": 259, "\u{2581}cat": 260, "s": 261 });
    for byte in 0..256 {
        vocabulary[format!("<0x{byte:02X}>")] = json!(byte + 3);
    }
    let special = |id: u32, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true })
    };
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "\u{2581}" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 } ] },
        "model": { "type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "vocab": vocabulary, "merges": [] },
    });
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    Arc::new(Model::load(folder.path()).unwrap())
}

#[test]
fn tokens_that_are_no_bytes_are_decoded_in_a_window() {
    let byte = |byte: u32| byte + 3;
    let model = word_model();
    let mut detokenizer = Detokenizer::new(&model, &[1, 259]);
    let mut pieces = Vec::new();
    for token in [260, 261, byte(0xe2), byte(0x82), byte(0xac), 2, 259, byte(0xf0), byte(0x9f)] {
        let mut piece = String::new();
        detokenizer.push(token, &mut piece);
        pieces.push(piece);
    }
    // The first word keeps its space, since the prompt is in front of it.
    assert_eq!(pieces, [" cat", "s", "", "", "\u{20ac}", "", " the", "", ""]);
    let mut end = String::new();
    detokenizer.flush(&mut end);
    assert_eq!(end, "\u{fffd}\u{fffd}");

    // Bytes that never become a character do not wait for ever.
    let mut detokenizer = Detokenizer::new(&model, &[]);
    let mut text = String::new();
    (0..100).for_each(|_| detokenizer.push(byte(0xff), &mut text));
    assert!(text.chars().count() >= 80, "{}", text.len());
}

fn token() -> impl Strategy<Value = u32> {
    // Single bytes and fragments often, special and unknown tokens too.
    prop_oneof![3 => 0..300u32, 2 => 0..4096u32, 1 => Just(9999u32)]
}

fn cut(text: &str, stops: &[String]) -> String {
    let ends =
        stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|start| (start + stop.len(), start)));
    ends.min().map_or(text, |(_, start)| &text[..start]).to_owned()
}

fn run(tokens: &[u32], stops: &[String]) -> String {
    let mut detokenizer = Detokenizer::new(tiny(), &[]);
    let mut filter = StopFilter::new(stops.to_vec());
    let (mut piece, mut out) = (String::new(), String::new());
    for &token in tokens {
        piece.clear();
        detokenizer.push(token, &mut piece);
        if filter.push(&piece, &mut out) {
            return out;
        }
    }
    piece.clear();
    detokenizer.flush(&mut piece);
    if !filter.push(&piece, &mut out) {
        filter.flush(&mut out);
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn text_piece_by_piece_is_the_text_of_all_tokens(tokens in prop::collection::vec(token(), 0..40)) {
        prop_assert_eq!(run(&tokens, &[]), tiny().decode(&tokens));
    }

    #[test]
    fn text_ends_at_the_first_stop_string(
        tokens in prop::collection::vec(token(), 1..40),
        spots in prop::collection::vec((any::<prop::sample::Index>(), 1..6usize), 1..4),
    ) {
        let text = tiny().decode(&tokens);
        let characters: Vec<char> = text.chars().collect();
        prop_assume!(!characters.is_empty());
        let stops: Vec<String> = spots
            .into_iter()
            .map(|(start, len)| characters[start.index(characters.len())..].iter().take(len).collect())
            .collect();
        prop_assert_eq!(run(&tokens, &stops), cut(&text, &stops));
    }
}
