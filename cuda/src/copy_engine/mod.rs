//! Copies of blocks between a GPU and the host: a thread and a stream per direction of a GPU, batches only.
//!
//! ```text
//!   submit ──► queue of the direction ──► lanes ──► pieces on the stream ──► ended, in order ──► the batch's callback
//!   (full is     onboard │ offload         │ a lane's head waits for its fence,
//!    an answer)          │                 │ background waits for the pacer,
//!                        │                 │ all wait for room among the bytes in flight
//! ```
//!
//! * *Exactly one end.* Every batch that was accepted ends once, as done or failed; those of a lane and direction in the
//!   order in which they were submitted. An end is told only when the GPU does not touch the batch's memory any more.
//! * *Neither direction waits for the other.* Each has its own thread, queue and room among the bytes in flight: with
//!   small blocks, issuing takes as long as copying.
//! * *A failure is the batch's own* as long as CUDA goes on. After an error that does not go away the GPU is out of
//!   service: what is there ends as failed, and nothing more is accepted.
//! * *Fences are awaited on the host,* not by streams: a few waiting streams can stop a whole GPU.
//!
//! What is here knows memory and bytes, but no blocks. The same executor runs over memory of the host, with threads that
//! copy, so that all of this is tested without a GPU.

mod batch;
mod cuda_device;
mod device;
mod engine;
mod executor;
mod gpus;
mod lanes;
mod memcpy_device;
mod memory;
mod pacer;
mod raw;
mod route;
mod step_words;

#[cfg(test)]
mod tests;

pub use batch::{CopyBatch, CopyEnd, CopyFailure, Fence, LaneId, Urgency};
pub use engine::{CopyEngine, CopyEngineConfig, Figures, NotAccepted, Refusal};
pub use gpus::{Copying, Gpu, Gpus, Place};
pub use memory::CopyMemory;
pub use pacer::{Allowance, Pacer, PacerConfig};
pub use raw::{RawCopies, RawMethod};
pub use step_words::{PassKind, STEP_WORDS_BYTES, StepSample, StepWords};

/// Which way bytes move, seen from the GPU. Each has a stream of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// To the GPU, from host memory or from another GPU.
    Onboard,
    /// Away from the GPU.
    Offload,
}
