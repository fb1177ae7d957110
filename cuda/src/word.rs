//! A word of shared memory that GPUs of several processes write and wait for, in the order of their streams.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::{DeviceAddress, Error, RegisteredMemory};

/// One word of a registered page.
#[derive(Debug, Clone)]
pub struct StreamWord {
    memory: Arc<RegisteredMemory>,
    offset: usize,
    address: DeviceAddress,
}

impl StreamWord {
    /// The word at a multiple of 4.
    pub fn new(memory: &Arc<RegisteredMemory>, offset: usize) -> Result<Self, Error> {
        if !offset.is_multiple_of(4) || offset + 4 > memory.registered() {
            let reason = format!("at {offset} of {} registered bytes", memory.registered());
            return Err(Error::refused("a shared word", reason));
        }
        Ok(Self { address: memory.device_address(offset), memory: memory.clone(), offset })
    }

    /// Its value, as the host sees it. What was written before it by a stream or a process is visible too.
    pub fn load(&self) -> u32 {
        self.word().load(Ordering::Acquire)
    }

    /// Writes it from the host. Streams that wait for the value go on.
    pub fn store(&self, value: u32) {
        self.word().store(value, Ordering::Release);
    }

    /// True if the word is `value` or later, in the cyclic order of 32 bits: what a waiting stream waits for.
    pub fn has_reached(&self, value: u32) -> bool {
        is_at_or_after(self.load(), value)
    }

    fn word(&self) -> &AtomicU32 {
        self.memory.memory().word32(self.offset)
    }

    pub(crate) fn device_address(&self) -> u64 {
        self.address.0
    }
}

/// As the hardware compares: the difference, as a signed number, is not negative.
pub(crate) fn is_at_or_after(word: u32, value: u32) -> bool {
    word.wrapping_sub(value) as i32 >= 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_compared_around_the_end_of_the_range() {
        assert!(is_at_or_after(5, 5) && is_at_or_after(6, 5) && !is_at_or_after(4, 5));
        assert!(is_at_or_after(2, u32::MAX) && !is_at_or_after(u32::MAX, 2));
    }
}
