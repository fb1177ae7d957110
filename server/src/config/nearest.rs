//! The name that was probably meant.

/// The candidate with the fewest edits, if they are few compared with the length of the name.
pub(super) fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let best = candidates.into_iter().map(|candidate| (edits(name, candidate), candidate)).min()?;
    (best.0 <= 2 + name.len() / 5).then_some(best.1)
}

/// Insertions, deletions and replacements from one to the other.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_recognised_and_a_stranger_is_not() {
        let names = ["cpu_cache_gb", "lease_ms", "socket"];
        assert_eq!(nearest("cpu_cach_gb", names), Some("cpu_cache_gb"));
        assert_eq!(nearest("lease", names), Some("lease_ms"));
        assert_eq!(nearest("entirely_different", names), None);
        assert_eq!(edits("abc", "axcd"), 2);
    }
}
