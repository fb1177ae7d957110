//! Where requests went lately: the guess at what workers hold that send no events.
//!
//! A routed prompt counts as held by its worker for a time; each further use begins the time anew.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::index::{Fingerprint, Index, SourceId};

/// See the module.
#[derive(Debug)]
pub struct Recent {
    lifetime: Duration,
    /// When each block was last used.
    used: HashMap<(SourceId, Fingerprint), Instant>,
    /// Uses, oldest first.
    uses: VecDeque<(Instant, SourceId, Arc<[Fingerprint]>)>,
}

impl Recent {
    /// Blocks count as held for `lifetime` after their last use.
    pub fn new(lifetime: Duration) -> Self {
        Self { lifetime, used: HashMap::new(), uses: VecDeque::new() }
    }

    /// A prompt goes to a worker.
    pub fn note(&mut self, index: &mut Index, source: SourceId, keys: Arc<[Fingerprint]>, now: Instant) {
        self.expire(index, now);
        for key in keys.iter() {
            index.store(source, *key);
            self.used.insert((source, *key), now);
        }
        self.uses.push_back((now, source, keys));
    }

    /// Lets go of what was not used for long.
    pub fn expire(&mut self, index: &mut Index, now: Instant) {
        let over = |used: Instant| now.duration_since(used) >= self.lifetime;
        while let Some((_, source, keys)) = self.uses.pop_front_if(|(used, ..)| over(*used)) {
            for key in keys.iter() {
                // Not there: an earlier use of the same age took it away.
                if self.used.get(&(source, *key)).is_some_and(|used| over(*used)) {
                    self.used.remove(&(source, *key));
                    index.remove(source, *key);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::index::{Source, Tier};
    use super::*;

    #[test]
    fn a_use_counts_for_its_time_and_a_second_one_begins_it_anew() {
        let mut index = Index::default();
        let source = index.source(Source { node: 1, tier: Tier::Device, pool: 0 }).unwrap();
        let mut recent = Recent::new(Duration::from_secs(10));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let keys = |keys: &[u64]| -> Arc<[Fingerprint]> { keys.iter().copied().map(Fingerprint).collect() };
        let depth = |index: &Index, keys: &[Fingerprint]| index.depths(keys, &[Some(source)])[0];
        recent.note(&mut index, source, keys(&[1, 2, 3]), at(0));
        recent.note(&mut index, source, keys(&[1, 2, 4]), at(6));
        assert_eq!(depth(&index, &keys(&[1, 2, 3])), 3);
        recent.expire(&mut index, at(12));
        assert_eq!(depth(&index, &keys(&[1, 2, 3])), 2);
        assert_eq!(depth(&index, &keys(&[1, 2, 4])), 3);
        recent.expire(&mut index, at(16));
        assert_eq!(index.blocks(), 0);
        assert!(recent.used.is_empty() && recent.uses.is_empty());
    }
}
