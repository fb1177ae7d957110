mod schemas;

use std::collections::HashSet;

use kvbm_hash::Namespace;
use proptest::prelude::*;

use super::*;
use crate::engine::Want;
use crate::request::{Eos, Request, RequestId};

const VOCAB: u32 = 24;
const EOS: u32 = 5;

/// Logits that depend on all tokens before.
fn logits(tokens: &[u32]) -> Vec<f32> {
    let mut state = tokens
        .iter()
        .fold(7u64, |state, token| (state ^ u64::from(*token)).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let row = (0..VOCAB).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) % 1000) as f32 / 200.0
    });
    row.collect()
}

fn request(sampling: Sampling, prompt: Vec<u32>, generated: Vec<u32>) -> Request {
    Request {
        id: RequestId(1),
        namespace: Namespace([0; 32]),
        prompt,
        generated,
        sampling,
        guide: None,
        max_tokens: 100,
        eos: Eos::Ends,
        stop_token_ids: vec![9],
        retention: None,
        span: tracing::Span::none(),
    }
}

/// Goes on for `count` tokens, whatever ends the sequence.
fn go_on(request: &Request, count: usize) -> Vec<Choice> {
    let mut sampler = Sampler::new(request, &[EOS], &Processors::default()).unwrap();
    let mut generated = request.generated.clone();
    let choices = (0..count).map(|_| {
        let all = [request.prompt.as_slice(), &generated].concat();
        let so_far = SoFar { prompt: &request.prompt, generated: &generated };
        let choice = sampler.choose(&logits(&all), so_far).unwrap();
        generated.push(choice.token);
        choice
    });
    choices.collect()
}

prop_compose! {
    fn any_sampling()(
        temperature in prop_oneof![Just(0.0f32), 0.1f32..2.0],
        seed: u64,
        top_p in prop_oneof![Just(1.0f32), 0.05f32..1.0],
        top_k in 0usize..30,
        min_p in prop_oneof![Just(0.0f32), 0.0f32..1.0],
        repetition_penalty in prop_oneof![Just(1.0f32), 0.5f32..2.0],
        presence_penalty in -2.0f32..2.0,
        frequency_penalty in -2.0f32..2.0,
        logit_bias in prop::collection::vec((0..VOCAB, -100.0f32..100.0), 0..3),
        min_tokens in 0usize..20,
        logprobs in prop::option::of(0usize..20),
    ) -> Sampling {
        Sampling {
            temperature, seed, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty,
            logit_bias, min_tokens, logprobs, prompt_logprobs: None,
        }
    }
}

proptest! {
    /// What another worker would say that is given the tokens so far is what this one says.
    #[test]
    fn a_sequence_goes_on_the_same_wherever_it_was_left(
        sampling in any_sampling(),
        prompt in prop::collection::vec(0..VOCAB, 1..20),
        cut in 0usize..30,
    ) {
        let whole = go_on(&request(sampling.clone(), prompt.clone(), Vec::new()), 30);
        let given: Vec<u32> = whole[..cut].iter().map(|choice| choice.token).collect();
        prop_assert_eq!(&whole[cut..], &go_on(&request(sampling, prompt, given), 30 - cut)[..]);
    }

    #[test]
    fn nothing_ends_a_sequence_before_its_minimum(sampling in any_sampling(), prompt in prop::collection::vec(0..VOCAB, 1..20)) {
        let tokens = go_on(&request(sampling.clone(), prompt, Vec::new()), 30);
        prop_assert!(tokens[..sampling.min_tokens].iter().all(|choice| ![EOS, 9].contains(&choice.token)));
    }
}

proptest! {
    /// Where the engine's own choice is asked for, logits would not have led to another.
    #[test]
    fn the_engine_chooses_only_what_would_be_chosen_anyway(
        any in any_sampling(),
        as_greedy in any::<[bool; 6]>(),
        prompt in prop::collection::vec(0..VOCAB, 1..20),
        generated in prop::collection::vec(0..VOCAB, 0..20),
    ) {
        let greedy = Sampling::greedy();
        let [temperature, repetition, presence, frequency, bias, logprobs] = as_greedy;
        let sampling = Sampling {
            temperature: if temperature { 0.0 } else { any.temperature },
            repetition_penalty: if repetition { 1.0 } else { any.repetition_penalty },
            presence_penalty: if presence { 0.0 } else { any.presence_penalty },
            frequency_penalty: if frequency { 0.0 } else { any.frequency_penalty },
            logit_bias: if bias { Vec::new() } else { any.logit_bias.clone() },
            logprobs: if logprobs { None } else { any.logprobs },
            min_tokens: any.min_tokens,
            ..if temperature { greedy } else { any }
        };
        let request = request(sampling, prompt, generated);
        let mut sampler = Sampler::new(&request, &[EOS], &Processors::default()).unwrap();
        let count = request.generated.len();
        if sampler.want(count) == Want::Largest {
            let row = logits(&[request.prompt.as_slice(), &request.generated].concat());
            let so_far = SoFar { prompt: &request.prompt, generated: &request.generated };
            prop_assert_eq!(sampler.take_largest(largest(&row), count), sampler.choose(&row, so_far).unwrap());
        } else {
            prop_assert!(as_greedy != [true; 6] || count < request.sampling.min_tokens);
        }
    }
}

#[test]
fn who_changes_logits_or_reports_them_wants_them() {
    let want = |sampling: Sampling, processors: Vec<std::sync::Arc<dyn LogitsProcessor>>| {
        let request = request(sampling, vec![1], vec![]);
        Sampler::new(&request, &[EOS], &Processors(processors)).unwrap().want(0)
    };
    let greedy = Sampling::greedy;
    assert_eq!(want(greedy(), vec![]), Want::Largest);
    assert_eq!(want(greedy(), vec![std::sync::Arc::new(Temperature(1.0))]), Want::Logits(1));
    for sampling in [
        Sampling::random(1.0, 1),
        Sampling { repetition_penalty: 1.1, ..greedy() },
        Sampling { presence_penalty: 0.1, ..greedy() },
        Sampling { frequency_penalty: 0.1, ..greedy() },
        Sampling { logit_bias: vec![(1, 1.0)], ..greedy() },
        Sampling { min_tokens: 1, ..greedy() },
        Sampling { logprobs: Some(0), ..greedy() },
    ] {
        assert_eq!(want(sampling.clone(), vec![]), Want::Logits(1), "{sampling:?}");
    }
}

#[test]
fn a_bias_decides() {
    let sampling = Sampling { logit_bias: vec![(3, 100.0)], ..Sampling::random(1.0, 5) };
    assert!(go_on(&request(sampling, vec![1], vec![]), 20).iter().all(|choice| choice.token == 3));
    let sampling =
        Sampling { logit_bias: (1..VOCAB).map(|token| (token, -100.0)).collect(), ..Sampling::greedy() };
    assert!(go_on(&request(sampling, vec![1], vec![]), 20).iter().all(|choice| choice.token == 0));
}

#[test]
fn logprobs_are_the_models_whatever_is_done_to_the_choice() {
    let base = Sampling { logprobs: Some(3), ..Sampling::greedy() };
    let plain = &go_on(&request(base.clone(), vec![1, 2], vec![]), 1)[0];
    let found = plain.logprobs.as_ref().unwrap();
    assert_eq!((found.top[0].0, found.top[0].1), (plain.token, found.logprob));
    let biased = Sampling { logit_bias: vec![(found.top[2].0, 100.0)], temperature: 2.0, ..base };
    let biased = &go_on(&request(biased, vec![1, 2], vec![]), 1)[0];
    assert_eq!(biased.token, found.top[2].0);
    assert_eq!(
        biased.logprobs.as_ref().unwrap(),
        &Logprobs { logprob: found.top[2].1, top: found.top.clone() }
    );
}

#[test]
fn processors_have_the_last_word() {
    let processors = Processors(vec![std::sync::Arc::new(Script(vec![7, 8, EOS]))]);
    let request = request(Sampling::random(1.0, 1), vec![1], vec![]);
    let mut sampler = Sampler::new(&request, &[EOS], &processors).unwrap();
    let mut generated = Vec::new();
    for _ in 0..4 {
        let so_far = SoFar { prompt: &[1], generated: &generated };
        generated.push(sampler.choose(&logits(&[1]), so_far).unwrap().token);
    }
    assert_eq!(generated, [7, 8, EOS, EOS]);
}

#[test]
fn what_cannot_be_is_refused_by_field() {
    let base = Sampling::greedy;
    for (sampling, field) in [
        (Sampling { temperature: -1.0, ..base() }, "temperature"),
        (Sampling { temperature: f32::NAN, ..base() }, "temperature"),
        (Sampling { top_p: 0.0, ..base() }, "top_p"),
        (Sampling { top_p: 1.5, ..base() }, "top_p"),
        (Sampling { min_p: -0.5, ..base() }, "min_p"),
        (Sampling { repetition_penalty: 0.0, ..base() }, "repetition_penalty"),
        (Sampling { presence_penalty: f32::INFINITY, ..base() }, "presence_penalty"),
        (Sampling { frequency_penalty: f32::NAN, ..base() }, "frequency_penalty"),
        (Sampling { logit_bias: vec![(VOCAB, 1.0)], ..base() }, "logit_bias"),
        (Sampling { logit_bias: vec![(0, f32::NAN)], ..base() }, "logit_bias"),
        (Sampling { logprobs: Some(21), ..base() }, "logprobs"),
        (Sampling { prompt_logprobs: Some(21), ..base() }, "prompt_logprobs"),
    ] {
        let Err(crate::Refusal::Invalid { field: found, .. }) = sampling.check(VOCAB as usize) else {
            panic!("{field} is accepted");
        };
        assert_eq!(found, field);
    }
}

fn guides() -> Guides {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny");
    Guides::new(&folder, vec![1])
}

/// Says something by chance under a grammar, until it may end.
fn guided(guides: &Guides, grammar: &Grammar, seed: u64) -> Vec<u32> {
    // The end is as likely as all else together.
    let mut row = vec![0.0; 4096];
    row[1] = (4096f32).ln();
    say(guides, grammar, seed, &row)
}

/// The same of a model that always has the same logits.
fn say(guides: &Guides, grammar: &Grammar, seed: u64, row: &[f32]) -> Vec<u32> {
    let guide = guides.guide(grammar).unwrap();
    let mut request = request(Sampling::random(1.0, seed), vec![0], vec![]);
    request.guide = Some(guide);
    request.stop_token_ids = vec![];
    let mut sampler = Sampler::new(&request, &[1], &Processors::default()).unwrap();
    let mut generated: Vec<u32> = Vec::new();
    while !sampler.is_complete() {
        assert!(generated.len() < 2000, "it comes to an end");
        let so_far = SoFar { prompt: &[0], generated: &generated };
        generated.push(sampler.choose(row, so_far).unwrap().token);
    }
    generated
}

fn text(tokens: &[u32]) -> String {
    static TOKENIZER: std::sync::OnceLock<tokenizers::Tokenizer> = std::sync::OnceLock::new();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny/tokenizer.json");
    let tokenizer = TOKENIZER.get_or_init(|| tokenizers::Tokenizer::from_file(path).unwrap());
    tokenizer.decode(tokens, true).unwrap()
}

#[test]
fn guides_let_only_such_text_through() {
    let guides = guides();
    let choices = ["yes", "no", "\"per haps\"\n"].map(str::to_owned);
    let said: HashSet<String> =
        (0..40).map(|seed| text(&guided(&guides, &Grammar::Choice(choices.to_vec()), seed))).collect();
    assert_eq!(said, HashSet::from(choices));
    for seed in 0..20 {
        let date = text(&guided(&guides, &Grammar::Regex(r"[0-9]{4}-(0[1-9]|1[0-2])/[a-c]+".into()), seed));
        assert!(
            date.as_bytes()[4] == b'-' && date[8..].chars().all(|c| "abc".contains(c)) && date.len() > 8,
            "{date}"
        );
        let sum = text(&guided(
            &guides,
            &Grammar::Lark("start: DIGIT (\"+\" DIGIT)*\nDIGIT: /[0-9]/".into()),
            seed,
        ));
        assert!(sum.split('+').all(|part| part.len() == 1 && part.parse::<u8>().is_ok()), "{sum}");
    }
}

#[test]
fn a_guided_answer_goes_on_in_another_worker() {
    let guides = guides();
    let grammar = Grammar::Regex("[a-z]{20}".into());
    let whole = guided(&guides, &grammar, 3);
    let mut guide = guides.guide(&grammar).unwrap();
    guide.accept(&whole[..2]).unwrap();
    let mut logits = vec![0.0; 4096];
    guide.mask(&mut logits).unwrap();
    assert!(logits[whole[2] as usize] == 0.0 && logits[1] == f32::NEG_INFINITY);
    assert!(guides.guide(&grammar).unwrap().accept(&[1]).is_err(), "what does not fit is not gone on with");
}

#[test]
fn grammars_that_are_wrong_are_refused() {
    let guides = guides();
    for grammar in [
        Grammar::JsonSchema("{".into()),
        Grammar::JsonSchema("{\"type\": \"strange\"}".into()),
        Grammar::Regex("(".into()),
        Grammar::Lark("start: nothing".into()),
        Grammar::Choice(vec![]),
        Grammar::Regex("x".repeat((1 << 20) + 1)),
    ] {
        assert!(guides.guide(&grammar).is_err(), "{grammar:?}");
    }
}
