//! How the next token is chosen from its logits.
//!
//! Chance is a function of the request's seed and of the token's position only, so that what else is in the batch, a
//! preemption or a move to another worker does not change the text.

use crate::engine::{Isa, Want, exponentials};

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sampling {
    /// The largest logit; of equal ones the lowest token.
    Greedy,
    /// By chance, in proportion to `exp(logit / temperature)`.
    Temperature {
        /// Above 0.
        temperature: f32,
        /// Chooses the sequence of random numbers.
        seed: u64,
    },
}

impl Sampling {
    /// What it needs of the engine.
    pub fn want(&self) -> Want {
        match self {
            Self::Greedy => Want::Largest,
            Self::Temperature { .. } => Want::Logits,
        }
    }

    /// The token for `position`, counted from the sequence's first.
    pub fn choose(&self, logits: &[f32], position: usize) -> u32 {
        match *self {
            Self::Greedy => argmax(logits) as u32,
            Self::Temperature { temperature, seed } => {
                let top = logits[argmax(logits)];
                let mut weights = vec![0.0; logits.len()];
                exponentials(Isa::detect(), logits, top, 1.0 / temperature, &mut weights);
                let total: f64 = weights.iter().copied().map(f64::from).sum();
                let mut left = uniform(seed, position as u64) * total;
                for (token, weight) in weights.iter().enumerate() {
                    left -= f64::from(*weight);
                    if left < 0.0 {
                        return token as u32;
                    }
                }
                // Rounding used up all weights: the last token that has one.
                weights.iter().rposition(|weight| *weight > 0.0).unwrap_or(0) as u32
            }
        }
    }
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
        assert_eq!(Sampling::Greedy.choose(&[0.0, 3.0, -1.0, 3.0], 0), 1);
    }

    #[test]
    fn chance_depends_on_seed_and_position_and_has_the_right_shares() {
        let logits = [0.0, (2.0f32).ln(), f32::MIN, (5.0f32).ln()];
        let choose =
            |seed, position| Sampling::Temperature { temperature: 1.0, seed }.choose(&logits, position);
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
        let cold = Sampling::Temperature { temperature: 1e-3, seed: 3 };
        assert!((0..100).all(|position| cold.choose(&[1.0, 1.5, 0.0], position) == 1));
    }
}
