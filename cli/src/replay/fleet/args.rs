//! Flags of a replay over several nodes.

use clap::Args;
use kvbm_frontend::{RouterMode, Weights};

/// What workers are, and how requests are spread over them.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Several workers")]
pub(in crate::replay) struct FleetArgs {
    /// Spread the requests over workers like this; several are compared: round-robin, random, least-loaded, kv
    #[arg(long, value_name = "MODE,...", value_delimiter = ',', requires = "device_blocks",
          conflicts_with_all = ["curve", "svg", "write_trace"])]
    router_mode: Vec<RouterMode>,
    /// Daemons, each with the host memory and disk named
    #[arg(long, default_value_t = 2, value_name = "N", requires = "router_mode",
          value_parser = clap::value_parser!(u8).range(1..=64))]
    pub nodes: u8,
    /// Workers at each daemon, each with a pool of --device-blocks
    #[arg(long, default_value_t = 2, value_name = "N", requires = "router_mode",
          value_parser = clap::value_parser!(u8).range(1..=64))]
    pub workers: u8,
    /// Tokens that a worker computes in a second
    #[arg(long, default_value_t = 20_000, value_name = "TOKENS", requires = "router_mode",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub prefill_rate: u32,
    /// Milliseconds that an answer takes from its first token on
    #[arg(long, default_value_t = 5000, value_name = "MS", requires = "router_mode")]
    pub answer_ms: u32,
    /// Mode kv: credit for each token that a worker has
    #[arg(long, default_value_t = Weights::default().overlap, requires = "router_mode")]
    router_kv_overlap_score_credit: f64,
    /// Mode kv: what tokens of other requests count
    #[arg(long, default_value_t = Weights::default().load, value_name = "WEIGHT", requires = "router_mode")]
    router_load_weight: f64,
    /// Mode kv: how much dearer computing is where more than its share of it was done lately
    #[arg(long, default_value_t = Weights::default().spread, value_name = "WEIGHT", requires = "router_mode")]
    router_spread_weight: f64,
    /// Mode kv: credit for a token that a worker had when the conversation was shorter, and has no more
    #[arg(long, default_value_t = Weights::default().gone, value_name = "WEIGHT", requires = "router_mode")]
    router_gone_weight: f64,
}

impl FleetArgs {
    /// To be compared; empty: there is one worker.
    pub(in crate::replay) fn modes(&self) -> &[RouterMode] {
        &self.router_mode
    }

    pub fn weights(&self) -> Weights {
        Weights {
            overlap: self.router_kv_overlap_score_credit,
            load: self.router_load_weight,
            spread: self.router_spread_weight,
            gone: self.router_gone_weight,
            ..Weights::default()
        }
    }
}
