//! Which answers an undisturbed worker allows where arithmetic is not the same in every batch.

use std::sync::atomic::{AtomicUsize, Ordering};

use kvbm_proto::v1::{GenerateRequest, Logprobs, Sampling};

use crate::worker_client::{Answer, WorkerClient};

/// Natural logarithms of two probabilities that are nearer than this may change places.
const NEAR: f32 = 0.05;
/// Of so many answers one may be excused.
const ONE_OF: usize = 100;
/// Such places in one answer.
const TIES: usize = 2;

/// What an undisturbed worker answers to prompts, with the two likeliest tokens at each place.
pub struct Reference {
    client: WorkerClient,
    exact: bool,
    prompts: Vec<Vec<u32>>,
    answers: Vec<Answer>,
    judged: AtomicUsize,
    excused: AtomicUsize,
}

impl Reference {
    /// Asks for so many tokens to each prompt. `exact`: no other answer is right, as on a processor.
    pub fn ask(client: WorkerClient, prompts: Vec<Vec<u32>>, max_tokens: u32, exact: bool) -> Self {
        let ask = |prompt: &Vec<u32>| client.send(with_choices(prompt, max_tokens)).unwrap();
        let answers = prompts.iter().map(ask).collect();
        Self { client, exact, prompts, answers, judged: AtomicUsize::new(0), excused: AtomicUsize::new(0) }
    }

    /// What the worker says to a prompt.
    pub fn answer(&self, prompt: usize) -> &Answer {
        &self.answers[prompt]
    }

    /// Panics unless this is what the worker answers to a prompt, or leaves that where the two likeliest tokens were near,
    /// by taking the second; behind it, it has to go on as the worker does.
    pub fn check(&self, prompt: usize, answer: &[u32], when: &str) {
        let expected = &self.answers[prompt];
        assert_eq!(answer.len(), expected.tokens.len(), "{when}prompt {prompt}");
        let judged = self.judged.fetch_add(1, Ordering::Relaxed) + 1;
        if answer == expected.tokens {
            return;
        }
        let allowed = !self.exact && self.is_excused(prompt, answer);
        assert!(allowed, "{when}prompt {prompt}: {answer:?}, expected {:?}", expected.tokens);
        let excused = self.excused.fetch_add(1, Ordering::Relaxed) + 1;
        assert!(excused <= judged.div_ceil(ONE_OF), "{when}{excused} of {judged} answers differ");
    }

    fn is_excused(&self, prompt: usize, answer: &[u32]) -> bool {
        let mut expected = self.answers[prompt].clone();
        // Places before which the answer is the same.
        let mut behind = 0;
        for _ in 0..=TIES {
            let rest = &answer[behind..];
            let Some(at) = rest.iter().zip(&expected.tokens).position(|(a, b)| a != b) else { return true };
            if !is_second_of_near(&expected.logprobs[at], rest[at]) {
                return false;
            }
            behind += at + 1;
            if behind == answer.len() {
                return true;
            }
            let request = with_choices(&self.prompts[prompt], answer.len() as u32);
            let request = GenerateRequest { generated: answer[..behind].to_vec(), ..request };
            expected = self.client.send(request).unwrap();
        }
        false
    }
}

fn with_choices(prompt: &[u32], max_tokens: u32) -> GenerateRequest {
    let sampling = Some(Sampling { logprobs: Some(2), ..Sampling::default() });
    GenerateRequest { sampling, ..WorkerClient::request(prompt, max_tokens) }
}

fn is_second_of_near(choice: &Logprobs, token: u32) -> bool {
    let (Some([first, second]), Some(id)) = (choice.top_logprobs.get(..2), choice.top_ids.get(1)) else {
        return false;
    };
    *id == token && first - second < NEAR
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_second_of_two_near_tokens_is_excused() {
        let choice =
            |second: f32| Logprobs { logprob: -0.7, top_ids: vec![7, 9], top_logprobs: vec![-0.7, second] };
        assert!(is_second_of_near(&choice(-0.72), 9));
        assert!(!is_second_of_near(&choice(-0.72), 8), "not one of the two");
        assert!(!is_second_of_near(&choice(-0.8), 9), "far apart");
        assert!(!is_second_of_near(&Logprobs::default(), 9), "nothing is known");
    }
}
