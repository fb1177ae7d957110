//! The keys of a request's blocks, as each kind of worker would compute them.

use std::sync::Arc;

use kvbm_hash::{BaseNamespace, Namespace, SequenceHash, sequence_hashes};
use kvbm_proto::v1::GenerateRequest;

use super::index::Fingerprint;

/// How workers of one kind make keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keying {
    /// Their base namespace.
    pub base: BaseNamespace,
    /// Tokens in one block; not 0.
    pub tokens_per_block: usize,
}

/// Keys of the complete blocks of a prompt, but for its last token: that one is always computed.
#[derive(Debug, Clone)]
pub struct Keys {
    /// Whose keys they are.
    pub namespace: Namespace,
    /// From the first block on.
    pub hashes: Arc<[SequenceHash]>,
    /// The same, for the index.
    pub prints: Arc<[Fingerprint]>,
}

impl Keying {
    /// Of a request's prompt, and of what has been generated behind it.
    pub fn keys(&self, request: &GenerateRequest) -> Keys {
        let given = |text: &'_ str| (!text.is_empty()).then(|| text.to_owned());
        let namespace = self
            .base
            .namespace(given(&request.lora).as_deref(), given(&request.cache_salt).as_deref())
            .of_tenant(&request.tenant);
        let hashes = match request.generated.is_empty() {
            true => self.hashes(namespace, &request.prompt),
            false => self.hashes(namespace, &[request.prompt.as_slice(), &request.generated].concat()),
        };
        let prints = hashes.iter().map(|hash| Fingerprint::from(*hash)).collect();
        Keys { namespace, hashes, prints }
    }

    fn hashes(&self, namespace: Namespace, tokens: &[u32]) -> Arc<[SequenceHash]> {
        let all_but_last = tokens.split_last().map_or(&[][..], |(_, rest)| rest);
        sequence_hashes(namespace, self.tokens_per_block, all_but_last).into()
    }
}
