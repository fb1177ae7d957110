//! Hit ratio over capacity.

use super::report::Row;

/// Capacities when none are named: powers of two from a thousandth of the different blocks to all of them.
pub(super) fn default_capacities(unique_blocks: usize) -> Vec<u32> {
    let most = u32::try_from(unique_blocks.max(1)).unwrap_or(1 << 31).min(1 << 31).next_power_of_two();
    let powers = std::iter::successors(Some(most), |size| Some(size / 2).filter(|size| *size > 0));
    let mut sizes: Vec<u32> = powers.take(10).collect();
    sizes.reverse();
    sizes
}

/// One policy at all capacities.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub policy: &'static str,
    /// Capacity and hit ratio.
    pub points: Vec<(u32, f64)>,
}

/// Lines of the rows of each capacity.
pub(super) fn lines(by_capacity: &[(u32, Vec<Row>)]) -> Vec<Line> {
    let Some((_, first)) = by_capacity.first() else { return Vec::new() };
    let line = |at: usize| Line {
        policy: first[at].policy(),
        points: by_capacity.iter().map(|(size, rows)| (*size, rows[at].hit_ratio())).collect(),
    };
    (0..first.len()).map(line).collect()
}

/// For people: a policy per line, a capacity per column.
pub(super) fn table(lines: &[Line]) -> String {
    let mut text = format!("{:<18}", "policy");
    if let Some(first) = lines.first() {
        first.points.iter().for_each(|(size, _)| text += &format!(" {size:>9}"));
    }
    for line in lines {
        text += &format!("\n{:<18}", line.policy);
        line.points.iter().for_each(|(_, ratio)| text += &format!(" {ratio:>9.4}"));
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacities_reach_from_few_to_all() {
        assert_eq!(
            default_capacities(182_790),
            [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144]
        );
        assert_eq!(default_capacities(3), [1, 2, 4]);
        assert_eq!(default_capacities(0), [1]);
    }
}
