//! What lines may refer to: the last matches, within bounds of number and size.

use std::collections::VecDeque;

use kvbm_hash::SequenceHash;

use super::line::{BlockKey, Chain, Like, MATCHES_BACK_MAX};

/// Keys that are kept to refer to: 16 MiB.
const KEYS_MAX: usize = 1 << 20;

/// Matches back among which the blocks of a commit are looked for: those of requests that are being computed.
const REQUESTS_BACK: usize = 64;

#[derive(Debug)]
struct Asked {
    ns: u32,
    keys: Vec<SequenceHash>,
    /// Leading keys that were found: only the others are likely to be committed.
    found: usize,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Window {
    /// The last one first.
    matches: VecDeque<Asked>,
    keys: usize,
}

impl Window {
    /// The keys of a match that found the first `found` of them, as short as can be said; others may refer to it from
    /// now on.
    pub fn shorten_match(&mut self, ns: u32, keys: Vec<SequenceHash>, found: usize) -> Chain {
        let shared = |known: &[SequenceHash]| {
            // A key stands for all before it: where two sequences agree, they agree up to there.
            let most = known.len().min(keys.len());
            let (mut same, mut different) = (0, most + 1);
            while same + 1 < different {
                let middle = (same + different) / 2;
                if known[middle - 1] == keys[middle - 1] { same = middle } else { different = middle }
            }
            same
        };
        let candidates = self.matches.iter().enumerate().filter(|(_, asked)| asked.ns == ns);
        let best = candidates.map(|(back, asked)| (shared(&asked.keys), back));
        // The longest, and among those the latest.
        let best = best.max_by_key(|(same, back)| (*same, std::cmp::Reverse(*back)));
        let (same, back) = best.unwrap_or((0, 0));
        let chain = chain_of(Like { back: back as u32, skip: 0, keep: same as u32 }, &keys[same..]);
        let found = found.min(keys.len());
        self.remember(Asked { ns, keys, found });
        chain
    }

    /// The keys of blocks that became complete behind `parent`, as short as can be said. True if the parent is said by
    /// that.
    pub fn shorten_commit(
        &self,
        ns: u32,
        parent: Option<SequenceHash>,
        keys: &[SequenceHash],
    ) -> (Chain, bool) {
        for (back, asked) in self.matches.iter().enumerate().take(REQUESTS_BACK) {
            if asked.ns != ns {
                continue;
            }
            let known = &asked.keys;
            let missing = known[asked.found..].iter().position(|key| Some(key) == keys.first());
            let Some(skip) = missing.map(|at| asked.found + at) else { continue };
            if skip.checked_sub(1).map(|before| known[before]) != parent {
                continue;
            }
            let same = known[skip..].iter().zip(keys).take_while(|(known, key)| known == key).count();
            let like = Like { back: back as u32, skip: skip as u32, keep: same as u32 };
            return (chain_of(like, &keys[same..]), true);
        }
        (chain_of(Like { back: 0, skip: 0, keep: 0 }, keys), false)
    }

    fn remember(&mut self, asked: Asked) {
        self.keys += asked.keys.len();
        self.matches.push_front(asked);
        while self.matches.len() > MATCHES_BACK_MAX || (self.keys > KEYS_MAX && self.matches.len() > 1) {
            let oldest = self.matches.pop_back().expect("there is more than one");
            self.keys -= oldest.keys.len();
        }
    }
}

fn chain_of(like: Like, rest: &[SequenceHash]) -> Chain {
    Chain { like: (like.keep > 0).then_some(like), keys: rest.iter().copied().map(BlockKey).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(numbers: &[u8]) -> Vec<SequenceHash> {
        numbers.iter().map(|n| SequenceHash([*n; 16])).collect()
    }

    #[test]
    fn a_line_says_only_what_no_match_before_it_said() {
        let mut window = Window::default();
        assert_eq!(window.shorten_match(1, keys(&[1, 2, 3]), 0).like, None);
        assert_eq!(window.shorten_match(1, keys(&[1, 9]), 1).like, Some([0, 0, 1].into()));
        let longest = window.shorten_match(1, keys(&[1, 2, 3, 4]), 3);
        assert_eq!((longest.like, longest.keys.len()), (Some([1, 0, 3].into()), 1));
        assert_eq!(window.shorten_match(2, keys(&[1, 2, 3]), 0).like, None, "namespaces share nothing");
        let (chain, parent_said) = window.shorten_commit(1, Some(keys(&[3])[0]), &keys(&[4, 5]));
        assert_eq!((chain.like, chain.keys.len(), parent_said), (Some([1, 3, 1].into()), 1, true));
        let (chain, parent_said) = window.shorten_commit(1, Some(keys(&[5])[0]), &keys(&[6]));
        assert_eq!((chain.like, chain.keys.len(), parent_said), (None, 1, false));
    }

    #[test]
    fn the_window_is_bounded() {
        let mut window = Window::default();
        for n in 0..1000u32 {
            let key = |i: u32| SequenceHash((u128::from(n) << 64 | u128::from(i)).to_le_bytes());
            window.shorten_match(1, (0..10_000).map(key).collect(), 0);
            assert!(window.keys <= KEYS_MAX && window.matches.len() <= MATCHES_BACK_MAX);
        }
        assert!(window.matches.len() > 100);
    }
}
