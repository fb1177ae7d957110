//! What the scheduler counts.

/// Counted since the start, when things were completed.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Counters {
    /// Requests that were accepted.
    pub requests: u64,
    /// Requests that were refused.
    pub refused: u64,
    /// Requests that ended with a stop token or with their length.
    pub finished: u64,
    /// Requests that were cancelled.
    pub cancelled: u64,
    /// Requests that were given up.
    pub failed: u64,
    /// Tokens of the prompts of requests that started.
    pub prompt_tokens: u64,
    /// Of these, tokens that came from the device pool.
    pub device_tokens: u64,
    /// From host memory.
    pub host_tokens: u64,
    /// From disk.
    pub disk_tokens: u64,
    /// Tokens that were generated.
    pub generated_tokens: u64,
    /// Tokens whose KV was computed, those of preempted sequences again.
    pub computed_tokens: u64,
    /// Sequences that lost their blocks to others.
    pub preemptions: u64,
    /// Onboards that failed, after which the blocks were computed.
    pub failed_onboards: u64,
    /// Passes of the engine.
    pub steps: u64,
    /// Seconds spent in them.
    pub step_seconds: f64,
    /// Passes in which at least one sequence decoded.
    pub decode_steps: u64,
    /// Sequences that decoded, summed over passes: divided by `decode_steps` the average decode batch.
    pub decode_sequences: u64,
    /// Largest decode batch.
    pub max_decode_batch: u64,
    /// Requests in the queue now.
    pub waiting: u64,
    /// Requests that left the queue and have not ended.
    pub running: u64,
}
