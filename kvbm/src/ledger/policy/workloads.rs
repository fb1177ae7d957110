//! Made-up traffic, for replays and tests where no recorded trace is at hand.
//!
//! Each kind has one trait of real traffic that policies of eviction treat differently. The same seed gives the same
//! requests. Times are virtual; rates do not depend on the number of requests, so a longer run is more of the same.

mod generator;
mod kinds;

use std::fmt;
use std::str::FromStr;

use generator::Generator;

/// A prompt that arrives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Milliseconds since the start, never less than that of the request before.
    pub at_ms: u64,
    /// Names of its blocks, the first one first. A name stands for the block and all before it, as a sequence hash does.
    pub blocks: Vec<u64>,
}

/// A kind of traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkloadKind {
    /// Conversations behind one of several system prompts. People think between turns, for a minute or for ten, and
    /// most leave after the first answer.
    Chat,
    /// Agents: many calls in quick succession, each of which extends the one before by the result of a tool, now and
    /// then with a second attempt from an earlier point.
    Agents,
    /// Questions about documents. Few documents are asked for often, most hardly ever; behind the first document comes
    /// another one or the question.
    Rag,
    /// A hot set of prompts, in the midst of long ones that never come again.
    Scans,
}

/// A name that no kind of traffic has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no workload is called {name:?}: use one of {}", WorkloadKind::ALL.map(WorkloadKind::name).join(", "))]
pub struct UnknownWorkload {
    name: String,
}

impl WorkloadKind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::Chat, Self::Agents, Self::Rag, Self::Scans];

    /// The name it is asked for by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Agents => "agents",
            Self::Rag => "rag",
            Self::Scans => "scans",
        }
    }
}

impl fmt::Display for WorkloadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for WorkloadKind {
    type Err = UnknownWorkload;

    fn from_str(name: &str) -> Result<Self, UnknownWorkload> {
        let kind = Self::ALL.into_iter().find(|kind| kind.name() == name);
        kind.ok_or_else(|| UnknownWorkload { name: name.to_owned() })
    }
}

/// The first `requests` requests of a kind of traffic, in order of time.
pub fn workload(kind: WorkloadKind, seed: u64, requests: usize) -> Vec<Request> {
    let mut generator = Generator::new(seed);
    match kind {
        WorkloadKind::Chat => kinds::chat(&mut generator, requests),
        WorkloadKind::Agents => kinds::agents(&mut generator, requests),
        WorkloadKind::Rag => kinds::rag(&mut generator, requests),
        WorkloadKind::Scans => kinds::scans(&mut generator, requests),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;

    #[test]
    fn traffic_is_in_order_of_time_repeatable_and_a_tree() {
        for kind in WorkloadKind::ALL {
            let requests = workload(kind, 7, 600);
            assert_eq!(requests.len(), 600);
            assert_eq!(requests, workload(kind, 7, 600));
            assert_ne!(requests, workload(kind, 8, 600));
            assert_eq!(requests[..200], workload(kind, 7, 200), "more requests are more of the same");
            assert!(requests.is_sorted_by_key(|request| request.at_ms));
            let mut before = HashMap::new();
            for request in &requests {
                assert!(!request.blocks.is_empty());
                for (at, block) in request.blocks.iter().enumerate() {
                    let parent = at.checked_sub(1).map(|at| request.blocks[at]);
                    assert_eq!(*before.entry(*block).or_insert(parent), parent, "{kind}");
                }
            }
        }
    }

    /// Share of references to blocks that were there before.
    fn again(kind: WorkloadKind) -> f64 {
        let requests = workload(kind, 1, 3000);
        let blocks: Vec<u64> = requests.into_iter().flat_map(|request| request.blocks).collect();
        let unique: HashSet<&u64> = blocks.iter().collect();
        1.0 - unique.len() as f64 / blocks.len() as f64
    }

    #[test]
    fn kinds_differ_in_how_much_comes_back() {
        let [chat, agents, rag, scans] = WorkloadKind::ALL.map(again);
        assert!(agents > 0.85 && chat > 0.5 && rag > 0.35 && scans < 0.2, "{chat} {agents} {rag} {scans}");
        assert_eq!("rag".parse(), Ok(WorkloadKind::Rag));
        assert!("RAG".parse::<WorkloadKind>().is_err());
    }
}
