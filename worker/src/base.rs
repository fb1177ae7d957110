//! The base namespace of the reference engine's blocks.

use kvbm_hash::{BaseNamespace, BaseParts};

use crate::KvLayout;

/// Of a model under the name it is served by, with weights of that revision ([`crate::model::revision`]).
pub fn base_namespace(served_name: &str, revision: &str, tokens_per_block: u32) -> BaseNamespace {
    of_layout(served_name, revision, KvLayout::NAME, tokens_per_block)
}

/// As [`base_namespace`], for an engine with another layout.
pub(crate) fn of_layout(
    served_name: &str,
    revision: &str,
    layout: &str,
    tokens_per_block: u32,
) -> BaseNamespace {
    BaseNamespace::new(&BaseParts {
        model: served_name,
        revision,
        kv_dtype: KvLayout::DTYPE,
        layout,
        tokens_per_block,
        parallel: "tp1",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_and_a_processor_never_find_each_others_blocks() {
        let of = |layout| of_layout("model", "revision", layout, 32);
        assert_ne!(of(KvLayout::NAME), of(KvLayout::CUDA_NAME));
        assert_eq!(of(KvLayout::NAME), base_namespace("model", "revision", 32));
    }
}
