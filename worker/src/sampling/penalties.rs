//! Penalties for what was said before.

use super::{Sampling, SoFar};

/// Applies them; a function of the tokens so far.
pub(super) fn apply(sampling: &Sampling, so_far: SoFar<'_>, logits: &mut [f32]) {
    if sampling.repetition_penalty != 1.0 {
        let seen = so_far.prompt.iter().chain(so_far.generated).copied();
        for (token, _) in counted(seen) {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            let penalty = sampling.repetition_penalty;
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
    if sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0 {
        for (token, times) in counted(so_far.generated.iter().copied()) {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            *logit -= sampling.presence_penalty + sampling.frequency_penalty * times as f32;
        }
    }
}

/// Each token with how often it occurs.
fn counted(tokens: impl Iterator<Item = u32>) -> Vec<(u32, usize)> {
    let mut tokens: Vec<u32> = tokens.collect();
    tokens.sort_unstable();
    tokens.chunk_by(|a, b| a == b).map(|same| (same[0], same.len())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_penalty_looks_at_what_it_should() {
        let so_far = SoFar { prompt: &[0, 1], generated: &[2, 2, 3] };
        let apply = |sampling: Sampling| {
            let mut logits = [1.0, -1.0, 1.0, 1.0, 1.0];
            super::apply(&sampling, so_far, &mut logits);
            logits
        };
        let base = Sampling::greedy();
        assert_eq!(apply(Sampling { repetition_penalty: 2.0, ..base.clone() }), [0.5, -2.0, 0.5, 0.5, 1.0]);
        assert_eq!(apply(Sampling { presence_penalty: 0.5, ..base.clone() }), [1.0, -1.0, 0.5, 0.5, 1.0]);
        assert_eq!(apply(Sampling { frequency_penalty: 0.5, ..base.clone() }), [1.0, -1.0, 0.0, 0.5, 1.0]);
        assert_eq!(apply(base), [1.0, -1.0, 1.0, 1.0, 1.0]);
    }
}
