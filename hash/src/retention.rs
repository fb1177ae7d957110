//! How long and how dearly blocks are to be kept: what a request says by token ranges, and what that means per block.
//!
//! The rules are TensorRT-LLM's `KvCacheRetentionConfig`. It is here because frontend, worker, connector and daemon all
//! have to mean the same by it.

use std::time::Duration;

use thiserror::Error;

/// How long and how dearly a block is to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Retention {
    /// 0..=100, higher stays longer.
    pub priority: u8,
    /// How long the priority holds after release, then it is the default; `None`: for ever.
    pub duration: Option<Duration>,
}

impl Retention {
    /// The highest priority.
    pub const PRIORITY_MAX: u8 = 100;
    /// The longest duration: a hundred years, milliseconds. Who wants longer gives none.
    pub const DURATION_MS_MAX: u64 = 3_155_760_000_000;
}

impl Default for Retention {
    fn default() -> Self {
        Self { priority: 35, duration: None }
    }
}

/// Retention of the tokens `[start, end)` of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenRange {
    /// First token, counted from 0.
    pub start: u32,
    /// Behind the last token; `None`: to the end of the prompt.
    pub end: Option<u32>,
    /// Of its blocks.
    pub retention: Retention,
}

/// What a request says about the blocks of its prompt and of its answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RetentionConfig {
    /// In order of their starts, without overlap.
    ranges: Vec<TokenRange>,
    decode: Retention,
}

/// A retention config that contradicts itself or goes out of bounds.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{field} {reason}")]
pub struct RetentionError {
    /// Path of the field within the config, for example `token_range_retention_configs[1].priority`.
    pub field: String,
    /// What is wrong with it, with the value and what is permitted.
    pub reason: String,
}

impl RetentionError {
    fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }
}

impl RetentionConfig {
    /// Checks the ranges, which may come in any order: priorities within 0..=100, none empty, no overlap, and only the
    /// last without an end. `decode` is of the blocks that begin behind the prompt.
    pub fn new(ranges: Vec<TokenRange>, decode: Retention) -> Result<Self, RetentionError> {
        let path = |index: usize, field: &str| format!("token_range_retention_configs[{index}].{field}");
        let mut indexed: Vec<(usize, TokenRange)> = ranges.into_iter().enumerate().collect();
        indexed.sort_by_key(|(_, range)| range.start);
        for (index, TokenRange { start, end, retention }) in &indexed {
            check(*retention, |field| path(*index, field))?;
            if let Some(end) = end.filter(|end| end <= start) {
                let reason = format!("is {end}, it must be above token_start, which is {start}");
                return Err(RetentionError::new(path(*index, "token_end"), reason));
            }
        }
        for pair in indexed.windows(2) {
            let [(_, before), (index, range)] = pair else { continue };
            if before.end.is_none_or(|end| end > range.start) {
                let before_end = before.end.map_or_else(|| "the end".to_owned(), |end| end.to_string());
                let reason = format!(
                    "is {}, which is within the range from {} to {before_end}",
                    range.start, before.start
                );
                return Err(RetentionError::new(path(*index, "token_start"), reason));
            }
        }
        check(decode, |field| match field {
            "priority" => "decode_retention_priority".to_owned(),
            _ => "decode_duration_ms".to_owned(),
        })?;
        Ok(Self { ranges: indexed.into_iter().map(|(_, range)| range).collect(), decode })
    }

    /// The same for all blocks of prompt and answer.
    pub fn uniform(retention: Retention) -> Result<Self, RetentionError> {
        check(retention, str::to_owned)?;
        let all = TokenRange { start: 0, end: None, retention };
        Ok(Self { ranges: vec![all], decode: retention })
    }

    /// In order of their starts, without overlap.
    pub fn ranges(&self) -> &[TokenRange] {
        &self.ranges
    }

    /// Of blocks whose first token was generated.
    pub fn decode(&self) -> Retention {
        self.decode
    }

    /// What is said about each block of a prompt of so many tokens: a block takes the range that its first token is
    /// in. `None`: nothing.
    pub fn per_block(&self, tokens_per_block: usize, tokens: usize) -> Vec<Option<Retention>> {
        let mut ranges = self.ranges.iter().peekable();
        let mut of_token = |token: usize| {
            while ranges.next_if(|range| range.end.is_some_and(|end| end as usize <= token)).is_some() {}
            ranges.peek().filter(|range| range.start as usize <= token).map(|range| range.retention)
        };
        (0..tokens).step_by(tokens_per_block).map(&mut of_token).collect()
    }
}

fn check(retention: Retention, path: impl Fn(&str) -> String) -> Result<(), RetentionError> {
    let Retention { priority, duration } = retention;
    if priority > Retention::PRIORITY_MAX {
        let reason = format!("is {priority}, it must be within 0 to {}", Retention::PRIORITY_MAX);
        return Err(RetentionError::new(path("priority"), reason));
    }
    let most = Duration::from_millis(Retention::DURATION_MS_MAX);
    if let Some(duration) = duration.filter(|duration| *duration > most) {
        let reason =
            format!("is {}, it must be within 0 to {}", duration.as_millis(), Retention::DURATION_MS_MAX);
        return Err(RetentionError::new(path("duration_ms"), reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kept(priority: u8) -> Retention {
        Retention { priority, duration: None }
    }

    fn config(ranges: &[(u32, Option<u32>, u8)]) -> Result<RetentionConfig, RetentionError> {
        let range =
            |(start, end, priority): &_| TokenRange { start: *start, end: *end, retention: kept(*priority) };
        RetentionConfig::new(ranges.iter().map(range).collect(), Retention::default())
    }

    /// Priorities per block; 255: nothing is said.
    fn expanded(ranges: &[(u32, Option<u32>, u8)], per_block: usize, tokens: usize) -> Vec<u8> {
        let blocks = config(ranges).unwrap().per_block(per_block, tokens);
        blocks.into_iter().map(|block| block.map_or(255, |block| block.priority)).collect()
    }

    #[test]
    fn blocks_take_the_range_of_their_first_token() {
        let no = 255;
        type Row<'a> = (&'a [(u32, Option<u32>, u8)], usize, usize, &'a [u8]);
        let rows: [Row<'_>; 10] = [
            (&[(0, Some(64), 80), (64, Some(128), 50)], 64, 256, &[80, 50, no, no]),
            (&[(0, Some(63), 80), (63, Some(127), 30)], 32, 127, &[80, 80, 30, 30]),
            (&[(0, Some(1), 80), (1, Some(2), 5)], 32, 128, &[80, no, no, no]),
            (&[(0, Some(128), 80)], 256, 192, &[80]),
            (&[(0, Some(65), 80), (65, Some(129), 30)], 64, 192, &[80, 80, 30]),
            (&[(0, Some(64), 80), (129, None, 50)], 64, 256, &[80, no, no, 50]),
            (&[(0, Some(64), 80), (66, Some(67), 50)], 64, 256, &[80, no, no, no]),
            (&[(127, Some(193), 80)], 64, 256, &[no, no, 80, 80]),
            (&[(127, Some(193), 80)], 64, 32, &[no]),
            (&[(1, None, 80)], 64, 128, &[no, 80]),
        ];
        for (ranges, per_block, tokens, expected) in rows {
            assert_eq!(expanded(ranges, per_block, tokens), expected, "{ranges:?} {per_block} {tokens}");
        }
        assert!(expanded(&[(0, None, 80)], 64, 0).is_empty());
    }

    #[test]
    fn what_contradicts_itself_is_refused_by_field() {
        let ranges = |rows: &[_]| config(rows).unwrap_err().to_string();
        let field = "token_range_retention_configs";
        for (rows, expected) in [
            (
                &[(0, None, 35), (64, Some(128), 35)][..],
                "[1].token_start is 64, which is within the range from 0 to the end",
            ),
            (&[(64, Some(32), 35)], "[0].token_end is 32, it must be above token_start, which is 64"),
            (&[(64, Some(64), 35)], "[0].token_end is 64, it must be above token_start, which is 64"),
            (
                &[(0, Some(64), 35), (30, Some(128), 35)],
                "[1].token_start is 30, which is within the range from 0 to 64",
            ),
            (&[(0, Some(64), 35), (64, None, 101)], "[1].priority is 101, it must be within 0 to 100"),
            // As they were given, whatever the order.
            (
                &[(64, None, 35), (0, Some(65), 35)],
                "[0].token_start is 64, which is within the range from 0 to 65",
            ),
        ] {
            assert_eq!(ranges(rows), format!("{field}{expected}"));
        }
        let long = Duration::from_millis(Retention::DURATION_MS_MAX + 1);
        let long = Retention { duration: Some(long), ..kept(50) };
        for (decode, expected) in [(kept(101), "decode_retention_priority"), (long, "decode_duration_ms")] {
            assert_eq!(RetentionConfig::new(vec![], decode).unwrap_err().field, expected);
        }
        assert_eq!(RetentionConfig::uniform(kept(101)).unwrap_err().field, "priority");
        assert_eq!(RetentionConfig::uniform(long).unwrap_err().field, "duration_ms");
    }

    #[test]
    fn ranges_may_come_in_any_order_and_the_bounds_are_permitted() {
        assert_eq!(expanded(&[(64, None, 100), (0, Some(64), 0)], 64, 192), [0, 100, 100]);
        let uniform = RetentionConfig::uniform(kept(90)).unwrap();
        assert_eq!(uniform.per_block(16, 33), [Some(kept(90)); 3]);
        assert_eq!(uniform.decode(), kept(90));
    }

    proptest! {
        /// Against a search from scratch for each block.
        #[test]
        fn the_walk_agrees_with_a_search(
            bounds in prop::collection::btree_set(0..300u32, 0..12),
            per_block in 1..70usize,
            tokens in 0..300usize,
        ) {
            let bounds: Vec<u32> = bounds.into_iter().collect();
            let rows: Vec<_> = bounds
                .chunks(2)
                .zip(0u8..)
                .map(|(pair, priority)| (pair[0], pair.get(1).copied(), priority))
                .collect();
            let searched: Vec<u8> = (0..tokens)
                .step_by(per_block)
                .map(|token| {
                    let token = token as u32;
                    let holds = |row: &&(u32, Option<u32>, u8)| row.0 <= token && row.1.is_none_or(|end| token < end);
                    rows.iter().find(holds).map_or(255, |row| row.2)
                })
                .collect();
            prop_assert_eq!(expanded(&rows, per_block, tokens), searched);
        }
    }
}
