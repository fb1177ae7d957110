//! Which requests the engine waits for, and which of those it can be told of.
//!
//! Each question costs what it is asked about and what has ended, however many copies are under way.

use std::collections::{HashMap, HashSet};

/// Copies of one kind, by request.
#[derive(Debug, Default)]
pub(super) struct Endings {
    /// Copies under way.
    under_way: HashMap<u64, usize>,
    /// The engine waits for the end.
    asked: HashSet<u64>,
    /// Asked and over, not told yet.
    over: Vec<u64>,
    /// Over before the engine asked. `None`: it need not ask, so this is not kept.
    early: Option<HashSet<u64>>,
}

impl Endings {
    /// Of copies whose end the engine always asks for.
    pub fn always_asked() -> Self {
        Self { early: Some(HashSet::new()), ..Self::default() }
    }

    pub fn begin(&mut self, request: u64) {
        *self.under_way.entry(request).or_insert(0) += 1;
        self.early.as_mut().map(|early| early.remove(&request));
    }

    /// One copy has ended.
    pub fn end(&mut self, request: u64) {
        let Some(left) = self.under_way.get_mut(&request) else { return };
        *left -= 1;
        if *left == 0 {
            self.under_way.remove(&request);
            if self.asked.remove(&request) {
                self.over.push(request);
            } else if let Some(early) = &mut self.early {
                early.insert(request);
            }
        }
    }

    /// The engine asks to be told. False, where it always asks: nothing was ever begun for the request.
    #[must_use]
    pub fn ask(&mut self, request: u64) -> bool {
        if self.under_way.contains_key(&request) {
            self.asked.insert(request);
            return true;
        }
        let known = self.early.as_mut().is_none_or(|early| early.remove(&request));
        if known {
            self.over.push(request);
        }
        known
    }

    pub fn is_under_way(&self, request: u64) -> bool {
        self.under_way.contains_key(&request)
    }

    pub fn is_any_under_way(&self) -> bool {
        !self.under_way.is_empty()
    }

    /// Some have ended of which the engine was not told.
    pub fn has_news(&self) -> bool {
        !self.over.is_empty() || self.early.as_ref().is_some_and(|early| !early.is_empty())
    }

    /// What the engine is to be told now, each once.
    pub fn take(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.over)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_told_once_when_all_its_copies_ended() {
        let mut endings = Endings::always_asked();
        endings.begin(7);
        endings.begin(7);
        assert!(endings.ask(7));
        endings.end(7);
        assert!(endings.take().is_empty());
        endings.end(7);
        assert_eq!(endings.take(), [7]);
        assert!(endings.take().is_empty());
    }

    #[test]
    fn one_that_ended_before_it_was_asked_for_is_told_at_once() {
        let mut endings = Endings::always_asked();
        endings.begin(7);
        endings.end(7);
        assert!(endings.take().is_empty());
        assert!(endings.ask(7));
        assert_eq!(endings.take(), [7]);
        assert!(!endings.ask(8), "never begun");
        assert!(Endings::default().ask(8), "nothing to wait for");
        assert!(endings.take().is_empty());
    }
}
