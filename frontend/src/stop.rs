//! Stop strings, found wherever the borders between tokens fall.
//!
//! Text passes through except for an end that may be the beginning of a stop string. The match that ends first
//! counts; of those that end together, the longest. So the cut does not depend on how the text was split.

/// Lets text through up to the first stop string.
pub struct StopFilter {
    stops: Vec<String>,
    /// Not yet released: a proper prefix of some stop string.
    held: String,
}

impl StopFilter {
    /// None of `stops` may be empty.
    pub fn new(stops: Vec<String>) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()));
        Self { stops, held: String::new() }
    }

    /// Whether all text passes unchanged.
    pub fn is_idle(&self) -> bool {
        self.stops.is_empty()
    }

    /// Appends to `out` what of `text` is certain to be in front of any stop string; true when one was found.
    #[must_use]
    pub fn push(&mut self, text: &str, out: &mut String) -> bool {
        if self.is_idle() {
            out.push_str(text);
            return false;
        }
        self.held.push_str(text);
        if let Some(start) = self.first_match() {
            out.push_str(&self.held[..start]);
            self.held.clear();
            return true;
        }
        let keep = self.possible_start();
        out.push_str(&self.held[..keep]);
        self.held.drain(..keep);
        false
    }

    /// Appends what was held back: the text ended without a stop string.
    pub fn flush(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    fn first_match(&self) -> Option<usize> {
        let ends = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        ends.min().map(|(_, start)| start)
    }

    /// Where the longest end of `held` starts that begins a stop string; its length when there is none.
    fn possible_start(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest.saturating_sub(1));
        let starts = (from..self.held.len()).filter(|&start| self.held.is_char_boundary(start));
        let mut candidates = starts.filter(|&start| {
            let tail = &self.held[start..];
            self.stops.iter().any(|stop| stop.starts_with(tail))
        });
        candidates.next().unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut filter = StopFilter::new(stops.iter().map(|s| s.to_string()).collect());
        let mut out = String::new();
        for piece in pieces {
            if filter.push(piece, &mut out) {
                return (out, true);
            }
        }
        filter.flush(&mut out);
        (out, false)
    }

    #[test]
    fn a_stop_string_is_found_across_pieces_and_cut_exactly() {
        assert_eq!(run(&["END"], &["one E", "N", "D two"]), ("one ".into(), true));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]), ("a".into(), true));
        assert_eq!(run(&["\u{e9}\u{20ac}"], &["x\u{e9}", "\u{20ac}"]), ("x".into(), true));
    }

    #[test]
    fn a_partial_match_is_held_back_and_released() {
        let mut filter = StopFilter::new(vec!["END".into()]);
        let mut out = String::new();
        assert!(!filter.push("one EN", &mut out));
        assert_eq!(out, "one ");
        assert!(!filter.push("E", &mut out));
        assert_eq!(out, "one EN");
        filter.flush(&mut out);
        assert_eq!(out, "one ENE");
    }

    #[test]
    fn the_match_that_ends_first_counts_however_the_text_is_split() {
        assert_eq!(run(&["abcd", "bc"], &["abcd"]), ("a".into(), true));
        assert_eq!(run(&["abcd", "bc"], &["a", "b", "c", "d"]), ("a".into(), true));
        assert_eq!(run(&["abc", "bc"], &["xabc"]), ("x".into(), true));
    }
}
