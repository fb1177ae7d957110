//! Namespaces: what besides the tokens determines KV bytes.

use std::fmt;

const BASE_CONTEXT: &str = "kvbm v1 base namespace";
const REQUEST_CONTEXT: &str = "kvbm v1 request namespace";
const TENANT_CONTEXT: &str = "kvbm v1 tenant namespace";

/// What a [`BaseNamespace`] is made of. Rank is not part of it: all shards of a block share one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseParts<'a> {
    /// Name under which the model is served.
    pub model: &'a str,
    /// Revision of the weights: a digest of them, or what the operator vouches for.
    pub revision: &'a str,
    /// Element type of the KV cache, for example `bf16`.
    pub kv_dtype: &'a str,
    /// Order of the dimensions within a block, and the numerics that made it.
    pub layout: &'a str,
    /// Tokens in one block.
    pub tokens_per_block: u32,
    /// How heads and layers are spread, for example `tp1`.
    pub parallel: &'a str,
}

/// Digest of a model as it is stored: the part of the namespace that all requests to a worker share.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BaseNamespace(pub [u8; 32]);

impl BaseNamespace {
    /// Digest of `parts`; each field is preceded by its length, so that no two lists of fields collide.
    pub fn new(parts: &BaseParts<'_>) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(BASE_CONTEXT);
        for field in [parts.model, parts.revision, parts.kv_dtype, parts.layout] {
            absorb(&mut hasher, field.as_bytes());
        }
        absorb(&mut hasher, &parts.tokens_per_block.to_le_bytes());
        absorb(&mut hasher, parts.parallel.as_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    /// The namespace of requests with this adapter and salt. Empty and absent mean the same.
    pub fn namespace(&self, lora: Option<&str>, salt: Option<&str>) -> Namespace {
        let mut hasher = blake3::Hasher::new_derive_key(REQUEST_CONTEXT);
        absorb(&mut hasher, &self.0);
        absorb(&mut hasher, lora.unwrap_or_default().as_bytes());
        absorb(&mut hasher, salt.unwrap_or_default().as_bytes());
        Namespace(*hasher.finalize().as_bytes())
    }
}

/// Digest of a base namespace, LoRA, cache salt and tenant; the key of the first block's hash.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Namespace(pub [u8; 32]);

impl Namespace {
    /// This namespace as a tenant has it for itself; without a tenant, as it is.
    #[must_use]
    pub fn of_tenant(self, tenant: &str) -> Self {
        if tenant.is_empty() {
            return self;
        }
        let mut hasher = blake3::Hasher::new_derive_key(TENANT_CONTEXT);
        absorb(&mut hasher, &self.0);
        absorb(&mut hasher, tenant.as_bytes());
        Self(*hasher.finalize().as_bytes())
    }
}

fn absorb(hasher: &mut blake3::Hasher, field: &[u8]) {
    hasher.update(&(field.len() as u64).to_le_bytes());
    hasher.update(field);
}

impl fmt::Debug for BaseNamespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "base:{}", &blake3::Hash::from(self.0).to_hex()[..12])
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ns:{}", &blake3::Hash::from(self.0).to_hex()[..12])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARTS: BaseParts<'static> = BaseParts {
        model: "tiny",
        revision: "r1",
        kv_dtype: "bf16",
        layout: "block-layer-kv-token-head",
        tokens_per_block: 32,
        parallel: "tp1",
    };

    #[test]
    fn every_part_counts() {
        let base = BaseNamespace::new(&PARTS);
        let others = [
            BaseParts { model: "tiny2", ..PARTS },
            BaseParts { revision: "r2", ..PARTS },
            BaseParts { kv_dtype: "fp8", ..PARTS },
            BaseParts { layout: "other", ..PARTS },
            BaseParts { tokens_per_block: 16, ..PARTS },
            BaseParts { parallel: "tp2", ..PARTS },
        ];
        for other in others {
            assert_ne!(BaseNamespace::new(&other), base, "{other:?}");
        }
    }

    #[test]
    fn fields_do_not_run_into_each_other() {
        let a = BaseParts { model: "ab", revision: "c", ..PARTS };
        let b = BaseParts { model: "a", revision: "bc", ..PARTS };
        assert_ne!(BaseNamespace::new(&a), BaseNamespace::new(&b));
    }

    #[test]
    fn tenants_separate_and_are_no_salts() {
        let base = BaseNamespace::new(&PARTS);
        let plain = base.namespace(None, None);
        assert_eq!(plain.of_tenant(""), plain);
        let salted = base.namespace(None, Some("a"));
        let all = [plain, plain.of_tenant("a"), plain.of_tenant("b"), salted, salted.of_tenant("a")];
        let distinct: std::collections::HashSet<Namespace> = all.into_iter().collect();
        assert_eq!(distinct.len(), all.len());
    }

    #[test]
    fn salt_and_lora_separate() {
        let base = BaseNamespace::new(&PARTS);
        let plain = base.namespace(None, None);
        assert_eq!(plain, base.namespace(Some(""), Some("")));
        assert_ne!(plain, base.namespace(Some("x"), None));
        assert_ne!(plain, base.namespace(None, Some("x")));
        assert_ne!(base.namespace(Some("x"), None), base.namespace(None, Some("x")));
    }
}
