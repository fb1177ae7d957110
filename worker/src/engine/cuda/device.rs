//! Memory of a GPU, with errors that say what it was for.

use kvbm_cuda::{Context, DeviceMemory, DeviceRange, VmmMemory};

use crate::{Error, Result};

/// Ordinary memory.
pub(super) fn allocate(context: &Context, what: &'static str, bytes: usize) -> Result<DeviceMemory> {
    // Vectors of a model without layers, say, have no bytes.
    DeviceMemory::allocate(context, bytes.max(256)).map_err(|error| explain(context, what, bytes, error))
}

/// Memory that can be handed to other processes, zeroed.
pub(super) fn allocate_exportable(context: &Context, what: &'static str, bytes: usize) -> Result<VmmMemory> {
    let memory = VmmMemory::create(context, bytes).map_err(|error| explain(context, what, bytes, error))?;
    memory.fill(0, 0, memory.bytes())?;
    Ok(memory)
}

fn explain(context: &Context, what: &'static str, bytes: usize, error: kvbm_cuda::Error) -> Error {
    if !error.is_out_of_memory() {
        return error.into();
    }
    let (free, total) = context.memory().unwrap_or_default();
    Error::DeviceMemory { device: context.device().name.clone(), what, bytes, free, total }
}
