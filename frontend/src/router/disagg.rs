//! Prefill and decode at different workers.
//!
//! ```text
//! prompt ─► prefill worker ─ first token ─► daemon: blocks pinned, in host memory ─► decode worker ─ other tokens ─►
//! ```
//!
//! The decode worker gets the prompt and the first token, finds the blocks in host memory and goes on. Whatever fails on
//! the way costs time and nothing else: it computes what it does not find.

use std::sync::Arc;
use std::time::Duration;

use kvbm_proto::v1::GenerateRequest;
use tokio::time::Instant;

use super::dispatch::{Among, Wanted};
use super::{Ask, Dispatch, Keying, Opened};
use crate::fleet::{Candidate, Node};
use crate::openai::ApiError;

/// In which order the workers are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Strategy {
    /// The prefill worker first, by its blocks; then a decode worker beside it
    #[value(name = "prefill_first", alias = "prefill-first")]
    PrefillFirst,
    /// The decode worker first; then a prefill worker beside it, if it has too much to compute
    #[value(name = "decode_first", alias = "decode-first")]
    DecodeFirst,
}

/// When and how prompts are computed elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DisaggConfig {
    /// Which worker is chosen first.
    pub strategy: Strategy,
    /// Prompts of which a decode worker has to compute fewer tokens are computed there.
    pub threshold_tokens: usize,
    /// With so many tokens waiting at each prefill worker, a prompt is computed at a decode worker.
    pub queue_tokens: u64,
    /// How long a decode worker waits for blocks on their way to host memory.
    pub wait: Duration,
    /// How long blocks are kept for a decode worker that does not come.
    pub lease: Duration,
}

/// What is left to do when the first token has come from a prefill worker.
#[derive(Clone)]
pub struct HandOver {
    node: Arc<Node>,
    keying: Option<Keying>,
    /// The connection of the decode worker that was chosen.
    decode: Option<u64>,
}

fn is_prefill(worker: &Candidate) -> bool {
    Wanted::Prefill.fits(worker.role)
}

fn is_decode(worker: &Candidate) -> bool {
    Wanted::Decode.fits(worker.role)
}

impl Dispatch {
    /// As `open`, with prefill at a worker of its own where that is worth it.
    pub(super) async fn open_apart(
        &self,
        config: &DisaggConfig,
        deadline: Instant,
    ) -> Result<Opened, ApiError> {
        let open = |worker: &&Arc<Candidate>| !worker.connection.is_closed();
        let open: Vec<&Arc<Candidate>> = self.entry.candidates().iter().filter(open).collect();
        let count = |prefill| self.router.metrics.disaggregated.with_label_values(&[prefill]).inc();
        if !open.iter().any(|worker| is_decode(worker)) || !open.iter().any(|worker| is_prefill(worker)) {
            count("role_missing");
            let wanted =
                if open.iter().any(|worker| is_decode(worker)) { Wanted::Decode } else { Wanted::Any };
            return self.send(&self.request, Among::of(wanted), &mut Vec::new(), deadline).await;
        }
        let plan = match config.strategy {
            Strategy::PrefillFirst => self.plan_prefill_first(config, &open),
            Strategy::DecodeFirst => self.plan_decode_first(config, &open),
        };
        let Some((prefill, decode)) = plan else {
            count("local");
            return self.send(&self.request, Among::of(Wanted::Decode), &mut Vec::new(), deadline).await;
        };
        let first = GenerateRequest { max_tokens: 1, ..self.request.clone() };
        match self.send(&first, prefill, &mut Vec::new(), Instant::now()).await {
            Ok(mut opened) => {
                count("remote");
                let of_connection = |worker: &&&Arc<Candidate>| worker.connection.id() == opened.connection;
                if let Some(worker) = open.iter().find(of_connection) {
                    let (node, keying) = (worker.place.node.clone(), worker.keying);
                    opened.hand_over = Some(HandOver { node, keying, decode });
                }
                Ok(opened)
            }
            // Refused for what it is: no other worker would take it.
            Err(error) if error.status.is_client_error() => Err(error),
            Err(_) => {
                count("prefill_failed");
                self.send(&self.request, Among::of(Wanted::Decode), &mut Vec::new(), deadline).await
            }
        }
    }

    /// Among which workers the prompt is computed; `None`: where it is decoded.
    fn plan_prefill_first(
        &self,
        config: &DisaggConfig,
        open: &[&Arc<Candidate>],
    ) -> Option<(Among, Option<u64>)> {
        let decode: Vec<&Arc<Candidate>> = open.iter().copied().filter(|worker| is_decode(worker)).collect();
        let found = self.router.overlaps(&decode, &self.request);
        let most = found.iter().map(|(overlap, _)| overlap.total()).max().unwrap_or(0);
        let nodes: Vec<u32> = decode.iter().map(|worker| worker.place.node.id()).collect();
        self.is_worth_it(config, most, open, &nodes)
            .then(|| (Among { nodes: Some(nodes), ..Among::of(Wanted::Prefill) }, None))
    }

    fn plan_decode_first(
        &self,
        config: &DisaggConfig,
        open: &[&Arc<Candidate>],
    ) -> Option<(Among, Option<u64>)> {
        let among = Among::of(Wanted::Decode);
        let ask = Ask { request: &self.request, wish: &self.wish, tried: &[], among: &among };
        let worker = self.router.choose(&self.entry, &ask)?.worker;
        let (overlap, _) = self.router.overlaps(&[&worker], &self.request).pop()?;
        let nodes = vec![worker.place.node.id()];
        self.is_worth_it(config, overlap.total(), open, &nodes).then(|| {
            (Among { nodes: Some(nodes), ..Among::of(Wanted::Prefill) }, Some(worker.connection.id()))
        })
    }

    /// Whether enough is to be computed, and a prefill worker beside the decode worker has time for it.
    fn is_worth_it(
        &self,
        config: &DisaggConfig,
        overlap: usize,
        open: &[&Arc<Candidate>],
        nodes: &[u32],
    ) -> bool {
        let beside =
            |worker: &&&Arc<Candidate>| is_prefill(worker) && nodes.contains(&worker.place.node.id());
        let queue = open.iter().filter(beside).map(|worker| worker.load.prefill_tokens()).min();
        let compute = self.request.prompt.len().saturating_sub(overlap);
        compute >= config.threshold_tokens && queue.is_some_and(|queue| queue < config.queue_tokens)
    }

    /// Goes on at a decode worker behind the tokens `generated` that a prefill worker sent.
    pub async fn decode(
        self: Arc<Self>,
        generated: Vec<u32>,
        hand_over: HandOver,
    ) -> Result<Opened, ApiError> {
        let HandOver { node, keying, decode } = hand_over;
        let request = GenerateRequest { generated, ..self.request.clone() };
        let config = self.router.config.disagg;
        let keys = keying.map(|keying| keying.keys(&request)).filter(|keys| !keys.hashes.is_empty());
        let kept = match (keys, config) {
            (Some(keys), Some(config)) => node.hand_over(&keys, config.wait, config.lease).await,
            _ => None,
        };
        let beside = Among { nodes: Some(vec![node.id()]), only: decode, ..Among::of(Wanted::Decode) };
        let mut sent = self.send(&request, beside, &mut Vec::new(), Instant::now()).await;
        if sent.as_ref().is_err_and(|error| !error.status.is_client_error()) {
            // Whoever else goes on computes what he does not find.
            sent = self.send(&request, Among::ALL, &mut Vec::new(), self.router.deadline()).await;
        }
        if let Some(kept) = kept.filter(|kept| kept.pin_id != 0) {
            node.end_hand_over(kept.pin_id).await;
        }
        sent
    }
}
