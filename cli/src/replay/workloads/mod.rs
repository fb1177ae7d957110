//! Workloads made up by rules: four ways in which prompts share beginnings.
//!
//! Sizes are in blocks of [`TOKENS_PER_BLOCK`] tokens. The same seed gives the same requests.

mod agents;
mod chat;
mod rag;
mod scan;
mod schedule;

use clap::ValueEnum;

use super::random::Random;
use super::trace::{Numbered, Trace};

/// Tokens in a block of a made-up workload, as in the Mooncake traces.
pub(super) const TOKENS_PER_BLOCK: u32 = 512;

/// Which rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Workload {
    /// Conversations of several turns with pauses to think, behind a few system prompts
    Chat,
    /// Agents that call in quick succession, their context growing by tool outputs
    Agents,
    /// Questions about some of many documents, the popular ones first
    Rag,
    /// Long documents that are read once, among conversations that go on
    Scan,
}

impl Workload {
    #[cfg(test)]
    pub(super) const ALL: [Self; 4] = [Self::Chat, Self::Agents, Self::Rag, Self::Scan];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Agents => "agents",
            Self::Rag => "rag",
            Self::Scan => "scan",
        }
    }

    /// So many requests, in order of time.
    pub(super) fn requests(self, seed: u64, count: usize) -> Vec<Request> {
        let mut random = Random::new(seed);
        let mut ids = Ids::default();
        match self {
            Self::Chat => chat::requests(&mut random, &mut ids, count),
            Self::Agents => agents::requests(&mut random, &mut ids, count),
            Self::Rag => rag::requests(&mut random, &mut ids, count),
            Self::Scan => scan::requests(&mut random, &mut ids, count),
        }
    }
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    pub at_ms: u64,
    pub input_tokens: u64,
    pub output_tokens: u64,
    /// A number for each block of the prompt; it stands for all blocks before it, too.
    pub blocks: Vec<u64>,
}

impl Request {
    /// A prompt of whole blocks.
    fn new(at_ms: u64, blocks: Vec<u64>, output_blocks: u64) -> Self {
        let tokens = u64::from(TOKENS_PER_BLOCK);
        let (input_tokens, output_tokens) = (blocks.len() as u64 * tokens, output_blocks * tokens);
        Self { at_ms, input_tokens, output_tokens, blocks }
    }
}

/// Numbers of blocks that nobody has had.
#[derive(Debug, Default)]
struct Ids(u64);

impl Ids {
    fn fresh(&mut self, count: u64) -> Vec<u64> {
        let first = self.0;
        self.0 += count;
        (first..self.0).collect()
    }
}

/// As a trace.
pub(super) fn trace_of(requests: &[Request]) -> Result<Trace, String> {
    let mut numbered = Numbered::new();
    requests.iter().try_for_each(|request| numbered.request(request.at_ms, &request.blocks))?;
    Ok(numbered.finish(TOKENS_PER_BLOCK))
}

#[cfg(test)]
mod tests;
