//! Angles of rotary position embedding.

use std::f64::consts::PI;

/// How positions become angles.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched for contexts longer than those of the first training.
    pub scaling: RopeScaling,
}

/// How frequencies are stretched.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All by the same factor.
    Linear {
        /// Positions are divided by it.
        factor: f64,
    },
    /// Low frequencies by a factor, high ones not, with a smooth passage between, as Llama 3.1 has it.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths longer than the original context divided by this are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths shorter than the original context divided by this are high frequencies.
        high_freq_factor: f64,
        /// Context length of the first training.
        original_max_position_embeddings: f64,
    },
}

impl Rope {
    /// Angle per position for each of the `head_dim / 2` pairs of elements.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|i| self.scale(self.theta.powf(-((2 * i) as f64) / head_dim as f64)) as f32)
            .collect()
    }

    fn scale(&self, frequency: f64) -> f64 {
        match self.scaling {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let turns = original_max_position_embeddings * frequency / (2.0 * PI);
                if turns > high_freq_factor {
                    frequency
                } else if turns < low_freq_factor {
                    frequency / factor
                } else {
                    let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_frequencies_fall_geometrically() {
        let rope = Rope { theta: 10_000.0, scaling: RopeScaling::Default };
        let frequencies = rope.frequencies(8);
        assert_eq!(frequencies, vec![1.0, 0.1, 0.01, 0.001]);
        let rope = Rope { scaling: RopeScaling::Linear { factor: 4.0 }, ..rope };
        assert_eq!(rope.frequencies(8)[0], 0.25);
    }

    // Values of the published formula for Llama-3.1-8B: head 128, theta 500,000, factor 8, 1, 4, 8192.
    #[test]
    fn llama3_keeps_high_and_divides_low_frequencies() {
        let plain = Rope { theta: 500_000.0, scaling: RopeScaling::Default }.frequencies(128);
        let scaled = Rope {
            theta: 500_000.0,
            scaling: RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192.0,
            },
        }
        .frequencies(128);
        assert_eq!(plain[0], scaled[0]);
        assert_eq!(plain[28], scaled[28]);
        assert!(scaled[30] < plain[30] && scaled[30] > plain[30] / 8.0);
        assert!((scaled[63] - plain[63] / 8.0).abs() < 1e-12);
    }
}
