//! Between the schema and the block manager: what comes in is checked here, once.

use kvbm::ledger::PoolEntry;
use kvbm::{BlockRef, CommitBlock, Error, Held, NamespaceId, Outcome, Prefetched, Refused, Retention, Tier};
use kvbm_hash::{RetentionError, SequenceHash};
use kvbm_proto::v1::{self, server_message::Body};
use kvbm_proto::{Malformed, entry_retention, keys, optional_key, retention_of_blocks, set_entry_retention};

/// Longest label of a client: names, models, endpoints. Bytes.
const LABEL_BYTES_MAX: usize = 4096;

pub(crate) fn malformed(malformed: Malformed) -> Refused {
    Refused::Invalid {
        field: malformed.field,
        reason: format!("{} bytes, {}", malformed.actual, malformed.expected),
    }
}

pub(crate) fn invalid(field: &'static str, reason: impl Into<String>) -> Refused {
    Refused::Invalid { field, reason: reason.into() }
}

pub(crate) fn refused(refused: &Refused) -> v1::Refused {
    v1::Refused { refusal: refusal(refused).into(), detail: refused.to_string() }
}

fn refusal(refused: &Refused) -> v1::Refusal {
    match refused {
        Refused::Busy { .. } => v1::Refusal::Busy,
        Refused::Exhausted { .. } | Refused::OverBudget { .. } => v1::Refusal::Exhausted,
        Refused::Invalid { .. } => v1::Refusal::Invalid,
        Refused::Unknown { .. } => v1::Refusal::Unknown,
        Refused::Stale { .. } => v1::Refusal::Stale,
        Refused::Closed => v1::Refusal::Closed,
    }
}

/// The answer to a question that failed for any reason.
pub(crate) fn failed(error: &Error) -> v1::Refused {
    match error {
        Error::Refused(reason) => refused(reason),
        Error::Memory(_) | Error::Thread { .. } | Error::Disk(_) => {
            v1::Refused { refusal: v1::Refusal::Exhausted.into(), detail: error.to_string() }
        }
    }
}

pub(crate) fn transfer_done(outcome: &Outcome) -> Body {
    let (refusal, detail) = match &outcome.error {
        Some(reason) => (refusal(reason), reason.to_string()),
        None => (v1::Refusal::Unspecified, String::new()),
    };
    Body::TransferDone(v1::TransferDone {
        blocks_done: count(outcome.blocks_done),
        blocks_failed: count(outcome.blocks_failed),
        bytes: outcome.bytes,
        refusal: refusal.into(),
        detail,
    })
}

pub(crate) fn prefetched(found: &Prefetched) -> Body {
    Body::Prefetch(v1::PrefetchReply {
        host_blocks: count(found.host_blocks),
        promoting_blocks: count(found.promoting_blocks),
    })
}

pub(crate) fn tier(tier: Tier) -> v1::Tier {
    match tier {
        Tier::Device => v1::Tier::Device,
        Tier::Host => v1::Tier::Host,
        Tier::Disk => v1::Tier::Disk,
        Tier::Remote => v1::Tier::Remote,
    }
}

/// Blocks of one message: more than a `u32` of them do not fit into a message.
pub(crate) fn count(blocks: usize) -> u32 {
    u32::try_from(blocks).unwrap_or(u32::MAX)
}

pub(crate) fn block(block: v1::BlockRef) -> BlockRef {
    BlockRef { block: block.block, generation: block.generation }
}

pub(crate) fn blocks(blocks: &[v1::BlockRef]) -> Vec<BlockRef> {
    blocks.iter().copied().map(block).collect()
}

pub(crate) fn block_out(block: BlockRef) -> v1::BlockRef {
    v1::BlockRef { block: block.block, generation: block.generation }
}

pub(crate) fn hashes(field: &'static str, bytes: &[u8]) -> Result<Vec<SequenceHash>, Refused> {
    Ok(keys(field, bytes).map_err(malformed)?.into_iter().map(SequenceHash).collect())
}

pub(crate) fn label<'a>(field: &'static str, text: &'a str) -> Result<&'a str, Refused> {
    match text.len() {
        0..=LABEL_BYTES_MAX => Ok(text),
        bytes => Err(invalid(field, format!("{bytes} bytes, at most {LABEL_BYTES_MAX} are permitted"))),
    }
}

pub(crate) fn commits(message: &v1::Commit) -> Result<Vec<CommitBlock>, Refused> {
    let hashes = hashes("keys", &message.keys)?;
    let parents = keys("parents", &message.parents).map_err(malformed)?;
    let blocks = blocks(&message.blocks);
    same_length("keys", hashes.len(), blocks.len())?;
    same_length("parents", parents.len(), blocks.len())?;
    let parents = parents.into_iter().map(|parent| (parent != [0; 16]).then_some(SequenceHash(parent)));
    let retention = commit_retention(message)?;
    let rows = blocks.into_iter().zip(hashes).zip(parents).zip(retention);
    Ok(rows
        .map(|(((block, hash), parent), retention)| CommitBlock { block, hash, parent, retention })
        .collect())
}

/// What the blocks of a commit are to be kept like, one for each.
fn commit_retention(message: &v1::Commit) -> Result<Vec<Option<Retention>>, Refused> {
    let blocks = message.blocks.len();
    let mut said = retention_of_blocks(&message.retention, blocks).map_err(unkeepable)?;
    said.resize(blocks, None);
    Ok(said)
}

/// What the blocks of a match are to be kept like from now on: one for each key, or none when it stays as it is.
pub(crate) fn match_retention(message: &v1::Match, keys: usize) -> Result<Vec<Option<Retention>>, Refused> {
    retention_of_blocks(&message.retention, keys).map_err(unkeepable)
}

fn unkeepable(error: RetentionError) -> Refused {
    invalid("retention", error.to_string())
}

pub(crate) fn held(message: &v1::Release) -> Result<Vec<Held>, Refused> {
    same_length("pins", message.pins.len(), message.blocks.len())?;
    if message.pins.contains(&0) {
        return Err(invalid("pins", "0 pins cannot be given back"));
    }
    let rows = blocks(&message.blocks).into_iter().zip(&message.pins);
    Ok(rows.map(|(block, pins)| Held { block, pins: *pins }).collect())
}

pub(crate) fn pool_entry(entry: &v1::PoolEntry) -> Result<PoolEntry, Refused> {
    let retention =
        entry_retention(entry).map_err(|error| invalid("adoption.entries.priority", error.to_string()))?;
    let place = entry.block.ok_or_else(|| invalid("adoption.entries.block", "is missing"))?;
    Ok(PoolEntry {
        block: block(place),
        namespace: NamespaceId(entry.namespace_id),
        hash: SequenceHash(kvbm_proto::key("adoption.entries.key", &entry.key).map_err(malformed)?),
        parent: optional_key("adoption.entries.parent", &entry.parent).map_err(malformed)?.map(SequenceHash),
        held: entry.held,
        retention,
    })
}

pub(crate) fn pool_entry_out(entry: &PoolEntry) -> v1::PoolEntry {
    let mut out = v1::PoolEntry {
        block: Some(block_out(entry.block)),
        namespace_id: entry.namespace.0,
        key: entry.hash.0.to_vec(),
        parent: entry.parent.map_or_else(Vec::new, |parent| parent.0.to_vec()),
        held: entry.held,
        ..Default::default()
    };
    set_entry_retention(&mut out, entry.retention);
    out
}

fn same_length(field: &'static str, actual: usize, blocks: usize) -> Result<(), Refused> {
    if actual == blocks { Ok(()) } else { Err(invalid(field, format!("{actual} for {blocks} blocks"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_has_as_many_keys_and_parents_as_blocks() {
        let mut message = v1::Commit {
            blocks: vec![v1::BlockRef { block: 1, generation: 2 }, v1::BlockRef { block: 3, generation: 1 }],
            keys: [[1; 16], [2; 16]].concat(),
            parents: [[0; 16], [1; 16]].concat(),
            ..Default::default()
        };
        let rows = commits(&message).unwrap();
        assert_eq!((rows[0].parent, rows[1].parent), (None, Some(SequenceHash([1; 16]))));
        message.keys.truncate(16);
        assert!(matches!(commits(&message), Err(Refused::Invalid { field: "keys", .. })));
        message.keys.truncate(15);
        assert!(matches!(commits(&message), Err(Refused::Invalid { field: "keys", .. })));
    }

    #[test]
    fn retention_is_of_each_block_and_zero_is_a_priority() {
        let run = |blocks, priority| v1::RetentionRun { blocks, priority, duration_ms: None };
        let commit = |retention| v1::Commit {
            blocks: vec![v1::BlockRef { block: 1, generation: 2 }; 3],
            retention,
            ..Default::default()
        };
        let priorities = |retention| {
            let kept = commit_retention(&commit(retention))?;
            Ok::<_, Refused>(kept.iter().map(|kept| kept.map(|kept| kept.priority)).collect::<Vec<_>>())
        };
        assert_eq!(priorities(vec![]).unwrap(), [None; 3]);
        assert_eq!(
            priorities(vec![run(1, Some(0)), run(1, None), run(1, Some(100))]).unwrap(),
            [Some(0), None, Some(100)]
        );
        let wrong = |refused| matches!(refused, Err(Refused::Invalid { field: "retention", .. }));
        assert!(wrong(priorities(vec![run(2, Some(50))])));
        assert!(wrong(priorities(vec![run(3, Some(101))])));
        let question = |retention| v1::Match { retention, ..Default::default() };
        assert_eq!(match_retention(&question(vec![]), 3).unwrap(), []);
        let said = match_retention(&question(vec![run(1, Some(0)), run(2, None)]), 3).unwrap();
        assert_eq!(said, [Some(Retention { priority: 0, duration: None }), None, None]);
        assert!(match_retention(&question(vec![run(2, Some(0))]), 3).is_err());
    }

    #[test]
    fn no_pin_can_be_given_back_zero_times() {
        let blocks = vec![v1::BlockRef { block: 1, generation: 2 }];
        let release = |pins| v1::Release { pool_id: 1, blocks: blocks.clone(), pins };
        assert!(held(&release(vec![0])).is_err());
        assert!(held(&release(vec![])).is_err());
        assert_eq!(held(&release(vec![2])).unwrap()[0].pins, 2);
    }
}
