//! Which memory is registered with the kernel under which number.
//!
//! The table keeps the memories that it names, so an address in it is never that of another, later memory.

use std::collections::HashMap;
use std::sync::Arc;

use kvbm_shm::SharedMemory;

/// See the header.
#[derive(Debug)]
pub(super) struct BufferTable {
    entries: Vec<Option<Arc<SharedMemory>>>,
    numbers: HashMap<*const SharedMemory, u16>,
}

impl BufferTable {
    pub fn new(len: u16) -> Self {
        Self { entries: (0..len).map(|_| None).collect(), numbers: HashMap::new() }
    }

    pub fn find(&self, memory: &Arc<SharedMemory>) -> Option<u16> {
        if self.numbers.is_empty() {
            return None;
        }
        self.numbers.get(&Arc::as_ptr(memory)).copied()
    }

    /// A number that nothing is registered under.
    pub fn free_number(&self) -> Option<u16> {
        self.entries.iter().position(Option::is_none).map(|number| number as u16)
    }

    pub fn insert(&mut self, number: u16, memory: &Arc<SharedMemory>) {
        self.entries[usize::from(number)] = Some(Arc::clone(memory));
        self.numbers.insert(Arc::as_ptr(memory), number);
    }

    /// Numbers of memories that nobody else has any more. No I/O can name them, and none under way does.
    pub fn orphans(&self) -> Vec<u16> {
        let orphan = |entry: &Option<Arc<SharedMemory>>| {
            entry.as_ref().is_some_and(|memory| Arc::strong_count(memory) == 1)
        };
        let numbered = self.entries.iter().enumerate();
        numbered.filter(|(_, entry)| orphan(entry)).map(|(number, _)| number as u16).collect()
    }

    pub fn remove(&mut self, number: u16) {
        if let Some(memory) = self.entries[usize::from(number)].take() {
            self.numbers.remove(&Arc::as_ptr(&memory));
        }
    }

    pub fn count(&self) -> usize {
        self.numbers.len()
    }
}
