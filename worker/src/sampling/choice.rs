//! One token of final logits: the likeliest, or one by chance among those that are let through.

use super::Sampling;
use crate::engine::{Isa, exponentials};

/// See [`Sampling::choose`].
pub(super) fn choose(sampling: &Sampling, logits: &[f32], position: u64) -> u32 {
    let best = argmax(logits);
    if sampling.is_greedy() || logits[best] == f32::NEG_INFINITY {
        return best as u32;
    }
    let mut weights = vec![0.0; logits.len()];
    exponentials(Isa::detect(), logits, logits[best], 1.0 / sampling.temperature, &mut weights);
    let draw = uniform(sampling.seed, position);
    let all = sampling.top_k == 0 && sampling.top_p >= 1.0 && sampling.min_p <= 0.0;
    if all {
        let tokens = weights.iter().enumerate().map(|(token, weight)| (token as u32, *weight));
        return pick(tokens, draw).unwrap_or(best as u32);
    }
    let mut candidates = candidates(sampling, &weights);
    // In the order of the vocabulary, as when all are let through.
    candidates.sort_unstable();
    pick(candidates.iter().map(|&token| (token, weights[token as usize])), draw).unwrap_or(best as u32)
}

/// Tokens that are let through. The likeliest always is, and has the weight 1.
fn candidates(sampling: &Sampling, weights: &[f32]) -> Vec<u32> {
    let least = sampling.min_p.max(f32::MIN_POSITIVE);
    let mut tokens: Vec<u32> =
        (0..weights.len() as u32).filter(|&token| weights[token as usize] >= least).collect();
    let likelier = |a: &u32, b: &u32| weights[*b as usize].total_cmp(&weights[*a as usize]).then(a.cmp(b));
    if (1..tokens.len()).contains(&sampling.top_k) {
        tokens.select_nth_unstable_by(sampling.top_k - 1, likelier);
        tokens.truncate(sampling.top_k);
    }
    if sampling.top_p < 1.0 {
        tokens.sort_unstable_by(likelier);
        let weight = |token: &u32| f64::from(weights[*token as usize]);
        let wanted = f64::from(sampling.top_p) * tokens.iter().map(weight).sum::<f64>();
        let mut sum = 0.0;
        let count = tokens.iter().take_while(|token| {
            let before = sum;
            sum += weight(token);
            before < wanted
        });
        let count = count.count().max(1);
        tokens.truncate(count);
    }
    tokens
}

/// The token where `draw` of all weights, in order, are used up.
fn pick(tokens: impl Iterator<Item = (u32, f32)> + Clone, draw: f64) -> Option<u32> {
    let total: f64 = tokens.clone().map(|(_, weight)| f64::from(weight)).sum();
    let mut left = draw * total;
    let mut last = None;
    for (token, weight) in tokens {
        left -= f64::from(weight);
        if weight > 0.0 {
            last = Some(token);
        }
        if left < 0.0 {
            return Some(token);
        }
    }
    // Rounding used up all weights: the last token that has one.
    last
}

/// The token with the largest logit, the lowest of equal ones.
pub(crate) fn largest(logits: &[f32]) -> u32 {
    argmax(logits) as u32
}

/// Index of the largest, the lowest of equal ones.
fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best
}

/// A number in `[0, 1)`.
fn uniform(seed: u64, position: u64) -> f64 {
    (mix(seed ^ mix(position.wrapping_add(0x9e37_79b9_7f4a_7c15))) >> 11) as f64 / (1u64 << 53) as f64
}

/// The finalizer of splitmix64.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        assert_eq!(Sampling::greedy().choose(&[0.0, 3.0, -1.0, 3.0], 0), 1);
    }

    #[test]
    fn chance_depends_on_seed_and_position_and_has_the_right_shares() {
        let logits = [0.0, (2.0f32).ln(), f32::MIN, (5.0f32).ln()];
        let choose = |seed, position| Sampling::random(1.0, seed).choose(&logits, position);
        let mut counts = [0; 4];
        for position in 0..8000 {
            counts[choose(9, position) as usize] += 1;
            assert_eq!(choose(9, position), choose(9, position));
        }
        assert!((900..1100).contains(&counts[0]), "{counts:?}");
        assert!((1850..2150).contains(&counts[1]), "{counts:?}");
        assert_eq!(counts[2], 0);
        let differ = (0..1000).filter(|position| choose(1, *position) != choose(2, *position)).count();
        assert!(differ > 300, "{differ}");
    }

    #[test]
    fn low_temperature_is_nearly_greedy() {
        let cold = Sampling::random(1e-3, 3);
        assert!((0..100).all(|position| cold.choose(&[1.0, 1.5, 0.0], position) == 1));
    }

    /// Which tokens of these probabilities are ever chosen.
    fn chosen(sampling: &Sampling) -> Vec<u32> {
        let logits = [0.1f32, 0.4, 0.2, 0.3].map(f32::ln);
        let mut tokens: Vec<u32> = (0..2000).map(|position| sampling.choose(&logits, position)).collect();
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    #[test]
    fn top_k_top_p_and_min_p_let_the_likeliest_through() {
        let base = Sampling::random(1.0, 7);
        assert_eq!(chosen(&base), [0, 1, 2, 3]);
        assert_eq!(chosen(&Sampling { top_k: 2, ..base.clone() }), [1, 3]);
        assert_eq!(chosen(&Sampling { top_k: 9, ..base.clone() }), [0, 1, 2, 3]);
        // The token that crosses the sum is let through, too.
        assert_eq!(chosen(&Sampling { top_p: 0.71, ..base.clone() }), [1, 2, 3]);
        assert_eq!(chosen(&Sampling { top_p: 0.65, ..base.clone() }), [1, 3]);
        assert_eq!(chosen(&Sampling { top_p: 1e-6, ..base.clone() }), [1]);
        assert_eq!(chosen(&Sampling { min_p: 0.6, ..base.clone() }), [1, 3]);
        // Of the two that top_k leaves, the first has 4/7.
        assert_eq!(chosen(&Sampling { top_k: 2, top_p: 0.5, ..base }), [1]);
    }

    #[test]
    fn nothing_left_is_no_reason_to_panic() {
        let nothing = [f32::NEG_INFINITY; 4];
        assert_eq!(Sampling::random(1.0, 7).choose(&nothing, 0), 0);
        for top_k in [0, 1] {
            let sampling = Sampling { top_k, ..Sampling::random(1.0, 7) };
            assert!(sampling.choose(&[f32::NAN, f32::NAN, 0.0], 3) < 3);
        }
    }
}
