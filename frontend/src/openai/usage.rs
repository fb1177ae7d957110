//! What a request cost, and what the cache saved it.

use serde::Serialize;

/// Tokens of a prompt that did not have to be computed, by the tier that held them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CachedTokens {
    pub device: u32,
    pub host: u32,
    pub disk: u32,
}

impl CachedTokens {
    /// Of all tiers.
    pub fn total(self) -> u32 {
        self.device + self.host + self.disk
    }

    /// Value of the header `x-kvbm-cached-tokens`.
    pub fn header(self) -> String {
        format!("device={},host={},disk={}", self.device, self.host, self.disk)
    }
}

impl std::ops::Add for CachedTokens {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            device: self.device.saturating_add(other.device),
            host: self.host.saturating_add(other.host),
            disk: self.disk.saturating_add(other.disk),
        }
    }
}

/// The object `usage`.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Usage {
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptDetails,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct PromptDetails {
    cached_tokens: u32,
}

impl Usage {
    /// Of all choices of a request together.
    pub fn new(prompt_tokens: u32, completion_tokens: u32, cached: CachedTokens) -> Self {
        let total_tokens = prompt_tokens.saturating_add(completion_tokens);
        let prompt_tokens_details = PromptDetails { cached_tokens: cached.total() };
        Self { prompt_tokens, completion_tokens, total_tokens, prompt_tokens_details }
    }
}
