//! What goes to the GPU before a step, and comes back after it, through memory of the host that the GPU reaches.

use std::ops::Range;
use std::sync::Arc;

use kvbm_cuda::{Context, DeviceAddress, DeviceMemory, DeviceRange, RegisteredMemory, Stream};
use kvbm_shm::SharedMemory;

use super::BatchLimits;
use super::activations::Addresses;
use super::bytes::{bytes, bytes_mut};
use super::device::allocate;
use super::step::{Fetched, Step};
use crate::model::Config;
use crate::{Logits, Result};

/// Rows of logits that are fetched at a time.
const ROWS: usize = 8;

/// The lists of a step, on both sides, and what is fetched.
pub(super) struct HostLists {
    up: RegisteredMemory,
    on_device: DeviceMemory,
    down: RegisteredMemory,
    /// Largest tokens are fetched to the start, rows of logits behind them.
    rows_offset: usize,
    tokens: Vec<u32>,
}

impl HostLists {
    /// For batches up to `limits`.
    pub fn allocate(context: &Context, config: &Config, limits: BatchLimits) -> Result<Self> {
        let blocks_each = config.context_length.div_ceil(limits.tokens_per_block);
        let up_bytes = Step::words_max(limits, blocks_each) * 4;
        let rows_offset = (limits.answers * 4).next_multiple_of(4096);
        Ok(Self {
            up: registered(context, up_bytes)?,
            on_device: allocate(context, "lists of a batch", up_bytes)?,
            down: registered(context, rows_offset + ROWS * config.vocab_size * 4)?,
            rows_offset,
            tokens: Vec::new(),
        })
    }

    /// Where word 0 of the lists is on the GPU.
    pub fn address(&self) -> u64 {
        self.on_device.address().0
    }

    /// Where the kernels write the largest tokens. They write them here themselves: a copy would have to wait in the GPU's copy
    /// engine behind those of the cache.
    pub fn tokens_address(&self) -> u64 {
        self.down.device_address(0).0
    }

    /// Begins to upload the lists. The last upload has ended: a step is waited for.
    pub fn upload(&self, stream: &Stream, step: &Step) -> Result<()> {
        let lists = bytes(&step.words);
        assert!(lists.len() <= self.on_device.bytes(), "a batch is within the limits");
        self.up.memory().write(0, lists);
        // SAFETY: both ranges live as long as `self`, and the engine waits for the stream before it lets go of it.
        Ok(unsafe { stream.copy(self.on_device.address(), self.up.device_address(0), lists.len()) }?)
    }

    /// Waits for the step, and fetches what is wanted of it.
    pub fn fetch(
        &mut self,
        stream: &Stream,
        step: &Step,
        from: &Addresses,
        config: &Config,
        logits: &mut Logits,
    ) -> Result<()> {
        logits.clear(config.token_count);
        self.tokens.clear();
        self.tokens.resize(step.answers.len(), 0);
        stream.synchronize()?;
        self.down.memory().read(0, bytes_mut(&mut self.tokens));
        for group in groups(&step.answers) {
            let with_logits = || group.clone().filter(|row| step.answers[*row] == Fetched::Logits);
            for (at, row) in with_logits().enumerate() {
                let from = DeviceAddress(from.logits).plus(row * config.vocab_size * 4);
                let here = self.down.device_address(self.row_offset(at, config));
                // SAFETY: both ranges live as long as the engine, and what is fetched is waited for below.
                unsafe { stream.copy(here, from, config.token_count * 4) }?;
            }
            if with_logits().next().is_some() {
                stream.synchronize()?;
            }
            let mut fetched = 0;
            for row in group.clone() {
                match step.answers[row] {
                    Fetched::Logits => {
                        let here = self.row_offset(fetched, config);
                        self.down.memory().read(here, bytes_mut(logits.push_row()));
                        fetched += 1;
                    }
                    // Where no logit is larger than another, because none is a number, the kernel names none.
                    Fetched::Largest => {
                        logits.push_token(self.tokens[row].min(config.token_count as u32 - 1));
                    }
                }
            }
        }
        Ok(())
    }

    fn row_offset(&self, index: usize, config: &Config) -> usize {
        self.rows_offset + index * config.vocab_size * 4
    }
}

/// Divides answers so that each part has at most `ROWS` that are logits.
fn groups(answers: &[Fetched]) -> Vec<Range<usize>> {
    let (mut groups, mut begin, mut rows) = (Vec::new(), 0, 0);
    for (index, fetched) in answers.iter().enumerate() {
        if *fetched == Fetched::Logits {
            if rows == ROWS {
                groups.push(begin..index);
                (begin, rows) = (index, 0);
            }
            rows += 1;
        }
    }
    groups.push(begin..answers.len());
    groups
}

fn registered(context: &Context, bytes: usize) -> Result<RegisteredMemory> {
    let memory = SharedMemory::create("kvbm-engine", bytes.next_multiple_of(4096))?;
    memory.populate(0..memory.bytes())?;
    Ok(RegisteredMemory::new(context, Arc::new(memory))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_few_logits_and_all_answers_in_order() {
        assert_eq!(groups(&[]), std::iter::once(0..0).collect::<Vec<_>>());
        assert_eq!(groups(&[Fetched::Largest; 30]).len(), 1);
        assert_eq!(groups(&[Fetched::Logits; 17]), [0..8, 8..16, 16..17]);
        let mixed: Vec<Fetched> =
            (0..20).map(|i| if i % 2 == 1 { Fetched::Logits } else { Fetched::Largest }).collect();
        assert_eq!(groups(&mixed), [0..17, 17..20]);
    }
}
