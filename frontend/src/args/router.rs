//! Flags of the router, under the names that users of Dynamo's frontend know.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kvbm_nats::Nats;

use super::{invalid, seconds};
use crate::error::FrontendError;
use crate::router::{DisaggConfig, Events, RouterConfig, RouterMode, Strategy, Weights};

/// Longest time that a flag may name, seconds.
const LONGEST: f64 = 86_400.0;

/// How workers are chosen, and what happens when one is lost. `RouterConfig::try_from` checks it.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Routing")]
pub struct RouterArgs {
    /// How a worker is chosen
    #[arg(long, env = "DYN_ROUTER_MODE", value_enum, default_value_t = RouterMode::RoundRobin)]
    pub router_mode: RouterMode,
    /// Mode kv: credit for each token that a worker has, 0 to 100; 0 looks at load only
    #[arg(
        long,
        env = "DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT",
        alias = "router-kv-overlap-score-weight",
        alias = "kv-overlap-score-weight",
        value_name = "CREDIT",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    pub router_kv_overlap_score_credit: f64,
    /// Mode kv: what a token in the daemon's host memory counts beside one in the worker's pool, 0 to 1
    #[arg(
        long,
        env = "DYN_ROUTER_HOST_CACHE_HIT_WEIGHT",
        value_name = "WEIGHT",
        default_value_t = 0.75,
        allow_negative_numbers = true
    )]
    pub router_host_cache_hit_weight: f64,
    /// Mode kv: what a token on the daemon's disk counts, 0 to 1
    #[arg(
        long,
        env = "DYN_ROUTER_DISK_CACHE_HIT_WEIGHT",
        value_name = "WEIGHT",
        default_value_t = 0.25,
        allow_negative_numbers = true
    )]
    pub router_disk_cache_hit_weight: f64,
    /// Mode kv: what a token counts that was at the worker when the conversation was shorter, and is there no more, 0 to 1
    #[arg(
        long,
        env = "KVBM_ROUTER_GONE_WEIGHT",
        value_name = "WEIGHT",
        default_value_t = Weights::default().gone,
        allow_negative_numbers = true
    )]
    pub router_gone_weight: f64,
    /// Mode kv: what a token that is still to be computed counts, 0 to 100
    #[arg(
        long,
        env = "DYN_ROUTER_PREFILL_LOAD_SCALE",
        value_name = "SCALE",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    pub router_prefill_load_scale: f64,
    /// Mode kv: what a token counts that other requests have a worker compute or keep, beside one of the request's own, 0 to
    /// 100
    #[arg(
        long,
        env = "KVBM_ROUTER_LOAD_WEIGHT",
        value_name = "WEIGHT",
        default_value_t = 0.1,
        allow_negative_numbers = true
    )]
    pub router_load_weight: f64,
    /// Mode kv: how much dearer computing is at a worker that was lately given twice its share of it, 0 to 1; 0: caches may
    /// be filled unevenly
    #[arg(
        long,
        env = "KVBM_ROUTER_SPREAD_WEIGHT",
        value_name = "WEIGHT",
        default_value_t = 0.25,
        allow_negative_numbers = true
    )]
    pub router_spread_weight: f64,
    /// Mode kv: what each request that a worker has counts, in tokens, 0 to 1000000
    #[arg(
        long,
        env = "DYN_ROUTER_DECODE_ACTIVE_REQUEST_WEIGHT",
        value_name = "TOKENS",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub router_decode_active_request_weight: f64,
    /// Mode kv: 0 takes the cheapest worker, more spreads by chance, 0 to 100
    #[arg(long, env = "DYN_ROUTER_TEMPERATURE", default_value_t = 0.0, allow_negative_numbers = true)]
    pub router_temperature: f64,
    /// Mode kv: do not ask daemons for KV events, guess from where requests went
    #[arg(long, env = "KVBM_NO_ROUTER_KV_EVENTS")]
    pub no_router_kv_events: bool,
    /// Mode kv: hear of blocks through NATS JetStream, where daemons with the same setting `events` tell of them, instead of
    /// from each daemon: nats://host:port, or nats for what NATS_SERVER names
    #[arg(long, env = "KVBM_FRONTEND_EVENTS", value_name = "WHERE", conflicts_with = "no_router_kv_events")]
    pub events: Option<String>,
    /// With --events: file with the JWT and the seed that are shown to NATS, as `nsc` writes it
    #[arg(long, env = "NATS_AUTH_CREDENTIALS_FILE", value_name = "FILE")]
    pub events_credentials: Option<PathBuf>,
    /// Mode kv: seconds that a prompt counts as held by a worker that sends no events, 0 to 86400
    #[arg(
        long,
        env = "DYN_ROUTER_TTL_SECS",
        value_name = "SECONDS",
        default_value_t = 120.0,
        allow_negative_numbers = true
    )]
    pub router_ttl_secs: f64,
    /// Seconds that a session (header x-kvbm-session) stays with its worker, 0 to 86400 [default: it does not]
    #[arg(
        long,
        env = "DYN_ROUTER_SESSION_AFFINITY_TTL_SECS",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    pub router_session_affinity_ttl_secs: Option<f64>,
    /// How often one answer may move to another worker when its own dies, stalls or drains, 0 to 1000
    #[arg(long, env = "DYN_MIGRATION_LIMIT", default_value_t = 3, allow_negative_numbers = true)]
    pub migration_limit: i64,
    /// Seconds without a token after which a worker counts as stalled in the middle of an answer, 0 to 86400; 0: never
    #[arg(
        long,
        env = "DYN_HTTP_BACKEND_STREAM_TIMEOUT_SECS",
        value_name = "SECONDS",
        default_value_t = 30.0,
        allow_negative_numbers = true
    )]
    pub stall_timeout_secs: f64,
    /// Compute prompts at workers of --role prefill and answers at those of --role decode; without both, as if not given
    #[arg(long, env = "KVBM_DISAGG")]
    pub disagg: bool,
    /// With --disagg: which worker is chosen first [default: prefill_first in mode kv, else decode_first]
    #[arg(long, env = "DISAGGREGATION_STRATEGY", value_enum, value_name = "STRATEGY")]
    pub disagg_strategy: Option<Strategy>,
    /// With --disagg: a prompt of which a decode worker lacks fewer tokens is computed there, 0 to 1000000000
    #[arg(
        long,
        env = "KVBM_DISAGG_THRESHOLD_TOKENS",
        value_name = "TOKENS",
        default_value_t = 256,
        allow_negative_numbers = true
    )]
    pub disagg_threshold_tokens: i64,
    /// With --disagg: when each prefill worker has so many tokens to compute, prompts are computed at decode workers,
    /// 0 to 1000000000
    #[arg(
        long,
        env = "KVBM_DISAGG_QUEUE_TOKENS",
        value_name = "TOKENS",
        default_value_t = 65_536,
        allow_negative_numbers = true
    )]
    pub disagg_queue_tokens: i64,
    /// With --disagg: seconds that a decode worker waits for blocks on their way through the daemon, 0 to 60
    #[arg(
        long,
        env = "KVBM_DISAGG_WAIT_SECS",
        value_name = "SECONDS",
        default_value_t = 2.0,
        allow_negative_numbers = true
    )]
    pub disagg_wait_secs: f64,
    /// Say in the header x-kvbm-route of each answer which worker it comes from and what it would cost at each
    #[arg(long, env = "KVBM_DEBUG_HEADERS")]
    pub debug_headers: bool,
}

/// How long the daemon keeps blocks for a decode worker that never asks for them.
const HAND_OVER_LEASE: Duration = Duration::from_secs(30);

fn disagg(args: &RouterArgs) -> Result<Option<DisaggConfig>, FrontendError> {
    let tokens = |flag, value: i64| {
        let tokens = u64::try_from(value).ok().filter(|tokens| *tokens <= 1_000_000_000);
        tokens.ok_or_else(|| invalid(flag, value, "within 0 to 1000000000"))
    };
    let by_mode = match args.router_mode {
        RouterMode::Kv => Strategy::PrefillFirst,
        _ => Strategy::DecodeFirst,
    };
    let wait = args.disagg_wait_secs;
    if !(0.0..=60.0).contains(&wait) {
        return Err(invalid("--disagg-wait-secs", wait, "within 0 to 60"));
    }
    let threshold = tokens("--disagg-threshold-tokens", args.disagg_threshold_tokens)?;
    let config = DisaggConfig {
        strategy: args.disagg_strategy.unwrap_or(by_mode),
        threshold_tokens: usize::try_from(threshold).unwrap_or(usize::MAX),
        queue_tokens: tokens("--disagg-queue-tokens", args.disagg_queue_tokens)?,
        wait: Duration::from_secs_f64(wait),
        lease: HAND_OVER_LEASE,
    };
    Ok(args.disagg.then_some(config))
}

fn nats(text: &str, credentials: Option<&Path>) -> Result<Nats, FrontendError> {
    let nats = Nats::parse(text).ok_or_else(|| invalid("--events", text, Nats::FORM))?;
    Ok(nats.with_credentials(credentials))
}

impl TryFrom<&RouterArgs> for RouterConfig {
    type Error = FrontendError;

    fn try_from(args: &RouterArgs) -> Result<Self, FrontendError> {
        let number = |flag, value: f64, most: f64, range| {
            if (0.0..=most).contains(&value) { Ok(value) } else { Err(invalid(flag, value, range)) }
        };
        let percent = |flag, value| number(flag, value, 100.0, "within 0 to 100");
        let share = |flag, value| number(flag, value, 1.0, "within 0 to 1");
        let weights = Weights {
            overlap: percent("--router-kv-overlap-score-credit", args.router_kv_overlap_score_credit)?,
            host: share("--router-host-cache-hit-weight", args.router_host_cache_hit_weight)?,
            disk: share("--router-disk-cache-hit-weight", args.router_disk_cache_hit_weight)?,
            gone: share("--router-gone-weight", args.router_gone_weight)?,
            prefill: percent("--router-prefill-load-scale", args.router_prefill_load_scale)?,
            load: percent("--router-load-weight", args.router_load_weight)?,
            spread: share("--router-spread-weight", args.router_spread_weight)?,
            request: number(
                "--router-decode-active-request-weight",
                args.router_decode_active_request_weight,
                1e6,
                "within 0 to 1000000",
            )?,
            temperature: percent("--router-temperature", args.router_temperature)?,
        };
        let affinity = args.router_session_affinity_ttl_secs;
        let affinity = affinity.map(|value| seconds("--router-session-affinity-ttl-secs", value, LONGEST));
        let stall = seconds("--stall-timeout-secs", args.stall_timeout_secs, LONGEST)?;
        let migration_limit = u32::try_from(args.migration_limit).ok().filter(|limit| *limit <= 1000);
        Ok(Self {
            mode: args.router_mode,
            weights,
            events: if args.no_router_kv_events { Events::Ignored } else { Events::Followed },
            nats: args
                .events
                .as_deref()
                .map(|text| nats(text, args.events_credentials.as_deref()))
                .transpose()?,
            guess_lifetime: seconds("--router-ttl-secs", args.router_ttl_secs, LONGEST)?,
            affinity: affinity.transpose()?.filter(|lifetime| *lifetime > Duration::ZERO),
            migration_limit: migration_limit
                .ok_or_else(|| invalid("--migration-limit", args.migration_limit, "within 0 to 1000"))?,
            disagg: disagg(args)?,
            stall: (stall > Duration::ZERO).then_some(stall),
            debug_headers: args.debug_headers,
        })
    }
}
