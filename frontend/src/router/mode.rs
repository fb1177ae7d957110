//! How a worker is chosen.

/// See `--router-mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum RouterMode {
    /// Each in turn
    #[default]
    RoundRobin,
    /// By chance
    Random,
    /// Of two by chance, the one with fewer requests
    PowerOfTwo,
    /// The one with the fewest requests
    LeastLoaded,
    /// The one at which the prompt costs least, by the blocks it has and by what it has to do
    Kv,
    /// The one that the request names in the header x-kvbm-worker
    Direct,
}

impl RouterMode {
    /// As flags and headers call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "round-robin",
            Self::Random => "random",
            Self::PowerOfTwo => "power-of-two",
            Self::LeastLoaded => "least-loaded",
            Self::Kv => "kv",
            Self::Direct => "direct",
        }
    }
}
