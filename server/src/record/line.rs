//! The format of a recorded trace: one JSON object per line, see `docs/replay.md`.

use kvbm_hash::SequenceHash;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Version of the format.
pub const VERSION: u32 = 1;
/// Matches back to which a line may refer.
pub const MATCHES_BACK_MAX: usize = 256;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Line {
    /// A daemon began to record. Numbers of namespaces and references to matches begin anew.
    KvbmTrace(Header),
    /// A namespace, before the first line that is about it.
    Namespace(Namespace),
    /// An engine asked for a prefix.
    Match(Match),
    /// An engine declared blocks complete.
    Commit(Commit),
}

/// Where a recording starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// [`VERSION`].
    pub version: u32,
    /// Milliseconds since 1970 at which `t` is 0.
    pub unix_ms: u64,
}

/// What the blocks of a namespace are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// Its number, which lines about it name.
    pub ns: u32,
    /// User id of the processes it belongs to.
    pub domain: u32,
    /// Who pays for it.
    pub tenant: String,
    /// Name of the model.
    pub model: String,
    /// Tokens in one block.
    pub tokens_per_block: u32,
    /// Bytes of one block.
    pub block_bytes: u64,
}

/// A lookup and what it found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Match {
    /// Milliseconds since the header.
    pub t: u64,
    /// Whose blocks.
    pub ns: u32,
    /// Leading blocks found on the device, behind them in host memory, behind them on disk.
    pub hits: [u32; 3],
    /// The blocks that were asked for.
    #[serde(flatten)]
    pub chain: Chain,
}

/// Blocks that became complete, each behind the one before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Milliseconds since the header.
    pub t: u64,
    /// Whose blocks.
    pub ns: u32,
    /// The block before the first; absent if `like` says it, or if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<BlockKey>,
    /// The blocks.
    #[serde(flatten)]
    pub chain: Chain,
}

/// Keys, without those that an earlier match had.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// The first keys are those of another match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub like: Option<Like>,
    /// The other keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<BlockKey>,
}

/// Part of an earlier match, written as `[back, skip, keep]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "[u32; 3]", into = "[u32; 3]")]
pub struct Like {
    /// Which match: 0 is the last one before this line, 1 the one before that.
    pub back: u32,
    /// Its keys that are left out.
    pub skip: u32,
    /// Its keys that are taken.
    pub keep: u32,
}

impl From<[u32; 3]> for Like {
    fn from([back, skip, keep]: [u32; 3]) -> Self {
        Self { back, skip, keep }
    }
}

impl From<Like> for [u32; 3] {
    fn from(like: Like) -> Self {
        [like.back, like.skip, like.keep]
    }
}

/// A key, written as 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockKey(pub SequenceHash);

impl Serialize for BlockKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{:032x}", u128::from_be_bytes(self.0.0)))
    }
}

impl<'de> Deserialize<'de> for BlockKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let is_key = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u128::from_str_radix(&text, 16).ok().filter(|_| is_key);
        let number = number
            .ok_or_else(|| D::Error::custom(format!("a key has 32 hexadecimal digits, not {text:?}")))?;
        Ok(Self(SequenceHash(number.to_be_bytes())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines that the documentation shows.
    #[test]
    fn lines_look_as_documented() {
        let page = include_str!("../../../docs/replay.md");
        let key = |byte| BlockKey(SequenceHash([byte; 16]));
        let lines = [
            Line::KvbmTrace(Header { version: VERSION, unix_ms: 1_767_225_600_000 }),
            Line::Namespace(Namespace {
                ns: 1,
                domain: 1000,
                tenant: "blue".into(),
                model: "tiny".into(),
                tokens_per_block: 32,
                block_bytes: 16_384,
            }),
            Line::Match(Match {
                t: 12,
                ns: 1,
                hits: [0, 0, 0],
                chain: Chain { like: None, keys: vec![key(0xa1), key(0xb2)] },
            }),
            Line::Commit(Commit {
                t: 20,
                ns: 1,
                parent: None,
                chain: Chain { like: Some([0, 0, 2].into()), keys: vec![] },
            }),
            Line::Commit(Commit {
                t: 31,
                ns: 1,
                parent: Some(key(0xb2)),
                chain: Chain { like: None, keys: vec![key(0xc3)] },
            }),
            Line::Match(Match {
                t: 700,
                ns: 1,
                hits: [2, 0, 0],
                chain: Chain { like: Some([0, 0, 2].into()), keys: vec![key(0xd4)] },
            }),
        ];
        for line in lines {
            let text = serde_json::to_string(&line).unwrap();
            assert!(page.contains(&text), "docs/replay.md does not show {text}");
            assert_eq!(serde_json::from_str::<Line>(&text).unwrap(), line);
        }
    }

    #[test]
    fn keys_that_are_none_are_refused() {
        let short = serde_json::from_str::<BlockKey>("\"+b\"").unwrap_err().to_string();
        assert!(short.contains("32 hexadecimal digits"), "{short}");
        let sign = format!("\"+{}\"", "0".repeat(31));
        assert!(serde_json::from_str::<BlockKey>(&sign).is_err());
    }
}
