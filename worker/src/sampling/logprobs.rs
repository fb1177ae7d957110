//! How likely the model held a token, and which it held likelier.

/// Natural logarithms of probabilities of the model's own distribution: temperature, penalties and the like have no part
/// in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// Of the token itself.
    pub logprob: f32,
    /// The likeliest tokens, best first; of equal ones the lowest.
    pub top: Vec<(u32, f32)>,
}

impl Logprobs {
    /// Of `token` among `logits`, with the `count` likeliest.
    pub(super) fn of(logits: &[f32], token: u32, count: usize) -> Self {
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from(logit - top).exp()).sum();
        let norm = f64::from(top) + sum.ln();
        let logprob = |token: u32| {
            let logit = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
            (f64::from(logit) - norm) as f32
        };
        let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
        let likelier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if (1..tokens.len()).contains(&count) {
            tokens.select_nth_unstable_by(count - 1, likelier);
        }
        tokens.truncate(count);
        tokens.sort_unstable_by(likelier);
        Self {
            logprob: logprob(token),
            top: tokens.into_iter().map(|token| (token, logprob(token))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithms_are_those_of_the_softmax() {
        let logits = [0.1f32, 0.4, 0.2, 0.3].map(|p| p.ln() + 50.0);
        let got = Logprobs::of(&logits, 2, 3);
        assert!((got.logprob.exp() - 0.2).abs() < 1e-5);
        assert_eq!(got.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 3, 2]);
        assert!((got.top[0].1.exp() - 0.4).abs() < 1e-5);
        assert_eq!(got.top[2].1, got.logprob);
        assert!(Logprobs::of(&logits, 2, 0).top.is_empty());
        assert_eq!(Logprobs::of(&logits, 2, 20).top.len(), 4);
    }
}
