//! Requests as Python tells them: tuples, in the words of `_native.pyi`.

use kvbm_connector::engine as core;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::numbers::{Pages, Tokens, behind_prompt};

/// `(id, tokens known, other tokens, pages by layer group, computed, scheduled or None, priorities or None)`
pub(crate) type ReportTuple<'py> =
    (u64, usize, Bound<'py, PyAny>, Vec<Pages>, usize, Option<usize>, Option<Vec<u8>>);

/// `(digest, start, tokens)` of an input that is not tokens.
pub(crate) type ItemTuple = ([u8; 32], u32, u32);

/// `prompt`: the tokens of the request's query, if this is the first report behind it. Those are compared where they are.
pub(crate) fn report_of(
    (id, known, list, pages, computed, scheduled, priorities): ReportTuple<'_>,
    prompt: &[u32],
) -> core::Report {
    // Some tokens may have been compared, and left out, by who tells this.
    let prompt = if known > 0 { &[] } else { prompt };
    let (compared, tokens) = behind_prompt(list.as_borrowed(), prompt);
    let known = known.max(compared);
    let (opaque, tokens) = (tokens.0.is_none(), tokens.0.unwrap_or_default());
    let pages = pages.into_iter().map(|group| group.0).collect();
    core::Report { id, known, tokens, opaque, pages, computed, scheduled, priorities }
}

/// Without tokens the request is served without the cache.
pub(crate) fn prompt_of(
    id: u64,
    tokens: Option<Vec<u32>>,
    salt: Option<String>,
    items: Vec<ItemTuple>,
) -> core::Prompt {
    let items = items.into_iter().map(|(digest, start, tokens)| core::PlacedItem { digest, start, tokens });
    let cacheable = tokens.is_some();
    let tokens = tokens.unwrap_or_default();
    core::Prompt { id, tokens, salt, items: items.collect(), cacheable, ..core::Prompt::default() }
}

/// A list of tokens as 32-bit words, little endian; None if something among them stands for no token.
#[pyfunction]
pub(crate) fn pack_tokens<'py>(py: Python<'py>, tokens: Tokens) -> Option<Bound<'py, PyBytes>> {
    let words: Vec<u8> = tokens.0?.into_iter().flat_map(u32::to_le_bytes).collect();
    Some(PyBytes::new(py, &words))
}

/// What [`pack_tokens`] made.
pub(crate) fn words(packed: &[u8]) -> PyResult<Vec<u32>> {
    let (words, rest) = packed.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(PyValueError::new_err("tokens are words of 4 bytes"));
    }
    Ok(words.iter().map(|word| u32::from_le_bytes(*word)).collect())
}
