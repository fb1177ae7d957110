//! Retention on the wire: what a request says by token ranges, and what an engine says of the blocks it commits or asks
//! for. Checked by the receiver.

use std::time::Duration;

use kvbm_hash::{Retention, RetentionConfig, RetentionError, TokenRange};

use crate::v1;

impl From<&RetentionConfig> for v1::Retention {
    fn from(config: &RetentionConfig) -> Self {
        let ranges = config.ranges().iter().map(|range| v1::TokenRangeRetention {
            token_start: range.start,
            token_end: range.end,
            priority: Some(range.retention.priority.into()),
            duration_ms: duration_ms(range.retention),
        });
        Self {
            token_range_retention_configs: ranges.collect(),
            decode_retention_priority: Some(config.decode().priority.into()),
            decode_duration_ms: duration_ms(config.decode()),
        }
    }
}

impl TryFrom<&v1::Retention> for RetentionConfig {
    type Error = RetentionError;

    fn try_from(message: &v1::Retention) -> Result<Self, RetentionError> {
        let ranges = message.token_range_retention_configs.iter().map(|range| TokenRange {
            start: range.token_start,
            end: range.token_end,
            retention: retention(range.priority, range.duration_ms),
        });
        let decode = retention(message.decode_retention_priority, message.decode_duration_ms);
        Self::new(ranges.collect(), decode)
    }
}

/// What is said of each block, as neighbours that are alike. Empty when nothing is said of any.
pub fn retention_runs(blocks: &[Option<Retention>]) -> Vec<v1::RetentionRun> {
    if blocks.iter().all(Option::is_none) {
        return Vec::new();
    }
    let run = |alike: &[Option<Retention>]| v1::RetentionRun {
        blocks: u32::try_from(alike.len()).expect("more blocks than that do not fit into a message"),
        priority: alike[0].map(|retention| retention.priority.into()),
        duration_ms: alike[0].and_then(duration_ms),
    };
    blocks.chunk_by(|a, b| a == b).map(run).collect()
}

/// The inverse of [`retention_runs`] for so many blocks: one for each, or none when nothing is said of any.
pub fn retention_of_blocks(
    runs: &[v1::RetentionRun],
    blocks: usize,
) -> Result<Vec<Option<Retention>>, RetentionError> {
    if runs.is_empty() {
        return Ok(Vec::new());
    }
    let wrong = |field: String, reason: String| RetentionError { field, reason };
    let said: u64 = runs.iter().map(|run| u64::from(run.blocks)).sum();
    if said != blocks as u64 {
        return Err(wrong("retention".into(), format!("is of {said} blocks, there are {blocks}")));
    }
    let mut of_blocks = Vec::with_capacity(blocks);
    for (index, run) in runs.iter().enumerate() {
        if run.blocks == 0 {
            return Err(wrong(format!("retention[{index}].blocks"), "is 0, at least 1 is permitted".into()));
        }
        let said = match (run.priority, run.duration_ms) {
            (None, None) => None,
            (None, Some(_)) => {
                let reason = "is given without a priority".into();
                return Err(wrong(format!("retention[{index}].duration_ms"), reason));
            }
            (Some(_), _) => {
                let run = retention(run.priority, run.duration_ms);
                RetentionConfig::uniform(run)
                    .map_err(|error| wrong(format!("retention[{index}].{}", error.field), error.reason))?;
                Some(run)
            }
        };
        of_blocks.resize(of_blocks.len() + run.blocks as usize, said);
    }
    Ok(of_blocks)
}

/// What a block of an adopted or inherited pool is to be kept like.
pub fn entry_retention(entry: &v1::PoolEntry) -> Result<Retention, RetentionError> {
    let said = retention(entry.priority, entry.duration_ms);
    RetentionConfig::uniform(said).map(|_| said)
}

/// Sets it, briefly: tables are long and most blocks are kept by default.
pub fn set_entry_retention(entry: &mut v1::PoolEntry, said: Retention) {
    if said != Retention::default() {
        (entry.priority, entry.duration_ms) = (Some(said.priority.into()), duration_ms(said));
    }
}

/// Not checked yet: a priority that no byte can hold is one that is not permitted.
fn retention(priority: Option<u32>, duration_ms: Option<u64>) -> Retention {
    let priority = priority.map(|priority| u8::try_from(priority).unwrap_or(u8::MAX));
    Retention {
        priority: priority.unwrap_or(Retention::default().priority),
        duration: duration_ms.map(Duration::from_millis),
    }
}

fn duration_ms(retention: Retention) -> Option<u64> {
    let duration = retention.duration?;
    Some(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_retention() -> impl Strategy<Value = Retention> {
        // Few values, so that neighbours are alike; 0 is a priority like any other.
        (prop_oneof![Just(0), Just(35), Just(100)], prop::option::of(0..3u64)).prop_map(
            |(priority, duration)| Retention { priority, duration: duration.map(Duration::from_millis) },
        )
    }

    proptest! {
        #[test]
        fn what_is_said_of_blocks_arrives(blocks in prop::collection::vec(prop::option::of(any_retention()), 0..40)) {
            let runs = retention_runs(&blocks);
            let arrived = retention_of_blocks(&runs, blocks.len()).unwrap();
            if blocks.iter().all(Option::is_none) {
                prop_assert!(runs.is_empty() && arrived.is_empty());
            } else {
                prop_assert_eq!(arrived, blocks);
            }
        }

        #[test]
        fn what_a_request_says_arrives(
            bounds in prop::collection::btree_set(0..1000u32, 0..12),
            of_ranges in prop::collection::vec(any_retention(), 6),
            decode in any_retention(),
        ) {
            let bounds: Vec<u32> = bounds.into_iter().collect();
            let ranges = bounds.chunks(2).zip(of_ranges).map(|(pair, retention)| {
                TokenRange { start: pair[0], end: pair.get(1).copied(), retention }
            });
            let config = RetentionConfig::new(ranges.collect(), decode).unwrap();
            prop_assert_eq!(RetentionConfig::try_from(&v1::Retention::from(&config)), Ok(config));
        }
    }

    #[test]
    fn an_entry_says_what_is_not_the_default() {
        let mut entry = v1::PoolEntry::default();
        set_entry_retention(&mut entry, Retention::default());
        assert_eq!((entry.priority, entry_retention(&entry)), (None, Ok(Retention::default())));
        let said = Retention { priority: 0, duration: Some(Duration::from_millis(7)) };
        set_entry_retention(&mut entry, said);
        assert_eq!(entry_retention(&entry), Ok(said));
        entry.priority = Some(101);
        assert_eq!(entry_retention(&entry).unwrap_err().field, "priority");
    }

    #[test]
    fn runs_that_are_wrong_are_refused_by_field() {
        let run = |blocks, priority, duration_ms| v1::RetentionRun { blocks, priority, duration_ms };
        for (runs, expected) in [
            (vec![run(2, Some(50), None)], "retention is of 2 blocks, there are 3"),
            (vec![run(u32::MAX, None, None); 3], "retention is of 12884901885 blocks, there are 3"),
            (
                vec![run(3, Some(50), None), run(0, Some(1), None)],
                "retention[1].blocks is 0, at least 1 is permitted",
            ),
            (
                vec![run(1, None, None), run(2, Some(101), None)],
                "retention[1].priority is 101, it must be within 0 to 100",
            ),
            (
                vec![run(3, Some(1), Some(u64::MAX))],
                "retention[0].duration_ms is 18446744073709551615, it must be within 0 to 3155760000000",
            ),
            (vec![run(3, None, Some(5))], "retention[0].duration_ms is given without a priority"),
        ] {
            assert_eq!(retention_of_blocks(&runs, 3).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn a_request_that_is_wrong_is_refused_by_field() {
        let range = v1::TokenRangeRetention { priority: Some(256), ..Default::default() };
        let message = v1::Retention { token_range_retention_configs: vec![range], ..Default::default() };
        let error = RetentionConfig::try_from(&message).unwrap_err();
        assert_eq!(error.field, "token_range_retention_configs[0].priority");
        assert_eq!(RetentionConfig::try_from(&v1::Retention::default()), Ok(RetentionConfig::default()));
    }
}
